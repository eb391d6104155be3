"""Hooks of mkdocs.yml: pages of the site that stand outside docs/, and links to other files of the repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Page of the site → file. Every other page is a file of docs/.
OUTSIDE = {
    "overview.md": "README.md",
    "eval_tasks/README.md": "eval_tasks/README.md",
    "examples/README.md": "examples/README.md",
}
_CODE = re.compile(r"(^```.*?^```$)", re.S | re.M)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)|(!\[[^\]]*\])\(([^)\s:]+)\)")


def on_files(files: Files, config: Any) -> Files:
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links of the site, or of ``repo_url``, or else plain text."""
    here = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(here, f"docs/{here}"))
    pages = {path: name for name, path in OUTSIDE.items()}

    def link(found: re.Match[str]) -> str:
        text, target, anchor, image, source = found.groups()
        path = posixpath.normpath(posixpath.join(folder, target or source))
        name = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) and (path in pages or path.startswith("docs/")):
            target = posixpath.relpath(name, posixpath.dirname(here) or ".")
            return f"{image or f'[{text}]'}({target}{anchor or ''})"
        if not target or not (ROOT / path).exists():
            return found[0]  # of which mkdocs says that it is broken
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    parts = _CODE.split(markdown)
    return "".join(part if place % 2 else _LINK.sub(link, part) for place, part in enumerate(parts))

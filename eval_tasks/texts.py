"""Texts by name: the reference of the running CPython, a local file, or any data set that ``datasets`` loads."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError

PYTHON_REFERENCE = "python-reference"
# Endings by which a second field is a file of the data set instead of a configuration.
_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
# Not pg19 itself, which is a script: `datasets` runs none.
_EXAMPLE = "emozilla/pg19-test:test"
# More text than any sweep reads; keeps data sets of many gigabytes from being tokenised whole.
MAX_CHARACTERS = 8_000_000

_BULLET = re.compile(r"(?:[*+-]|\d+\.|[a-z]\.) +")
_CODE = re.compile(r"\s*(?:>>>|\.\.\.|\||\+[-=])")


@dataclass(frozen=True)
class Text:
    """A text by the name that the user wrote, where it came from in words, and the digest of its UTF-8."""

    name: str
    origin: str
    content: str
    sha256: str


def load_text(name: str) -> Text:
    """Loads a text; raises EvalError where there is none, it is empty, or it cannot be read.

    The name is ``"python-reference"``, the path of a UTF-8 file, or a data set as ``NAME[,CONFIG]:SPLIT[:COLUMN]``,
    where CONFIG may be a file of the data set, or a local one where NAME is ``json``, ``csv`` or ``parquet``. Documents
    are joined by blank lines, from the first on, up to 8 million characters.
    """
    if name == PYTHON_REFERENCE:
        content, origin = python_reference()
    elif Path(name).expanduser().is_file():
        content, origin = _read_file(Path(name).expanduser())
    elif ":" in name:
        content, origin = _read_dataset(name)
    else:
        raise EvalError(
            f"no text named {name!r}: give {PYTHON_REFERENCE}, the path of a text file, or a data set as "
            f"NAME[,CONFIG]:SPLIT[:COLUMN], for example {_EXAMPLE}"
        )
    if not content.strip():
        raise EvalError(f"the text {name!r} is empty")
    return Text(name, origin, content, hashlib.sha256(content.encode()).hexdigest())


def python_reference() -> tuple[str, str]:
    """The language reference that every CPython carries (``pydoc_data.topics``), reflowed, and its origin in words.

    Topics are joined in sorted order. The text depends on the Python version: compare figures by the hash.
    """
    import platform
    from pydoc_data.topics import topics

    content = "\n\n".join(reflow(topics[topic].strip("\n")) for topic in sorted(topics)) + "\n"
    return content, f"the language reference of Python {platform.python_version()} (pydoc_data.topics)"


def reflow(text: str, width: int = 70) -> str:
    """Joins the lines of paragraphs that were wrapped at ``width`` columns (Sphinx's) and leaves other line ends alone.

    Two lines are joined when both stand at the same indentation (or the first opens a list item whose text the second
    continues) and the second one's first word would not have fitted on the first.
    """
    lines, last_piece = list[str](), ""  # the last source line that went into lines[-1]
    for line in text.split("\n"):
        if lines and _continues(last_piece, line, width):
            glue = "" if re.search(r"\w-$", last_piece) else " "
            lines[-1] += glue + line.strip()
        else:
            lines.append(line)
        last_piece = line
    return "\n".join(lines)


def _continues(line: str, following: str, width: int) -> bool:
    if not line.strip() or not following.strip() or _CODE.match(line) or _CODE.match(following):
        return False
    indent = len(line) - len(line.lstrip())
    bullet = _BULLET.match(line[indent:])
    following_indent = len(following) - len(following.lstrip())
    if following_indent != indent + (len(bullet.group()) if bullet else 0) or _BULLET.match(following.lstrip()):
        return False
    needed = (0 if line.endswith("-") else 1) + len(following.split()[0])
    return len(line) <= width < len(line) + needed


def _read_file(path: Path) -> tuple[str, str]:
    try:
        return path.read_text(encoding="utf-8"), f"the file {path.name}"
    except (OSError, UnicodeDecodeError) as error:
        said = "cannot be read" if isinstance(error, OSError) else "is not UTF-8; convert it first"
        raise EvalError(f"the text file {path} {said}: {error}") from error


def _read_dataset(name: str) -> tuple[str, str]:
    source, *fields = name.split(":")
    if not source or not 1 <= len(fields) <= 2 or not all(fields):
        raise EvalError(f"a data set is written NAME[,CONFIG]:SPLIT[:COLUMN], for example {_EXAMPLE}; got {name!r}")
    split, column = fields[0], (*fields, "text")[1]
    builder, _, config = source.partition(",")
    is_file = Path(config).suffix in _FILES
    arguments: dict[str, Any] = {"data_files": {split: config}} if is_file else {"name": config or None}
    try:
        from datasets import load_dataset

        content, count = _join_documents(load_dataset(builder, split=split, streaming=True, **arguments), name, column)
    except EvalError:
        raise
    except Exception as error:  # `datasets` raises its own, its file systems' and its HTTP client's exceptions
        reason = str(error).split("\n")[0]
        raise EvalError(
            f"the data set {name!r} could not be loaded ({type(error).__name__}: {reason}). Check the name, the split "
            f"and the network, or give a local file or {PYTHON_REFERENCE}."
        ) from error
    return content, f"the first {count} documents of the data set {source}, split {split}"


def _join_documents(documents: Iterable[dict[str, Any]], name: str, column: str) -> tuple[str, int]:
    parts, characters = list[str](), 0
    for document in documents:
        if column not in document:
            raise EvalError(f"the data set {name!r} has no column {column!r}; it has {', '.join(sorted(document))}")
        parts.append(str(document[column]).strip("\n"))
        characters += len(parts[-1]) + 2
        if characters >= MAX_CHARACTERS:
            break
    return "\n\n".join(parts)[:MAX_CHARACTERS], len(parts)

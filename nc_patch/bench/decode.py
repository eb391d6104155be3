"""One decoding step of one layer, sparse against dense: every case of lengths, batches and geometries, timed.

A step is what a layer does once its new key and value are in the cache: upkeep of the index (one key taken in), choice
of keys, attention. The projections and the write to the cache are the same for all methods and left out.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nc_patch.bench.checks import Expected, compare, expected_output
from nc_patch.bench.dense_rivals import Absent, Step, rivals
from nc_patch.bench.inputs import GEOMETRIES, DecodeInputs, concentration, make_inputs
from nc_patch.bench.machine import cache_bytes, free_bytes
from nc_patch.bench.timing import Prepared, first_line, interleave, prepare
from nc_patch.bench.traffic import dense_bytes, sparse_bytes
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention

OK, ABSENT, FAILED, WRONG, NO_MEMORY, NO_TIME = "ok", "absent", "error", "wrong", "out of memory", "out of time"
# Inputs rotate until together they are this many times the cache; fewer and more sets do not pay.
_TIMES_CACHE, _FEWEST_SETS, _MOST_SETS = 3, 4, 16
# Memory that a set may take, per byte of keys and values: indexes, the copy in pages, and what dense attention expands.
_MEMORY_FACTOR, _MEMORY_SHARE = 2.5, 0.6


@dataclass(frozen=True)
class Settings:
    """What is timed, on what."""

    device: torch.device
    dtype: torch.dtype
    geometries: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    selections: tuple[str, ...]
    alpha: float
    C: float
    repeats: int
    seed: int = 0

    @property
    def config(self) -> NCConfig:
        return NCConfig.create(self.alpha, self.C)


@dataclass(frozen=True)
class Case:
    """One geometry, batch and length."""

    geometry: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.geometry}, batch {self.batch}, {self.length:,} keys"


def cases(settings: Settings) -> list[Case]:
    """All cases, short ones first within each geometry and batch."""
    return [
        Case(geometry, batch, length)
        for geometry in settings.geometries
        for batch in settings.batches
        for length in sorted(settings.lengths)
    ]


def measure_all(
    settings: Settings, bandwidth: float, deadline: float, say: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case after another; a case that fails is a row that says why, and the next goes on.

    Args:
        bandwidth: of a copy, bytes a second. deadline: of ``time.monotonic``, after which no case begins.
        say: told of each case that begins.
    """
    for case in cases(settings):
        if time.monotonic() > deadline:
            yield [_row(case, "all", "case", NO_TIME, message="the time was used up before this case")]
            continue
        say(str(case))
        try:
            with torch.inference_mode():
                rows = measure_case(case, settings, bandwidth, deadline)
        except Exception as error:
            rows = [_row(case, "all", "case")]
            _fail(rows[0], error)
        yield rows
        gc.collect()  # what failed may hold inputs in its traceback
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)  # raises where an earlier failure has taken the device along
            torch.cuda.empty_cache()


def measure_case(case: Case, settings: Settings, bandwidth: float, deadline: float) -> list[dict[str, Any]]:
    """One row for each dense implementation and each selection, in one case."""
    device, geometry = settings.device, GEOMETRIES[case.geometry]
    itemsize = settings.dtype.itemsize
    dense = dense_bytes(geometry, case.batch, case.length, itemsize)
    count = _set_count(dense, device)
    sets = [
        make_inputs(geometry, case.batch, case.length, settings.dtype, device, list(settings.selections), seed)
        for seed in range(settings.seed, settings.seed + count)
    ]
    config = settings.config
    budget = config.largest_budget(case.length)
    shared: dict[str, Any] = {"budget": budget, "input_sets": count, "scores": concentration(sets[0], budget)}
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    right = {kind: expected_output(sets[0], kind, config) for kind in ("dense", *settings.selections)}
    for selection in settings.selections:
        moved = sparse_bytes(selection, geometry, case.batch, case.length, budget, itemsize, config.block_size)
        rows[selection] = _row(case, selection, "sparse", bytes=moved, **shared)
        rows[selection] |= {"attended": right[selection].attended, "kept_mass": right[selection].kept_mass}
        _try(
            rows[selection],
            ready,
            partial(sparse_step, sets, selection, config),
            sets,
            selection,
            right[selection],
            device,
        )
    for name, make in rivals(device).items():
        rows[name] = _row(case, name, "dense", bytes=dense, **shared)
        _try(rows[name], ready, partial(make, sets), sets, "dense", right["dense"], device)
    taken, raised = interleave(ready, settings.repeats, device, deadline)
    for name, error in raised.items():
        _fail(rows[name], error)
    for name, seconds in taken.items():
        rows[name] |= {"seconds": seconds, "median_seconds": _median(seconds)}
        rows[name]["roofline_fraction"] = rows[name]["bytes"] / bandwidth / rows[name]["median_seconds"]
    return list(rows.values())


def sparse_step(sets: Sequence[DecodeInputs], selection: str, config: NCConfig) -> Step:
    """A step of a selection: the last key is taken into the index, and the query attends."""

    def step(i: int) -> torch.Tensor:
        one = sets[i]
        index = one.indexes.get(selection)
        if index is not None:
            index.extend(one.key, 1, one.end)
        output = sparse_attention(
            one.query,
            one.key,
            one.value,
            alpha=config.alpha,  # type: ignore[arg-type]
            C=config.C,  # type: ignore[arg-type]
            selection=selection,  # type: ignore[arg-type]
            index=index,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return step


def _try(
    row: dict[str, Any],
    ready: dict[str, Prepared],
    make: Callable[[], Step],
    sets: Sequence[DecodeInputs],
    selection: str,
    right: Expected,
    device: torch.device,
) -> None:
    """Makes, checks and prepares one method; whatever goes wrong is written into its row."""
    try:
        step = make()
        if not _is_right(row, step(0), right, selection, sets[0]):
            return
        prepared = prepare(step, len(sets), device)
        if prepared.replayed is not None and not _is_right(row, prepared.replayed, right, selection, sets[0]):
            row["message"] += ", in a CUDA graph"
            return
    except Exception as error:
        _fail(row, error)
    else:
        ready[row["method"]] = prepared
        row |= {"captured": prepared.captured, "message": prepared.reason}


def _is_right(row: dict[str, Any], output: torch.Tensor, right: Expected, selection: str, inputs: DecodeInputs) -> bool:
    row |= compare(output, right, selection, inputs)
    if not row["right"]:
        row |= {"status": WRONG, "message": f"off by {row['relative_error']:.2g} from the {right.against}"}
    return bool(row["right"])


def _fail(row: dict[str, Any], error: Exception) -> None:
    if isinstance(error, Absent):
        row |= {"status": ABSENT, "message": str(error)}
        return
    short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    row |= {"status": NO_MEMORY if short_of_memory else FAILED, "message": first_line(error)}


def _row(case: Case, method: str, kind: str, status: str = OK, **more: Any) -> dict[str, Any]:
    known = {"geometry": case.geometry, "batch": case.batch, "length": case.length}
    return {**known, "method": method, "kind": kind, "status": status, **more}


def _set_count(kv_bytes: int, device: torch.device) -> int:
    wanted = min(_MOST_SETS, max(_FEWEST_SETS, -(-_TIMES_CACHE * cache_bytes(device) // kv_bytes)))
    room = int(free_bytes(device) * _MEMORY_SHARE / (kv_bytes * _MEMORY_FACTOR))
    if room < 1:
        raise MemoryError(f"{kv_bytes / 1e9:.1f} GB of keys and values leave too little of the memory")
    return min(wanted, room)


def _median(seconds: Sequence[float]) -> float:
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(0.5))

"""What both benchmarks go through: their cases one after another, and a row for all that came of each method."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from eval_tasks.bench.checks import Expected, checked_rows, compare, expected_output
from eval_tasks.bench.inputs import GEOMETRIES, Inputs
from eval_tasks.bench.rivals import KINDS, Absent, rivals
from eval_tasks.bench.timing import Prepared, Step, capture, first_line, free_bytes, interleave
from nc_patch.config import NCConfig
from nc_patch.ops.backends import choose_backend
from nc_patch.selections import Block

Row = dict[str, Any]
OK, ABSENT, FAILED, WRONG, NO_MEMORY, NO_TIME = "ok", "absent", "error", "wrong", "out of memory", "out of time"
# Was too slow at a shorter length to be of interest at a longer one.
LEFT_OUT = "left out"
# A method is left out where a run would take more than so many seconds and it takes so many times the fastest dense's.
_LONG_SECONDS, _TOO_SLOW = 1.0, 2.0
# Repeats of a case go on for this long, and three in any case.
_CASE_SECONDS = 20.0
# Memory that inputs and what methods make of them may take, of what is free.
_MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Settings:
    """What is timed, on what; ``options`` are those of selections, by name, as ``NCConfig`` takes them."""

    device: torch.device
    dtype: torch.dtype
    geometries: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    selections: tuple[str, ...]
    alpha: float
    C: float
    repeats: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dense: tuple[str, ...] = KINDS

    def config(self, prefill: str, decode: str | None = None) -> NCConfig:
        """The settings of attention by a selection, or by one for each phase."""
        phases = {"prefill": prefill, "decode": decode or prefill}
        return NCConfig(self.alpha, self.C, **phases, **{"dense_below": 0, **self.options})

    def cases(self) -> list[Row]:
        """Geometry, batch and length of every case, short ones first within each geometry and batch."""
        return [
            {"geometry": geometry, "batch": batch, "length": length}
            for geometry in self.geometries
            for batch in self.batches
            for length in sorted(self.lengths)
        ]


@dataclass(frozen=True)
class Benchmark:
    """One subcommand of ``nc-patch bench``.

    Attributes:
        phase: its name, ``"decode"`` or ``"prefill"``. what: what a time is, in the results.
        unit: of the times that are shown. per_second: how many are a second.
        selections: those measured by default, in this order. defaults: of lengths, geometry, dtype, repeats and the
            whole model's lengths, by device type.
        make_sets: draws the inputs of a case, of which several rotate. sparse_step: attends them by a config.
        growth: exponent of the length with which dense attention's time grows.
        graphs: whether steps are captured in CUDA graphs on a GPU.
        whole: the option that measures whole models too.
    """

    phase: str
    what: str
    unit: str
    per_second: float
    selections: tuple[str, ...]
    defaults: dict[str, dict[str, Any]]
    make_sets: Callable[[Settings, Row], list[Inputs]]
    sparse_step: Callable[[Sequence[Inputs], NCConfig], Step]
    growth: float
    graphs: bool
    whole: str


def measure_all(
    benchmark: Benchmark, settings: Settings, deadline: float, say: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of one case after another; a case that fails is a row that says why, and the next goes on.

    Args:
        deadline: of ``time.monotonic``, after which no case begins. say: told of each case that begins.
    """
    before: list[Row] = []
    for case in settings.cases():
        rows = [case | {"method": "all", "kind": "case", "status": OK}]
        if time.monotonic() > deadline:
            yield [rows[0] | {"status": NO_TIME, "message": "the time was used up before this case"}]
            continue
        say(f"{case['geometry']}, batch {case['batch']}, {case['length']:,} keys")
        try:
            with torch.inference_mode():
                rows = measure_case(benchmark, settings, case, before, deadline)
        except Exception as error:
            fail(rows[0], error)
        before += rows
        yield rows
        gc.collect()  # what failed may hold inputs in its traceback
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)  # raises where an earlier failure has taken the device along
            torch.cuda.empty_cache()


def measure_case(
    benchmark: Benchmark, settings: Settings, case: Row, before: Sequence[Row], deadline: float
) -> list[Row]:
    """One row for each selection and each dense implementation, all checked before any is timed."""
    device, phase, sets = settings.device, benchmark.phase, benchmark.make_sets(settings, case)
    compared = checked_rows(sets[0].query.shape[2], settings.options.get("query_block_size", Block.query_block_size))
    shared = {"status": OK, "budget": settings.config("dense").largest_budget(case["length"]), "input_sets": len(sets)}
    methods: list[tuple[str, str, NCConfig, Callable[[Sequence[Inputs]], Step]]] = []
    for name in settings.selections:
        config = settings.config(name)
        methods.append((name, "sparse", config, partial(benchmark.sparse_step, config=config)))
    for name, make in rivals(device, phase, settings.dense).items():
        methods.append((name, "dense", settings.config("dense"), make))
    rows: dict[str, Row] = {}
    right: dict[str, Expected] = {}
    ready: dict[str, Prepared] = {}
    for name, kind, config, make in methods:
        row = rows[name] = {**case, "method": name, "kind": kind, **shared}
        if not is_wanted(row, before, deadline, benchmark.growth):
            continue
        try:
            selection = getattr(config, phase)
            if selection.name not in right:
                right[selection.name] = expected_output(sets[0], config, phase, compared)
            expected = right[selection.name]
            if kind == "sparse":
                row |= {"attended": expected.attended, "kept_mass": expected.kept_mass}
                row["backend"] = _backend(sets[0], config, phase)
            prepared = _prepare(row, make(sets), expected, sets, benchmark.graphs)
        except Exception as error:
            fail(row, error)
        else:
            ready |= {name: prepared} if prepared else {}
    taken, raised = interleave(ready, settings.repeats, device, min(deadline, time.monotonic() + _CASE_SECONDS))
    for name, error in raised.items():
        fail(rows[name], error)
    for name, seconds in taken.items():
        rows[name] |= {"seconds": seconds, "median_seconds": median(seconds)}
    return list(rows.values())


def is_wanted(row: Row, before: Sequence[Row], deadline: float, growth: float) -> bool:
    """Whether a method is worth the time that it takes, by what it took at shorter lengths; if not, its row says why."""
    if time.monotonic() > deadline:
        row |= {"status": NO_TIME, "message": "the time was used up before this method"}
        return False
    same = [one for one in before if (one["geometry"], one["batch"]) == (row["geometry"], row["batch"])]
    earlier = max((one for one in same if one["method"] == row["method"]), key=lambda one: one["length"], default=None)
    if earlier is None:
        return True
    if earlier["status"] == LEFT_OUT:
        row |= {"status": LEFT_OUT, "message": earlier["message"]}
    elif "median_seconds" in earlier:
        seconds, length = earlier["median_seconds"], earlier["length"]
        dense = [one for one in same if one["kind"] == "dense" and one["length"] == length and "median_seconds" in one]
        fastest = min((one["median_seconds"] for one in dense), default=seconds)
        if seconds > _TOO_SLOW * fastest and seconds * (row["length"] / length) ** growth > _LONG_SECONDS:
            message = f"took {seconds / fastest:.1f} times as long as the fastest dense at {length:,} keys"
            row |= {"status": LEFT_OUT, "message": message}
    return bool(row["status"] != LEFT_OUT)


def fail(row: Row, error: Exception) -> None:
    """Writes into a row that its method is absent, or short of memory, or broke."""
    if isinstance(error, Absent):
        row |= {"status": ABSENT, "message": str(error)}
        return
    short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    row |= {"status": NO_MEMORY if short_of_memory else FAILED, "message": first_line(error)}


def check_memory(settings: Settings, case: Row, set_bytes: float) -> int:
    """How many sets of inputs fit into the memory, with what methods make of them; raises MemoryError if none does."""
    room = int(_MEMORY_SHARE * free_bytes(settings.device) / set_bytes)
    if room < 1:
        raise MemoryError(f"{set_bytes / 1e9:.1f} GB for {case['length']:,} keys are too much of the free memory")
    return room


def heads_bytes(settings: Settings, case: Row) -> int:
    """Bytes of one head's keys, of all tokens of a case."""
    return case["batch"] * case["length"] * GEOMETRIES[case["geometry"]].head_dim * settings.dtype.itemsize


def _prepare(row: Row, step: Step, expected: Expected, sets: Sequence[Inputs], graphs: bool) -> Prepared | None:
    """Checks a step, and its CUDA graph; None where an output is wrong, which is written into the row."""
    device = sets[0].key.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    output = step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - allocated
    if not _is_right(row, output, expected):
        return None
    del output
    if not graphs:
        return Prepared(lambda: [step(i) for i in range(len(sets))], len(sets))
    prepared = capture(step, len(sets), device)
    if prepared.replayed is not None and not _is_right(row, prepared.replayed, expected):
        row["message"] += ", in a CUDA graph"
        return None
    row |= {"captured": prepared.captured, "message": prepared.reason}
    return prepared


def _is_right(row: Row, output: torch.Tensor, expected: Expected) -> bool:
    row |= compare(output, expected, row["method"])
    if not row["right"]:
        row |= {"status": WRONG, "message": f"off by {row['relative_error']:.2g} from the {row['compared_with']}"}
    return bool(row["right"])


def _backend(inputs: Inputs, config: NCConfig, phase: str) -> str:
    selection, head_dims = getattr(config, phase), (inputs.query.shape[-1], inputs.value.shape[-1])
    implemented = selection.backends(phase if selection.index_kind else "prefill")
    backend, why = choose_backend(config.backend, inputs.key.device, head_dims=head_dims, implemented=implemented)
    return f"{backend}, since {why}" if why else backend

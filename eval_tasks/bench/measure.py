"""What both benchmarks go through: their cases one after another, and a row for all that came of each method."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from eval_tasks.bench.checks import Expected, checked_rows, compare, expected_output
from eval_tasks.bench.inputs import Inputs
from eval_tasks.bench.operator import Benchmark, Case, Settings, make_sets, sparse_step
from eval_tasks.bench.rivals import Absent, rivals
from eval_tasks.bench.timing import Prepared, Step, first_line, interleave, prepare
from nc_patch.config import NCConfig
from nc_patch.ops.backends import choose_backend
from nc_patch.selections import Block

Row = dict[str, Any]
OK, ABSENT, FAILED, WRONG, NO_MEMORY, NO_TIME = "ok", "absent", "error", "wrong", "out of memory", "out of time"
LEFT_OUT = "left out"  # was too slow at a shorter length to be of interest at a longer one
# A method is left out where a run would take more than so many seconds and it takes so many times the fastest dense's.
_LONG_SECONDS, _TOO_SLOW = 1.0, 2.0
# Repeats of a case go on for this long, and three in any case.
_CASE_SECONDS = 20.0


def measure_all(
    benchmark: Benchmark, settings: Settings, deadline: float, say: Callable[[str], None]
) -> Iterator[list[Row]]:
    """The rows of one case after another; a case that fails is a row that says why, and the next goes on.

    After the deadline (``time.monotonic``) no case begins; ``say`` is told of each that does.
    """
    before: list[Row] = []
    for case in settings.cases():
        rows = [vars(case) | {"method": "all", "kind": "case", "status": OK}]
        if time.monotonic() > deadline:
            yield [rows[0] | {"status": NO_TIME, "message": "the time was used up before this case"}]
            continue
        say(str(case))
        try:
            with torch.inference_mode():
                rows = _measure_case(benchmark, settings, case, before, deadline)
        except Exception as error:
            fail(rows[0], error)
        before += rows
        yield rows
        gc.collect()  # what failed may hold inputs in its traceback
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)  # raises where an earlier failure has taken the device along
            torch.cuda.empty_cache()


def _measure_case(
    benchmark: Benchmark, settings: Settings, case: Case, before: Sequence[Row], deadline: float
) -> list[Row]:
    """One row for each selection and each dense implementation, all checked before any is timed."""
    device, phase, sets = settings.device, benchmark.phase, make_sets(settings, case, benchmark.phase)
    compared = checked_rows(sets[0].query.shape[2], settings.options.get("query_block_size", Block.query_block_size))
    dense = settings.config("dense")
    shared = {"status": OK, "budget": dense.largest_budget(case.length), "input_sets": len(sets)}
    configs = {name: settings.config(name) for name in settings.selections}
    methods: list[tuple[str, NCConfig, Callable[[Sequence[Inputs]], Step]]]
    methods = [(name, config, partial(sparse_step, config=config, phase=phase)) for name, config in configs.items()]
    methods += [(name, dense, make) for name, make in rivals(phase).items()]
    rows: dict[str, Row] = {}
    right: dict[str, Expected] = {}
    ready: dict[str, Prepared] = {}
    for name, config, make in methods:
        row = rows[name] = {**vars(case), "method": name, "kind": "dense" if config is dense else "sparse", **shared}
        if not is_wanted(row, before, deadline, 1 if phase == "decode" else 2):
            continue
        try:
            selection = getattr(config, phase).name
            if selection not in right:
                right[selection] = expected_output(sets[0], config, phase, compared)
            if config is not dense:
                row |= {"attended": right[selection].attended, "kept_mass": right[selection].kept_mass}
                row["backend"] = _backend(sets[0], config, phase)
            step = make(sets)
            if not _is_right(row, step(0), right[selection]):
                continue
            prepared = prepare(step, len(sets), device, graph=phase == "decode")
            if prepared.replayed is not None and not _is_right(row, prepared.replayed, right[selection]):
                row["message"] += ", in a CUDA graph"
                continue
            row |= {"captured": prepared.captured, "message": prepared.reason}
            ready[name] = prepared
        except Exception as error:
            fail(row, error)
    taken, raised = interleave(ready, settings.repeats, device, min(deadline, time.monotonic() + _CASE_SECONDS))
    for name, problem in raised.items():
        fail(rows[name], problem)
    for name, seconds in taken.items():
        rows[name] |= {"seconds": seconds, "median_seconds": median(seconds)}
    return list(rows.values())


def is_wanted(row: Row, before: Sequence[Row], deadline: float, growth: float) -> bool:
    """Whether a method is worth its time, by what it took at shorter lengths; if not, its row says why.

    ``before`` holds the rows of earlier cases; dense attention's time grows with the length to the power of ``growth``.
    """
    if time.monotonic() > deadline:
        row |= {"status": NO_TIME, "message": "the time was used up before this method"}
        return False
    same = [one for one in before if (one["geometry"], one["batch"]) == (row["geometry"], row["batch"])]
    earlier = max((one for one in same if one["method"] == row["method"]), key=lambda one: one["length"], default={})
    if earlier.get("status") == LEFT_OUT:
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
    else:
        short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        row |= {"status": NO_MEMORY if short_of_memory else FAILED, "message": first_line(error)}


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

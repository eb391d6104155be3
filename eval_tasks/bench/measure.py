"""What both benchmarks go through: their cases one after another, and a row for all that came of each method.

Before anything is timed, some rows of the first sequence are compared with the PyTorch backend, over all heads.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from eval_tasks.bench.inputs import Inputs
from eval_tasks.bench.operator import Case, Settings, Step, dense_steps, make_sets, sparse_step
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.problem import AttentionResult, causal_intervals
from nc_patch.selections import Block
from nc_patch.selections.index import KeyIndex

Row = dict[str, Any]
OK, ABSENT, FAILED, WRONG, NO_MEMORY, NO_TIME = "ok", "absent", "error", "wrong", "out of memory", "out of time"
LEFT_OUT = "left out"  # was too slow at a shorter length to be of interest at a longer one
# A method is left out of longer cases once a step took so many seconds, and so many times the fastest dense one's.
_LONG_SECONDS, _TOO_SLOW = 0.25, 2.0
# Repeats of a case go on for this long, and so many in any case.
_CASE_SECONDS = 20.0
_FEWEST_ROUNDS, _WARM_UPS = 3, 3
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Rounded statistics may exchange the lightest page that is chosen for the heaviest that is not.
_BLOCK_TOLERANCE = 0.1
_CHECKED_BLOCKS = 4


class WrongOutput(Exception):
    """A method's output is not what the PyTorch backend returns."""


def measure_all(settings: Settings, deadline: float, say: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of one case after another; a case that fails is a row that says why, and the next goes on.

    After the deadline (``time.monotonic``) no case begins; ``say`` is told of each that does.
    """
    slow: dict[tuple[str, int, str], str] = {}
    for case in settings.cases():
        rows = [vars(case) | {"method": "all", "kind": "case", "status": OK}]
        if time.monotonic() > deadline:
            yield [rows[0] | {"status": NO_TIME, "message": "the time was used up before this case"}]
            continue
        say(str(case))
        try:
            with torch.inference_mode():
                rows = _measure_case(settings, case, slow, deadline)
        except Exception as error:
            fail(rows[0], error)
        slow |= _too_slow(rows)
        yield rows
        gc.collect()  # what failed may hold inputs in its traceback
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)  # raises where an earlier failure has taken the device along
            torch.cuda.empty_cache()


def _measure_case(settings: Settings, case: Case, slow: dict[tuple[str, int, str], str], deadline: float) -> list[Row]:
    """One row for each selection and each dense implementation, all checked before any is timed."""
    phase, sets = settings.phase, make_sets(settings, case)
    device = sets[0].query.device
    compared = checked_rows(sets[0].query.shape[2], settings.options.get("query_block_size", Block.query_block_size))
    dense, right = dense_steps(sets), dict[str, AttentionResult]()
    rows: dict[str, Row] = {}
    ready: dict[str, Callable[[], object]] = {}
    for name in (*settings.selections, *dense):
        selection = "dense" if name in dense else name
        config = settings.config(selection)
        row = rows[name] = vars(case) | {"method": name, "kind": "dense" if name in dense else "sparse", "status": OK}
        row |= {"budget": settings.config("dense").largest_budget(case.length), "input_sets": len(sets)}
        if message := slow.get((case.geometry, case.batch, name)):
            row |= {"status": LEFT_OUT, "message": message}
            continue
        try:
            if selection not in right:
                right[selection] = expected_output(sets[0], config, phase, compared)
            if name not in dense:
                row |= {what: float(getattr(right[name], what).double().mean()) for what in ("attended", "kept_mass")}
                row["backend"] = _backend(sets[0], config, phase)
            step = dense.get(name) or sparse_step(sets, config, phase)
            check(row, step(0), right[selection].output, compared)
            launch, replayed = prepare(step, len(sets), device, graph=phase == "decode")
            row["in_graph"] = replayed is not None
            if replayed is not None:
                check(row, replayed, right[selection].output, compared, ", in a CUDA graph")
            ready[name] = launch
        except Exception as error:
            fail(row, error)
    taken = interleave(ready, settings.repeats, device, min(deadline, time.monotonic() + _CASE_SECONDS))
    for name, launches in taken.items():
        seconds = [launch / len(sets) for launch in launches]
        rows[name] |= {"seconds": seconds, "median_seconds": median(seconds)}
    return list(rows.values())


def fail(row: Row, error: Exception) -> None:
    """Writes into a row that its method has no kernel here, is short of memory, wrong, or broke."""
    if isinstance(error, WrongOutput):
        row |= {"status": WRONG, "message": str(error)}
        return
    absent = row["kind"] == "dense" and "No available kernel" in str(error)
    # On the CPU PyTorch raises a plain RuntimeError, which only its words tell apart.
    short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
    status = ABSENT if absent else NO_MEMORY if short_of_memory else FAILED
    row |= {"status": status, "message": first_line(error)}


def checked_rows(queries: int, query_block_size: int) -> torch.Tensor:
    """The rows that are compared, int64 ``[R]``: the first query block, the last, and two between."""
    blocks = torch.linspace(0, -(-queries // query_block_size) - 1, _CHECKED_BLOCKS).long().unique()
    rows = (blocks[:, None] * query_block_size + torch.arange(query_block_size)).flatten()
    return rows[rows < queries]


def expected_output(inputs: Inputs, config: NCConfig, phase: str, rows: torch.Tensor) -> AttentionResult:
    """What the selection of ``config`` for a phase should return for the first sequence, ``[1, Hq, R, Dv]``."""
    selection, at, index = getattr(config, phase), rows.to(inputs.query.device), None
    query, key, value = inputs.query[:1, :, at], inputs.key[:1], inputs.value[:1]
    if phase == "decode" and isinstance(selection, Block):
        index = KeyIndex.build(key, "pages", block_size=selection.size, backend="torch")
    settings: dict[str, Any] = {"alpha": config.alpha, "C": config.C, "dense_below": config.dense_below}
    visible = causal_intervals(1, inputs.query.shape[2], key.shape[2], key.device)[:, at].contiguous()
    settings |= {"selection": selection, "visible": visible, "index": index}
    result = sparse_attention(query, key, value, **settings, backend="torch", return_stats=True)
    assert isinstance(result, AttentionResult)
    return result


def check(row: Row, output: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, where: str = "") -> None:
    """Writes into a row how far an output ``[B, Hq, Lq, Dv]`` is off, ``|out - right| / |right|``.

    Raises WrongOutput where that is too far, or where the output is not finite.
    """
    found, right = output[:1, :, rows.to(output.device)].double().cpu(), right.double().cpu()
    row["relative_error"] = float((found - right).norm() / right.norm())
    rounded = row["method"] == "block" and output.dtype != torch.float32
    if not row["relative_error"] <= (_BLOCK_TOLERANCE if rounded else _TOLERANCE[output.dtype]):
        raise WrongOutput(f"off by {row['relative_error']:.2g} from the PyTorch backend{where}")
    if not output.isfinite().all():
        raise WrongOutput(f"NaN or Inf in rows that are not compared with the PyTorch backend{where}")


def _too_slow(rows: Sequence[Row]) -> dict[tuple[str, int, str], str]:
    """Methods that are not worth their time at greater lengths, with the reason; those left out before stay so."""
    timed = [row for row in rows if "median_seconds" in row]
    fastest = min((row["median_seconds"] for row in timed if row["kind"] == "dense"), default=float("inf"))
    found = {}
    for row in timed:
        if row["median_seconds"] > max(_LONG_SECONDS, _TOO_SLOW * fastest):
            times = f"took {row['median_seconds'] / fastest:.1f} times as long as the fastest dense"
            found[row["geometry"], row["batch"], row["method"]] = f"{times} at {row['length']:,} keys"
    return found


def _backend(inputs: Inputs, config: NCConfig, phase: str) -> str:
    selection, head_dims = getattr(config, phase), (inputs.query.shape[-1], inputs.value.shape[-1])
    implemented = selection.backends(phase if selection.index_kind else "prefill")
    backend, why = choose_backend(config.backend, inputs.key.device, head_dims=head_dims, implemented=implemented)
    return f"{backend}, since {why}" if why else backend


def prepare(
    step: Step, steps: int, device: torch.device, graph: bool
) -> tuple[Callable[[], object], torch.Tensor | None]:
    """What runs ``step(i)`` for i below ``steps``, in a row as layers come; on a GPU as one CUDA graph, if wanted.

    Beside it what the graph returned for the first set, if there is one. Raises what the warm-up and the capture raise.
    """

    def all_steps() -> torch.Tensor:
        first = step(0)
        for i in range(1, steps):  # whose outputs are not kept: a long prompt's take gigabytes
            step(i)
        return first

    if device.type != "cuda" or not graph:
        all_steps()
        return all_steps, None
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            all_steps()
    current.wait_stream(side)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            replayed = all_steps()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own stream behind
    replayed.fill_(torch.nan)  # so that a replay which leaves something out shows
    captured.replay()
    torch.cuda.synchronize(device)
    return captured.replay, replayed


def seconds_of(launch: Callable[[], object], device: torch.device) -> float:
    """Seconds of one launch."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


def interleave(
    launches: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, deadline: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of a launch of every method, in ``repeats`` rounds in which each has its turn.

    After the deadline (``time.monotonic``) no round begins, but for the first three.
    """
    taken: dict[str, list[float]] = {name: [] for name in launches}
    for turn in range(repeats):
        if turn >= _FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        for name, launch in launches.items():
            taken[name].append(seconds_of(launch, device))
    return taken


def first_line(error: BaseException) -> str:
    """An error as one line: its type and the beginning of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__

"""Times of short steps: CUDA graphs where they can be captured, medians of interleaved repeats, inputs in rotation."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

Step = Callable[[int], torch.Tensor]  # runs a method on the i-th set of inputs
# A method that takes this many times as long as the fastest is not repeated beyond the fewest.
_HOPELESS, _FEWEST = 4.0, 3
_WARM_UPS = 3


@dataclass(frozen=True)
class Prepared:
    """Steps that are ready to be timed: ``launch`` runs one on each of so many sets of inputs.

    ``captured`` says whether that replays a CUDA graph (None where there are none), ``reason`` why it does not;
    ``replayed`` is what a replay returned for the first set.
    """

    launch: Callable[[], object]
    steps: int = 1
    captured: bool | None = None
    reason: str | None = None
    replayed: torch.Tensor | None = None


def prepare(step: Step, steps: int, device: torch.device, graph: bool) -> Prepared:
    """What runs ``step(i)`` for i below ``steps``, in a row, as layers come; on a GPU as one CUDA graph, if wanted.

    What the warm-up raises is raised here. What cannot be captured is timed as it is, and says so.
    """

    def all_steps() -> None:
        for i in range(steps):
            step(i)

    if device.type != "cuda" or not graph:
        all_steps()
        return Prepared(all_steps, steps)
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
            replayed = step(0)
            for i in range(1, steps):
                step(i)
        replayed.fill_(torch.nan)  # so that a replay which leaves something out shows
        captured.replay()
        torch.cuda.synchronize(device)
    except Exception as error:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own stream behind
        if isinstance(error, torch.OutOfMemoryError):
            raise
        torch.cuda.synchronize(device)
        return Prepared(all_steps, steps, False, first_line(error))
    return Prepared(captured.replay, steps, True, replayed=replayed)


def seconds_of(prepared: Prepared, device: torch.device) -> float:
    """Seconds of one step, the mean over the sets of inputs."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        prepared.launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / prepared.steps
    start = time.perf_counter()
    prepared.launch()
    return (time.perf_counter() - start) / prepared.steps


def interleave(
    methods: Mapping[str, Prepared], repeats: int, device: torch.device, deadline: float = float("inf")
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of a step of every method, in ``repeats`` rounds in which each has its turn, and what methods raised.

    A method that is hopelessly slow is left out after a few rounds; after the deadline (``time.monotonic``) all are.
    One that raises is in the second result alone.
    """
    raised: dict[str, Exception] = {}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats):
        best = min((min(seconds) for seconds in taken.values() if seconds), default=float("inf"))
        for name, prepared in methods.items():
            if name in raised or (turn >= _FEWEST and min(taken[name]) > _HOPELESS * best):
                continue
            try:
                taken[name].append(seconds_of(prepared, device))
            except Exception as error:
                raised[name] = error
        if turn + 1 >= _FEWEST and time.monotonic() > deadline:
            break
    return {name: seconds for name, seconds in taken.items() if name not in raised}, raised


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def first_line(error: BaseException) -> str:
    """An error as one line: its type and the beginning of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__

"""Times of short steps: CUDA graphs where they can be captured, medians of interleaved repeats, inputs in rotation."""

import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[int], torch.Tensor]  # runs a method on the i-th set of inputs
_FEWEST_ROUNDS, _WARM_UPS = 3, 3


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

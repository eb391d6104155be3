"""The steps of block prefill, each with its time: plan, score, choose and attend."""

import statistics
import time
from typing import Any

import torch

from nc_patch.bench.cases import Settings
from nc_patch.bench.prompts import PromptInputs
from nc_patch.ops.backends import choose_backend
from nc_patch.selections import Block

STEPS = ("plan", "score", "choose", "attend")
_MOST_RUNS = 5


class StepClock:
    """Adds up the time between marks by the name of the mark that ends it: of the device, or of the processor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self("")

    def __call__(self, name: str) -> None:
        """Ends the step that began with the mark before."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """Seconds by name; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = dict.fromkeys(STEPS, 0.0)
        for (_, begin), (name, end) in zip(self._marks[:-1], self._marks[1:], strict=True):
            passed = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            found[name] = found.get(name, 0.0) + passed
        return found


def step_seconds(inputs: PromptInputs, settings: Settings, deadline: float) -> dict[str, float]:
    """Median seconds of every step over a few runs of what ``selection="block"`` runs, of its backend.

    Args:
        deadline: of ``time.monotonic``, after which no second run begins.
    """
    config = settings.config("block")
    selection, head_dims = config.prefill, (inputs.query.shape[-1], inputs.value.shape[-1])
    assert isinstance(selection, Block)
    backend, _ = choose_backend(config.backend, settings.device, head_dims=head_dims)
    run = selection.prefill_triton if backend == "triton" else selection.prefill_torch
    runs: list[dict[str, float]] = []
    while len(runs) < min(_MOST_RUNS, max(settings.repeats, 1)) and (not runs or time.monotonic() < deadline):
        clock = StepClock(settings.device)
        run(inputs.problem(config), clock)
        runs.append(clock.seconds())
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}

"""The steps of block prefill, each with its time: plan, score, choose and attend."""

import statistics
import time
from typing import Any

import torch

from nc_patch.bench.cases import Settings
from nc_patch.bench.prompts import PromptInputs
from nc_patch.functional import budgets_of
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.reference import causal_intervals
from nc_patch.selections.block.torch import torch_block_attention

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
    device, config = settings.device, settings.config
    B, length = inputs.query.shape[0], inputs.query.shape[2]
    head_dims = (inputs.query.shape[-1], inputs.value.shape[-1])
    backend, _ = choose_backend(config.backend, "block", device, head_dims=head_dims, estimator=config.estimator)
    more: dict[str, Any] = {}
    if backend == "triton":
        from nc_patch.selections.block.prefill import triton_block_attention as run
    else:
        run, more = torch_block_attention, {"estimator": config.estimator}
    runs: list[dict[str, float]] = []
    while len(runs) < min(_MOST_RUNS, max(settings.repeats, 1)) and (not runs or time.monotonic() < deadline):
        clock = StepClock(device)
        visible = causal_intervals(B, length, length, device)
        run(
            *(inputs.query, inputs.key, inputs.value, visible, visible[..., 0]),
            *(budgets_of(config, 0, visible, length), None),
            scale=inputs.query.shape[-1] ** -0.5,
            softcap=0.0,
            block_size=config.block_size,
            query_block_size=config.query_block_size,
            sample_stride=config.sample_stride,
            min_mass=config.min_mass or 0.0,
            max_factor=config.max_factor,
            want_stats=False,
            mark=clock,
            **more,
        )
        runs.append(clock.seconds())
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}

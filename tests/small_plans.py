"""Plans of decoding by codes that are small enough for Triton's interpreter."""

import pytest

from nc_patch.ops.problem import Problem
from nc_patch.selections.topk import decode, plan


def plan_with(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Makes plans of several tiles, splits and blocks for few keys; ``splits`` or ``samples`` as given."""

    def small(problem: Problem, keys: int, architecture: str) -> plan.Plan:
        made = plan.plan_for(problem, keys, architecture)
        splits, tile = min(made.splits, changes.get("splits", 2)), 32
        made = made._replace(
            tile=tile, samples=changes.get("samples", 64), samplers=1, held=128, splits=splits,
            segment=plan.segment_of(keys, tile, splits), parts=splits + made.parts - made.splits,
        )  # fmt: skip
        return plan.with_scratch(made, problem)

    monkeypatch.setattr(decode, "plan_for", small)
    monkeypatch.setattr(decode, "_STEPS", {})

"""Plans of decoding by codes that are small enough for Triton's interpreter."""

from typing import Any

import pytest

from nc_patch.selections.topk import decode, plan


def plan_with(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Makes plans of several tiles, splits and blocks for few keys; ``splits``, ``samples`` or ``segment`` as given."""

    def small(sizes: plan.Sizes, *settings: Any) -> plan.Plan:
        made = plan.plan_for(sizes, *settings)
        splits, tile = min(made.splits, changes.get("splits", 2)), 32
        variant = made.variant._replace(keys=tile, samples=changes.get("samples", 64), samplers=1, held=128)
        segment = changes.get("segment", -(-(-(-sizes.keys // tile) + 1) // splits) * tile)
        made = made._replace(variant=variant, splits=splits, parts=splits + made.parts - made.splits)
        return plan.with_scratch(made._replace(segment=segment, stride=max(splits * segment, sizes.keys)))

    monkeypatch.setattr(decode, "plan_for", small)
    monkeypatch.setattr(decode, "_STEPS", {})

"""Plans of decoding by codes that are small enough for Triton's interpreter."""

import pytest
import torch

from nc_patch.selections.topk import decode, plan

# Not what is remembered: tests change tiles, too.
_plan_for, _options = plan.plan_for.__wrapped__, plan._options.__wrapped__


def plan_with(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Makes plans of several tiles, splits and blocks for few keys; ``splits``, ``samples`` or ``segment`` as given."""

    def small(
        sizes: plan.Sizes, budget: int, dtype: torch.dtype, architecture: str, want_bounds: bool, has_tail: bool
    ) -> plan.Plan:
        made = _plan_for(sizes, budget, dtype, architecture, want_bounds, has_tail)
        splits, tile, samples = min(made.splits, changes.get("splits", 2)), 32, changes.get("samples", 64)
        segment = changes.get("segment", -(-(-(-sizes.keys // tile) + 1) // splits) * tile)
        (rows, _, _, _, scored, _, padded), *rest = made.constants
        constants = ((rows, tile, samples, 1, scored, 128, padded), *rest)
        made = made._replace(
            keys=tile, splits=splits, samples=samples, segment=segment, stride=max(splits * segment, sizes.keys),
            constants=constants, options=_options(*constants),
        )  # fmt: skip
        return plan.with_scratch(made, sizes, want_bounds)

    monkeypatch.setattr(decode, "plan_for", small)
    monkeypatch.setattr(decode, "_STEPS", {})

"""What a patched attention module carries: its settings, its place and its counters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nc_patch.config import NCConfig
from nc_patch.ops.problem import Problem
from nc_patch.stats import LayerCounters

PATCH_ATTRIBUTE = "_nc_patch"  # of an attention module: its LayerPatch


class Observed(NamedTuple):
    """One call of attention of a layer, as an observer sees it: the problem, whose budget may be empty, and the output
    ``[B, Hq, Lq, Dv]``, which goes on through the model.
    """

    layer: int
    problem: Problem
    output: torch.Tensor


@dataclass(frozen=True)
class LayerPatch:
    """What one attention module needs to know; ``observe`` is who else sees its calls."""

    config: NCConfig
    layer: int
    original_implementation: str
    counters: LayerCounters = field(default_factory=LayerCounters, compare=False)
    observe: Callable[[Observed], None] | None = field(default=None, compare=False)

    @property
    def audit_seed(self) -> int:
        """Seed of the rows that an audit of the next call draws: another for each layer and call."""
        return self.counters.calls * 4096 + self.layer


def patches_of(model: torch.nn.Module) -> dict[Any, LayerPatch]:
    """The patched attention modules of a model, and what they carry."""
    found = ((module, module.__dict__.get(PATCH_ATTRIBUTE)) for module in model.modules())
    return {module: patch for module, patch in found if patch is not None}

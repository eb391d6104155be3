"""What a patched attention module carries: its settings, its place and its counters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nc_patch.config import NCConfig
from nc_patch.ops.problem import Problem
from nc_patch.stats import LayerCounters

# The attribute of an attention module that holds its LayerPatch.
PATCH_ATTRIBUTE = "_nc_patch"


class Observed(NamedTuple):
    """One call of attention, as an observer sees it.

    Attributes:
        layer: index of the layer.
        problem: what attention was computed of; its budget may be empty.
        output: ``[B, Hq, Lq, Dv]``, which goes on through the model.
    """

    layer: int
    problem: Problem
    output: torch.Tensor


@dataclass(frozen=True)
class LayerPatch:
    """What one attention module needs to know: its settings, its place, what ran before, its counters, and who else
    wants to see its calls.
    """

    config: NCConfig
    layer: int
    original_implementation: str
    counters: LayerCounters = field(default_factory=LayerCounters, compare=False)
    observe: Callable[[Observed], None] | None = field(default=None, compare=False)

    @property
    def audit_seed(self) -> int:
        """Seed of the rows that an audit of the next call draws: another for each layer and call."""
        return self.counters.calls * 4096 + self.layer

"""``Window``: the first keys and the most recent ones, whatever they score. A selection in one file."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from nc_patch.common import check_integer
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import Rows
from nc_patch.selections.base import Selection, register


@register("window")
@dataclass(frozen=True)
class Window(Selection):
    """The first ``sink_keys`` visible keys, and of the others the most recent; one key is always recent.

    Args:
        sink_keys: how many first keys are attended, within the budget.
    """

    sink_keys: int = 4

    checks: ClassVar = {"sink_keys": partial(check_integer, least=0)}

    def keep(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The definition, bool ``[H or 1, R, N]``; see ``Selection.keep``."""
        position, (start, end) = rows.positions(scores.shape[-1]), rows.visible.unbind(-1)
        firsts = (rows.budget - 1).clamp(0, self.sink_keys)
        first = position < (start + firsts)[..., None]
        recent = position >= (end - rows.budget + firsts)[..., None]
        return rows.seen(scores.shape[-1]) & (first | recent)

    def prefill_triton(self, problem: Problem) -> AttentionResult:
        """The attention kernel over two runs of keys: to the rows' last sink, and from their first recent key on."""
        from nc_patch.ops.triton.launch import launch_attention

        return launch_attention(self.with_means(problem, "triton"), self.sink_keys)

    def prefill_cpu(self, problem: Problem) -> AttentionResult:
        """In a compiled kernel, over the same two runs of keys."""
        from nc_patch.ops.cpu.recent import cpu_recent_attention

        return cpu_recent_attention(problem, self.sink_keys)

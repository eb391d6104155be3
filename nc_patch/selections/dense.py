"""``Dense``: every visible key, which is what sparse attention is compared with."""

from dataclasses import dataclass

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import Rows
from nc_patch.selections.base import Selection, register


@register("dense")
@dataclass(frozen=True)
class Dense(Selection):
    """Every visible key, whatever the budget."""

    def keep(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The definition, bool ``[H or 1, R, N]``; see ``Selection.keep``."""
        return rows.seen(scores.shape[-1])[None]

    def prefill_triton(self, problem: Problem) -> AttentionResult:
        """The attention kernel over all that rows see."""
        from nc_patch.ops.triton.launch import launch_attention

        return launch_attention(problem.over_all_keys())

    def prefill_cpu(self, problem: Problem) -> AttentionResult:
        """A compiled kernel over all that rows see."""
        from nc_patch.ops.cpu.recent import cpu_recent_attention

        return cpu_recent_attention(problem.over_all_keys(), 0)

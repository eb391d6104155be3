"""``block`` attention in PyTorch: some rows choose the key blocks that a whole query block attends."""

import torch

from nc_patch.ops.attend_rows import attend_rows
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import RowBlock, Rows, rows_per_block
from nc_patch.selections.base import Choice
from nc_patch.selections.block.audit import audit, enlarged_of, expected_of
from nc_patch.selections.block.blocks import BlockOptions, plan_of
from nc_patch.selections.block.torch_choose import choose_blocks


def torch_block_attention(problem: Problem, options: BlockOptions) -> AttentionResult:
    """Attention over key blocks that a query block shares; see ``definition``. Every score is computed."""
    expected = expected_of(problem, len(plan_of(problem, options).listed))
    chosen = ChosenBlocks(problem, options, expected)
    result = attend_rows(problem._replace(means=None), chosen)
    return result._replace(
        attended=chosen.attended,
        enlarged=enlarged_of(chosen.added, problem.group) if options.enlarges else None,
        audit=None if expected is None else audit(problem, chosen.plan, chosen.choice, expected, options.size),
    )


class ChosenBlocks(Choice):
    """The chosen blocks of a prefill, query block by query block.

    Attributes:
        attended: int32 ``[B, Hq, Lq]``, how many keys the rows attend for which ``keep`` has been called.
        plan, choice, added: see ``choose_blocks``, which also writes to ``expected``.
    """

    def __init__(self, problem: Problem, options: BlockOptions, expected: torch.Tensor | None = None) -> None:
        self._problem, self._size, self.plan = problem, options.size, plan_of(problem, options)
        self.choice, self.added = choose_blocks(problem, self.plan, options, expected)
        self.attended = problem.visible.new_zeros(problem.query.shape[:3])
        rows = rows_per_block(problem.query.shape[1], problem.key.shape[2])
        self.blocks = [
            RowBlock(block.batch, first, min(first + rows, block.last), block.low, block.high)
            for block in self.plan.listed
            for first in range(block.first, block.last, rows)
        ]

    def keep(self, scores: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """See ``Choice.keep``."""
        number = int(self.plan.owner[block.batch, block.first])
        planned, (indices, counts) = self.plan.listed[number], (each[number] for each in self.choice)
        exists = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        place = torch.where(exists, indices - planned.lowest, planned.width).long()
        chosen = exists.new_zeros(len(counts), planned.width + 1).scatter_(1, place, True)
        first = planned.low - planned.begin - planned.lowest * self._size
        of_keys = chosen.repeat_interleave(self._size, 1)[:, first : first + scores.shape[2]]
        keep = of_keys[:, None] & Rows.of(self._problem, block).seen(scores.shape[2])
        group = self._problem.group
        self.attended[block.batch, :, block.rows] = keep.sum(-1, dtype=torch.int32).repeat_interleave(group, 0)
        return keep.repeat_interleave(group, 0)

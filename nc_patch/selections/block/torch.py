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
    chosen = ChosenBlocks(problem, options)
    result = attend_rows(problem._replace(means=None), chosen)
    enlarged = enlarged_of(chosen.added, problem.group) if options.enlarges else None
    return result._replace(attended=chosen.attended, enlarged=enlarged, audit=chosen.audit())


class ChosenBlocks(Choice):
    """The chosen blocks of a prefill, query block by query block.

    Attributes:
        attended: int32 ``[B, Hq, Lq]``, how many keys the rows attend for which ``keep`` has been called.
        added: int32 ``[N, Hkv]``, how many blocks ``min_mass`` has added.
    """

    def __init__(self, problem: Problem, options: BlockOptions) -> None:
        self._problem, self._size, self._plan = problem, options.size, plan_of(problem, options)
        self._expected = expected_of(problem, len(self._plan.listed))
        self._choice, self.added = choose_blocks(problem, self._plan, options, self._expected)
        self.attended = problem.visible.new_zeros(problem.query.shape[:3])
        rows = rows_per_block(problem.query.shape[1], problem.key.shape[2])
        self._numbers = {
            RowBlock(block.batch, first, min(first + rows, block.last), block.low, block.high): number
            for number, block in enumerate(self._plan.listed)
            for first in range(block.first, block.last, rows)
        }
        self.blocks = self._numbers

    def keep(self, scores: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """See ``Choice.keep``."""
        number = self._numbers[block]
        planned, (indices, counts) = self._plan.listed[number], (each[number] for each in self._choice)
        exists = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        place = torch.where(exists, indices - planned.lowest, planned.width).long()
        chosen = exists.new_zeros(len(counts), planned.width + 1).scatter_(1, place, True)
        first = planned.low - planned.begin - planned.lowest * self._size
        of_keys = chosen.repeat_interleave(self._size, 1)[:, first : first + scores.shape[2]]
        keep = of_keys[:, None] & Rows.of(self._problem, block).seen(scores.shape[2])
        group = self._problem.group
        self.attended[block.batch, :, block.rows] = keep.sum(-1, dtype=torch.int32).repeat_interleave(group, 0)
        return keep.repeat_interleave(group, 0)

    def audit(self) -> torch.Tensor | None:
        """The audit of the choice; None where none is asked for."""
        if self._expected is None:
            return None
        return audit(self._problem, self._plan, self._choice, self._expected, self._size)

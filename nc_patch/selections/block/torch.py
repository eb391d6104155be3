"""``block`` attention in PyTorch: some rows choose the key blocks that a whole query block attends."""

import torch

from nc_patch.ops.attend_rows import attend_rows
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import RowBlock, Rows, final_scores_, rows_per_block, softmax_, weighted_values
from nc_patch.selections.base import Choice
from nc_patch.selections.block.audit import audit, enlarged_of, expected_of
from nc_patch.selections.block.blocks import BlockOptions, PlannedBlock, plan_of
from nc_patch.selections.block.torch_choose import choose_blocks


def torch_block_attention(problem: Problem, options: BlockOptions) -> AttentionResult:
    """Attention over key blocks that a query block shares; see ``definition``. With stats every score is computed."""
    chosen, problem = ChosenBlocks(problem, options), problem._replace(means=None)
    result = attend_rows(problem, chosen) if problem.stats else _attend_chosen(problem, chosen)
    enlarged = enlarged_of(chosen.added, problem.group) if options.enlarges else None
    return result._replace(attended=chosen.attended, enlarged=enlarged, audit=chosen.audit())


def _attend_chosen(problem: Problem, chosen: "ChosenBlocks") -> AttentionResult:
    """``attend_rows`` that reads the keys of the chosen blocks alone."""
    sinks = None if problem.sinks is None else problem.sinks.float()[:, None]
    output = problem.query.new_zeros(*problem.query.shape[:3], problem.value.shape[-1])
    by_group = (problem.key.shape[1], problem.group)
    for block in chosen.blocks:
        position, exists = chosen.positions(block)
        at = position.clamp(block.low, block.high - 1)[..., None]
        keys, values = (
            t[block.batch].gather(1, at.expand(-1, -1, t.shape[-1])).float() for t in (problem.key, problem.value)
        )
        query = problem.query[block.batch, :, block.rows].float().unflatten(0, by_group).flatten(1, 2)
        scores = final_scores_(query @ keys.transpose(1, 2), problem.scale, problem.softcap)
        seen, key = problem.visible[block.batch, block.rows], position[:, None]
        keep = exists[:, None] & (key >= seen[:, :1]) & (key < seen[:, 1:])
        scores = scores.unflatten(1, (problem.group, -1)).masked_fill_(~keep[:, None], -torch.inf)
        found = weighted_values(softmax_(scores.flatten(0, 1), sinks), values)
        empty = (seen[:, 1] <= seen[:, 0])[:, None]
        output[block.batch, :, block.rows] = found.masked_fill_(empty, 0.0).to(output.dtype)
        chosen.count(block, keep)
    return AttentionResult(output)


class ChosenBlocks(Choice):
    """The chosen blocks of a prefill, query block by query block.

    Attributes:
        attended: int32 ``[B, Hq, Lq]``, how many keys the rows attend that have been attended.
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
        planned, indices, exists = self._chosen(block)
        place = torch.where(exists, indices - planned.lowest, planned.width).long()
        chosen = exists.new_zeros(len(indices), planned.width + 1).scatter_(1, place, True)
        first = planned.low - planned.begin - planned.lowest * self._size
        of_keys = chosen.repeat_interleave(self._size, 1)[:, first : first + scores.shape[2]]
        keep = of_keys[:, None] & Rows.of(self._problem, block).seen(scores.shape[2])
        self.count(block, keep)
        return keep.repeat_interleave(self._problem.group, 0)

    def positions(self, block: RowBlock) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys of the chosen blocks, int64 ``[Hkv, M]``, and which of them there are."""
        planned, indices, exists = self._chosen(block)
        within = torch.arange(self._size, device=indices.device)
        position = planned.begin + indices[..., None] * self._size + within
        return position.flatten(1).long(), exists.repeat_interleave(self._size, 1)

    def count(self, block: RowBlock, keep: torch.Tensor) -> None:
        """Takes note of what rows attend, bool ``[Hkv, R, M]``."""
        of_heads = keep.sum(-1, dtype=torch.int32).repeat_interleave(self._problem.group, 0)
        self.attended[block.batch, :, block.rows] = of_heads

    def _chosen(self, block: RowBlock) -> tuple[PlannedBlock, torch.Tensor, torch.Tensor]:
        """The plan of a row block's query block, its chosen blocks int32 ``[Hkv, K]``, and which of them there are."""
        number = self._numbers[block]
        indices, counts = (each[number] for each in self._choice)
        exists = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        return self._plan.listed[number], indices, exists

    def audit(self) -> torch.Tensor | None:
        """The audit of the choice; None where none is asked for."""
        if self._expected is None:
            return None
        return audit(self._problem, self._plan, self._choice, self._expected, self._size)

"""``block`` attention in PyTorch: some rows choose the key blocks that a whole query block attends."""

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import (
    Buffers,
    RowBlock,
    final_scores_,
    hide_unseen_,
    row_blocks,
    rows_per_block,
    scores_of,
    split_scale,
)
from nc_patch.selections.base import Choice
from nc_patch.selections.block.audit import audit, enlarged_of, expected_of
from nc_patch.selections.block.blocks import BlockOptions, plan_of
from nc_patch.selections.block.torch_attend import attend_blocks
from nc_patch.selections.block.torch_choose import choose_blocks


def torch_block_attention(problem: Problem, options: BlockOptions) -> AttentionResult:
    """Attention over key blocks that a query block shares; see ``definition``. The kept mass costs half of dense's."""
    visible = problem.visible
    plan = plan_of(problem, options)
    expected, audited = expected_of(problem, len(plan.listed)), None
    choice, added = choose_blocks(problem, plan, options, expected)
    if expected is not None:
        audited = audit(problem, plan, choice, expected, options.size)
    output, of_keys, attended = attend_blocks(problem, plan, choice, options.size)
    lse = kept_mass = None
    if problem.stats:
        empty = (visible[..., 1] <= visible[..., 0])[:, None]
        kept_mass = torch.exp(of_keys - _dense_lse(problem)).masked_fill_(empty, 1.0)
        sinks = problem.sinks
        lse = of_keys if sinks is None else torch.logaddexp(of_keys, sinks.float()[:, None].expand_as(of_keys))
    enlarged = enlarged_of(added, problem.group) if options.enlarges else None
    return AttentionResult(output, lse, kept_mass, attended, enlarged=enlarged, audit=audited)


class ChosenBlocks(Choice):
    """The chosen blocks of a prefill, query block by query block."""

    def __init__(self, problem: Problem, options: BlockOptions) -> None:
        self._problem, self._block_size = problem, options.size
        plan = plan_of(problem, options)
        self._begin = plan.blocks.begin
        self._choice, _ = choose_blocks(problem, plan, options)
        self.blocks = [RowBlock(*row[:5]) for row in plan.listed]
        self._number = {(block.batch, block.first): number for number, block in enumerate(self.blocks)}

    def hide_(self, scores: torch.Tensor, block: RowBlock, buffers: Buffers) -> torch.Tensor:
        """See ``Choice.hide_``; the scores ``[Hq, R, N]`` that stay are not lowered."""
        number = self._number[block.batch, block.first]
        indices, counts = self._choice.block_indices[number], self._choice.block_counts[number]
        position = torch.arange(block.low, block.high, device=scores.device)
        of_key = torch.div(position - self._begin[number], self._block_size, rounding_mode="floor")
        exists = torch.arange(indices.shape[1], device=scores.device) < counts[:, None]
        attended = ((of_key[:, None] == indices[:, None]) & exists[:, None]).any(-1)
        hidden = ~attended[:, None, None]
        scores.view(indices.shape[0], -1, *scores.shape[1:]).masked_fill_(hidden, -torch.inf)
        hide_unseen_(scores, self._problem.visible[block.batch, block.rows], position)
        return scores.new_zeros(1, scores.shape[1])


def _dense_lse(problem: Problem) -> torch.Tensor:
    """Log-sum-exp of every row over the keys it sees, float32 ``[B, Hq, Lq]``; -inf where it sees none."""
    query, key, visible = problem.query, problem.key, problem.visible
    B, Hq, Lq, _ = query.shape
    lse = torch.full((B, Hq, Lq), -torch.inf, dtype=torch.float32, device=query.device)
    before, after = split_scale(problem.scale)
    buffers = Buffers(0, query.device)
    loaded, keys = -1, key
    for block in row_blocks(visible, rows_per_block(Hq, key.shape[2])):
        b, rows = block.batch, block.rows
        if b != loaded:
            keys, loaded = key[b].float(), b
        scores = scores_of(query[b, :, rows].float() * before, keys[:, block.low : block.high], buffers)
        position = torch.arange(block.low, block.high, device=query.device)
        lse[b, :, rows] = torch.logsumexp(
            hide_unseen_(final_scores_(scores, after, problem.softcap), visible[b, rows], position), -1
        )
    return lse

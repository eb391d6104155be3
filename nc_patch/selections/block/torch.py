"""``block`` in PyTorch: rows choose the key blocks that a query block attends; while decoding each query, its pages."""

import itertools

import torch

from nc_patch.ops.attend_rows import attend_rows
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import (
    RowBlock,
    final_scores_,
    hide_unseen_,
    rows_per_block,
    scores_of,
    softmax_,
    weighted_values,
)
from nc_patch.selections.base import Choice
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, BlockPlan, PlannedBlock
from nc_patch.selections.block.pages import PageStatistics, page_logits

# Of rows: where their sequence begins, the key blocks that they attend, ``[Hkv, K]``, and which of these there are.
Chosen = tuple[int, torch.Tensor, torch.Tensor]


class ChosenBlocks(Choice):
    """The key blocks that rows attend, of ``size`` keys each, counted from where their sequence begins.

    Attributes:
        blocks: what each block of rows attends.
        attended: int32 ``[B, Hq, Lq]``, how many keys the rows attend that have been attended.
    """

    blocks: dict[RowBlock, Chosen]

    def __init__(self, problem: Problem, size: int, blocks: dict[RowBlock, Chosen]) -> None:
        self._problem, self._size, self.blocks = problem, size, blocks
        self.attended = problem.visible.new_zeros(problem.query.shape[:3])

    def keep(self, scores: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """See ``Choice.keep``."""
        begin, indices, exists = self.blocks[block]
        lowest, last = (block.low - begin) // self._size, (block.high - 1 - begin) // self._size
        place = torch.where(exists, indices - lowest, last + 1 - lowest).long()
        chosen = exists.new_zeros(len(indices), last + 2 - lowest).scatter_(1, place, True)
        position = torch.arange(block.low, block.high, dtype=torch.int32, device=chosen.device)
        first = block.low - begin - lowest * self._size
        of_keys = chosen.repeat_interleave(self._size, 1)[:, first : first + len(position)]
        return self._seen(block, of_keys, position).repeat_interleave(self._problem.group, 0)

    def attend(self) -> AttentionResult:
        """Attention over the chosen keys, which alone are read unless statistics are wanted."""
        problem = self._problem._replace(means=None)
        if problem.stats:
            return attend_rows(problem, self)._replace(attended=self.attended)
        sinks = None if problem.sinks is None else problem.sinks.float()[:, None]
        output = problem.query.new_zeros(*problem.query.shape[:3], problem.value.shape[-1])
        by_group = (problem.key.shape[1], problem.group)
        for block, (begin, indices, exists) in self.blocks.items():
            within = torch.arange(self._size, device=indices.device)
            position = (begin + indices[..., None] * self._size + within).flatten(1).long()
            at = position.clamp(block.low, block.high - 1)[..., None]
            keys, values = (
                t[block.batch].gather(1, at.expand(-1, -1, t.shape[-1])).float() for t in (problem.key, problem.value)
            )
            query = problem.query[block.batch, :, block.rows].float().unflatten(0, by_group).flatten(1, 2)
            scores = final_scores_(query @ keys.transpose(1, 2), problem.scale, problem.softcap)
            keep = self._seen(block, exists.repeat_interleave(self._size, 1), position[:, None])
            scores = scores.unflatten(1, (problem.group, -1)).masked_fill_(~keep[:, None], -torch.inf)
            found = weighted_values(softmax_(scores.flatten(0, 1), sinks), values)
            nothing = self.attended[block.batch, :, block.rows, None] == 0
            output[block.batch, :, block.rows] = found.masked_fill_(nothing, 0.0).to(output.dtype)
        return AttentionResult(output, attended=self.attended)

    def _seen(self, block: RowBlock, chosen: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Which of the ``chosen`` keys, bool ``[Hkv, M]``, each row sees, ``[Hkv, R, M]``; notes how many they are."""
        seen = self._problem.visible[block.batch, block.rows]
        keep = chosen[:, None] & ((position >= seen[:, :1]) & (position < seen[:, 1:]))
        of_heads = keep.sum(-1, dtype=torch.int32).repeat_interleave(self._problem.group, 0)
        self.attended[block.batch, :, block.rows] = of_heads
        return keep


def chosen_blocks(problem: Problem, plan: BlockPlan, choice: BlockChoice, size: int) -> ChosenBlocks:
    """The chosen blocks of a prefill."""
    rows = rows_per_block(problem.query.shape[1], problem.key.shape[2])
    indices, counts = choice
    exists = torch.arange(indices.shape[2], device=indices.device) < counts[..., None]
    blocks = {
        RowBlock(block.batch, first, min(first + rows, block.last), block.low, block.high): (block.begin, *chosen)
        for block, *chosen in zip(plan.listed, indices, exists, strict=True)
        for first in range(block.first, block.last, rows)
    }
    return ChosenBlocks(problem, size, blocks)


def choose_blocks(problem: Problem, plan: BlockPlan, options: BlockOptions) -> tuple[BlockChoice, torch.Tensor | None]:
    """The blocks that each query block attends, as ``definition.block_choice`` says; and what an audit compares with.

    That is the mean kept mass of each query block's scored rows, float32 ``[N, Hq]``, 1 where there are none; a row
    whose shares are not numbers counts as keeping nothing. None where there is to be no audit.
    """
    most = max((block.width for block in plan.listed), default=0)
    indices, counts = plan.law.new_full((*plan.law.shape, most), -1), plan.law.clone()
    expected = None
    if problem.audit_seed >= 0:
        expected = problem.query.new_ones(len(plan.listed), problem.query.shape[1], dtype=torch.float32)
    for number, block in enumerate(plan.listed):
        shares = _shares(problem, plan, block, options)
        order, count = _heaviest(shares, plan.recent[number], plan.law[number], plan.limit[number], options.min_mass)
        ranked = torch.arange(block.width, device=order.device).expand_as(order)
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, ranked < count[:, None])
        found = torch.where(chosen, ranked, most).sort(-1).values  # ascending, behind them what is not chosen
        indices[number, :, : block.width] = torch.where(found < most, found + block.lowest, -1).int()
        counts[number] = count
        if expected is not None and block.samples:
            kept = (shares * chosen[:, None, None]).sum(-1).nan_to_num(nan=0.0).clamp(max=1.0).flatten(0, 1)
            expected[number] = kept.mean(-1)
    return BlockChoice(indices[..., : int(counts.max()) if len(counts) else 0], counts), expected


def _shares(problem: Problem, plan: BlockPlan, block: PlannedBlock, options: BlockOptions) -> torch.Tensor:
    """The share of every key block for the S scored rows, as the definition says, float32 ``[Hkv, G, S, width]``."""
    b, rows = block.batch, plan.samples[block.first_sample : block.first_sample + block.samples].long()
    query, key = problem.query[b, :, rows].float(), problem.key[b, :, block.low : block.high].float()
    scores = final_scores_(scores_of(query, key), problem.scale, problem.softcap)
    position = torch.arange(block.low, block.high, device=query.device)
    hide_unseen_(scores, problem.visible[b, rows], position)
    start = block.begin + block.lowest * options.size
    missing = (block.low - start, start + block.width * options.size - block.high)
    by_block = torch.nn.functional.pad(scores, missing, value=-torch.inf).unflatten(-1, (block.width, options.size))
    logits = by_block.amax(-1) if options.min_mass is None else torch.logsumexp(by_block, -1)
    return torch.softmax(logits, -1).unflatten(0, (key.shape[0], problem.group))


def _heaviest(
    shares: torch.Tensor, recent: torch.Tensor, law: torch.Tensor, limit: torch.Tensor, min_mass: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks from the first to be attended to the last, int64 ``[Hkv, width]``, and how many are, ``[Hkv]``.

    ``recent``, ``law`` and ``limit``: int32 ``[Hkv]``, see ``BlockPlan``.
    """
    rows = shares.flatten(1, 2)
    block = torch.arange(rows.shape[-1], device=law.device)
    if rows.shape[1] == 0:  # every block is attended
        return block.expand(len(law), -1), law
    # The largest share, not their sum: one row that needs a block for itself alone would not be heard among many.
    weight = rows.amax(1).nan_to_num_(nan=torch.finfo(torch.float32).max)
    weight.masked_fill_((block == 0) | (block >= recent[:, None]), torch.inf)  # attended always
    order = torch.sort(weight, dim=-1, descending=True, stable=True).indices
    if min_mass is None:
        return order, law
    kept = rows.nan_to_num(nan=0.0).sum(1).gather(-1, order).cumsum(-1)
    needed = (kept < min_mass * rows.shape[1]).sum(-1, dtype=torch.int32) + 1
    return order, torch.maximum(law, needed.minimum(limit))


def torch_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. The kept mass costs
    as much as dense attention.
    """
    problem = problem if problem.table is None else _gathered(problem)
    (B, Hkv, N, _), Lq, budget = problem.key.shape, problem.query.shape[2], problem.budget
    of_group = (B, Hkv, problem.group, Lq) if budget.shape[1] > 1 else (B, 1, 1, Lq)
    budgets = budget.view(of_group).amax(2).expand(B, Hkv, Lq).transpose(1, 2).tolist()
    origins, end = problem.origin.tolist(), problem.visible[..., 1].clamp(max=N).tolist()
    start = torch.maximum(problem.visible[..., 0], problem.origin).clamp(min=0).tolist()
    blocks = {}
    for b, i in itertools.product(range(B), range(Lq)):
        if start[b][i] < end[b][i]:
            query = RowBlock(b, i, i + 1, start[b][i], end[b][i])
            blocks[query] = _choose_pages(problem, query, origins[b][i], budgets[b][i])
    return ChosenBlocks(problem, problem.page_size, blocks).attend()


def _gathered(problem: Problem) -> Problem:
    """The problem with the keys that its table names, side by side: as many for each sequence as the longest has."""
    ends, N = problem.visible.clamp(0, problem.key_length), problem.key.shape[2]
    assert problem.table is not None
    # What follows a sequence's own blocks may be any number, and is not read.
    blocks = problem.table[:, : -(-int(ends.max()) // N) if ends.numel() else 0].clamp(0, len(problem.key) - 1)
    memory = (problem.key, problem.value, *problem.key_index)
    key, value, codes, scales = (t[blocks].transpose(1, 2).flatten(2, 3) for t in memory)
    starts = torch.zeros_like(ends)
    visible = torch.stack((starts, ends), -1)
    return problem._replace(key=key, value=value, visible=visible, origin=starts, key_index=(codes, scales), table=None)


def _choose_pages(problem: Problem, query: RowBlock, begin: int, budgets: list[int]) -> Chosen:
    """The pages that a query chooses by the budget of each key/value head."""
    size, device = problem.page_size, problem.key.device
    low, own = (query.low - begin) // size, (query.high - 1 - begin) // size
    pages = own + 1 - low
    counts = [pages if k >= query.high - query.low else max(min(2, pages), min(-(-k // size), pages)) for k in budgets]
    if min(counts) == pages:
        order = torch.arange(pages, device=device).expand(len(counts), -1)
    else:
        weight = _page_weights(problem, query, begin, low, own)
        order = torch.sort(weight, dim=-1, descending=True, stable=True).indices[:, : max(counts)]
    exists = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
    return begin, low + order, exists


def _page_weights(problem: Problem, query: RowBlock, begin: int, low: int, own: int) -> torch.Tensor:
    """Weights float32 ``[Hkv, P]`` of the pages from ``low`` to the query's ``own``; infinite for both."""
    size, b = problem.page_size, query.batch
    key = problem.key[b, :, max(begin + own * size, query.low) : query.high].float()
    rows = problem.query[b, :, query.first].view(len(key), problem.group, -1).float()
    own_scores = final_scores_(rows @ key.transpose(1, 2), problem.scale, problem.softcap)
    statistics = PageStatistics(*(t[b, :, low:own] for t in problem.key_index))
    count = torch.full((own - low,), size, device=rows.device)
    count[:1] = begin + (low + 1) * size - query.low
    estimates = page_logits(rows, statistics, count, problem.scale, problem.softcap)
    logits = torch.cat((estimates, torch.logsumexp(own_scores, -1, keepdim=True)), -1)
    overwhelming = logits.isnan() | (logits == torch.inf)
    weight = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num_(nan=0.0)
    # Beyond every number, but after the two pages that are attended always.
    weight = weight.sum(1).masked_fill_(overwhelming.any(1), torch.finfo(torch.float32).max)
    weight[:, 0] = weight[:, -1] = torch.inf
    return weight

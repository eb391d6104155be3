"""Which key blocks a query block attends, in PyTorch: rows scored against all visible keys, and the heaviest blocks.

Works on chunks of query blocks of one sequence, so that the extra memory is O(rows scored at once * keys).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nc_patch.ops import rows as torch_rows
from nc_patch.ops.problem import Problem
from nc_patch.selections.block import blocks
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, BlockPlan


class _Span(NamedTuple):
    """Query blocks ``first:last`` of a plan, of one sequence, and the key blocks ``lowest:stop`` they may see."""

    batch: int
    begin: int
    first: int
    last: int
    samples: slice
    lowest: int
    stop: int


def choose_blocks(
    problem: Problem,
    plan: BlockPlan,
    options: BlockOptions,
    expected: torch.Tensor | None = None,
) -> tuple[BlockChoice, torch.Tensor]:
    """The blocks that each query block attends, as ``definition.block_choice`` defines them.

    Args:
        expected: float32 ``[N, Hq]``, is given the mean kept mass of each query block's scored rows, 1 where there are
            none; a row whose shares are not numbers counts as keeping nothing.

    Returns:
        The choice, and int32 ``[N, Hkv]``, how many blocks ``min_mass`` has added.
    """
    query, key, visible = problem.query, problem.key, problem.visible
    Hq, size = query.shape[1], options.size
    if not plan.listed:
        return BlockChoice(plan.law.new_zeros(*plan.law.shape, 0), plan.law), plan.law
    buffers = torch_rows.Buffers(0, query.device)
    indices, counts = [], []
    loaded, keys = -1, key
    for span in _spans(plan, size, Hq):
        b, of_span = span.batch, slice(span.first, span.last)
        samples = plan.samples[span.samples].long()
        owner = plan.owner[b, samples] - span.first
        lowest, width = (plan.table[of_span, column, None] for column in (6, 7))
        lowest = lowest - span.lowest
        shares = query.new_zeros(Hq, 0, span.stop - span.lowest, dtype=torch.float32)
        if len(samples):
            if b != loaded:
                keys, loaded = key[b].float(), b
            origin_of_columns = span.begin + span.lowest * size
            columns = _columns(keys, origin_of_columns, span.begin + span.stop * size)
            seen = visible[b, samples] - origin_of_columns
            shares = block_shares(problem, query[b, :, samples], columns, seen, options, buffers)
        edges = torch.stack((lowest.expand_as(plan.law[of_span]), lowest + plan.recent[of_span]), -1)
        chosen, count = _heaviest(shares, owner, plan.law[of_span], plan.limit[of_span], (edges, width), options)
        if expected is not None:
            rows = torch.bincount(owner, minlength=len(lowest))[:, None]
            kept = _kept(shares, owner, chosen)
            mean = expected.new_zeros(len(lowest), Hq).index_add_(0, owner, kept.T) / rows
            expected[of_span] = mean.masked_fill(rows == 0, 1.0)
        # The chosen ones in ascending order: a stable sort brings them to the front.
        order = torch.sort((~chosen).byte(), dim=-1, stable=True).indices[..., : int(count.max())]
        exists = torch.arange(order.shape[-1], device=order.device) < count[..., None]
        indices.append(torch.where(exists, order + span.lowest, -1).int())
        counts.append(count)
    most = max(listed.shape[-1] for listed in indices)
    filled = [torch.nn.functional.pad(listed, (0, most - listed.shape[-1]), value=-1) for listed in indices]
    count = torch.cat(counts)
    return BlockChoice(torch.cat(filled), count), count - plan.law


def block_shares(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor,
    options: BlockOptions,
    buffers: torch_rows.Buffers,
) -> torch.Tensor:
    """The share that every key block has for S rows, as the definition says, float32 ``[Hq, S, K]``.

    Args:
        query: ``[Hq, S, D]``. key: float32 ``[Hkv, K * block_size, D]``. seen: int32 ``[S, 2]``, columns of ``key``.
    """
    before, after = torch_rows.split_scale(problem.scale)
    (Hq, S, D), (Hkv, columns, _) = query.shape, key.shape
    # Keys come first: so the highest score of each block is found in whole vectors.
    scores = buffers.get("sampled", (Hkv, columns, Hq // Hkv * S))
    torch.bmm(key, (query.float() * before).reshape(Hkv, -1, D).transpose(1, 2), out=scores)
    torch_rows.final_scores_(scores, after, problem.softcap)
    clear_from, clear_to = int(seen[:, 0].max()), int(seen[:, 1].min())
    # Most columns are seen by every row: only the two ends need a mask.
    ends = ((0, clear_from), (clear_to, columns)) if clear_from < clear_to else ((0, columns),)
    for first, last in ends:
        if first < last:
            column = torch.arange(first, last, device=scores.device)[:, None]
            hidden = (column < seen[:, 0]) | (column >= seen[:, 1])
            scores.view(Hkv, columns, -1, S)[:, first:last].masked_fill_(hidden[:, None], -torch.inf)
    by_block = scores.view(Hkv, -1, options.size, scores.shape[-1])
    logits = by_block.amax(2) if options.min_mass is None else torch.logsumexp(by_block, 2)
    return torch.softmax(logits.transpose(1, 2).reshape(Hq, S, -1), -1)


def _spans(plan: BlockPlan, size: int, num_heads: int) -> Iterator[_Span]:
    """The plan in runs of one sequence whose scores stay within a block's memory."""
    listed = plan.listed
    first = 0
    while first < len(listed):
        block = listed[first]
        lowest, stop, samples, last = block.lowest, block.lowest + block.width, block.samples, first + 1
        while last < len(listed) and (listed[last].batch, listed[last].begin) == (block.batch, block.begin):
            more = listed[last]
            wider = min(lowest, more.lowest), max(stop, more.lowest + more.width)
            rows = max(samples + more.samples, last + 1 - first)
            if num_heads * rows * (wider[1] - wider[0]) * size > blocks.SCORES_AT_ONCE:
                break
            (lowest, stop), samples, last = wider, samples + more.samples, last + 1
        scored = slice(block.first_sample, block.first_sample + samples)
        yield _Span(block.batch, block.begin, first, last, scored, lowest, stop)
        first = last


def _columns(keys: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Keys ``first:last`` of ``[Hkv, Lk, D]``; zero where there are none."""
    inside = keys[:, max(first, 0) : last]
    missing = (max(-first, 0), last - max(first, 0) - inside.shape[1])
    return torch.nn.functional.pad(inside, (0, 0, *missing)) if any(missing) else inside


def _heaviest(
    shares: torch.Tensor,
    owner: torch.Tensor,
    law: torch.Tensor,
    limit: torch.Tensor,
    edges: tuple[torch.Tensor, torch.Tensor],
    options: BlockOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heaviest blocks of n query blocks: bool ``[n, Hkv, K]``, and how many they are, int32 ``[n, Hkv]``.

    Args:
        shares: of S sampled rows among K key blocks, ``[Hq, S, K]``. owner: int64 ``[S]``, the row's query block.
        law, limit: int32 ``[n, Hkv]``, see ``BlockPlan``.
        edges: the first visible and the first recent of the K, int32 ``[n, Hkv, 2]``; how many are visible, ``[n, 1]``.
    """
    (n, Hkv), (Hq, S, K) = law.shape, shares.shape
    group = Hq // Hkv
    by_head = shares.view(Hkv, group, S, K)
    # The largest share, not their sum: one row that needs a block for itself alone would not be heard among many.
    largest = by_head.amax(1).transpose(0, 1)
    of_row = owner[:, None, None].expand(S, Hkv, K)
    weight = law.new_zeros(n, Hkv, K, dtype=torch.float32).scatter_reduce_(0, of_row, largest, "amax")
    block = torch.arange(K, device=law.device)
    lowest, recent = edges[0][..., None].unbind(2)
    inside = (block >= lowest) & (block < lowest + edges[1][..., None])
    # First those attended always, then what is not a number, then the others by weight; last what no row sees.
    rank = weight.nan_to_num(nan=torch.finfo(torch.float32).max)
    rank.masked_fill_((block == lowest) | (block >= recent), torch.inf).masked_fill_(~inside, -torch.inf)
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices
    count = law
    if options.min_mass is not None:
        rows = torch.bincount(owner, minlength=n)[:, None]
        mass = torch.zeros_like(weight).index_add_(0, owner, by_head.nan_to_num(nan=0.0).sum(1).transpose(0, 1))
        kept = mass.gather(-1, order).cumsum(-1)
        needed = (kept < options.min_mass * group * rows[..., None]).sum(-1, dtype=torch.int32) + 1
        count = torch.maximum(law, needed.minimum(limit))
    chosen = torch.zeros_like(inside).scatter_(-1, order, block < count[..., None])
    return chosen, count


def _kept(shares: torch.Tensor, owner: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """What S rows with ``shares [Hq, S, K]`` keep on the blocks chosen for their query block, float32 ``[Hq, S]``."""
    Hq, S, K = shares.shape
    Hkv = chosen.shape[1]
    of_rows = shares.view(Hkv, Hq // Hkv, S, K) * chosen[owner].transpose(0, 1)[:, None]
    return of_rows.sum(-1).nan_to_num(nan=0.0).view(Hq, S).clamp(max=1.0)

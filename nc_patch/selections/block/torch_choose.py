"""Which key blocks a query block attends, in PyTorch: rows scored against all visible keys, and the heaviest blocks.

Works on chunks of query blocks of one sequence, so that the extra memory is O(rows scored at once * keys).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nc_patch.ops import rows as torch_rows
from nc_patch.ops.problem import Problem
from nc_patch.selections.block.blocks import (
    BlockChoice,
    BlockSettings,
    Mark,
    QueryBlocks,
    always_attended,
    block_of_rows,
    law_counts,
    no_mark,
    sampled_rows,
)


class Chosen(NamedTuple):
    """A choice, and what it is estimated to keep: float32 ``[Hq, 5]``, columns ``blocks.ESTIMATE_COLUMNS``."""

    choice: BlockChoice
    estimate: torch.Tensor


class _Span(NamedTuple):
    """Query blocks ``first:last`` of the table, of one sequence, and the key blocks ``lowest:stop`` they may see."""

    batch: int
    begin: int
    first: int
    last: int
    rows: slice
    lowest: int
    stop: int


def choose_blocks(
    problem: Problem,
    table: QueryBlocks,
    settings: BlockSettings,
    expected: torch.Tensor | None = None,
    mark: Mark = no_mark,
) -> Chosen:
    """The blocks that each query block attends, as ``definition.block_choice`` defines them.

    The estimate is over the sampled rows; one whose shares are not numbers counts as keeping nothing. ``expected``,
    float32 ``[N, Hq]``, is given the mean kept mass of each query block's scored rows.
    """
    query, key, visible, origin = problem.query, problem.key, problem.visible, problem.origin
    B, Hq, Lq, _ = query.shape
    Hkv = key.shape[1]
    estimate = torch.zeros(Hq, 5, dtype=torch.float32, device=query.device)
    if table.first.shape[0] == 0:
        none = torch.zeros(0, Hkv, 0, dtype=torch.int32, device=query.device)
        return Chosen(BlockChoice(none, none.new_zeros(0, Hkv)), estimate)
    owner = block_of_rows(table, B, Lq)
    scored = sampled_rows(table, visible, origin, settings.sample_stride)
    law = law_counts(problem, table, owner, settings.block_size)
    always = torch.stack(always_attended(table, visible, settings.block_size), -1)
    buffers = torch_rows.Buffers(0, query.device)
    indices, counts = [], []
    loaded, keys = -1, key
    mark("plan")
    for span in _spans(table, settings, Hq):
        b, rows, blocks = span.batch, span.rows, slice(span.first, span.last)
        if b != loaded:
            keys, loaded = key[b].float(), b
        origin_of_columns = span.begin + span.lowest * settings.block_size
        sampled = scored[b, rows].nonzero()[:, 0] + rows.start
        of_block = owner[b, sampled] - span.first
        shares = block_shares(
            problem,
            query[b, :, sampled],
            _columns(keys, origin_of_columns, span.begin + span.stop * settings.block_size),
            visible[b, sampled] - origin_of_columns,
            settings.block_size,
            buffers,
        )
        mark("score")
        order, taken, kept = _heaviest(shares, of_block, law[blocks], always[blocks] - span.lowest, settings)
        indices.append(torch.where(order >= 0, order + span.lowest, -1).int())
        counts.append(taken.counts)
        estimate += _estimate(kept, taken.enlarged)
        if expected is not None:
            rows_of = torch.bincount(of_block, minlength=len(taken.counts))[:, None]
            expected[blocks] = expected.new_zeros(rows_of.shape[0], Hq).index_add_(0, of_block, kept.T) / rows_of
        mark("choose")
    most = max(listed.shape[-1] for listed in indices)
    filled = [torch.nn.functional.pad(listed, (0, most - listed.shape[-1]), value=-1) for listed in indices]
    choice = BlockChoice(torch.cat(filled), torch.cat(counts))
    mark("choose")
    return Chosen(choice, estimate)


def block_shares(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor,
    block_size: int,
    buffers: torch_rows.Buffers,
) -> torch.Tensor:
    """The share of its softmax that every key block holds for S rows, float32 ``[Hq, S, K]``.

    Args:
        query: ``[Hq, S, D]``. key: float32 ``[Hkv, K * block_size, D]``. seen: int32 ``[S, 2]``, columns of ``key``.
    """
    before, after = torch_rows.split_scale(problem.scale)
    scores = torch_rows.scores_of(query.float() * before, key, buffers, "sampled")
    torch_rows.final_scores_(scores, after, problem.softcap)
    clear_from, clear_to = int(seen[:, 0].max()), int(seen[:, 1].min())
    columns = torch.arange(scores.shape[-1], device=scores.device)
    # Most columns are seen by every row: only the two ends need a mask.
    ends = ((0, clear_from), (clear_to, scores.shape[-1])) if clear_from < clear_to else ((0, scores.shape[-1]),)
    for first, last in ends:
        if first < last:
            column = columns[first:last]
            hidden = (column < seen[:, :1]) | (column >= seen[:, 1:])
            scores[..., first:last].masked_fill_(hidden, -torch.inf)
    torch.softmax(scores, -1, out=scores)
    ones = scores.new_ones(block_size, 1)
    return (scores.view(-1, block_size) @ ones).view(*scores.shape[:2], -1)


def _spans(table: QueryBlocks, settings: BlockSettings, num_heads: int) -> Iterator[_Span]:
    """The table in runs of one sequence whose scores stay within a block's memory."""
    rows = settings.query_block_size // settings.sample_stride + 1
    size = settings.block_size
    listed = torch.stack(tuple(table), -1).tolist()
    first = 0
    while first < len(listed):
        batch, first_row, _, low, high, begin = listed[first]
        last = first + 1
        while last < len(listed) and listed[last][0] == batch and listed[last][5] == begin:
            lowest, highest = min(low, listed[last][3]), max(high, listed[last][4])
            elements = num_heads * rows * (last + 1 - first) * (highest - lowest)
            if elements > torch_rows.SCORES_PER_BLOCK:
                break
            low, high, last = lowest, highest, last + 1
        lowest, stop = (low - begin) // size, (high - 1 - begin) // size + 1
        yield _Span(batch, begin, first, last, slice(first_row, listed[last - 1][2]), lowest, stop)
        first = last


def _columns(keys: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Keys ``first:last`` of ``[Hkv, Lk, D]``; zero where there are none."""
    inside = keys[:, max(first, 0) : last]
    missing = (max(-first, 0), last - max(first, 0) - inside.shape[1])
    return torch.nn.functional.pad(inside, (0, 0, *missing)) if any(missing) else inside


class _Taken(NamedTuple):
    """How many blocks each query block takes, int32 ``[n, Hkv]``, and where that is more than its budget has."""

    counts: torch.Tensor
    enlarged: torch.Tensor


def _estimate(kept: torch.Tensor, enlarged: torch.Tensor) -> torch.Tensor:
    """The estimate ``[Hq, 5]`` of S rows that keep ``kept [Hq, S]``; ``enlarged`` is bool ``[n, Hkv]``."""
    Hq, S = kept.shape
    more = enlarged.sum(0).repeat_interleave(Hq // enlarged.shape[1])
    columns = (
        torch.full_like(more, S),
        kept.sum(-1),
        kept.square().sum(-1),
        torch.full_like(more, enlarged.shape[0]),
        more,
    )
    return torch.stack([column.float() for column in columns], -1)


def _heaviest(
    shares: torch.Tensor, owner: torch.Tensor, law: torch.Tensor, always: torch.Tensor, settings: BlockSettings
) -> tuple[torch.Tensor, _Taken, torch.Tensor]:
    """The blocks of n query blocks by weight.

    Args:
        shares: of S sampled rows among K key blocks, ``[Hq, S, K]``. owner: int64 ``[S]``, the row's query block.
        law: int32 ``[n, Hkv]``, how many blocks the budget has.
        always: int32 ``[n, 3]``, see ``always_attended``, counted from the first of the K.

    Returns:
        (block numbers int64 ``[n, Hkv, M]``, ascending and -1 beyond the count; how many they are; what each of the S
        rows keeps on them, float32 ``[Hq, S]``).
    """
    (n, Hkv), (Hq, S, K) = law.shape, shares.shape
    group = Hq // Hkv
    by_head = shares.view(Hkv, group, S, K)
    # The largest share, not their sum: one row that needs a block for itself alone would not be heard among many.
    largest = by_head.amax(1).transpose(0, 1)
    of_row = owner[:, None, None].expand(S, Hkv, K)
    weight = law.new_zeros(n, Hkv, K, dtype=torch.float32).scatter_reduce_(0, of_row, largest, "amax")
    block = torch.arange(K, device=law.device)
    lowest, diagonal, highest = (edge[:, None] for edge in always.unbind(-1))
    inside = (block >= lowest) & (block <= highest)
    forced = inside & ((block == lowest) | (block >= diagonal))
    # First the forced ones, then what is not a number, then the others by weight; last what no row sees.
    rank = weight.nan_to_num(nan=torch.finfo(torch.float32).max).masked_fill_(forced[:, None], torch.inf)
    order = torch.sort(rank.masked_fill_(~inside[:, None], -torch.inf), dim=-1, descending=True, stable=True).indices
    available = inside.sum(-1, dtype=torch.int32)[:, None]
    floor = torch.maximum(law, forced.sum(-1, dtype=torch.int32)[:, None]).minimum(available)
    counts = floor
    if settings.min_mass:
        rows = torch.bincount(owner, minlength=n)[:, None]
        mass = torch.zeros_like(weight).index_add_(0, owner, by_head.nan_to_num(nan=0.0).sum(1).transpose(0, 1))
        kept = mass.gather(-1, order).cumsum(-1)
        needed = (kept < settings.min_mass * group * rows[..., None]).sum(-1, dtype=torch.int32) + 1
        most = (law.double() * settings.max_factor).ceil().clamp(max=torch.iinfo(torch.int32).max).int()
        counts = torch.maximum(floor, needed.minimum(most).minimum(available))
    exists = torch.arange(int(counts.max()), device=law.device) < counts[..., None]
    order = torch.where(exists, order[..., : exists.shape[-1]], K).sort(-1).values
    chosen = weight.new_zeros(n, Hkv, K + 1).scatter_(-1, order, 1.0)[..., :K]
    of_rows = by_head * chosen[owner].transpose(0, 1)[:, None]
    kept_by_row = of_rows.sum(-1).nan_to_num(nan=0.0).view(Hq, S).clamp(max=1.0)
    return torch.where(order < K, order, -1), _Taken(counts, counts > floor), kept_by_row

"""Which key blocks a query block attends, in PyTorch: rows scored against all visible keys, and the heaviest blocks.

Works on chunks of query blocks of one sequence, so that the extra memory is O(rows scored at once * keys). How rows are
scored is the estimator's business, see ``estimators``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nc_patch.ops import rows as torch_rows
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
from nc_patch.selections.block.estimators import ESTIMATORS, Chunk, RowMass


class Chosen(NamedTuple):
    """A choice, and what the estimator expects it to keep: float32 ``[Hq, 5]``, columns ``blocks.ESTIMATE_COLUMNS``."""

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
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    table: QueryBlocks,
    settings: BlockSettings,
    *,
    scale: float,
    softcap: float,
    expected: torch.Tensor | None = None,
    mark: Mark = no_mark,
) -> Chosen:
    """The blocks that each query block attends, as ``reference.block_choice`` defines them.

    The estimate is over the rows that the estimator scored; one whose shares are not numbers counts as keeping nothing.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``.
        budget: int32 ``[B, Hq or 1, Lq]``. table: as from ``query_block_table``.
        scale, softcap: of the scores; softcap 0 for none. mark: for timing the steps.
        expected: float32 ``[N, Hq]``, is given the mean kept mass of each query block's scored rows.
    """
    B, Hq, Lq, _ = query.shape
    Hkv = key.shape[1]
    estimate = torch.zeros(Hq, 5, dtype=torch.float32, device=query.device)
    if table.first.shape[0] == 0:
        none = torch.zeros(0, Hkv, 0, dtype=torch.int32, device=query.device)
        return Chosen(BlockChoice(none, none.new_zeros(0, Hkv)), estimate)
    owner = block_of_rows(table, B, Lq)
    scored = sampled_rows(table, visible, origin, settings.sample_stride)
    law = law_counts(table, owner, visible, budget, Hkv, settings.block_size)
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
        chunk = Chunk(
            query[b, :, rows],
            _columns(keys, origin_of_columns, span.begin + span.stop * settings.block_size),
            visible[b, rows] - origin_of_columns,
            visible[b, rows, 1] - 1 - origin[b, rows],
            owner[b, rows] - span.first,
            scored[b, rows],
            span.last - span.first,
        )
        found = ESTIMATORS[settings.estimator](chunk, settings, scale, softcap, buffers)
        mark("score")
        order, taken, kept = _heaviest(found, law[blocks], always[blocks] - span.lowest, settings)
        indices.append(torch.where(order >= 0, order + span.lowest, -1).int())
        counts.append(taken.counts)
        estimate += _estimate(kept, taken.enlarged)
        if expected is not None:
            rows_of = torch.bincount(found.owner, minlength=len(taken.counts))[:, None]
            expected[blocks] = expected.new_zeros(rows_of.shape[0], Hq).index_add_(0, found.owner, kept.T) / rows_of
        mark("choose")
    most = max(found.shape[-1] for found in indices)
    filled = [torch.nn.functional.pad(found, (0, most - found.shape[-1]), value=-1) for found in indices]
    choice = BlockChoice(torch.cat(filled), torch.cat(counts))
    mark("choose")
    return Chosen(choice, estimate)


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
    found: RowMass, law: torch.Tensor, always: torch.Tensor, settings: BlockSettings
) -> tuple[torch.Tensor, _Taken, torch.Tensor]:
    """The blocks of n query blocks by weight.

    Args:
        found: as from an estimator, K key blocks.
        law: int32 ``[n, Hkv]``, how many blocks the budget has.
        always: int32 ``[n, 3]``, see ``always_attended``, counted from the first of the K.

    Returns:
        (block numbers int64 ``[n, Hkv, M]``, ascending and -1 beyond the count; how many they are; what each of the S
        rows keeps on them, float32 ``[Hq, S]``).
    """
    (n, Hkv), (Hq, S, K) = law.shape, found.mass.shape
    group = Hq // Hkv
    by_head = found.mass.view(Hkv, group, S, K)
    owner = found.owner[:, None, None].expand(S, Hkv, K)
    # The largest share, not their sum: one row that needs a block for itself alone would not be heard among many.
    shares = by_head.amax(1).transpose(0, 1)
    weight = law.new_zeros(n, Hkv, K, dtype=torch.float32).scatter_reduce_(0, owner, shares, "amax")
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
        rows = torch.bincount(found.owner, minlength=n)[:, None]
        mass = torch.zeros_like(weight).index_add_(0, found.owner, by_head.nan_to_num(nan=0.0).sum(1).transpose(0, 1))
        kept = mass.gather(-1, order).cumsum(-1)
        needed = (kept < settings.min_mass * group * rows[..., None]).sum(-1, dtype=torch.int32) + 1
        most = (law.double() * settings.max_factor).ceil().clamp(max=torch.iinfo(torch.int32).max).int()
        counts = torch.maximum(floor, needed.minimum(most).minimum(available))
    exists = torch.arange(int(counts.max()), device=law.device) < counts[..., None]
    order = torch.where(exists, order[..., : exists.shape[-1]], K).sort(-1).values
    chosen = weight.new_zeros(n, Hkv, K + 1).scatter_(-1, order, 1.0)[..., :K]
    of_rows = by_head * chosen[found.owner].transpose(0, 1)[:, None]
    kept_by_row = of_rows.sum(-1).nan_to_num(nan=0.0).view(Hq, S).clamp(max=1.0)
    return torch.where(order < K, order, -1), _Taken(counts, counts > floor), kept_by_row

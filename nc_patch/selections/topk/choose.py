"""From the rivals that a row has collected to the best of them: the k-th largest score, and how many that equal it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.ranks import (
    NO_RANK,
    RANK_INFINITY,
    RANK_NEGATIVE_INFINITY,
    Bracket,
    count_ranks,
    rank_of,
    score_of,
    search,
)
from nc_patch.ops.triton.rows import FAR
from nc_patch.ops.triton.structs import PER_CALL
from nc_patch.ops.triton.tail import PAGE
from nc_patch.selections.topk.scan import one_row, rivals_of

# Keys whose pages are counted at once.
_COUNTED = tl.constexpr(1024)


class Rivals(NamedTuple):
    """``count`` rivals of a row, their scores and positions.

    They are ranked by their scores or, where ``tied`` is not None, those of this rank by their positions, from the last
    to the first.
    """

    scores: Any
    positions: Any
    count: Any
    tied: Any


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "slots"])
def choose_kernel(
    inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, splits, segment, slots,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ``Limits`` of what a row attends of its entries, from what it has collected.

    Where ``inputs`` have an origin, every key attended is added to the count of its page, ``page_counts``.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    first, last, needed = rivals_of(row, sink_keys, recent_keys)
    reached = scratch.integers + scratch.reached + row.row * 2
    short = tl.load(reached) < needed
    count = tl.load(reached + short.to(tl.int32))
    low = tl.where(short, RANK_NEGATIVE_INFINITY, rank_of(tl.load(scratch.floats + scratch.guess + row.row)))
    scores = scratch.floats + scratch.reached_scores + row.row * splits * segment
    positions = scratch.integers + scratch.reached_positions + row.row * splits * segment
    rivals = Rivals(scores, positions, count, None)
    held = ranks_at(rivals, 0, BLOCK_E)
    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    if (needed > 0) & (needed < last - first):
        highest = tl.max(held, axis=0)
        for begin in range(BLOCK_E, count, BLOCK_E):
            highest = tl.maximum(highest, tl.max(ranks_at(rivals, begin, BLOCK_E), axis=0))
        bracket = search(Bracket(low, highest + 1, count, count * 0), needed, count_rivals, (rivals, held))
        limit = score_of(bracket.low)
        if bracket.count_low != needed:
            # Too many ties: the position after the last one that is admitted.
            ties = Rivals(scores, positions, count, bracket.low)
            held_ties = ranks_at(ties, 0, BLOCK_E)
            places = Bracket(-last + 1, -first + 1, bracket.count_low - bracket.count_high, count * 0)
            limit_end = -search(places, needed - bracket.count_high, count_rivals, (ties, held_ties)).low + 1
    tl.store(scratch.floats + scratch.threshold + row.row, limit)
    tl.store(scratch.integers + scratch.ties_end + row.row, limit_end)
    if inputs.origin is not None:
        residue = tl.load(inputs.origin + row.batch * Lq + row.index) & (PAGE - 1)
        counts = scratch.integers + scratch.page_counts + row.row * slots
        for begin in range(0, count, _COUNTED):
            e = begin + tl.arange(0, _COUNTED)
            rank = ranks_at(rivals, begin, _COUNTED)
            position = tl.load(positions + e, mask=e < count, other=0)
            taken = (rank > rank_of(limit)) | ((rank == rank_of(limit)) & (position < limit_end))
            count_pages(counts, position, residue, taken & (e < count))
        for begin in range(row.start, row.end - (last - first), _COUNTED):
            # The keys before the rivals, and those after them.
            position = begin + tl.arange(0, _COUNTED)
            position = tl.where(position < first, position, position + (last - first))
            count_pages(counts, position, residue, position < row.end)


@triton.jit
def count_pages(counts, position, residue, among):
    """Adds each key to the count of its page."""
    tl.atomic_add(counts + (position - residue) // PAGE, 1, mask=among & (position >= residue), sem="relaxed")


@triton.jit
def ranks_at(rivals, begin, BLOCK_E: tl.constexpr):
    """Ranks of ``BLOCK_E`` rivals, ``NO_RANK`` beyond the end; NaN is as high as +inf."""
    e = begin + tl.arange(0, BLOCK_E)
    score = tl.load(rivals.scores + e, mask=e < rivals.count, other=0.0)
    # -0.0 equals 0.0.
    rank = tl.where(score == score, rank_of(score + 0.0), RANK_INFINITY)
    if rivals.tied is not None:
        position = tl.load(rivals.positions + e, mask=e < rivals.count, other=0)
        rank = tl.where(rank == rivals.tied, -position, NO_RANK)
    return tl.where(e < rivals.count, rank, NO_RANK)


@triton.jit
def count_rivals(counted, first, second, third):
    """``count_ranks`` of ``Rivals``, of which the ranks of the first are held; as many are looked at at once."""
    rivals, held = counted
    counts = count_ranks(held, first, second, third)
    for begin in range(held.shape[0], rivals.count, held.shape[0]):
        more = count_ranks(ranks_at(rivals, begin, held.shape[0]), first, second, third)
        counts = (counts[0] + more[0], counts[1] + more[1], counts[2] + more[2])
    return counts

"""From the keys that may be among the best of a block of rows to exactly the best of each row.

The scan (``scan.scan_kernel``) leaves segments of candidates, which the rows of a block share. Here every candidate is
scored exactly for all rows of its block at once, and a row collects those of its rivals that reach its guess, in any
order. The exact k-th largest of these is the row's threshold. All that is not collected scores less than the guess; so
the best are among them if the list is complete and as many of the row's rivals as are needed reach the guess, which the
scan has proved by their bounds. Where it has not, the block takes all keys, and its rows collect all their rivals.

``plan.with_scratch`` describes what the kernels hand on. Blocks of rows are those of ``program_rows``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.ranks import NO_RANK, RANK_INFINITY, Bracket, count_ranks, rank_of, score_of, search
from nc_patch.ops.triton.rows import FAR, head_of, program_rows, span
from nc_patch.ops.triton.scores import dot, load_queries
from nc_patch.ops.triton.structs import PER_CALL
from nc_patch.ops.triton.tail import PAGE
from nc_patch.selections.topk.scan import integers, one_row, rivals_of

# What one step of a sum on matrix units may lose, relative to the sum of the sizes: they cut where float32 rounds.
_MATRIX_ULP = tl.constexpr(2.0**-22)
# Keys whose pages are counted at once.
_COUNTED = tl.constexpr(1024)


class Entries(NamedTuple):
    """Entries of a block, from ``begin`` to ``stop``: ``positions`` points to those of entries below ``listed``.

    Another entry is its own position.
    """

    begin: Any
    stop: Any
    positions: Any
    listed: Any


class Rivals(NamedTuple):
    """``count`` rivals of a row: their scores and positions, and the ranks ``held`` of the first of them.

    As many are looked at at once. They are ranked by their scores or, where ``tied`` is not None, those of this rank
    by their positions, from the last to the first.
    """

    scores: Any
    positions: Any
    count: Any
    held: Any
    tied: Any


@triton.jit
def entries_of(scratch, rows, whole, splits, segment):
    """The ``Entries`` of this program, a split of its block."""
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    positions = integers(scratch, scratch.positions) + block * splits * segment
    count = tl.load(integers(scratch, scratch.counts) + block * splits + split)
    low, high = span(rows.start, rows.end, rows.end > rows.start)
    share = tl.cdiv(high - low, splits)
    begin = tl.where(whole, low + split * share, split * segment)
    stop = tl.where(whole, tl.minimum(begin + share, high), begin + count)
    return Entries(begin, stop, positions, tl.where(whole, 0, stop))


@triton.jit
def positions_at(entries, e):
    """The positions of keys that are entries."""
    return tl.load(entries.positions + e, mask=e < entries.listed, other=e)


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "stride"])
def score_kernel(
    query, key, inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, splits, segment,
    stride, shape, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Exact scores of one split's share of a block's entries, and the collections of its rows.

    A block has at most ``ROWS`` rows: fewer than a matrix instruction takes.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    block = tl.program_id(0).to(tl.int64)
    _first, _last, needed = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(scratch.memory + scratch.guess + rows.row, mask=rows.valid, other=float("inf"))
    s = tl.arange(0, BLOCK_S)
    sizes = tl.load(integers(scratch, scratch.counts) + block * splits + s, mask=s < splits, other=0)
    known = rows.valid[:, None] & (s < splits)[None, :]
    sure = tl.load(integers(scratch, scratch.sure) + rows.row[:, None] * splits + s[None, :], mask=known, other=0)
    # A guess of -inf lists every rival.
    short = (tl.sum(sure, axis=1) < needed) & (least > float("-inf"))
    whole = (tl.max(sizes, axis=0) > segment) | (tl.max(short.to(tl.int32), axis=0) > 0)
    tl.store(integers(scratch, scratch.whole) + block, whole.to(tl.int32), mask=tl.program_id(1) == 0)
    entries = entries_of(scratch, rows, whole, splits, segment)
    queries = load_queries(query, rows, shape)
    keys = head_of(key, rows.batch, rows.kv_head)
    for begin in range(entries.begin, entries.stop, shape.BLOCK_N):
        e = begin + tl.arange(0, shape.BLOCK_N)
        here = e < entries.stop
        score, error = exact_scores(queries, keys, positions_at(entries, e), here, shape, BOUNDS)
        at = rows.row[:, None] * stride + e[None, :]
        inside = rows.valid[:, None] & here[None, :]
        tl.store(scratch.memory + scratch.scores + at, score, mask=inside)
        if BOUNDS:
            tl.store(scratch.memory + scratch.errors + at, error, mask=inside)
    # What other threads have stored is read back.
    tl.debug_barrier()
    few = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, ROWS)
    collect(few, entries, scratch, whole, sink_keys, recent_keys, stride, shape.BLOCK_N)


@triton.jit
def collect(rows, entries, scratch, whole, sink_keys, recent_keys, stride, BLOCK_N: tl.constexpr):
    """Adds the entries that are rivals of a row and reach its guess, or all if ``whole``, to its collection.

    Places in it are given out a split at a time, after they are counted. Their order is no matter: it is a set.
    """
    first, last, _needed = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(scratch.memory + scratch.guess + rows.row, mask=rows.valid, other=float("inf"))
    least = tl.where(whole, float("-inf"), least)
    tl.store(scratch.memory + scratch.threshold + rows.row, least, mask=rows.valid & (tl.program_id(1) == 0))
    taken = tl.zeros([rows.row.shape[0]], dtype=tl.int32)
    for writes in tl.static_range(2):
        for begin in range(entries.begin, entries.stop, BLOCK_N):
            e = begin + tl.arange(0, BLOCK_N)
            position = positions_at(entries, e)
            inside = rows.valid[:, None] & (e < entries.stop)[None, :]
            at = rows.row[:, None] * stride + e[None, :]
            score = tl.load(scratch.memory + scratch.scores + at, mask=inside, other=0.0)
            rival = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
            # NaN reaches any guess.
            ones = (inside & rival & ~(score < least[:, None])).to(tl.int32)
            if writes:
                at = rows.row[:, None] * stride + taken[:, None] + tl.cumsum(ones, axis=1) - ones
                places = integers(scratch, scratch.reached_positions) + at
                tl.store(places, tl.broadcast_to(position[None, :], at.shape), mask=ones > 0)
                tl.store(scratch.memory + scratch.reached_scores + at, score, mask=ones > 0)
            taken += tl.sum(ones, axis=1)
        if writes == 0:
            counts = integers(scratch, scratch.reached) + rows.row
            taken = tl.atomic_add(counts, taken, mask=rows.valid & (taken > 0), sem="relaxed")


@triton.jit
def exact_scores(queries, keys, position, here, shape, BOUNDS: tl.constexpr):
    """q·k in float32 of the keys at ``position``, and with ``BOUNDS`` what it may be off by."""
    score = tl.zeros([shape.BLOCK_M, shape.BLOCK_N], dtype=tl.float32)
    size = score
    offsets = position.to(tl.int64) * keys.stride
    for begin in tl.static_range(0, shape.BLOCK_D, shape.CHUNK_D):
        d = begin + tl.arange(0, shape.CHUNK_D)
        part = queries.tile
        if shape.CHUNK_D < shape.BLOCK_D:
            inside = queries.valid[:, None] & (d < shape.D)[None, :]
            part = tl.load(queries.rows[:, None] + d[None, :], mask=inside, other=0.0)
        inside = here[None, :] & (d < shape.D)[:, None]
        tile = tl.load(keys.data + (offsets[None, :] + d[:, None]), mask=inside, other=0.0)
        score = dot(part, tile, score)
        if BOUNDS:
            size = dot(tl.abs(part), tl.abs(tile), size)
    return score, size * ((shape.D + 16) * _MATRIX_ULP)


@triton.jit(do_not_specialize=[*PER_CALL, "stride", "slots"])
def choose_kernel(
    inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, stride, slots,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ``Limits`` of what a row attends of its entries, from what it has collected.

    Where ``inputs`` have an origin, every key attended is added to the count of its page, ``page_counts``.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    first, last, needed = rivals_of(row, sink_keys, recent_keys)
    low = rank_of(tl.load(scratch.memory + scratch.threshold + row.row))
    scores = scratch.memory + scratch.reached_scores + row.row * stride
    positions = integers(scratch, scratch.reached_positions) + row.row * stride
    count = tl.load(integers(scratch, scratch.reached) + row.row)
    rivals = hold(scores, positions, count, None, BLOCK_E)
    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    if (needed > 0) & (needed < last - first):
        highest = tl.max(rivals.held, axis=0)
        for begin in range(BLOCK_E, count, BLOCK_E):
            highest = tl.maximum(highest, tl.max(ranks_at(rivals, begin, BLOCK_E), axis=0))
        bracket = search(Bracket(low, highest + 1, count, count * 0), needed, count_rivals, rivals)
        limit = score_of(bracket.low)
        if bracket.count_low != needed:
            # Too many ties: the position after the last one that is admitted.
            ties = hold(scores, positions, count, bracket.low, BLOCK_E)
            places = Bracket(-last + 1, -first + 1, bracket.count_low - bracket.count_high, count * 0)
            limit_end = -search(places, needed - bracket.count_high, count_rivals, ties).low + 1
    tl.store(scratch.memory + scratch.threshold + row.row, limit)
    tl.store(integers(scratch, scratch.ties_end) + row.row, limit_end)
    if inputs.origin is not None:
        residue = tl.load(inputs.origin + row.batch * Lq + row.index) & (PAGE - 1)
        counts = integers(scratch, scratch.page_counts) + row.row * slots
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
def hold(scores, positions, count, tied, BLOCK_E: tl.constexpr):
    """``Rivals``, of which ``BLOCK_E`` are held."""
    rivals = Rivals(scores, positions, count, None, tied)
    return Rivals(scores, positions, count, ranks_at(rivals, 0, BLOCK_E), tied)


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
def count_rivals(rivals, first, second, third):
    """``count_ranks`` of ``Rivals``."""
    counts = count_ranks(rivals.held, first, second, third)
    for begin in range(rivals.held.shape[0], rivals.count, rivals.held.shape[0]):
        more = count_ranks(ranks_at(rivals, begin, rivals.held.shape[0]), first, second, third)
        counts = (counts[0] + more[0], counts[1] + more[1], counts[2] + more[2])
    return counts

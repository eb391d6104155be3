"""From the keys that may be among the best of a block of rows to exactly the best of each row.

The scan (``scan.scan_kernel``) leaves segments of candidates, which the rows of a block share. Here every candidate is
scored exactly for all rows of its block at once, and a row collects those of its rivals that reach its guess, in any
order. The exact k-th largest of these is the row's threshold. All that is not collected scores less than the guess; so
the best are among them if the list is complete and as many of the row's rivals as are needed reach the guess, which the
scan has proved by their bounds. Where it has not, the block takes all keys: they are scored then, and chosen from.

``plan.Scratch`` describes what the kernels hand on. Rows are those of a contiguous ``[B, Hq, Lq]``; blocks are those of
``program_rows``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.ranks import (
    RANK_INFINITY,
    RANK_NEGATIVE_INFINITY,
    Bracket,
    count_ranks,
    rank_of,
    score_of,
    search,
)
from nc_patch.ops.triton.rows import FAR, head_of, program_rows, span
from nc_patch.ops.triton.scores import dot, load_queries
from nc_patch.ops.triton.structs import PER_CALL
from nc_patch.ops.triton.tail import PAGE
from nc_patch.selections.topk.scan import NO_RIVAL, floats, integers, one_row, rivals_of

# What one step of a sum on matrix units may lose, relative to the sum of the sizes: they cut where float32 rounds.
_MATRIX_ULP = tl.constexpr(2.0**-22)
# Keys whose pages are counted at once.
_COUNTED = tl.constexpr(1024)


class Entries(NamedTuple):
    """Entries of a block: those from ``begin`` to ``stop``.

    ``positions`` points to those of listed ones, up to ``listed``; if ``whole``, an entry is its own position.
    """

    begin: Any
    stop: Any
    positions: Any
    listed: Any
    whole: Any


class Rivals(NamedTuple):
    """``length`` rivals of a row: their scores, and the positions of the ``listed`` ones.

    If ``whole``, none is, and they are all keys from ``first`` on. ``held`` are the ranks of the first of them, in
    registers; as many are looked at at once.
    """

    held: Any
    scores: Any
    positions: Any
    listed: Any
    whole: Any
    first: Any
    length: Any


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
    return Entries(begin, stop, positions, tl.where(whole, 0, stop), whole)


@triton.jit
def positions_at(entries, e):
    """The positions of keys that are entries."""
    return tl.where(entries.whole, e, tl.load(entries.positions + e, mask=e < entries.listed, other=0))


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "stride"])
def score_kernel(
    query, key, inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, splits, segment,
    stride, shape, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Exact scores of one split's share of a block's entries; see ``plan.Scratch``.

    The rivals of each row that reach its guess are collected as ``reached``. A block has at most ``ROWS`` rows: fewer
    than a matrix instruction takes.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    block = tl.program_id(0).to(tl.int64)
    first, last = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(floats(scratch, scratch.guess) + rows.row, mask=rows.valid, other=float("inf"))
    s = tl.arange(0, BLOCK_S)
    sizes = tl.load(integers(scratch, scratch.counts) + block * splits + s, mask=s < splits, other=0)
    known = rows.valid[:, None] & (s < splits)[None, :]
    sure = tl.load(integers(scratch, scratch.sure) + rows.row[:, None] * splits + s[None, :], mask=known, other=0)
    needed = rows.wanted - (rows.end - rows.start - (last - first))
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
        position = positions_at(entries, e)
        score, error = exact_scores(queries, keys, position, here, shape, BOUNDS)
        at = rows.row[:, None] * stride + e[None, :]
        inside = rows.valid[:, None] & here[None, :]
        tl.store(floats(scratch, scratch.scores) + at, score, mask=inside)
        if BOUNDS:
            tl.store(floats(scratch, scratch.errors) + at, error, mask=inside)
    if not whole:
        # What other threads have stored is read back.
        tl.debug_barrier()
        few = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, ROWS)
        collect(few, entries, scratch, sink_keys, recent_keys, stride, shape.BLOCK_N)


@triton.jit
def collect(rows, entries, scratch, sink_keys, recent_keys, stride, BLOCK_N: tl.constexpr):
    """Adds the entries that reach each row's guess to its collection.

    Places in it are given out a split at a time. Their order is no matter: it is a set.
    """
    first, last = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(floats(scratch, scratch.guess) + rows.row, mask=rows.valid, other=float("inf"))
    many = tl.zeros([rows.row.shape[0]], dtype=tl.int32)
    for begin in range(entries.begin, entries.stop, BLOCK_N):
        _position, _score, ones = reaching(rows, entries, begin, scratch, first, last, least, stride, BLOCK_N)
        many += tl.sum(ones, axis=1)
    counts = integers(scratch, scratch.reached) + rows.row
    taken = tl.atomic_add(counts, many, mask=rows.valid & (many > 0), sem="relaxed")
    for begin in range(entries.begin, entries.stop, BLOCK_N):
        position, score, ones = reaching(rows, entries, begin, scratch, first, last, least, stride, BLOCK_N)
        at = rows.row[:, None] * stride + taken[:, None] + tl.cumsum(ones, axis=1) - ones
        places = integers(scratch, scratch.reached_positions) + at
        tl.store(places, tl.broadcast_to(position[None, :], at.shape), mask=ones > 0)
        tl.store(floats(scratch, scratch.reached_scores) + at, score, mask=ones > 0)
        taken += tl.sum(ones, axis=1)


@triton.jit
def reaching(rows, entries, begin, scratch, first, last, least, stride, BLOCK_N: tl.constexpr):
    """(position, score of each row, 1 where it is a rival that scores the row's guess or more, else 0) of entries.

    NaN reaches any guess.
    """
    e = begin + tl.arange(0, BLOCK_N)
    position = positions_at(entries, e)
    inside = rows.valid[:, None] & (e < entries.stop)[None, :]
    score = tl.load(floats(scratch, scratch.scores) + rows.row[:, None] * stride + e[None, :], mask=inside, other=0.0)
    rival = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
    return position, score, (inside & rival & ~(score < least[:, None])).to(tl.int32)


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
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ``Limits`` of what a row attends of its entries; a block has ``ROWS`` rows.

    Where ``inputs`` have an origin, every key attended is added to the count of its page, ``page_counts``.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    first, last = rivals_of(row, sink_keys, recent_keys)
    needed = row.wanted - (row.end - row.start - (last - first))
    # As ``program_rows`` divides rows into blocks.
    blocks = tl.cdiv(Lq * group, ROWS)
    block = (row.batch * num_kv_heads + row.kv_head) * blocks
    block += blocks - 1 - (row.index * group + row.head % group) // ROWS
    whole = tl.load(integers(scratch, scratch.whole) + block) != 0
    low = rank_of(tl.load(floats(scratch, scratch.guess) + row.row))
    scores = floats(scratch, scratch.reached_scores) + row.row * stride
    positions = integers(scratch, scratch.reached_positions) + row.row * stride
    count = tl.load(integers(scratch, scratch.reached) + row.row)
    if whole:
        scores = floats(scratch, scratch.scores) + row.row * stride + first
        count = last - first
        low = low * 0 + RANK_NEGATIVE_INFINITY
    held = load_ranks(scores, 0, count, BLOCK_E)
    rivals = Rivals(held, scores, positions, tl.where(whole, 0, count), whole, first, count)
    limit, limit_end = find_best(rivals, low, needed, first, last)
    tl.store(floats(scratch, scratch.threshold) + row.row, limit)
    tl.store(integers(scratch, scratch.ties_end) + row.row, limit_end)
    if inputs.origin is not None:
        residue = tl.load(inputs.origin + row.batch * Lq + row.index) & (PAGE - 1)
        counts = integers(scratch, scratch.page_counts) + row.row * slots
        for begin in range(0, count, _COUNTED):
            e = begin + tl.arange(0, _COUNTED)
            rank = load_ranks(scores, begin, count, _COUNTED)
            position = rival_positions(rivals, e)
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
def rival_positions(rivals, e):
    """The positions of rivals."""
    return tl.where(rivals.whole, rivals.first + e, tl.load(rivals.positions + e, mask=e < rivals.listed, other=FAR))


@triton.jit
def find_best(rivals, low, needed, first, last):
    """Threshold and end of its ties of the ``needed`` best of the rivals in ``[first, last)``, as ``find_thresholds``.

    ``rivals`` are of rank ``low`` or more, with all of the best among them.
    """
    count = rivals.length
    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    highest = tl.max(rivals.held, axis=0)
    for begin in range(rivals.held.shape[0], count, rivals.held.shape[0]):
        highest = tl.maximum(highest, tl.max(load_ranks(rivals.scores, begin, count, rivals.held.shape[0]), axis=0))
    if (needed > 0) & (needed < last - first):
        bracket = search(Bracket(low, highest + 1, count, count * 0), needed, count_rivals, rivals)
        limit = score_of(bracket.low)
        if bracket.count_low != needed:
            # Too many ties: the position after the last one that is admitted.
            spare = needed - bracket.count_high
            before = first
            after = last
            while after - before > 1:
                middle = before + (after - before) // 2
                ties = count_ties(rivals, bracket.low, middle)
                before = tl.where(ties < spare, middle, before)
                after = tl.where(ties < spare, after, middle)
            limit_end = after
    return limit, limit_end


@triton.jit
def load_ranks(scores, begin, count, BLOCK_E: tl.constexpr):
    """Ranks of ``BLOCK_E`` scores; NaN is as high as +inf, and what is beyond the end is below every score."""
    e = begin + tl.arange(0, BLOCK_E)
    score = tl.load(scores + e, mask=e < count, other=0.0)
    # -0.0 equals 0.0.
    rank = tl.where(score == score, rank_of(score + 0.0), RANK_INFINITY)
    return tl.where(e < count, rank, NO_RIVAL)


@triton.jit
def count_rivals(rivals, first, second, third):
    """``count_ranks`` of ``Rivals``."""
    counts = count_ranks(rivals.held, first, second, third)
    for begin in range(rivals.held.shape[0], rivals.length, rivals.held.shape[0]):
        ranks = load_ranks(rivals.scores, begin, rivals.length, rivals.held.shape[0])
        more = count_ranks(ranks, first, second, third)
        counts = (counts[0] + more[0], counts[1] + more[1], counts[2] + more[2])
    return counts


@triton.jit
def count_ties(rivals, rank, before):
    """How many rivals of this rank stand before a position."""
    ties = rivals.length * 0
    for begin in range(0, rivals.length, rivals.held.shape[0]):
        ranks = load_ranks(rivals.scores, begin, rivals.length, rivals.held.shape[0])
        position = rival_positions(rivals, begin + tl.arange(0, rivals.held.shape[0]))
        ties += tl.sum(((ranks == rank) & (position < before)).to(tl.int32), axis=0)
    return ties

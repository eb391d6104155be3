"""From the keys that may be among the best of a block of rows to exactly the best of each row.

The scan (``scan.scan_kernel``) leaves segments of candidates, which the rows of a block share. Here a row's
guess is taken from the sampled scores before the scan. After it every candidate is scored exactly for all rows of its
block at once, and a row collects those of its rivals that reach its guess, in any order. The exact k-th largest of
these is the row's threshold. All that is not collected scores less than the guess; so the best are among them if and
only if the list is complete and as many of the row's rivals as are needed reach the guess. A row where that fails is
flagged and left empty: all its keys are scored then, and chosen from, by kernels that have nothing to do for other
rows.

``decode.py`` describes the structures. Rows are those of a contiguous ``[B, Hq, Lq]``; blocks are those of
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
    narrow,
    rank_of,
    score_of,
    search,
    width_of,
)
from nc_patch.ops.triton.rows import FAR, head_of, program_rows, span
from nc_patch.ops.triton.scores import dot, load_queries
from nc_patch.ops.triton.structs import PER_CALL, Rows
from nc_patch.selections.topk.scan import one_row, rivals_of

# Below the rank of every score.
_NO_RIVAL = tl.constexpr(-2147483648)
# What one step of a sum on matrix units may lose, relative to the sum of the sizes: they cut where float32 rounds.
_MATRIX_ULP = tl.constexpr(2.0**-22)
# Entries that are set to zero at once.
_ZEROS = tl.constexpr(1024)
# Quarterings of the bracket of a guess: then it is 2**12 floats wide at most, a relative 2**-11.
_GUESS_PASSES = tl.constexpr(10)
# Deviations of the sample's count by which the guess lies on the safe side.
_DEVIATIONS = tl.constexpr(5.0)


class Collected(NamedTuple):
    """The ``length`` scores of a row that are searched, and the ranks of the first ``BLOCK_E``, held in registers."""

    held: Any
    scores: Any
    length: Any
    BLOCK_E: Any


@triton.jit(do_not_specialize=[*PER_CALL, "slots"])
def guess_kernel(
    inputs, samples, guess, reached, page_counts, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys,
    slots, SAMPLES: tl.constexpr,
):  # fmt: skip
    """A score that at least the needed rivals of a row should reach, and few more; -inf where the sample is no help.

    Sets to zero what later kernels count in: the row's count of ``reached`` and ``page_counts[row, slots]``.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    tl.store(reached.counts + row.row, 0)
    if page_counts is not None:
        zeros = tl.arange(0, _ZEROS)
        for slot in range(0, slots, _ZEROS):
            at = page_counts + row.row * slots + slot + zeros
            tl.store(at, tl.zeros([_ZEROS], tl.int32), mask=slot + zeros < slots)
    first, last = rivals_of(row, sink_keys, recent_keys)
    rivals = last - first
    needed = row.wanted - (row.end - row.start - rivals)
    sampled = tl.load(samples + row.row * SAMPLES + tl.arange(0, SAMPLES))
    ranks = tl.where(sampled > float("-inf"), rank_of(sampled), _NO_RIVAL)
    size = tl.sum((ranks > _NO_RIVAL).to(tl.int32), axis=0)
    share = needed.to(tl.float32) * size.to(tl.float32) / tl.maximum(rivals, 1).to(tl.float32)
    place = tl.ceil(share + _DEVIATIONS * tl.sqrt(share) + 4.0).to(tl.int32)
    low = tl.min(tl.where(ranks > _NO_RIVAL, ranks, RANK_INFINITY), axis=0)
    bracket = Bracket(low, tl.maximum(tl.max(ranks, axis=0) + 1, low), size, size * 0)
    for _pass in range(_GUESS_PASSES):
        width = width_of(bracket)
        a = (bracket.low.to(tl.int64) + width // 4).to(tl.int32)
        b = (bracket.low.to(tl.int64) + width // 2).to(tl.int32)
        c = (bracket.low.to(tl.int64) + width * 3 // 4).to(tl.int32)
        count_a, count_b, count_c = count_ranks(ranks, a, b, c)
        bracket = narrow(bracket, place, a, b, c, count_a, count_b, count_c)
    value = tl.where(place > size, float("-inf"), score_of(bracket.low))
    value = tl.where(needed >= rivals, float("-inf"), value)
    tl.store(guess + row.row, tl.where(needed > 0, value, float("inf")))


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "capacity", "room", "chunks"])
def score_kernel(
    query, key, inputs, guess, segments, candidates, reached, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys,
    recent_keys, splits, segment, capacity, room, chunks, shape, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One of ``chunks`` even parts of a block's candidates: joined to one list and scored exactly.

    A row's rivals that reach its guess are collected in ``reached``, whose count goes on where there is no room.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    block = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    first, last = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(guess + rows.row, mask=rows.valid, other=float("inf"))
    s = tl.arange(0, BLOCK_S)
    sizes = tl.minimum(tl.load(segments.counts + block * splits + s, mask=s < splits, other=0), segment)
    ends = tl.cumsum(sizes, axis=0)
    total = tl.minimum(tl.sum(sizes, axis=0), capacity)
    tiles = tl.cdiv(total, shape.BLOCK_N)
    begin = tiles * chunk // chunks
    after = tiles * (chunk + 1) // chunks
    positions = candidates.positions + block * capacity
    for tile in range(begin, after):
        e = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        here = e < total
        # In which segment an entry of the joined list is, and where in it.
        source = tl.sum((ends[None, :] <= e[:, None]).to(tl.int32), axis=1)
        place = e - tl.sum(tl.where(s[None, :] < source[:, None], sizes[None, :], 0), axis=1)
        at = (block * splits + source) * segment + place
        tl.store(positions + e, tl.load(segments.positions + at, mask=here, other=0), mask=here)
    # What other threads have stored is read back: here, and after the next loop.
    tl.debug_barrier()
    queries = load_queries(query, rows, shape)
    keys = head_of(key, rows.batch, rows.kv_head)
    for tile in range(begin, after):
        e = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        position = tl.load(positions + e, mask=e < total, other=0)
        store_scores(queries, keys, rows, position, e, e < total, candidates, capacity, shape)
    tl.debug_barrier()

    many = tl.zeros([shape.BLOCK_M], dtype=tl.int32)
    for tile in range(begin, after):
        e = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        _position, _score, ones = reaching(positions, candidates, rows, capacity, e, total, first, last, least)
        many += tl.sum(ones, axis=1)
    # Places in a row's collection are given out a chunk at a time. Their order is no matter: it is a set.
    taken = tl.atomic_add(reached.counts + rows.row, many, mask=rows.valid & (many > 0), sem="relaxed")
    for tile in range(begin, after):
        e = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        position, score, ones = reaching(positions, candidates, rows, capacity, e, total, first, last, least)
        place = taken[:, None] + tl.cumsum(ones, axis=1) - ones
        kept = (ones > 0) & (place < room)
        at = rows.row[:, None] * room + place
        tl.store(reached.positions + at, tl.broadcast_to(position[None, :], kept.shape), mask=kept)
        tl.store(reached.scores + at, score, mask=kept)
        taken += tl.sum(ones, axis=1)


@triton.jit
def reaching(positions, candidates, rows, capacity, e, total, first, last, least):
    """(position, score of every row, 1 where it is a rival that scores its row's guess or more) of entries ``e``.

    NaN reaches any guess.
    """
    here = e < total
    position = tl.load(positions + e, mask=here, other=0)
    inside = rows.valid[:, None] & here[None, :]
    score = tl.load(candidates.scores + rows.row[:, None] * capacity + e[None, :], mask=inside, other=0.0)
    rival = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
    return position, score, (inside & rival & ~(score < least[:, None])).to(tl.int32)


@triton.jit
def store_scores(queries, keys, rows, position, e, here, candidates, stride, shape):
    """Stores q·k in float32 of the keys at ``position`` as entries ``e`` of each row, and what it may be off by."""
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
        if candidates.errors is not None:
            size = dot(tl.abs(part), tl.abs(tile), size)
    at = rows.row[:, None] * stride + e[None, :]
    inside = queries.valid[:, None] & here[None, :]
    tl.store(candidates.scores + at, score, mask=inside)
    if candidates.errors is not None:
        tl.store(candidates.errors + at, size * ((shape.D + 16) * _MATRIX_ULP), mask=inside)


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "capacity", "room"])
def choose_kernel(
    inputs, segments, guess, reached, choice, attended, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys,
    recent_keys, splits, segment, capacity, room, ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ``choice`` of a row among its rivals that reach its guess; or its flag, and an empty list.

    ``attended`` is the row's budget. A block has ``ROWS`` rows.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    first, last = rivals_of(row, sink_keys, recent_keys)
    needed = row.wanted - (row.end - row.start - (last - first))
    # As ``program_rows`` divides rows into blocks.
    blocks = tl.cdiv(Lq * group, ROWS)
    block = (row.batch * num_kv_heads + row.kv_head) * blocks
    block += blocks - 1 - (row.index * group + row.head % group) // ROWS
    s = tl.arange(0, BLOCK_S)
    sizes = tl.load(segments.counts + block * splits + s, mask=s < splits, other=0)
    total = tl.sum(sizes, axis=0)
    count = tl.load(reached.counts + row.row)
    complete = (tl.max(sizes, axis=0) <= segment) & (total <= capacity) & (count <= room)
    count = tl.where(complete, count, 0)
    sound = complete & ((needed <= 0) | (count >= needed))
    tl.store(choice.listed + row.row, tl.where(sound, total, 0))
    tl.store(attended + row.row, row.wanted)
    tl.store(choice.flags + row.row, tl.where(sound, 0, 1))
    limit, limit_end = find_best(
        reached.positions + row.row * room, reached.scores + row.row * room, count,
        rank_of(tl.load(guess + row.row)), sound, needed, first, last, BLOCK_E, True,
    )  # fmt: skip
    tl.store(choice.threshold + row.row, limit)
    tl.store(choice.ties_end + row.row, limit_end)


@triton.jit(do_not_specialize=PER_CALL)
def score_flagged_kernel(query, key, inputs, choice, candidates, budget_heads, num_kv_heads, group, Lq, Lk, shape):
    """Exact scores ``[row, Lk]`` of the keys that a flagged row sees. The grid's second axis divides the keys."""
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    rows = flagged_rows(rows, choice.flags)
    low, high = span(rows.start, rows.end, rows.valid & (rows.end > rows.start))
    queries = load_queries(query, rows, shape)
    keys = head_of(key, rows.batch, rows.kv_head)
    tiles = tl.cdiv(high - low, shape.BLOCK_N)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        position = low + tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        store_scores(queries, keys, rows, position, position, position < high, candidates, Lk, shape)


@triton.jit
def flagged_rows(rows, flags):
    """The ``Rows`` of which only those are valid whose flag is not 0."""
    flagged = rows.valid & (tl.load(flags + rows.row, mask=rows.valid, other=0) != 0)
    return Rows(
        rows.batch, rows.kv_head, rows.index, rows.head, rows.row, flagged, rows.start, rows.end, rows.wanted
    )  # fmt: skip


@triton.jit(do_not_specialize=PER_CALL)
def choose_flagged_kernel(
    inputs, choice, candidates, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, BLOCK_E: tl.constexpr
):
    """The ``choice`` of a flagged row among all keys, which are all its list then, from their scores ``[row, Lk]``."""
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    if tl.load(choice.flags + row.row) != 0:
        first, last = rivals_of(row, sink_keys, recent_keys)
        needed = row.wanted - (row.end - row.start - (last - first))
        scores = candidates.scores + row.row * Lk + first
        limit, limit_end = find_best(
            scores, scores, last - first, first * 0 + RANK_NEGATIVE_INFINITY, row.valid, needed, first, last, BLOCK_E,
            False,
        )  # fmt: skip
        tl.store(choice.listed + row.row, row.end)
        tl.store(choice.threshold + row.row, limit)
        tl.store(choice.ties_end + row.row, limit_end)


@triton.jit
def find_best(
    positions, scores, count, low, sound, needed, first, last, BLOCK_E: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """Threshold and end of its ties of the ``needed`` best of the rivals in ``[first, last)``, as ``find_thresholds``.

    The ``count`` rivals of rank ``low`` or more, with all of the best among them where they are ``sound``: they score
    ``scores`` at ``positions`` or, without ``LISTED``, at ``first`` and after.
    """
    held = load_ranks(scores, 0, count, BLOCK_E)
    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    highest = tl.max(held, axis=0)
    for begin in range(BLOCK_E, count, BLOCK_E):
        highest = tl.maximum(highest, tl.max(load_ranks(scores, begin, count, BLOCK_E), axis=0))
    if (sound & (needed > 0) & (needed < last - first)).to(tl.int32) > 0:
        bracket = Bracket(low, highest + 1, count, count * 0)
        bracket = search(bracket, needed, count_collected, Collected(held, scores, count, BLOCK_E))
        limit = score_of(bracket.low)
        if bracket.count_low != needed:
            # Too many ties: the position after the last one that is admitted.
            spare = needed - bracket.count_high
            before = first
            after = last
            while after - before > 1:
                middle = before + (after - before) // 2
                ties = count_ties(positions, scores, count, bracket.low, first, middle, BLOCK_E, LISTED)
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
    return tl.where(e < count, rank, _NO_RIVAL)


@triton.jit
def count_collected(collected, first, second, third):
    """``count_ranks`` of ``Collected``."""
    counts = count_ranks(collected.held, first, second, third)
    for begin in range(collected.BLOCK_E, collected.length, collected.BLOCK_E):
        ranks = load_ranks(collected.scores, begin, collected.length, collected.BLOCK_E)
        more = count_ranks(ranks, first, second, third)
        counts = (counts[0] + more[0], counts[1] + more[1], counts[2] + more[2])
    return counts


@triton.jit
def count_ties(
    positions, scores, count, rank, first, before, BLOCK_E: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """How many entries of this rank stand before a position."""
    ties = count * 0
    for begin in range(0, count, BLOCK_E):
        ranks = load_ranks(scores, begin, count, BLOCK_E)
        e = begin + tl.arange(0, BLOCK_E)
        position = first + e
        if LISTED:
            position = tl.load(positions + e, mask=e < count, other=FAR)
        ties += tl.sum(((ranks == rank) & (position < before)).to(tl.int32), axis=0)
    return ties

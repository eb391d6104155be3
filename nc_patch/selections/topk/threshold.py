"""The prefill of exact ``topk``: a search for each row's k-th largest score, over tiles of QK^T made anew in each pass.

A program takes a block of rows of one key/value head. A row keeps a bracket ``[low, high)`` of scores: at least k
candidates score ``low`` or more, and fewer than k ``high`` or more. A pass counts how many reach each of three
thresholds inside it, and finds the largest score below the middle one. Where the thresholds lie is a guess (a normal
quantile of a sample at first, then interpolation of the logarithm of the count), which decides how fast the bracket
closes, not what it closes on. After ``GUESSED_PASSES`` it is quartered by the rank of its floats, so that 17 more
passes end any search. One ends when the count at a threshold is exactly k, or when the bracket holds a single float:
that score is tied, and one more pass finds the last tie that is admitted.

With p passes a block reads K p + 1 times here, and ``attend_kernel`` K and V once: 2 * D * (p + 1) + 2 * Dv operations
for a pair of a query and a key. None is made where every budget covers the row's interval.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.ranks import (
    ABOVE_INFINITY,
    RANK_NEGATIVE_INFINITY,
    Bracket,
    narrow,
    rank_of,
    score_of,
    width_of,
)
from nc_patch.ops.triton.rows import FAR, forced_keys, head_of, program_rows, span
from nc_patch.ops.triton.scores import dot_scores, load_queries, score_run
from nc_patch.ops.triton.structs import PER_CALL

GUESSED_PASSES = tl.constexpr(8)
# Three counts of a tile travel in one int32, ten bits each, so that they are summed over the tile at once.
_FIELD_BITS = tl.constexpr(10)
_FIELD = tl.constexpr((1 << 10) - 1)


class Candidates(NamedTuple):
    """Of each row: the keys ``[first, last)``. Tiles are counted from ``origin``, the first key that any row sees."""

    first: Any
    last: Any
    origin: Any


class Counts(NamedTuple):
    """How many candidates of a row reach each of three ascending scores, and the largest score below the second."""

    first: Any
    second: Any
    third: Any
    below: Any


@triton.jit(do_not_specialize=PER_CALL)
def threshold_kernel(
    query, key, inputs, limits, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, shape
):  # fmt: skip
    """Writes the ``Limits`` of one block of rows.

    Of its candidates a row attends those that score above the threshold and, at positions below ``ties_end``, those
    that equal it. Blocks in which every row takes all or none of its candidates make no pass.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    firsts, recents = forced_keys(rows.wanted, sink_keys, recent_keys, True)
    origin, _last = span(rows.start, rows.end, rows.end > rows.start)
    candidates = Candidates(rows.start + firsts, rows.end - recents, origin)
    keys = head_of(key, rows.batch, rows.kv_head)
    needed = rows.wanted - firsts - recents
    size = candidates.last - candidates.first
    threshold = tl.where(needed > 0, float("-inf"), float("inf"))
    ties_end = tl.where(needed > 0, FAR, 0)
    searching = (needed > 0) & (needed < size)
    remaining = tl.sum(searching.to(tl.int32), axis=0)
    if remaining > 0:
        queries = load_queries(query, rows, shape)
        mean, deviation = sample_moments(queries, keys, candidates, searching, shape)
        nothing = tl.zeros([shape.BLOCK_M], dtype=tl.int32)
        bracket = Bracket(nothing + RANK_NEGATIVE_INFINITY, nothing + ABOVE_INFINITY, size, nothing)
        suspect = searching & False
        spare = nothing
        number = 0
        while remaining > 0:
            a, b, c = next_ranks(bracket, needed, size, mean, deviation, suspect, number)
            counts = count_range(queries, keys, candidates, searching, score_of(a), score_of(b), score_of(c), shape)
            before = bracket
            bracket = narrow(bracket, needed, a, b, c, counts.first, counts.second, counts.third)
            # No score lies between the largest below the middle threshold and that threshold.
            high = tl.minimum(bracket.high, rank_of(counts.below) + 1)
            high = tl.where(counts.second < needed, high, bracket.high)
            bracket = Bracket(bracket.low, high, bracket.count_low, bracket.count_high)
            # One key is missing: the score below is the k-th, unless it is tied. Nothing moved: the rest are ties.
            unmoved = (bracket.count_low == before.count_low) & (bracket.count_high == before.count_high)
            suspect = (counts.second == needed - 1) | unmoved
            exact = bracket.count_low == needed
            ended = searching & (exact | (width_of(bracket) <= 1))
            threshold = tl.where(ended, score_of(bracket.low), threshold)
            spare = tl.where(ended & ~exact, needed - bracket.count_high, spare)
            searching = searching & ~ended
            remaining = tl.sum(searching.to(tl.int32), axis=0)
            number += 1
        ties_end = end_ties(queries, keys, candidates, threshold, spare, ties_end, shape)
    tl.store(limits.threshold + rows.row, threshold, mask=rows.valid)
    tl.store(limits.ties_end + rows.row, ties_end, mask=rows.valid)


@triton.jit
def end_ties(queries, keys, candidates, threshold, spare, ties_end, shape):
    """``ties_end``, changed where a row has room for ``spare`` > 0 of its ties: to the position after the last one."""
    low, high = span(candidates.first, candidates.last, spare > 0)
    origin = candidates.origin
    for tile in range((low - origin) // shape.BLOCK_N, tl.cdiv(high - origin, shape.BLOCK_N)):
        begin = origin + tile * shape.BLOCK_N
        columns = begin + tl.arange(0, shape.BLOCK_N)
        raw = score_run(queries, keys, begin, columns < high, shape, True)
        ranked = tl.where(raw == raw, raw, float("inf"))
        tied = (among_candidates(columns, candidates) & (ranked == threshold[:, None])).to(tl.int32)
        within = (tied > 0) & (tl.cumsum(tied, axis=1) <= spare[:, None])
        past = tl.max(tl.where(within, columns[None, :] + 1, 0), axis=1)
        count = tl.sum(tied, axis=1)
        ties_end = tl.where((spare > 0) & (count >= spare), past, ties_end)
        spare = tl.maximum(spare - count, 0)
    return ties_end


@triton.jit
def among_candidates(columns, candidates):
    """Which keys of a tile are candidates of each row."""
    return (columns[None, :] >= candidates.first[:, None]) & (columns[None, :] < candidates.last[:, None])


@triton.jit
def sample_moments(queries, keys, candidates, searching, shape):
    """Mean and standard deviation of each row's scores over ``BLOCK_N`` evenly spaced keys, outliers set aside."""
    low, high = span(candidates.first, candidates.last, searching)
    at = (2 * tl.arange(0, shape.BLOCK_N) + 1).to(tl.int64)
    columns = low + ((high - low).to(tl.int64) * at // (2 * shape.BLOCK_N)).to(tl.int32)
    raw = dot_scores(queries, keys.data, columns.to(tl.int64) * keys.stride, columns < high, shape, True)
    among = among_candidates(columns, candidates) & (tl.abs(raw) < float("inf"))
    mean = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
    deviation = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
    for _ in range(3):
        size = tl.maximum(tl.sum(among.to(tl.float32), axis=1), 1.0)
        mean = tl.sum(tl.where(among, raw, 0.0), axis=1) / size
        off = tl.where(among, raw - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(off * off, axis=1) / size)
        among = among & (tl.abs(raw - mean[:, None]) <= 3.0 * deviation[:, None])
    return mean, tl.maximum(deviation, 1e-6 * tl.abs(mean) + 1e-30)


@triton.jit
def next_ranks(bracket, needed, size, mean, deviation, suspect, number):
    """Three ascending ranks strictly inside the bracket, to be counted in pass ``number``."""
    least = score_of(bracket.low)
    most = score_of(tl.minimum(bracket.high, ABOVE_INFINITY - 1))
    most = tl.where(bracket.high == ABOVE_INFINITY, float("inf"), most)

    # The count above an interpolated score is binomial in the bracket's count: aim at k and one deviation either side.
    bracketed = (bracket.count_low - bracket.count_high).to(tl.float32)
    part = (bracket.count_low - needed + 0.5) / bracketed
    aside = tl.maximum(tl.sqrt(tl.maximum(bracketed * part * (1.0 - part), 0.0)), 0.5)
    top = tl.log2(bracket.count_low + 0.5)
    slope = (most - least) / (top - tl.log2(bracket.count_high + 0.5))
    step = deviation * tl.exp2(tl.maximum(number - 1, 0).to(tl.float32))

    first = bracket.low + 1
    second = first
    third = first
    for i in tl.static_range(3):
        aim = needed - 0.5 + (1 - i) * aside
        aim = tl.minimum(tl.maximum(aim, bracket.count_high + 0.25), bracket.count_low - 0.25)
        guess = least + slope * (top - tl.log2(aim + 0.5))
        # One side of the bracket still unknown: walk away from the other in growing steps.
        guess = tl.where(tl.abs(most) == float("inf"), least + step * (i + 1), guess)
        guess = tl.where(tl.abs(least) == float("inf"), most - step * (3 - i), guess)
        # What a standard normal exceeds with probability p, by Tukey's lambda: within 0.2 for p of 1e-4 or more.
        upper = (needed.to(tl.float32) - 0.5) * (2.0 if i == 0 else (1.0 if i == 1 else 0.5)) / size
        upper = tl.minimum(tl.maximum(upper, 1e-9), 0.9999)
        normal = 4.91 * (tl.exp2(0.14 * tl.log2(1.0 - upper)) - tl.exp2(0.14 * tl.log2(upper)))
        guess = tl.where(number == 0, mean + deviation * normal, guess)
        rank = rank_of(guess)
        # The top of the bracket may be a score that occurs; where it is, its count ends the search.
        if i > 0:
            rank = tl.where(suspect, bracket.high - 1, rank)
        quarter = (bracket.low.to(tl.int64) + width_of(bracket) * (i + 1) // 4).to(tl.int32)
        rank = tl.where(number >= GUESSED_PASSES, quarter, rank)
        first = second
        second = third
        third = tl.minimum(tl.maximum(rank, third), bracket.high - 1)
    return first, second, third


@triton.jit
def count_range(queries, keys, candidates, searching, first, second, third, shape):
    """The ``Counts`` of the rows still searching at three ascending scores; one pass over their candidates."""
    nothing = tl.zeros([shape.BLOCK_M], dtype=tl.int32)
    counts = Counts(nothing, nothing, nothing, tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32))
    n = tl.arange(0, shape.BLOCK_N)
    origin = candidates.origin
    low, high = span(candidates.first, candidates.last, searching)
    begin = (low - origin) // shape.BLOCK_N
    stop = tl.cdiv(high - origin, shape.BLOCK_N)
    # Tiles that lie inside every row's candidates need no mask.
    all_first = tl.max(tl.where(searching, candidates.first, 0), axis=0)
    all_last = tl.min(tl.where(searching, candidates.last, FAR), axis=0)
    inner_begin = tl.minimum(tl.cdiv(all_first - origin, shape.BLOCK_N), stop)
    inner_stop = tl.maximum((all_last - origin) // shape.BLOCK_N, inner_begin)
    for tile in range(inner_begin, inner_stop):
        raw = score_run(queries, keys, origin + tile * shape.BLOCK_N, n >= 0, shape, False)
        counts = count_tile(counts, raw, first, second, third, raw == raw, False)
    before = inner_begin - begin
    for edge in range(before + stop - inner_stop):
        tile = tl.where(edge < before, begin + edge, inner_stop + edge - before)
        columns = origin + tile * shape.BLOCK_N + n
        raw = score_run(queries, keys, origin + tile * shape.BLOCK_N, columns < high, shape, True)
        counts = count_tile(counts, raw, first, second, third, among_candidates(columns, candidates), True)
    return counts


@triton.jit
def count_tile(counts, raw, first, second, third, among, MASKED: tl.constexpr):
    """``Counts`` with those of a tile; of the keys ``among`` the candidates, where ``MASKED``.

    A NaN compares below nothing, so it is counted at every score, as +inf is.
    """
    reached = tl.where(raw < second[:, None], 1, tl.where(raw < third[:, None], 1025, 1049601))
    reached = tl.where(raw < first[:, None], 0, reached)
    below = tl.where(raw < second[:, None], raw, float("-inf"))
    if MASKED:
        reached = tl.where(among, reached, 0)
        below = tl.where(among, below, float("-inf"))
    packed = tl.sum(reached, axis=1)
    return Counts(
        counts.first + (packed & _FIELD),
        counts.second + ((packed >> _FIELD_BITS) & _FIELD),
        counts.third + (packed >> (2 * _FIELD_BITS)),
        tl.maximum(counts.below, tl.max(below, axis=1)),
    )

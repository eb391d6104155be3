"""The search for each row's k-th largest score, over tiles of QK^T that are recomputed in every pass.

A row keeps a bracket ``[low, high)`` of scores such that at least k candidates score ``low`` or more and fewer than k
score ``high`` or more. A pass counts, for three thresholds inside the bracket, how many candidates reach each, and
finds the largest score below the middle one. Where the thresholds lie is a guess (a normal quantile of a sample at
first, then interpolation of the logarithm of the count), which decides how fast the bracket closes, not what it closes
on. After ``GUESSED_PASSES`` the bracket is quartered by the rank of its floats instead, so that 17 more passes end the
search for any input: the bracket is at most 2**32 floats wide.

A search ends when the count at a threshold is exactly k, or when the bracket holds a single float: that score is tied,
and one more pass finds the position of the last tie that is admitted.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.tiles import FAR, PER_CALL, dot_scores, forced_keys, load_query, program_rows, span

GUESSED_PASSES = tl.constexpr(8)
_NEGATIVE_INFINITY = tl.constexpr(-2139095041)
_ABOVE_INFINITY = tl.constexpr(2139095041)
# Three counts of a tile travel in one int32, ten bits each, so that they are summed over the tile at once.
_FIELD_BITS = tl.constexpr(10)
_FIELD = tl.constexpr((1 << 10) - 1)


@triton.jit(do_not_specialize=PER_CALL)
def threshold_kernel(
    query,
    key,
    visible,
    budget,
    threshold,
    ties_end,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Threshold and end of its ties, ``[B, Hq, Lq]``, of one block of rows: what ``find_thresholds`` returns."""
    batch, kv_head, index, head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    keys = key + batch * stride_kb + kv_head * stride_kh
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    origin, _last = span(start, end, end > start)
    limit, limit_end = find_thresholds(
        query_rows, valid, keys, stride_kl, start + firsts, end - recents, wanted - firsts - recents, origin, D,
        BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D,
    )  # fmt: skip
    tl.store(threshold + row, limit, mask=valid)
    tl.store(ties_end + row, limit_end, mask=valid)


@triton.jit
def find_thresholds(
    query_rows,
    valid,
    keys,
    stride_kl,
    first,
    last,
    needed,
    origin,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """(threshold, ties_end) of each row's ``needed`` highest keys in ``[first, last)``.

    They are the keys that score above the threshold and, at positions below ``ties_end``, those that equal it. Blocks
    in which every row takes all or none of its candidates make no pass.
    """
    candidates = last - first
    threshold = tl.where(needed > 0, float("-inf"), float("inf"))
    ties_end = tl.where(needed > 0, FAR, 0)
    searching = (needed > 0) & (needed < candidates)
    remaining = tl.sum(searching.to(tl.int32), axis=0)
    if remaining > 0:
        queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
        mean, deviation = sample_moments(
            queries, query_rows, valid, keys, stride_kl, first, last, searching, D, BLOCK_N, BLOCK_D, CHUNK_D
        )
        low = tl.full([BLOCK_M], _NEGATIVE_INFINITY, dtype=tl.int32)
        high = tl.full([BLOCK_M], _ABOVE_INFINITY, dtype=tl.int32)
        count_low = candidates
        count_high = tl.zeros([BLOCK_M], dtype=tl.int32)
        suspect = searching & False
        spare = tl.zeros([BLOCK_M], dtype=tl.int32)
        number = 0
        while remaining > 0:
            a, b, c = next_thresholds(
                low, high, count_low, count_high, needed, candidates, mean, deviation, suspect, number
            )
            count_a, count_b, count_c, below = count_range(
                queries,
                query_rows,
                valid,
                keys,
                stride_kl,
                first,
                last,
                searching,
                origin,
                score_of(a),
                score_of(b),
                score_of(c),
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                CHUNK_D,
            )
            was_low = count_low
            was_high = count_high
            low = tl.where(count_c >= needed, c, tl.where(count_b >= needed, b, tl.where(count_a >= needed, a, low)))
            count_low = tl.where(
                count_c >= needed,
                count_c,
                tl.where(count_b >= needed, count_b, tl.where(count_a >= needed, count_a, count_low)),
            )
            high = tl.where(count_a < needed, a, tl.where(count_b < needed, b, tl.where(count_c < needed, c, high)))
            count_high = tl.where(
                count_a < needed,
                count_a,
                tl.where(count_b < needed, count_b, tl.where(count_c < needed, count_c, count_high)),
            )
            # No score lies between the largest below the middle threshold and that threshold.
            high = tl.where(count_b < needed, tl.minimum(high, rank_of(below) + 1), high)
            # One key is missing: the score below is the k-th, unless it is tied. Nothing moved: the rest are ties.
            one_short = count_b == needed - 1
            suspect = one_short | ((count_low == was_low) & (count_high == was_high))
            exact = count_low == needed
            closed = high.to(tl.int64) - low.to(tl.int64) <= 1
            ended = searching & (exact | closed)
            threshold = tl.where(ended, score_of(low), threshold)
            spare = tl.where(ended & ~exact, needed - count_high, spare)
            searching = searching & ~ended
            remaining = tl.sum(searching.to(tl.int32), axis=0)
            number += 1
        ties_end = end_ties(
            queries, query_rows, valid, keys, stride_kl, first, last, threshold, spare, origin, ties_end, D, BLOCK_M,
            BLOCK_N, BLOCK_D, CHUNK_D,
        )  # fmt: skip
    return threshold, ties_end


@triton.jit
def end_ties(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    first,
    last,
    threshold,
    spare,
    origin,
    ties_end,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """``ties_end``, changed where a row has room for ``spare`` > 0 of its ties: to the position after the last one."""
    n = tl.arange(0, BLOCK_N)
    low, high = span(first, last, spare > 0)
    for tile in range((low - origin) // BLOCK_N, tl.cdiv(high - origin, BLOCK_N)):
        columns = origin + tile * BLOCK_N + n
        first_key = keys + (origin + tile * BLOCK_N).to(tl.int64) * stride_kl
        raw = dot_scores(
            queries, query_rows, valid, first_key, n * stride_kl, columns < high, D, BLOCK_D, CHUNK_D, True
        )
        ranked = tl.where(raw == raw, raw, float("inf"))
        tied = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        tied = (tied & (ranked == threshold[:, None])).to(tl.int32)
        within = (tied > 0) & (tl.cumsum(tied, axis=1) <= spare[:, None])
        past = tl.max(tl.where(within, columns[None, :] + 1, 0), axis=1)
        count = tl.sum(tied, axis=1)
        ties_end = tl.where((spare > 0) & (count >= spare), past, ties_end)
        spare = tl.maximum(spare - count, 0)
    return ties_end


@triton.jit
def rank_of(score):
    """A float32 as an int32 of the same order; NaN has no place in it."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(rank):
    """The float32 whose ``rank_of`` is ``rank``."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def normal_quantile(upper):
    """The z that a standard normal exceeds with probability ``upper`` (Abramowitz and Stegun 26.2.23, error 5e-4)."""
    tail = tl.minimum(upper, 1.0 - upper)
    t = tl.sqrt(-2.0 * 0.6931471805599453 * tl.log2(tail))
    over = 2.515517 + t * (0.802853 + t * 0.010328)
    under = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    z = t - over / under
    return tl.where(upper < 0.5, z, -z)


@triton.jit
def count_tile(raw, first, second, third, among, MASKED: tl.constexpr):
    """Of each row of a tile, counts at or above three ascending thresholds, packed, and the largest below ``second``.

    A NaN compares below nothing, so it is counted at every threshold, as +inf is.
    """
    reached = tl.where(raw < second, 1, tl.where(raw < third, 1025, 1049601))
    reached = tl.where(raw < first, 0, reached)
    below = tl.where(raw < second, raw, float("-inf"))
    if MASKED:
        reached = tl.where(among, reached, 0)
        below = tl.where(among, below, float("-inf"))
    return tl.sum(reached, axis=1), tl.max(below, axis=1)


@triton.jit
def sample_moments(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    first,
    last,
    searching,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Mean and standard deviation of each row's scores over ``BLOCK_N`` evenly spaced keys, outliers set aside."""
    low, high = span(first, last, searching)
    at = (2 * tl.arange(0, BLOCK_N) + 1).to(tl.int64)
    columns = low + ((high - low).to(tl.int64) * at // (2 * BLOCK_N)).to(tl.int32)
    raw = dot_scores(
        queries, query_rows, valid, keys, columns.to(tl.int64) * stride_kl, columns < high, D, BLOCK_D, CHUNK_D, True
    )
    among = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    among = among & (tl.abs(raw) < float("inf"))
    mean = tl.zeros_like(first).to(tl.float32)
    deviation = tl.zeros_like(first).to(tl.float32)
    for _ in range(3):
        size = tl.maximum(tl.sum(among.to(tl.float32), axis=1), 1.0)
        mean = tl.sum(tl.where(among, raw, 0.0), axis=1) / size
        off = tl.where(among, raw - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(off * off, axis=1) / size)
        among = among & (tl.abs(raw - mean[:, None]) <= 3.0 * deviation[:, None])
    return mean, tl.maximum(deviation, 1e-6 * tl.abs(mean) + 1e-30)


@triton.jit
def next_thresholds(low, high, count_low, count_high, needed, candidates, mean, deviation, suspect, number):
    """Three ascending ranks strictly inside the bracket ``(low, high)``, to be counted in pass ``number``."""
    least = score_of(low)
    most = score_of(tl.minimum(high, _ABOVE_INFINITY - 1))
    most = tl.where(high == _ABOVE_INFINITY, float("inf"), most)
    width = high.to(tl.int64) - low.to(tl.int64)

    # The count above an interpolated score is binomial in the bracket's count: aim at k and one deviation either side.
    bracketed = (count_low - count_high).to(tl.float32)
    part = (count_low - needed + 0.5) / bracketed
    aside = tl.maximum(tl.sqrt(tl.maximum(bracketed * part * (1.0 - part), 0.0)), 0.5)
    top = tl.log2(count_low + 0.5)
    slope = (most - least) / (top - tl.log2(count_high + 0.5))
    step = deviation * tl.exp2(tl.maximum(number - 1, 0).to(tl.float32))

    for_third = rank_of(least)
    for_first = for_third
    for_second = for_third
    for i in tl.static_range(3):
        aim = tl.minimum(tl.maximum(needed - 0.5 + (1 - i) * aside, count_high + 0.25), count_low - 0.25)
        guess = least + slope * (top - tl.log2(aim + 0.5))
        # One side of the bracket still unknown: walk away from the other in growing steps.
        guess = tl.where(tl.abs(most) == float("inf"), least + step * (i + 1), guess)
        guess = tl.where(tl.abs(least) == float("inf"), most - step * (3 - i), guess)
        upper = (needed.to(tl.float32) - 0.5) * (2.0 if i == 0 else (1.0 if i == 1 else 0.5)) / candidates
        normal = mean + deviation * normal_quantile(tl.minimum(tl.maximum(upper, 1e-9), 0.9999))
        guess = tl.where(number == 0, normal, guess)
        rank = rank_of(guess)
        # The top of the bracket may be a score that occurs; where it is, its count ends the search.
        if i > 0:
            rank = tl.where(suspect, high - 1, rank)
        quarter = (low.to(tl.int64) + width * (i + 1) // 4).to(tl.int32)
        rank = tl.where(number >= GUESSED_PASSES, quarter, rank)
        rank = tl.minimum(tl.maximum(rank, low + 1), high - 1)
        if i == 0:
            for_first = rank
        elif i == 1:
            for_second = tl.maximum(rank, for_first)
        else:
            for_third = tl.maximum(rank, for_second)
    return for_first, for_second, for_third


@triton.jit
def count_range(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    first,
    last,
    searching,
    origin,
    thresholds_first,
    thresholds_second,
    thresholds_third,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """One pass over the keys of the rows still searching: three counts, and the largest below the middle threshold."""
    count_first = tl.zeros([BLOCK_M], dtype=tl.int32)
    count_second = tl.zeros([BLOCK_M], dtype=tl.int32)
    count_third = tl.zeros([BLOCK_M], dtype=tl.int32)
    below = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)
    low, high = span(first, last, searching)
    begin = (low - origin) // BLOCK_N
    stop = tl.cdiv(high - origin, BLOCK_N)
    # Tiles that lie inside every row's candidates need no mask.
    all_first = tl.max(tl.where(searching, first, 0), axis=0)
    all_last = tl.min(tl.where(searching, last, FAR), axis=0)
    inner_begin = tl.minimum(tl.cdiv(all_first - origin, BLOCK_N), stop)
    inner_stop = tl.maximum((all_last - origin) // BLOCK_N, inner_begin)
    for tile in range(inner_begin, inner_stop):
        first_key = keys + (origin + tile * BLOCK_N).to(tl.int64) * stride_kl
        raw = dot_scores(queries, query_rows, valid, first_key, n * stride_kl, n >= 0, D, BLOCK_D, CHUNK_D, False)
        packed, largest = count_tile(
            raw,
            thresholds_first[:, None],
            thresholds_second[:, None],
            thresholds_third[:, None],
            raw == raw,
            False,
        )
        count_first += packed & _FIELD
        count_second += (packed >> _FIELD_BITS) & _FIELD
        count_third += packed >> (2 * _FIELD_BITS)
        below = tl.maximum(below, largest)
    before = inner_begin - begin
    for edge in range(before + stop - inner_stop):
        tile = tl.where(edge < before, begin + edge, inner_stop + edge - before)
        columns = origin + tile * BLOCK_N + n
        first_key = keys + (origin + tile * BLOCK_N).to(tl.int64) * stride_kl
        raw = dot_scores(
            queries, query_rows, valid, first_key, n * stride_kl, columns < high, D, BLOCK_D, CHUNK_D, True
        )
        among = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        packed, largest = count_tile(
            raw, thresholds_first[:, None], thresholds_second[:, None], thresholds_third[:, None], among, True
        )
        count_first += packed & _FIELD
        count_second += (packed >> _FIELD_BITS) & _FIELD
        count_third += packed >> (2 * _FIELD_BITS)
        below = tl.maximum(below, largest)
    return count_first, count_second, count_third, below

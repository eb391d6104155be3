"""From the keys that may be among a row's best to exactly its best; one program works on one row.

The scan (``triton_codes.scan_kernel``) leaves segments of candidates. Here a row's guess is taken from the sampled
scores before the scan, and after it the candidates are scored exactly and written as one list, in which the exact k-th
largest score is found. All that is unlisted scores less than the guess; so the list holds the best if and only if it is
complete and as many of its rivals as are needed reach the guess. A row where that fails is flagged and left empty.

Rows are those of a contiguous ``[B, Hq, Lq]``.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton_threshold import rank_of, score_of
from nc_patch.ops.triton_tiles import FAR, forced_keys

_RANK_NEGATIVE_INFINITY = tl.constexpr(-2139095041)
_RANK_INFINITY = tl.constexpr(2139095040)
# Below the rank of every score.
_NO_RIVAL = tl.constexpr(-2147483648)
_HALF_ULP = tl.constexpr(2.0**-24)
# Three counts of a block travel in one int64.
_FIELD_BITS = tl.constexpr(20)
_FIELD = tl.constexpr((1 << 20) - 1)
# Quarterings of the bracket of a guess: then it is 2**12 floats wide at most, a relative 2**-11.
_GUESS_PASSES = tl.constexpr(10)
# Deviations of the sample's count by which the guess lies on the safe side.
_DEVIATIONS = tl.constexpr(5.0)


@triton.jit
def row_interval(
    row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
    recent_keys,
):  # fmt: skip
    """(batch, head, index, start, end, budget, first rival, end of the rivals) of one row, as ``program_rows``."""
    index = row % Lq
    head = (row // Lq) % num_heads
    batch = row // (Lq * num_heads)
    interval = visible + batch * stride_ib + index * stride_il
    start = tl.maximum(tl.load(interval), 0)
    end = tl.maximum(start, tl.minimum(tl.load(interval + 1), Lk))
    wanted = tl.load(budget + batch * stride_nb + head * stride_nh + index * stride_nl)
    wanted = tl.minimum(tl.maximum(wanted, 0), end - start)
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    return batch, head, index, start, end, wanted, start + firsts, end - recents


@triton.jit(do_not_specialize=["num_heads", "Lq", "Lk", "sink_keys", "recent_keys"])
def guess_kernel(
    visible,
    budget,
    samples,
    guess,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_heads,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    SAMPLES: tl.constexpr,
):
    """A score that at least the needed rivals of a row should reach, and few more; -inf where the sample is no help."""
    row = tl.program_id(0).to(tl.int64)
    _batch, _head, _index, _start, _end, wanted, first, last = row_interval(
        row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
        recent_keys,
    )  # fmt: skip
    rivals = last - first
    needed = wanted - (_end - _start - rivals)
    sampled = tl.load(samples + row * SAMPLES + tl.arange(0, SAMPLES))
    ranks = tl.where(sampled > float("-inf"), rank_of(sampled), _NO_RIVAL)
    size = tl.sum((ranks > _NO_RIVAL).to(tl.int32), axis=0)
    share = needed.to(tl.float32) * size.to(tl.float32) / tl.maximum(rivals, 1).to(tl.float32)
    place = tl.ceil(share + _DEVIATIONS * tl.sqrt(share) + 4.0).to(tl.int32)
    low = tl.min(tl.where(ranks > _NO_RIVAL, ranks, _RANK_INFINITY), axis=0)
    high = tl.max(ranks, axis=0) + 1
    for _pass in range(_GUESS_PASSES):
        width = tl.maximum(high, low).to(tl.int64) - low.to(tl.int64)
        a = (low.to(tl.int64) + width // 4).to(tl.int32)
        b = (low.to(tl.int64) + width // 2).to(tl.int32)
        c = (low.to(tl.int64) + width * 3 // 4).to(tl.int32)
        count_a, count_b, count_c = count_ranks(ranks, a, b, c)
        low, high, _count_low, _count_high = narrow(low, high, 0, 0, place, a, b, c, count_a, count_b, count_c)
    value = tl.where(place > size, float("-inf"), score_of(low))
    value = tl.where(needed >= rivals, float("-inf"), value)
    tl.store(guess + row, tl.where(needed > 0, value, float("inf")))


@triton.jit
def count_ranks(ranks, a, b, c):
    """How many ranks are at or above each of three ascending ones."""
    one = tl.full([1], 1, tl.int64)
    packed = tl.where(ranks >= a, one, 0)
    packed += tl.where(ranks >= b, one << _FIELD_BITS, 0)
    packed += tl.where(ranks >= c, one << (2 * _FIELD_BITS), 0)
    total = tl.sum(packed, axis=0)
    return (
        (total & _FIELD).to(tl.int32),
        ((total >> _FIELD_BITS) & _FIELD).to(tl.int32),
        (total >> (2 * _FIELD_BITS)).to(tl.int32),
    )


@triton.jit
def narrow(low, high, count_low, count_high, needed, a, b, c, count_a, count_b, count_c):
    """The bracket ``[low, high)`` after counting inside it: at least ``needed`` reach ``low``, fewer ``high``."""
    up = tl.where(count_c >= needed, c, tl.where(count_b >= needed, b, tl.where(count_a >= needed, a, low)))
    count_up = tl.where(count_b >= needed, count_b, tl.where(count_a >= needed, count_a, count_low))
    count_up = tl.where(count_c >= needed, count_c, count_up)
    down = tl.where(count_a < needed, a, tl.where(count_b < needed, b, tl.where(count_c < needed, c, high)))
    count_down = tl.where(count_b < needed, count_b, tl.where(count_c < needed, count_c, count_high))
    count_down = tl.where(count_a < needed, count_a, count_down)
    return up, down, count_up, count_down


@triton.jit(do_not_specialize=["group", "num_heads", "Lq", "splits", "segment", "capacity"])
def score_kernel(
    query,
    key,
    counts,
    segment_positions,
    segment_scores,
    segment_errors,
    positions,
    scores,
    errors,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    group,
    num_heads,
    Lq,
    splits,
    segment,
    capacity,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REFINE: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
):
    """Copies one segment to its place in the row's list, with ``REFINE`` scoring its keys exactly.

    With ``WANT_BOUNDS`` ``errors`` is what each score may be off by.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    index = row % Lq
    head = (row // Lq) % num_heads
    batch = row // (Lq * num_heads)
    s = tl.arange(0, BLOCK_S)
    sizes = tl.minimum(tl.load(counts + row * splits + s, mask=s < splits, other=0), segment)
    begin = tl.sum(tl.where(s < split, sizes, 0), axis=0)
    size = tl.sum(tl.where(s == split, sizes, 0), axis=0)
    source = (row * splits + split) * segment
    target = row * capacity + begin
    d = tl.arange(0, BLOCK_D)
    keys = key + batch * stride_kb + (head // group) * stride_kh
    if REFINE:
        q = tl.load(query + batch * stride_qb + head * stride_qh + index * stride_ql + d, mask=d < D, other=0.0)
        q = q.to(tl.float32)
    for block in range(0, size, BLOCK_E):
        e = block + tl.arange(0, BLOCK_E)
        here = e < size
        room = here & (begin + e < capacity)
        position = tl.load(segment_positions + source + e, mask=here, other=0)
        if REFINE:
            rows = keys + position.to(tl.int64) * stride_kl
            k = tl.load(rows[:, None] + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
            products = k.to(tl.float32) * q[None, :]
            score = tl.sum(products, axis=1)
            if WANT_BOUNDS:
                error = tl.sum(tl.abs(products), axis=1) * ((D + 16) * _HALF_ULP)
        else:
            score = tl.load(segment_scores + source + e, mask=here, other=0.0)
            if WANT_BOUNDS:
                error = tl.load(segment_errors + source + e, mask=here, other=0.0)
        tl.store(positions + target + e, position, mask=room)
        tl.store(scores + target + e, score, mask=room)
        if WANT_BOUNDS:
            tl.store(errors + target + e, error, mask=room)


@triton.jit(do_not_specialize=["num_heads", "Lq", "Lk", "sink_keys", "recent_keys", "splits", "segment", "capacity"])
def choose_kernel(
    visible,
    budget,
    counts,
    guess,
    positions,
    scores,
    listed,
    threshold,
    ties_end,
    attended,
    flags,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_heads,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    splits,
    segment,
    capacity,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Threshold and end of its ties of a row, as ``find_thresholds``; or the row's flag, and an empty list.

    ``listed`` is the length of the list, ``attended`` the row's budget. A bracket of float ranks is quartered until the
    count at its low end is the one needed or a single float is left. The ranks of a list of at most ``BLOCK_E`` stay in
    registers.
    """
    row = tl.program_id(0).to(tl.int64)
    _batch, _head, _index, start, end, wanted, first, last = row_interval(
        row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
        recent_keys,
    )  # fmt: skip
    rivals = last - first
    needed = wanted - (end - start - rivals)
    s = tl.arange(0, BLOCK_S)
    sizes = tl.load(counts + row * splits + s, mask=s < splits, other=0)
    total = tl.sum(sizes, axis=0)
    complete = (tl.max(sizes, axis=0) <= segment) & (total <= capacity)
    count = tl.where(complete, total, 0)
    positions += row * capacity
    scores += row * capacity
    held = load_ranks(positions, scores, 0, count, first, last, BLOCK_E)
    least = rank_of(tl.load(guess + row))
    reached, _b, _c = count_list(held, positions, scores, count, first, last, least, least, least, BLOCK_E)
    sound = complete & ((needed <= 0) | (reached >= needed))

    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    low = least
    count_low = reached
    high = highest_rank(held, positions, scores, count, first, last, BLOCK_E) + 1
    count_high = count * 0
    searching = (sound & (needed > 0) & (needed < rivals)).to(tl.int32)
    if searching > 0:
        while (count_low != needed) & (high.to(tl.int64) - low.to(tl.int64) > 1):
            width = high.to(tl.int64) - low.to(tl.int64)
            a = tl.maximum((low.to(tl.int64) + width // 4).to(tl.int32), low + 1)
            b = tl.maximum((low.to(tl.int64) + width // 2).to(tl.int32), a)
            c = tl.maximum((low.to(tl.int64) + width * 3 // 4).to(tl.int32), b)
            count_a, count_b, count_c = count_list(held, positions, scores, count, first, last, a, b, c, BLOCK_E)
            low, high, count_low, count_high = narrow(
                low, high, count_low, count_high, needed, a, b, c, count_a, count_b, count_c
            )
        limit = score_of(low)
        if count_low != needed:
            # Too many ties: the position after the last one that is admitted.
            spare = needed - count_high
            before = first
            after = last
            while after - before > 1:
                middle = before + (after - before) // 2
                ties = count_ties(positions, scores, count, first, last, low, middle, BLOCK_E)
                before = tl.where(ties < spare, middle, before)
                after = tl.where(ties < spare, after, middle)
            limit_end = after
    tl.store(listed + row, tl.where(sound, count, 0))
    tl.store(threshold + row, limit)
    tl.store(ties_end + row, limit_end)
    tl.store(attended + row, wanted)
    tl.store(flags + row, tl.where(sound, 0, 1))


@triton.jit
def load_ranks(positions, scores, begin, count, first, last, BLOCK_E: tl.constexpr):
    """Ranks of ``BLOCK_E`` entries of a list; NaN is as high as +inf, and what is no rival is below every score."""
    e = begin + tl.arange(0, BLOCK_E)
    position = tl.load(positions + e, mask=e < count, other=-1)
    score = tl.load(scores + e, mask=e < count, other=0.0)
    # -0.0 equals 0.0.
    rank = tl.where(score == score, rank_of(score + 0.0), _RANK_INFINITY)
    return tl.where((position >= first) & (position < last), rank, _NO_RIVAL)


@triton.jit
def count_list(held, positions, scores, count, first, last, a, b, c, BLOCK_E: tl.constexpr):
    """``count_ranks`` of a whole list, whose first ``BLOCK_E`` entries are ``held``."""
    count_a, count_b, count_c = count_ranks(held, a, b, c)
    for begin in range(BLOCK_E, count, BLOCK_E):
        ranks = load_ranks(positions, scores, begin, count, first, last, BLOCK_E)
        more_a, more_b, more_c = count_ranks(ranks, a, b, c)
        count_a += more_a
        count_b += more_b
        count_c += more_c
    return count_a, count_b, count_c


@triton.jit
def highest_rank(held, positions, scores, count, first, last, BLOCK_E: tl.constexpr):
    """The largest rank of a list, whose first ``BLOCK_E`` entries are ``held``."""
    highest = tl.max(held, axis=0)
    for begin in range(BLOCK_E, count, BLOCK_E):
        ranks = load_ranks(positions, scores, begin, count, first, last, BLOCK_E)
        highest = tl.maximum(highest, tl.max(ranks, axis=0))
    return highest


@triton.jit
def count_ties(positions, scores, count, first, last, rank, before, BLOCK_E: tl.constexpr):
    """How many rivals of this rank stand before a position."""
    ties = count * 0
    for begin in range(0, count, BLOCK_E):
        ranks = load_ranks(positions, scores, begin, count, first, last, BLOCK_E)
        e = begin + tl.arange(0, BLOCK_E)
        position = tl.load(positions + e, mask=e < count, other=FAR)
        ties += tl.sum(((ranks == rank) & (position < before)).to(tl.int32), axis=0)
    return ties

"""From the keys that may be among the best of a block of rows to exactly the best of each row.

The scan (``scan.scan_kernel``) leaves segments of candidates, which the rows of a block share. Here a row's
guess is taken from the sampled scores before the scan. After it every candidate is scored exactly for all rows of its
block at once, and a row collects those of its rivals that reach its guess, in any order. The exact k-th largest of
these is the row's threshold. All that is not collected scores less than the guess; so the best are among them if and
only if the list is complete and as many of the row's rivals as are needed reach the guess. A row where that fails is
flagged and left empty.

Rows are those of a contiguous ``[B, Hq, Lq]``; blocks are those of ``tiles.program_rows``.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.tiles import FAR, PER_CALL, dot, forced_keys, load_query, program_rows
from nc_patch.selections.topk.threshold import rank_of, score_of

RANK_NEGATIVE_INFINITY = tl.constexpr(-2139095041)
_RANK_INFINITY = tl.constexpr(2139095040)
# Below the rank of every score.
_NO_RIVAL = tl.constexpr(-2147483648)
# What one step of a sum on matrix units may lose, relative to the sum of the sizes: they cut where float32 rounds.
MATRIX_ULP = tl.constexpr(2.0**-22)
# Three counts of a block travel in one int64.
_FIELD_BITS = tl.constexpr(20)
_FIELD = tl.constexpr((1 << 20) - 1)
# Entries that are set to zero at once.
_ZEROS = tl.constexpr(1024)
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


@triton.jit(do_not_specialize=[*PER_CALL, "slots"])
def guess_kernel(
    visible,
    budget,
    samples,
    guess,
    reached,
    page_counts,
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
    slots,
    SAMPLES: tl.constexpr,
):
    """A score that at least the needed rivals of a row should reach, and few more; -inf where the sample is no help.

    Sets to zero what later kernels count in: ``reached[row]`` and ``page_counts[row, slots]``.
    """
    row = tl.program_id(0).to(tl.int64)
    tl.store(reached + row, 0)
    zeros = tl.arange(0, _ZEROS)
    for slot in range(0, slots, _ZEROS):
        tl.store(page_counts + row * slots + slot + zeros, tl.zeros([_ZEROS], tl.int32), mask=slot + zeros < slots)
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


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "capacity", "room", "chunks"])
def score_kernel(
    query,
    key,
    visible,
    budget,
    guess,
    counts,
    segment_positions,
    segment_scores,
    segment_errors,
    positions,
    scores,
    errors,
    reached,
    reached_positions,
    reached_scores,
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
    splits,
    segment,
    capacity,
    room,
    chunks,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    REFINE: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
):
    """One of ``chunks`` even parts of a block's candidates: joined to one list, and with ``REFINE`` scored exactly.

    ``positions[block, capacity]`` is the list, ``scores[row, capacity]`` what every row of the block scores there, and
    with ``WANT_BOUNDS`` ``errors`` what each score may be off by. A row's rivals that reach its guess are collected in
    ``reached_positions`` and ``reached_scores[row, room]``; ``reached[row]`` counts on where there is no room. Segments
    have ``ROWS`` rows, of which ``BLOCK_M`` is at least as many as a matrix instruction takes.
    """
    batch, kv_head, index, head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    block = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    least = tl.load(guess + row, mask=valid, other=float("inf"))
    s = tl.arange(0, BLOCK_S)
    sizes = tl.minimum(tl.load(counts + block * splits + s, mask=s < splits, other=0), segment)
    ends = tl.cumsum(sizes, axis=0)
    total = tl.minimum(tl.sum(sizes, axis=0), capacity)
    tiles = tl.cdiv(total, BLOCK_E)
    begin = tiles * chunk // chunks
    after = tiles * (chunk + 1) // chunks
    positions += block * capacity
    m = tl.arange(0, BLOCK_M)
    for tile in range(begin, after):
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        here = e < total
        # In which segment an entry of the joined list is, and where in it.
        source = tl.sum((ends[None, :] <= e[:, None]).to(tl.int32), axis=1)
        place = e - tl.sum(tl.where(s[None, :] < source[:, None], sizes[None, :], 0), axis=1)
        source = block * splits + source
        tl.store(positions + e, tl.load(segment_positions + source * segment + place, mask=here, other=0), mask=here)
        if not REFINE:
            origin = (source[None, :] * ROWS + m[:, None]) * segment + place[None, :]
            inside = valid[:, None] & here[None, :]
            at = row[:, None] * capacity + e[None, :]
            tl.store(scores + at, tl.load(segment_scores + origin, mask=inside, other=0.0), mask=inside)
            if WANT_BOUNDS:
                tl.store(errors + at, tl.load(segment_errors + origin, mask=inside, other=0.0), mask=inside)
    # What other threads have stored is read back: here, and after each of the two loops below.
    tl.debug_barrier()
    if REFINE:
        query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
        keys = key + batch * stride_kb + kv_head * stride_kh
        queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
        for tile in range(begin, after):
            e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
            here = e < total
            position = tl.load(positions + e, mask=here, other=0)
            score, size = exact_scores(
                queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, here, D, BLOCK_D, CHUNK_D,
                WANT_BOUNDS,
            )  # fmt: skip
            at = row[:, None] * capacity + e[None, :]
            inside = valid[:, None] & here[None, :]
            tl.store(scores + at, score, mask=inside)
            if WANT_BOUNDS:
                tl.store(errors + at, size * ((D + 16) * MATRIX_ULP), mask=inside)
        tl.debug_barrier()

    many = tl.zeros([BLOCK_M], dtype=tl.int32)
    for tile in range(begin, after):
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        _position, _score, ones = reaching(positions, scores, row, capacity, e, e < total, valid, first, last, least)
        many += tl.sum(ones, axis=1)
    # Places in a row's collection are given out a chunk at a time. Their order is no matter: it is a set.
    taken = tl.atomic_add(reached + row, many, mask=valid & (many > 0), sem="relaxed")
    for tile in range(begin, after):
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        position, score, ones = reaching(positions, scores, row, capacity, e, e < total, valid, first, last, least)
        place = taken[:, None] + tl.cumsum(ones, axis=1) - ones
        kept = (ones > 0) & (place < room)
        at = row[:, None] * room + place
        tl.store(reached_positions + at, tl.broadcast_to(position[None, :], kept.shape), mask=kept)
        tl.store(reached_scores + at, score, mask=kept)
        taken += tl.sum(ones, axis=1)


@triton.jit
def reaching(positions, scores, row, capacity, e, here, valid, first, last, least):
    """(position, score of every row, 1 where it is a rival that scores its row's guess or more) of entries ``e``.

    NaN reaches any guess.
    """
    position = tl.load(positions + e, mask=here, other=0)
    inside = valid[:, None] & here[None, :]
    score = tl.load(scores + row[:, None] * capacity + e[None, :], mask=inside, other=0.0)
    rival = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
    return position, score, (inside & rival & ~(score < least[:, None])).to(tl.int32)


@triton.jit
def exact_scores(
    queries, query_rows, valid, keys, offsets, here, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    WANT_SIZES: tl.constexpr,
):  # fmt: skip
    """(q·k ``[BLOCK_M, BLOCK_E]`` in float32 of the keys at ``keys + offsets``, the same of absolute values)."""
    score = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    size = score
    for begin in tl.static_range(0, BLOCK_D, CHUNK_D):
        d = begin + tl.arange(0, CHUNK_D)
        part = queries
        if CHUNK_D < BLOCK_D:
            part = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
        tile = tl.load(keys + (offsets[None, :] + d[:, None]), mask=here[None, :] & (d < D)[:, None], other=0.0)
        score = dot(part, tile, score)
        if WANT_SIZES:
            size = dot(tl.abs(part), tl.abs(tile), size)
    return score, size


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "capacity", "room"])
def choose_kernel(
    visible,
    budget,
    counts,
    guess,
    reached,
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
    group,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    splits,
    segment,
    capacity,
    room,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Threshold and end of its ties of a row, as ``find_thresholds``; or the row's flag, and an empty list.

    ``positions`` and ``scores[row, room]`` are the row's rivals that reach its guess, ``listed`` the length of the list
    that its block shares, ``attended`` the row's budget.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, index, start, end, wanted, first, last = row_interval(
        row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
        recent_keys,
    )  # fmt: skip
    rivals = last - first
    needed = wanted - (end - start - rivals)
    # As ``program_rows`` divides rows into blocks.
    blocks = tl.cdiv(Lq * group, ROWS)
    block = batch * (num_heads // group) + head // group
    block = block * blocks + (blocks - 1 - (index * group + head % group) // ROWS)
    s = tl.arange(0, BLOCK_S)
    sizes = tl.load(counts + block * splits + s, mask=s < splits, other=0)
    total = tl.sum(sizes, axis=0)
    count = tl.load(reached + row)
    complete = (tl.max(sizes, axis=0) <= segment) & (total <= capacity) & (count <= room)
    count = tl.where(complete, count, 0)
    sound = complete & ((needed <= 0) | (count >= needed))
    tl.store(listed + row, tl.where(sound, total, 0))
    tl.store(attended + row, wanted)
    tl.store(flags + row, tl.where(sound, 0, 1))
    limit, limit_end = find_best(
        positions + row * room, scores + row * room, count, rank_of(tl.load(guess + row)), sound, needed, first, last,
        BLOCK_E, True,
    )  # fmt: skip
    tl.store(threshold + row, limit)
    tl.store(ties_end + row, limit_end)


@triton.jit
def find_best(
    positions, scores, count, low, sound, needed, first, last, BLOCK_E: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """Threshold and end of its ties of the ``needed`` best of the rivals in ``[first, last)``, as ``find_thresholds``.

    The ``count`` rivals of rank ``low`` or more, with all of the best among them where they are ``sound``: they score
    ``scores`` at ``positions`` or, without ``LISTED``, at ``first`` and after. A bracket of float ranks is quartered
    until the count at its low end is the one needed or a single float is left. The ranks of at most ``BLOCK_E`` rivals
    stay in registers.
    """
    held = load_ranks(scores, 0, count, BLOCK_E)
    limit = tl.where(needed > 0, float("-inf"), float("inf"))
    limit_end = tl.where(needed > 0, FAR, 0)
    count_low = count
    high = highest_rank(held, scores, count, BLOCK_E) + 1
    count_high = count * 0
    searching = (sound & (needed > 0) & (needed < last - first)).to(tl.int32)
    if searching > 0:
        while (count_low != needed) & (high.to(tl.int64) - low.to(tl.int64) > 1):
            width = high.to(tl.int64) - low.to(tl.int64)
            a = tl.maximum((low.to(tl.int64) + width // 4).to(tl.int32), low + 1)
            b = tl.maximum((low.to(tl.int64) + width // 2).to(tl.int32), a)
            c = tl.maximum((low.to(tl.int64) + width * 3 // 4).to(tl.int32), b)
            count_a, count_b, count_c = count_list(held, scores, count, a, b, c, BLOCK_E)
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
                ties = count_ties(positions, scores, count, low, first, middle, BLOCK_E, LISTED)
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
    rank = tl.where(score == score, rank_of(score + 0.0), _RANK_INFINITY)
    return tl.where(e < count, rank, _NO_RIVAL)


@triton.jit
def count_list(held, scores, count, a, b, c, BLOCK_E: tl.constexpr):
    """``count_ranks`` of a whole list, whose first ``BLOCK_E`` entries are ``held``."""
    count_a, count_b, count_c = count_ranks(held, a, b, c)
    for begin in range(BLOCK_E, count, BLOCK_E):
        more_a, more_b, more_c = count_ranks(load_ranks(scores, begin, count, BLOCK_E), a, b, c)
        count_a += more_a
        count_b += more_b
        count_c += more_c
    return count_a, count_b, count_c


@triton.jit
def highest_rank(held, scores, count, BLOCK_E: tl.constexpr):
    """The largest rank of a list, whose first ``BLOCK_E`` entries are ``held``."""
    highest = tl.max(held, axis=0)
    for begin in range(BLOCK_E, count, BLOCK_E):
        highest = tl.maximum(highest, tl.max(load_ranks(scores, begin, count, BLOCK_E), axis=0))
    return highest


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

"""The kernels of ``block`` while decoding: score pages, choose among them, attend the chosen ones.

A program works for one query and one key/value head, for up to ``BLOCK_G`` of its query heads; ``number`` below counts
(batch, query, key/value head) with the head running fastest. Logits are in base 2. Pages are counted from the first
visible one, except in the list of chosen pages and in the statistics, where they are counted from the origin.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton_attend import finite_or_zero, fold, logits_base2
from nc_patch.ops.triton_tiles import dot, dot_scores, load_query

_ABOVE_INFINITY = tl.constexpr(2139095041)
_EXPONENT = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
# What is lost of a square, kept apart, is this much smaller: so that float16 can hold it.
_LOW_PART = tl.constexpr(2048.0)


@triton.jit
def query_pages(
    number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE: tl.constexpr
):
    """(batch, query index, kv head, start, end, begin, low, pages): what a query sees, and in which pages.

    ``begin`` is the position of page 0; ``low`` the first visible page, ``pages`` how many there are.
    """
    batch = (number // (num_kv_heads * Lq)).to(tl.int64)
    index = ((number // num_kv_heads) % Lq).to(tl.int64)
    kv_head = (number % num_kv_heads).to(tl.int64)
    begin = tl.load(origin + batch * stride_ob + index * stride_ol)
    start = tl.load(visible + batch * stride_ib + index * stride_il)
    end = tl.load(visible + batch * stride_ib + index * stride_il + 1)
    start = tl.maximum(tl.maximum(start, begin), 0)
    end = tl.maximum(tl.minimum(end, Lk), start)
    # No negative number is divided: start is not before begin.
    low = (start - begin) // BLOCK_SIZE
    pages = tl.where(end > start, (end - start + (start - begin) % BLOCK_SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
    return batch, index, kv_head, start, end, begin, low, pages


@triton.jit
def group_rows(kv_head, group, BLOCK_G: tl.constexpr):
    """(query head within the group, query head, whether there is one) of this program's rows, ``[BLOCK_G]``."""
    member = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    return member, kv_head * group + member, member < group


@triton.jit
def squares(part, norm):
    """``(part / norm) ** 2`` as a sum ``high + low / _LOW_PART`` of numbers of part's dtype, exact for 16-bit ones."""
    scaled = part.to(tl.float32) / norm[:, None]
    square = scaled * scaled
    high = square.to(part.dtype)
    low = ((square - high.to(tl.float32)) * _LOW_PART).to(part.dtype)
    return high, low


@triton.jit
def page_scores(
    queries,
    query_rows,
    valid,
    means,
    variances,
    offsets,
    in_range,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Raw scores ``q.mean + scale / 2 * q^2.variance`` of the pages at ``offsets``: ``[BLOCK_G, BLOCK_P]``."""
    along = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    spread = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    rest = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        mask = (d[:, None] < D) & in_range[None, :]
        mean = tl.load(means + (offsets[None, :] + d[:, None]), mask=mask, other=0.0)
        variance = tl.load(variances + (offsets[None, :] + d[:, None]), mask=mask, other=0.0)
        # Divided by a power of two, so that squares stay in the range of the dtype.
        largest = tl.max(tl.abs(queries.to(tl.float32)), axis=1)
        norm = (largest.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
        norm = tl.maximum(norm, _SMALLEST)
        high, low = squares(queries, norm)
        along = dot(queries, mean, along)
        spread = dot(high, variance, spread)
        rest = dot(low, variance, rest)
        spread = (spread + rest * (1.0 / _LOW_PART)) * norm[:, None] * norm[:, None]
    else:
        for chunk in range(0, D, CHUNK_D):
            d = chunk + tl.arange(0, CHUNK_D)
            mask = (d[:, None] < D) & in_range[None, :]
            part = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
            mean = tl.load(means + (offsets[None, :] + d[:, None]), mask=mask, other=0.0)
            along = dot(part, mean, along)
            variance = tl.load(variances + (offsets[None, :] + d[:, None]), mask=mask, other=0.0)
            spread = dot(part * part, variance, spread)
    return along + (0.5 * scale) * spread


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "width", "splits"])
def score_pages_kernel(
    query,
    key,
    mean,
    variance,
    visible,
    origin,
    page_logits,
    peak,
    total,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_mb,
    stride_mh,
    stride_mp,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    num_kv_heads,
    group,
    Lq,
    Lk,
    width,
    splits,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits ``[number, group, width]`` of visible pages, and (peak, total) of their softmax for each split.

    Split s scores the s-th share of the pages from their statistics; the one after the last scores the query's own
    page from its keys. What is NaN or +inf stays out of the softmax.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    batch, index, kv_head, start, end, begin, low, pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    member, head, valid = group_rows(kv_head, group, BLOCK_G)
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    logits_rows = page_logits + (number.to(tl.int64) * group + member) * width
    highest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    sum_of_weights = tl.zeros([BLOCK_G], dtype=tl.float32)
    own = tl.minimum(pages, width) - 1
    if split < splits:
        means = mean + batch * stride_mb + kv_head * stride_mh
        variances = variance + batch * stride_mb + kv_head * stride_mh
        share = (own + splits * BLOCK_P - 1) // (splits * BLOCK_P)
        stop = tl.minimum((split + 1) * share * BLOCK_P, own)
        for tile in range(share):
            page = (split * share + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
            in_range = page < stop
            first = begin + (low + page) * BLOCK_SIZE
            size = tl.minimum(first + BLOCK_SIZE, end) - tl.maximum(first, start)
            raw = page_scores(
                queries, query_rows, valid, means, variances, (low + page).to(tl.int64) * stride_mp, in_range, scale,
                D, BLOCK_D, CHUNK_D,
            )  # fmt: skip
            logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
            logits += tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
            tl.store(logits_rows[:, None] + page[None, :], logits, mask=valid[:, None] & in_range[None, :])
            # Written so that NaN fails the comparison too.
            ordinary = (logits < float("inf")) & in_range[None, :]
            highest, sum_of_weights, _weights, _shrink = fold(
                tl.where(ordinary, logits, float("-inf")), highest, sum_of_weights
            )
    elif own >= 0:
        keys = key + batch * stride_kb + kv_head * stride_kh
        position = begin + (low + pages - 1) * BLOCK_SIZE + tl.arange(0, BLOCK_K)
        seen = (position >= start) & (position < end)
        raw = dot_scores(
            queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, seen, D, BLOCK_D, CHUNK_D, True
        )
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        highest, sum_of_weights, _weights, _shrink = fold(
            tl.where(seen[None, :], logits, float("-inf")), highest, sum_of_weights
        )
        exact = finite_or_zero(highest) + tl.log2(sum_of_weights)
        tl.store(logits_rows + own, exact, mask=valid)
        ordinary_page = exact < float("inf")
        highest = tl.where(ordinary_page, highest, float("-inf"))
        sum_of_weights = tl.where(ordinary_page, sum_of_weights, 0.0)
    part = (number.to(tl.int64) * group + member) * (splits + 1) + split
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, sum_of_weights, mask=valid)


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "width", "splits", "capacity"])
def choose_pages_kernel(
    visible,
    origin,
    budget,
    page_logits,
    peak,
    total,
    chosen,
    chosen_count,
    attended,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    width,
    splits,
    capacity,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The pages that one query and the group attend: ``chosen [number, capacity]``, ascending, and how many they are.

    Also ``attended [B, Hq, Lq]``, the number of their visible keys. ``peak`` and ``total`` have ``splits`` parts.
    """
    number = tl.program_id(0)
    batch, index, kv_head, start, end, begin, low, pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    pages = tl.minimum(pages, width)
    weights = page_logits + number.to(tl.int64) * group * width
    largest_budget = sum_weights(
        weights, peak + number.to(tl.int64) * group * splits, total + number.to(tl.int64) * group * splits,
        budget + batch * stride_nb + kv_head * group * stride_nh + index * stride_nl, stride_nh, group, width, splits,
        pages, BLOCK_P, BLOCK_S,
    )  # fmt: skip
    tl.debug_barrier()
    always = tl.minimum(pages, 2)
    wanted = tl.maximum((tl.maximum(largest_budget, 0) + BLOCK_SIZE - 1) // BLOCK_SIZE, always)
    wanted = tl.minimum(tl.minimum(wanted, pages), capacity)
    cut, spare = find_cut(weights, pages, wanted - always, BLOCK_P)
    certain = 0
    ties = 0
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        rank = load_ranks(weights, page, pages)
        above = (page < pages) & ((page == 0) | (page == pages - 1) | (rank > cut))
        tied = rank == cut
        ties_here = ties + tl.cumsum(tied.to(tl.int32), axis=0)
        certain_here = certain + tl.cumsum(above.to(tl.int32), axis=0)
        place = certain_here + tl.minimum(ties_here, spare) - 1
        taken = (above | (tied & (ties_here <= spare))) & (place < capacity)
        tl.store(chosen + number.to(tl.int64) * capacity + place, low + page, mask=taken)
        ties += tl.sum(tied.to(tl.int32), axis=0)
        certain += tl.sum(above.to(tl.int32), axis=0)
    tl.store(chosen_count + number, wanted)
    # The first and the last page may be seen in part; both are always chosen.
    missing = (start - begin - low * BLOCK_SIZE) + (begin + (low + pages) * BLOCK_SIZE - end)
    keys = tl.where(pages > 0, wanted * BLOCK_SIZE - missing, 0)
    row = (batch * num_kv_heads + kv_head) * group * Lq + index
    for member in range(group):
        tl.store(attended + row + member * Lq, keys)


@triton.jit
def sum_weights(
    logits_rows,
    peak,
    total,
    budgets,
    stride_nh,
    group,
    width,
    splits,
    pages,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The group's largest budget; over the first head's logits goes each page's weight, summed over the group.

    A logit that is NaN or +inf weighs +inf.
    """
    largest_budget = 0
    split = tl.arange(0, BLOCK_S)
    for member in range(group):
        largest_budget = tl.maximum(largest_budget, tl.load(budgets + member * stride_nh))
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        weight = tl.zeros([BLOCK_P], dtype=tl.float32)
        for member in range(group):
            peaks = tl.load(peak + member * splits + split, mask=split < splits, other=float("-inf"))
            totals = tl.load(total + member * splits + split, mask=split < splits, other=0.0)
            row = logits_rows + tl.cast(member, tl.int64) * width
            logits = tl.load(row + page, mask=page < pages, other=float("-inf"))
            base = finite_or_zero(tl.max(peaks, axis=0))
            whole = tl.sum(totals * tl.exp2(peaks - base), axis=0)
            share = tl.where(whole > 0.0, 1.0 / tl.maximum(whole, 1e-30), 0.0)
            # Written so that NaN fails the comparison too.
            weight += tl.where(logits < float("inf"), tl.exp2(logits - base) * share, float("inf"))
        # Every thread has read the logits that the weights replace.
        tl.debug_barrier()
        tl.store(logits_rows + page, weight, mask=page < pages)
    return largest_budget


@triton.jit
def load_ranks(weights, page, pages):
    """The bits of the weights, which order them, since none is negative; below 0 for pages that are no candidates."""
    candidate = (page > 0) & (page < pages - 1)
    return tl.load(weights + page, mask=candidate, other=-1.0).to(tl.int32, bitcast=True)


@triton.jit
def find_cut(weights, pages, needed, BLOCK_P: tl.constexpr):
    """(cut, spare): the ``needed`` highest ranks are those above ``cut`` and the first ``spare`` that equal it.

    ``low`` is a rank that ``needed`` or more candidates reach and ``high`` one that fewer reach; each pass counts at
    three ranks between them and keeps a quarter. The search ends when a count is exact, or the quarter a single rank:
    after at most 17 passes, and about 8 for weights that differ.
    """
    cut = tl.where(needed > 0, -1, _ABOVE_INFINITY)
    spare = needed * 0
    low = needed * 0
    high = low + _ABOVE_INFINITY
    count_high = needed * 0
    searching = (needed > 0) & (needed < pages - 2)
    while searching:
        step = tl.maximum((high - low) // 4, 1)
        at_first = tl.minimum(low + step, high - 1)
        at_second = tl.minimum(at_first + step, high - 1)
        at_third = tl.minimum(at_second + step, high - 1)
        # Three counts of 21 bits each travel in one sum.
        counts = tl.cast(needed * 0, tl.int64)
        for first in range(0, pages, BLOCK_P):
            rank = load_ranks(weights, first + tl.arange(0, BLOCK_P), pages)
            reached = tl.where(rank >= at_first, 1, 0) + tl.where(rank >= at_second, 1 << 21, 0)
            counts += tl.sum(reached.to(tl.int64) + ((rank >= at_third).to(tl.int64) << 42), axis=0)
        first_count = (counts & 0x1FFFFF).to(tl.int32)
        second_count = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        third_count = (counts >> 42).to(tl.int32)
        exact = (first_count == needed) | (second_count == needed) | (third_count == needed)
        hit = tl.where(third_count == needed, at_third, tl.where(second_count == needed, at_second, at_first))
        # Ranks rise and counts fall: the lowest rank that too few reach is the new top.
        high = tl.where(third_count < needed, at_third, high)
        count_high = tl.where(third_count < needed, third_count, count_high)
        high = tl.where(second_count < needed, at_second, high)
        count_high = tl.where(second_count < needed, second_count, count_high)
        high = tl.where(first_count < needed, at_first, high)
        count_high = tl.where(first_count < needed, first_count, count_high)
        low = tl.where(first_count >= needed, at_first, low)
        low = tl.where(second_count >= needed, at_second, low)
        low = tl.where(third_count >= needed, at_third, low)
        cut = tl.where(exact, hit - 1, low)
        spare = tl.where(exact, 0, needed - count_high)
        searching = ~(exact | (high - low <= 1))
    return cut, spare


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "splits", "capacity"])
def attend_pages_kernel(
    query,
    key,
    value,
    visible,
    origin,
    chosen,
    chosen_count,
    acc,
    peak,
    total,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    num_kv_heads,
    group,
    Lq,
    Lk,
    splits,
    capacity,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(acc, peak, total) of one share of the chosen pages, as ``triton_split`` wants them.

    All rows of a program attend the same keys and no other key is loaded, so that what others hold cannot matter.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    batch, index, kv_head, start, end, begin, _low, _pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    _member, head, valid = group_rows(kv_head, group, BLOCK_G)
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh
    page_list = chosen + number.to(tl.int64) * capacity
    highest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    sum_of_weights = tl.zeros([BLOCK_G], dtype=tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_DV], dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, BLOCK_DV)
    count = tl.load(chosen_count + number)
    share = (count + splits - 1) // splits
    first = split * share
    stop = tl.minimum(first + share, count)
    keys_left = tl.maximum(stop - first, 0) * BLOCK_SIZE
    tiles = (keys_left + BLOCK_N - 1) // BLOCK_N
    for tile in range(tiles):
        offset = tile * BLOCK_N + n
        page = tl.load(page_list + first + offset // BLOCK_SIZE, mask=offset < keys_left, other=0)
        position = begin + page * BLOCK_SIZE + offset % BLOCK_SIZE
        seen = (offset < keys_left) & (position >= start) & (position < end)
        raw = dot_scores(
            queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, seen, D, BLOCK_D, CHUNK_D, True
        )
        logits = tl.where(seen[None, :], logits_base2(raw, scale, softcap, HAS_SOFTCAP), float("-inf"))
        highest, sum_of_weights, weights, shrink = fold(logits, highest, sum_of_weights)
        tile_values = tl.load(
            values + (position.to(tl.int64)[:, None] * stride_vl + dv[None, :]),
            mask=seen[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        sums = dot(weights.to(values.dtype.element_ty), tile_values, sums * shrink[:, None])
    row = (batch * num_kv_heads * group + head) * Lq + index
    part = row * splits + split
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, sum_of_weights, mask=valid)
    if tiles > 0:
        tl.store(acc + part[:, None] * DV + dv[None, :], sums, mask=valid[:, None] & (dv[None, :] < DV))

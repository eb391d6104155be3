"""Scores from codes: how a program bounds q.k of a tile of keys without reading a key, and lists what may matter.

``codes.py`` defines the codes and the bounds. A weighted query ``w = q * spread`` is itself rounded to 16 bits,
``w ~= step * (256 * high + low)`` with two int8 vectors, so that its product with a key's codes is an exact integer
product of the tensor cores; what the rounding leaves out is part of the error. Both vectors of a program's rows are
stacked into one operand of twice the rows, which is the least number of rows that a matrix instruction takes.

A tile of keys is looked at twice: by the high halves of all its codes, and by the low halves of those alone that the
high ones do not rule out for every row.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import fold, logits_base2
from nc_patch.ops.triton.tiles import PER_CALL, forced_keys, program_rows, span
from nc_patch.selections.topk.codes import HIGH_UNIT, LARGEST_CODE

# The largest weight: 127 * 256 + 127.
_LARGEST_WEIGHT = tl.constexpr(32639.0)
# As in codes.py: half a unit in the last place of a float32 near 1, what float32 loses near its smallest number, and
# the largest code.
_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST = tl.constexpr(float(LARGEST_CODE))
_HIGH_UNIT = tl.constexpr(HIGH_UNIT)
# The golden ratio's fraction in units of 2**-16, and odd.
_GOLDEN = tl.constexpr(40503)
# Rounding of a logit on its way from a raw score, relative to the logit and to the soft-cap: sixteen half units.
LOGIT_SLACK = tl.constexpr(2.0**-20)


@triton.jit(do_not_specialize=PER_CALL)
def sample_kernel(
    query,
    visible,
    budget,
    high,
    low,
    code_scale,
    center,
    spread,
    samples,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_cb,
    stride_ch,
    stride_cl,
    stride_sb,
    stride_sh,
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
    SAMPLES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Approximate scores, ``samples[row, SAMPLES]``, of keys drawn from even shares of the rivals of a block of rows.

    Which key of its share is drawn follows from the share's number alone, by multiples of the golden ratio: evenly
    spaced keys would be in step with a text that repeats itself.
    A key outside a row's rivals is stored as -inf, and NaN as +inf. A program scores ``BLOCK_N`` keys.
    """
    batch, kv_head, _index, _head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    channels = (batch * num_kv_heads + kv_head) * D
    first_weights, second_weights, step, at_center, _per_residual, _per_scale, _slack = coded_rows(
        query, stride_qb, stride_qh, stride_ql, batch, kv_head, group, Lq, center + channels, spread + channels, D,
        BLOCK_M, BLOCK_H,
    )  # fmt: skip
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    begin, end = span(first, last, last > first)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (place.to(tl.int64) << 16) + (place * _GOLDEN & 0xFFFF)
    columns = (begin + (end - begin).to(tl.int64) * at // (SAMPLES << 16)).to(tl.int32)
    within = columns < end
    head_codes = batch * stride_cb + kv_head * stride_ch
    offsets = columns.to(tl.int64) * stride_cl
    product = _HIGH_UNIT * half_products(
        first_weights, second_weights, high + head_codes, offsets, within, D, BLOCK_M, BLOCK_N, BLOCK_H
    )
    product += half_products(
        first_weights, second_weights, low + head_codes, offsets, within, D, BLOCK_M, BLOCK_N, BLOCK_H
    )
    sizes = tl.load(code_scale + batch * stride_sb + kv_head * stride_sh + columns, mask=within, other=0.0)
    score = product.to(tl.float32) * sizes[None, :] * step[:, None] + at_center[:, None]
    score = tl.where(score == score, score, float("inf"))
    rival = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    score = tl.where(rival, score, float("-inf"))
    tl.store(samples + (row * SAMPLES)[:, None] + place[None, :], score, mask=valid[:, None])


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment"])
def scan_kernel(
    query,
    visible,
    budget,
    high,
    low,
    code_scale,
    coarse,
    residual,
    center,
    spread,
    guess,
    positions,
    scores,
    errors,
    counts,
    outside,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_cb,
    stride_ch,
    stride_cl,
    stride_sb,
    stride_sh,
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
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    REFINE: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Lists, of every ``splits``-th tile of keys, those that may reach the ``guess`` of any row or are forced for one.

    The rows of a program share its list, a segment of its own: ``positions[program, split, segment]``, rising.
    ``counts[program, split]`` goes on where the segment is full. Without ``REFINE`` keys go by their approximate
    scores, which are kept for every row, ``scores[program, split, row, segment]``, and with ``WANT_BOUNDS`` their
    ``errors``. With ``WANT_BOUNDS`` ``outside[row, split]`` is (peak, total) of the softmax of the lower and then of
    the upper logits, in base 2, of the keys not listed, for which every low half is read.
    """
    batch, kv_head, _index, _head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    channels = (batch * num_kv_heads + kv_head) * D
    first_weights, second_weights, step, at_center, per_residual, per_scale, slack = coded_rows(
        query, stride_qb, stride_qh, stride_ql, batch, kv_head, group, Lq, center + channels, spread + channels, D,
        BLOCK_M, BLOCK_H,
    )  # fmt: skip
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    least = tl.load(guess + row, mask=valid, other=float("inf"))
    lowest, highest = span(start, end, end > start)
    program = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    high += batch * stride_cb + kv_head * stride_ch
    low += batch * stride_cb + kv_head * stride_ch
    code_scale += batch * stride_sb + kv_head * stride_sh
    coarse += batch * stride_sb + kv_head * stride_sh
    residual += batch * stride_sb + kv_head * stride_sh
    own = program * splits + split
    positions += own * segment
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    listed = 0
    low_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    low_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    high_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    high_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(lowest // BLOCK_N + split, tl.cdiv(highest, BLOCK_N), splits):
        begin = tl.cast(tile, tl.int64) * BLOCK_N
        columns = tile * BLOCK_N + n
        within = columns < highest
        product = _HIGH_UNIT * half_products(
            first_weights, second_weights, high + begin * stride_cl, n * stride_cl, within, D, BLOCK_M, BLOCK_N, BLOCK_H
        )
        sizes = tl.load(code_scale + begin + n, mask=within, other=0.0)
        far = tl.load(coarse + begin + n, mask=within, other=0.0).to(tl.float32)
        near = tl.load(residual + begin + n, mask=within, other=0.0).to(tl.float32)
        rounding = per_scale[:, None] * sizes[None, :] + slack[:, None]
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
        forced = (columns[None, :] < first[:, None]) | (columns[None, :] >= last[:, None])
        # NaN is below nothing, so that a key whose score is not known at all is listed.
        rough = product.to(tl.float32) * sizes[None, :] * step[:, None] + at_center[:, None]
        reach = per_residual[:, None] * far[None, :] + rounding
        if not REFINE:
            # What the whole code may score, not the key.
            reach += per_residual[:, None] * near[None, :] + rounding
        maybe = seen & (forced | ~(rough + reach < least[:, None]))
        wanted_by_any = within if WANT_BOUNDS else tl.max(maybe.to(tl.int32), axis=0) > 0
        product += half_products(
            first_weights, second_weights, low + begin * stride_cl, n * stride_cl, wanted_by_any, D, BLOCK_M, BLOCK_N,
            BLOCK_H,
        )  # fmt: skip
        score = product.to(tl.float32) * sizes[None, :] * step[:, None] + at_center[:, None]
        error = per_residual[:, None] * near[None, :] + rounding
        below = (score + error if REFINE else score) < least[:, None]
        chosen = tl.max((maybe & (forced | ~below)).to(tl.int32), axis=0)
        place = listed + tl.cumsum(chosen, axis=0) - chosen
        room = (chosen > 0) & (place < segment)
        tl.store(positions + place, columns, mask=room)
        if not REFINE:
            at = (own * BLOCK_M + m)[:, None] * segment + place[None, :]
            tl.store(scores + at, score, mask=valid[:, None] & room[None, :])
            if WANT_BOUNDS:
                tl.store(errors + at, error, mask=valid[:, None] & room[None, :])
        if WANT_BOUNDS:
            rest = seen & (chosen == 0)[None, :]
            lower = logits_base2(score - error, scale, softcap, HAS_SOFTCAP)
            upper = logits_base2(score + error, scale, softcap, HAS_SOFTCAP)
            lower -= logit_slack(lower, softcap, HAS_SOFTCAP)
            upper += logit_slack(upper, softcap, HAS_SOFTCAP)
            # The error of a key that is not sound may be infinite.
            lower = tl.where(lower == lower, lower, float("-inf"))
            upper = tl.where(upper == upper, upper, float("inf"))
            low_peak, low_total, _w, _s = fold(tl.where(rest, lower, float("-inf")), low_peak, low_total)
            high_peak, high_total, _w, _s = fold(tl.where(rest, upper, float("-inf")), high_peak, high_total)
        listed += tl.sum(chosen, axis=0)
    tl.store(counts + own, listed)
    if WANT_BOUNDS:
        sums = outside + (row * splits + split) * 4
        tl.store(sums, low_peak, mask=valid)
        tl.store(sums + 1, low_total, mask=valid)
        tl.store(sums + 2, high_peak, mask=valid)
        tl.store(sums + 3, high_total, mask=valid)


@triton.jit
def coded_rows(
    query,
    stride_qb,
    stride_qh,
    stride_ql,
    batch,
    kv_head,
    group,
    Lq,
    center,
    spread,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The rows of ``program_rows`` against codes: (two weights, step, at_center, per_residual, per_scale, slack).

    The weights are int8 ``[2 * BLOCK_M, BLOCK_H]``, of the first half of the channels and of the second: the high parts
    of all rows, then the low ones. The rest are float32 ``[BLOCK_M]``: a score is ``at_center + code_scale * step *
    product``, and it is off by at most ``per_residual * residual + per_scale * code_scale + slack``, in which float32's
    rounding is counted.
    """
    blocks = tl.cdiv(Lq * group, BLOCK_M)
    stacked = tl.arange(0, 2 * BLOCK_M)
    flat = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M + stacked % BLOCK_M
    valid = flat < Lq * group
    head = kv_head * group + flat % group
    rows = query + batch * stride_qb + head * stride_qh + (flat // group).to(tl.int64) * stride_ql
    half = (D + 1) // 2
    h = tl.arange(0, BLOCK_H)
    q, middle, w = weighted(rows, center, spread, valid, h, half)
    q_2, middle_2, w_2 = weighted(rows + half, center + half, spread + half, valid, h, D - half)
    at_center = tl.sum(q * middle, axis=1) + tl.sum(q_2 * middle_2, axis=1)
    slack = row_norms(q, q_2) * tl.max(row_norms(middle, middle_2), axis=0) * (2 * (D + 16) * _HALF_ULP) + _SMALLEST

    largest = tl.maximum(tl.max(tl.abs(w), axis=1), tl.max(tl.abs(w_2), axis=1))
    step = largest / _LARGEST_WEIGHT
    step = tl.where((step > 1e-37) & (largest < float("inf")), step, 0.0)
    level = levels(w, step)
    level_2 = levels(w_2, step)
    # NaN and infinity stay in what is left over, so that such a row bounds nothing.
    left_over = row_norms(w - step[:, None] * level, w_2 - step[:, None] * level_2)
    size = row_norms(w, w_2)
    widest = _LARGEST * (D**0.5) * (1.0 + 8 * _HALF_ULP)
    per_scale = widest * (size * ((D + 16) * _HALF_ULP) + left_over)
    is_high = (stacked < BLOCK_M)[:, None]
    return (
        byte_of(level, is_high),
        byte_of(level_2, is_high),
        one_half(step, BLOCK_M),
        one_half(at_center, BLOCK_M),
        one_half(size, BLOCK_M),
        one_half(per_scale, BLOCK_M),
        one_half(slack, BLOCK_M),
    )


@triton.jit
def weighted(rows, center, spread, valid, h, count):
    """``count`` channels of queries, of the center ``[1, BLOCK_H]``, and of the queries times the spread; float32."""
    mask = (h < count)[None, :]
    q = tl.load(rows[:, None] + h[None, :], mask=valid[:, None] & mask, other=0.0).to(tl.float32)
    middle = tl.load(center + h[None, :], mask=mask, other=0.0)
    return q, middle, q * tl.load(spread + h[None, :], mask=mask, other=0.0)


@triton.jit
def levels(w, step):
    """Whole numbers of at most 16 bits that times ``step`` are nearest to w; 0 where there are none."""
    level = w / tl.where(step > 0, step, 1.0)[:, None]
    level = tl.where((step > 0)[:, None] & (level == level), level, 0.0)
    return tl.minimum(tl.maximum(tl.floor(level + 0.5), -_LARGEST_WEIGHT), _LARGEST_WEIGHT)


@triton.jit
def byte_of(level, is_high):
    """The upper or the lower byte of 16-bit whole numbers, both signed."""
    upper = tl.floor((level + 128.0) * (1.0 / 256.0))
    return tl.where(is_high, upper, level - 256.0 * upper).to(tl.int8)


@triton.jit
def one_half(stacked, BLOCK_M: tl.constexpr):
    """The first ``BLOCK_M`` of twice as many numbers whose halves are equal; NaN stays."""
    return 0.5 * tl.sum(tl.reshape(stacked, [2, BLOCK_M]), axis=0)


@triton.jit
def row_norms(rows, more):
    """At least the norm of each row of two tiles side by side, without overflow or underflow on the way.

    NaN where a row holds NaN or inf.
    """
    largest = tl.maximum(tl.max(tl.abs(rows), axis=1), tl.max(tl.abs(more), axis=1))
    size = tl.where(largest > 0, largest, 1.0)[:, None]
    squares = tl.sum((rows / size) * (rows / size), axis=1) + tl.sum((more / size) * (more / size), axis=1)
    return largest * tl.sqrt(squares) * (1.0 + (2 * rows.shape[1] + 16) * _HALF_ULP)


@triton.jit
def half_products(
    first_weights, second_weights, packed, offsets, within, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """int32 ``[BLOCK_M, BLOCK_N]``, exact: the 16-bit weights times the halves of codes at ``packed + offsets``."""
    h = tl.arange(0, BLOCK_H)
    if (D + 1) // 2 == BLOCK_H:
        tile = tl.load(packed + (offsets[None, :] + h[:, None]), mask=within[None, :], other=0)
    else:
        mask = within[None, :] & (h < (D + 1) // 2)[:, None]
        tile = tl.load(packed + (offsets[None, :] + h[:, None]), mask=mask, other=0)
    # Shifts of signed numbers, eight bits wide, so that the sign of the lower half comes out too.
    product = tl.dot(first_weights, (tile << 4).to(tl.int8) >> 4, out_dtype=tl.int32)
    product = tl.dot(second_weights, tile >> 4, product, out_dtype=tl.int32)
    parts = tl.reshape(product, [2, BLOCK_M, BLOCK_N])
    worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    return tl.sum(parts * worth[:, None, None], axis=0)


@triton.jit
def logit_slack(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """What logits in base 2 may be off by beyond the error of the scores they are made of."""
    slack = tl.abs(logits) * LOGIT_SLACK
    if HAS_SOFTCAP:
        slack += softcap * LOGIT_SLACK
    return slack

"""Scores from codes: how a program bounds q.k of a tile of keys without reading a key, and lists what may matter.

``codes.py`` defines the codes and the bounds. A weighted query ``w = q * spread`` is itself rounded to 16 bits,
``w ~= step * (256 * high + low)`` with two int8 vectors, so that its product with a key's codes is an exact integer
product of the tensor cores; what the rounding leaves out is part of the error. Both vectors of a program's rows are
stacked into one operand of twice the rows, which is the least number of rows that a matrix instruction takes.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton_attend import fold, logits_base2
from nc_patch.ops.triton_tiles import forced_keys, program_rows, span

# The largest weight: 127 * 256 + 127.
_LARGEST_WEIGHT = tl.constexpr(32639.0)
# As in codes.py: half a unit in the last place of a float32 near 1, what float32 loses near its smallest number, and
# the largest code.
_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST_CODE = tl.constexpr(127.0)
# Rounding of a logit on its way from a raw score, relative to the logit and to the soft-cap: sixteen half units.
LOGIT_SLACK = tl.constexpr(2.0**-20)


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys"])
def sample_kernel(
    query,
    visible,
    budget,
    codes,
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
    BLOCK_D: tl.constexpr,
):
    """Approximate scores, ``samples[row, SAMPLES]``, of keys evenly spaced among the rivals of a block of rows.

    A key outside a row's rivals is stored as -inf, and NaN as +inf. A program scores ``BLOCK_N`` keys.
    """
    batch, kv_head, _index, _head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    channels = (batch * num_kv_heads + kv_head) * D
    weights, step, at_center, _per_residual, _per_scale, _slack = coded_rows(
        query, stride_qb, stride_qh, stride_ql, batch, kv_head, group, Lq, center + channels, spread + channels, D,
        BLOCK_M, BLOCK_D,
    )  # fmt: skip
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    low, high = span(first, last, last > first)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (2 * place + 1).to(tl.int64)
    columns = (low + (high - low).to(tl.int64) * at // (2 * SAMPLES)).to(tl.int32)
    within = columns < high
    product = code_products(
        weights, codes + batch * stride_cb + kv_head * stride_ch, columns.to(tl.int64) * stride_cl, within, D, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    sizes = tl.load(code_scale + batch * stride_sb + kv_head * stride_sh + columns, mask=within, other=0.0)
    score = product.to(tl.float32) * sizes[None, :] * step[:, None] + at_center[:, None]
    score = tl.where(score == score, score, float("inf"))
    rival = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    score = tl.where(rival, score, float("-inf"))
    tl.store(samples + (row * SAMPLES)[:, None] + place[None, :], score, mask=valid[:, None])


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys", "splits", "segment"])
def scan_kernel(
    query,
    visible,
    budget,
    codes,
    code_scale,
    code_residual,
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
    stride_rb,
    stride_rh,
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
    BLOCK_D: tl.constexpr,
    REFINE: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Lists, of every ``splits``-th tile of keys, those that may reach a row's ``guess`` or are forced.

    A program fills a segment of its own per row, ``[row, split, segment]``: positions in rising order, approximate
    scores and, with ``WANT_BOUNDS`` but not ``REFINE``, their errors. ``counts[row, split]`` goes on where a segment
    is full. Without ``REFINE`` keys go by their approximate scores. With ``WANT_BOUNDS`` ``outside[row, split]`` is
    (peak, total) of the softmax of the lower and then of the upper logits, in base 2, of the keys not listed.
    """
    batch, kv_head, _index, _head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    channels = (batch * num_kv_heads + kv_head) * D
    weights, step, at_center, per_residual, per_scale, slack = coded_rows(
        query, stride_qb, stride_qh, stride_ql, batch, kv_head, group, Lq, center + channels, spread + channels, D,
        BLOCK_M, BLOCK_D,
    )  # fmt: skip
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    least = tl.load(guess + row, mask=valid, other=float("inf"))
    low, high = span(start, end, end > start)
    split = tl.program_id(1)
    codes += batch * stride_cb + kv_head * stride_ch
    code_scale += batch * stride_sb + kv_head * stride_sh
    code_residual += batch * stride_rb + kv_head * stride_rh
    own = (row * splits + split) * segment
    n = tl.arange(0, BLOCK_N)
    listed = tl.zeros([BLOCK_M], dtype=tl.int32)
    low_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    low_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    high_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    high_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(low // BLOCK_N + split, tl.cdiv(high, BLOCK_N), splits):
        begin = tl.cast(tile, tl.int64) * BLOCK_N
        columns = tile * BLOCK_N + n
        within = columns < high
        product = code_products(weights, codes + begin * stride_cl, n * stride_cl, within, D, BLOCK_M, BLOCK_N, BLOCK_D)
        sizes = tl.load(code_scale + begin + n, mask=within, other=0.0)
        residuals = tl.load(code_residual + begin + n, mask=within, other=0.0)
        score = product.to(tl.float32) * sizes[None, :] * step[:, None] + at_center[:, None]
        error = per_residual[:, None] * residuals[None, :] + (per_scale[:, None] * sizes[None, :] + slack[:, None])
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
        forced = (columns[None, :] < first[:, None]) | (columns[None, :] >= last[:, None])
        # NaN is below nothing, so that a key whose score is not known at all is listed.
        below = (score + error if REFINE else score) < least[:, None]
        chosen = seen & (forced | ~below)
        ones = chosen.to(tl.int32)
        place = listed[:, None] + tl.cumsum(ones, axis=1) - ones
        room = chosen & (place < segment)
        at = own[:, None] + place
        tl.store(positions + at, tl.broadcast_to(columns[None, :], room.shape), mask=room)
        tl.store(scores + at, score, mask=room)
        if WANT_BOUNDS:
            if not REFINE:
                tl.store(errors + at, error, mask=room)
            rest = seen & ~chosen
            lower = logits_base2(score - error, scale, softcap, HAS_SOFTCAP)
            upper = logits_base2(score + error, scale, softcap, HAS_SOFTCAP)
            lower -= logit_slack(lower, softcap, HAS_SOFTCAP)
            upper += logit_slack(upper, softcap, HAS_SOFTCAP)
            # The error of a key that is not sound may be infinite.
            lower = tl.where(lower == lower, lower, float("-inf"))
            upper = tl.where(upper == upper, upper, float("inf"))
            low_peak, low_total, _w, _s = fold(tl.where(rest, lower, float("-inf")), low_peak, low_total)
            high_peak, high_total, _w, _s = fold(tl.where(rest, upper, float("-inf")), high_peak, high_total)
        listed += tl.sum(ones, axis=1)
    tl.store(counts + row * splits + split, listed, mask=valid)
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
    BLOCK_D: tl.constexpr,
):
    """The rows of ``program_rows`` against codes: (weights, step, at_center, per_residual, per_scale, slack).

    ``weights`` is int8 ``[2 * BLOCK_M, BLOCK_D]``: the high parts of all rows, then the low ones. The rest are float32
    ``[BLOCK_M]``: a score is ``at_center + code_scale * step * product``, and it is off by at most
    ``per_residual * residual + per_scale * code_scale + slack``, in which float32's rounding is counted.
    """
    blocks = tl.cdiv(Lq * group, BLOCK_M)
    stacked = tl.arange(0, 2 * BLOCK_M)
    flat = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M + stacked % BLOCK_M
    valid = flat < Lq * group
    head = kv_head * group + flat % group
    rows = query + batch * stride_qb + head * stride_qh + (flat // group).to(tl.int64) * stride_ql
    d = tl.arange(0, BLOCK_D)
    q = tl.load(rows[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    middle = tl.load(center + d, mask=d < D, other=0.0)
    w = q * tl.load(spread + d, mask=d < D, other=0.0)[None, :]
    at_center = tl.sum(q * middle[None, :], axis=1)
    slack = row_norms(q) * tl.max(row_norms(middle[None, :]), axis=0) * (2 * (D + 16) * _HALF_ULP) + _SMALLEST

    largest = tl.max(tl.abs(w), axis=1)
    step = largest / _LARGEST_WEIGHT
    step = tl.where((step > 1e-37) & (largest < float("inf")), step, 0.0)
    level = w / tl.where(step > 0, step, 1.0)[:, None]
    level = tl.where((step > 0)[:, None] & (level == level), level, 0.0)
    level = tl.minimum(tl.maximum(tl.floor(level + 0.5), -_LARGEST_WEIGHT), _LARGEST_WEIGHT)
    # NaN and infinity stay in what is left over, so that such a row bounds nothing.
    left_over = row_norms(w - step[:, None] * level)
    high = tl.floor((level + 128.0) * (1.0 / 256.0))
    weights = tl.where((stacked < BLOCK_M)[:, None], high, level - 256.0 * high).to(tl.int8)
    size = row_norms(w)
    widest = _LARGEST_CODE * (D**0.5) * (1.0 + 8 * _HALF_ULP)
    per_scale = widest * (size * ((D + 16) * _HALF_ULP) + left_over)
    return (
        weights,
        one_half(step, BLOCK_M),
        one_half(at_center, BLOCK_M),
        one_half(size, BLOCK_M),
        one_half(per_scale, BLOCK_M),
        one_half(slack, BLOCK_M),
    )


@triton.jit
def one_half(stacked, BLOCK_M: tl.constexpr):
    """The first ``BLOCK_M`` of twice as many numbers whose halves are equal; NaN stays."""
    return 0.5 * tl.sum(tl.reshape(stacked, [2, BLOCK_M]), axis=0)


@triton.jit
def row_norms(rows):
    """At least the norm of each row, without overflow or underflow on the way; NaN where a row holds NaN or inf."""
    largest = tl.max(tl.abs(rows), axis=1)
    unit = rows / tl.where(largest > 0, largest, 1.0)[:, None]
    norm = largest * tl.sqrt(tl.sum(unit * unit, axis=1))
    return norm * (1.0 + (rows.shape[1] + 16) * _HALF_ULP)


@triton.jit
def code_products(
    weights, codes, offsets, within, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """int32 ``[BLOCK_M, BLOCK_N]``, exact: the 16-bit weights times the codes at ``codes + offsets``."""
    d = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        tile = tl.load(codes + (offsets[None, :] + d[:, None]), mask=within[None, :], other=0)
    else:
        tile = tl.load(codes + (offsets[None, :] + d[:, None]), mask=within[None, :] & (d < D)[:, None], other=0)
    product = tl.dot(weights, tile, out_dtype=tl.int32)
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

"""Softmax times value over listed keys, and the bounds of what was left out; one program works on one row.

The lists are those of ``triton_candidates``. The keys of a row are divided among programs, and ``triton_split`` joins
what they leave. Logits are in base 2.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton_attend import LOG2_E, finite_or_zero, logits_base2
from nc_patch.ops.triton_candidates import row_interval
from nc_patch.ops.triton_codes import logit_slack
from nc_patch.ops.triton_tail import PAGE

# Relative width given to bounds of sums of exponentials, for their rounding in float32, and what underflow may lose.
_SUM_SLACK = tl.constexpr(1e-4)
_SMALLEST_MASS = tl.constexpr(1e-30)
_HALF_ULP = tl.constexpr(2.0**-24)


@triton.jit(
    do_not_specialize=["num_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys", "capacity", "chunks", "parts"]
)
def gather_kernel(
    value,
    visible,
    budget,
    positions,
    scores,
    errors,
    listed,
    threshold,
    ties_end,
    acc,
    peak,
    total,
    kept,
    origin,
    page_counts,
    stride_vb,
    stride_vh,
    stride_vl,
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
    capacity,
    chunks,
    parts,
    slots,
    stride_ob,
    stride_ol,
    scale,
    softcap,
    DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
    COUNT_PAGES: tl.constexpr,
):
    """The partial softmax of one of ``chunks`` parts of a row's list: what ``combine_splits`` joins, among ``parts``.

    With ``WANT_BOUNDS`` ``kept[row, chunk]`` is (peak, total) of the lower and the upper logits of the keys attended,
    then of those listed but not attended. With ``COUNT_PAGES`` every key attended is added to the count of its page,
    ``page_counts[row, slot]``.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    batch, head, index, _start, _end, _wanted, first, last = row_interval(
        row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
        recent_keys,
    )  # fmt: skip
    values = value + batch * stride_vb + (head // group) * stride_vh
    positions += row * capacity
    scores += row * capacity
    errors += row * capacity
    count = tl.load(listed + row)
    limit = tl.load(threshold + row)
    limit_end = tl.load(ties_end + row)
    if COUNT_PAGES:
        residue = tl.load(origin + batch * stride_ob + index * stride_ol) & (PAGE - 1)
        page_counts += row * slots
    blocks = tl.cdiv(count, BLOCK_E)
    dv = tl.arange(0, BLOCK_DV)
    sums = tl.zeros([BLOCK_E, BLOCK_DV], dtype=tl.float32)
    highest = tl.full([1], float("-inf"), dtype=tl.float32)
    whole = tl.zeros([1], dtype=tl.float32)
    in_low_peak = tl.full([1], float("-inf"), dtype=tl.float32)
    in_low = tl.zeros([1], dtype=tl.float32)
    in_high_peak = in_low_peak
    in_high = in_low
    out_low_peak = in_low_peak
    out_low = in_low
    out_high_peak = in_low_peak
    out_high = in_low
    for block in range(blocks * chunk // chunks, blocks * (chunk + 1) // chunks):
        e = block * BLOCK_E + tl.arange(0, BLOCK_E)
        here = e < count
        position = tl.load(positions + e, mask=here, other=0)
        score = tl.load(scores + e, mask=here, other=0.0)
        ranked = tl.where(score == score, score, float("inf"))
        chosen = (position < first) | (position >= last) | (ranked > limit)
        chosen = here & (chosen | ((ranked == limit) & (position < limit_end)))
        logits = logits_base2(score, scale, softcap, HAS_SOFTCAP)
        highest, whole, weights, shrink = fold_one(logits, chosen, highest, whole)
        rows = values + position.to(tl.int64) * stride_vl
        tile = tl.load(rows[:, None] + dv[None, :], mask=chosen[:, None] & (dv < DV)[None, :], other=0.0)
        sums = sums * shrink[:, None] + weights[:, None] * tile.to(tl.float32)
        if COUNT_PAGES:
            in_page = chosen & (position >= residue)
            tl.atomic_add(page_counts + (position - residue) // PAGE, 1, mask=in_page, sem="relaxed")
        if WANT_BOUNDS:
            error = tl.load(errors + e, mask=here, other=0.0)
            lower = logits_base2(score - error, scale, softcap, HAS_SOFTCAP)
            upper = logits_base2(score + error, scale, softcap, HAS_SOFTCAP)
            lower -= logit_slack(lower, softcap, HAS_SOFTCAP)
            upper += logit_slack(upper, softcap, HAS_SOFTCAP)
            lower = tl.where(lower == lower, lower, float("-inf"))
            upper = tl.where(upper == upper, upper, float("inf"))
            rest = here & ~chosen
            in_low_peak, in_low, _w, _s = fold_one(lower, chosen, in_low_peak, in_low)
            in_high_peak, in_high, _w, _s = fold_one(upper, chosen, in_high_peak, in_high)
            out_low_peak, out_low, _w, _s = fold_one(lower, rest, out_low_peak, out_low)
            out_high_peak, out_high, _w, _s = fold_one(upper, rest, out_high_peak, out_high)
    part = row * parts + chunk
    tl.store(acc + part * DV + dv, tl.sum(sums, axis=0), mask=dv < DV)
    one = tl.arange(0, 1)
    tl.store(peak + part + one, highest)
    tl.store(total + part + one, whole)
    if WANT_BOUNDS:
        kept += (row * chunks + chunk) * 8
        tl.store(kept + one, in_low_peak)
        tl.store(kept + 1 + one, in_low)
        tl.store(kept + 2 + one, in_high_peak)
        tl.store(kept + 3 + one, in_high)
        tl.store(kept + 4 + one, out_low_peak)
        tl.store(kept + 5 + one, out_low)
        tl.store(kept + 6 + one, out_high_peak)
        tl.store(kept + 7 + one, out_high)


@triton.jit
def fold_one(logits, among, peak, total):
    """``triton_attend.fold`` for one row: logits ``[BLOCK_E]`` among which some count, peak and total ``[1]``."""
    logits = tl.where(among, logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, axis=0))
    base = finite_or_zero(higher)
    weights = tl.exp2(logits - base)
    shrink = tl.exp2(peak - base)
    return higher, total * shrink + tl.sum(weights, axis=0), weights, shrink


@triton.jit
def join_parts(parts, stride, count, BLOCK: tl.constexpr):
    """(peak, total) of ``count`` parts, each a peak and a total ``stride`` apart."""
    at = tl.arange(0, BLOCK)
    peaks = tl.load(parts + at * stride, mask=at < count, other=float("-inf"))
    totals = tl.load(parts + at * stride + 1, mask=at < count, other=0.0)
    peak = tl.max(peaks, axis=0)
    shares = tl.exp2(finite_or_zero(peaks) - finite_or_zero(peak))
    return peak, tl.sum(tl.where(totals != 0.0, totals * shares, 0.0), axis=0)


@triton.jit
def add_parts(peak, total, other_peak, other_total):
    """(peak, total) of two such sums together."""
    higher = tl.maximum(peak, other_peak)
    base = finite_or_zero(higher)
    left = tl.where(total != 0.0, total * tl.exp2(finite_or_zero(peak) - base), 0.0)
    right = tl.where(other_total != 0.0, other_total * tl.exp2(finite_or_zero(other_peak) - base), 0.0)
    return higher, left + right


@triton.jit
def share_of(peak, total, rest_peak, rest_total):
    """The share of one such sum in both together."""
    base = finite_or_zero(tl.maximum(peak, rest_peak))
    own = tl.where(total != 0.0, total * tl.exp2(finite_or_zero(peak) - base), 0.0)
    rest = tl.where(rest_total != 0.0, rest_total * tl.exp2(finite_or_zero(rest_peak) - base), 0.0)
    return own / (own + rest)


@triton.jit(do_not_specialize=["num_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys", "splits", "chunks"])
def bounds_kernel(
    query,
    visible,
    budget,
    code_scale,
    code_residual,
    center,
    spread,
    flags,
    outside,
    kept,
    kept_mass,
    bounds,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_sb,
    stride_sh,
    stride_rb,
    stride_rh,
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
    chunks,
    scale,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Kept mass of a row from below and above, ``bounds[row, 2]``.

    A flagged row has its ``kept_mass``, as wide as its rounding: at most the error of a float32 dot product with a key
    of the largest norm that the codes allow.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head, index, start, end, _wanted, _first, _last = row_interval(
        row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
        recent_keys,
    )  # fmt: skip
    lower = 0.0
    upper = 1.0
    if tl.load(flags + row) > 0:
        kv_head = head // group
        d = tl.arange(0, BLOCK_D)
        channels = (batch * (num_heads // group) + kv_head) * D + d
        q = tl.load(query + batch * stride_qb + head * stride_qh + index * stride_ql + d, mask=d < D, other=0.0)
        # One-norms are at least norms.
        q_size = tl.sum(tl.abs(q.to(tl.float32)), axis=0)
        middle = tl.sum(tl.abs(tl.load(center + channels, mask=d < D, other=0.0)), axis=0)
        widest = tl.max(tl.load(spread + channels, mask=d < D, other=0.0), axis=0)
        code_scale += batch * stride_sb + kv_head * stride_sh
        code_residual += batch * stride_rb + kv_head * stride_rh
        largest = 0.0
        for begin in range(start, end, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            size = tl.load(code_scale + column, mask=column < end, other=0.0) * (127.0 * (D**0.5))
            size += tl.load(code_residual + column, mask=column < end, other=0.0)
            largest = tl.maximum(largest, tl.max(size, axis=0))
        off = q_size * (middle + widest * largest) * ((D + 16) * _HALF_ULP) * (2.0 * scale * LOG2_E)
        exact = tl.load(kept_mass + row)
        lower = exact * tl.exp2(-off)
        upper = exact * tl.exp2(off)
    else:
        in_low_peak, in_low = join_parts(kept + row * chunks * 8, 8, chunks, BLOCK_C)
        in_high_peak, in_high = join_parts(kept + row * chunks * 8 + 2, 8, chunks, BLOCK_C)
        out_low_peak, out_low = join_parts(kept + row * chunks * 8 + 4, 8, chunks, BLOCK_C)
        out_high_peak, out_high = join_parts(kept + row * chunks * 8 + 6, 8, chunks, BLOCK_C)
        more_low_peak, more_low = join_parts(outside + row * splits * 4, 4, splits, BLOCK_S)
        more_high_peak, more_high = join_parts(outside + row * splits * 4 + 2, 4, splits, BLOCK_S)
        out_low_peak, out_low = add_parts(out_low_peak, out_low, more_low_peak, more_low)
        out_high_peak, out_high = add_parts(out_high_peak, out_high, more_high_peak, more_high)
        lower = share_of(in_low_peak, in_low, out_high_peak, out_high)
        upper = share_of(in_high_peak, in_high, out_low_peak, out_low)
    lower = lower * (1.0 - _SUM_SLACK) - _SMALLEST_MASS
    upper = upper * (1.0 + _SUM_SLACK) + _SMALLEST_MASS
    lower = tl.where(lower == lower, tl.minimum(tl.maximum(lower, 0.0), 1.0), 0.0)
    upper = tl.where(upper == upper, tl.minimum(tl.maximum(upper, 0.0), 1.0), 1.0)
    tl.store(bounds + row * 2, tl.where(end > start, lower, 1.0))
    tl.store(bounds + row * 2 + 1, tl.where(end > start, upper, 1.0))

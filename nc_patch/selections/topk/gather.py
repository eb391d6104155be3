"""Softmax times value over listed keys, for a block of rows at once, and the bounds of what was left out.

The lists are those of ``candidates``. A value is read once for all rows of the block that attend its key. The
keys of a block are divided among programs, and ``split`` joins what they leave. Logits are in base 2.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import finite_or_zero, fold, logits_base2
from nc_patch.ops.triton.tail import PAGE
from nc_patch.ops.triton.tiles import PER_CALL, dot, forced_keys, program_rows
from nc_patch.selections.topk.scan import logit_slack

# Relative width given to bounds of sums of exponentials, for their rounding in float32, and what underflow may lose.
_SUM_SLACK = tl.constexpr(1e-4)
_SMALLEST_MASS = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=[*PER_CALL, "capacity", "chunks", "parts", "slots"])
def gather_kernel(
    value,
    visible,
    budget,
    positions,
    scores,
    errors,
    listed,
    flags,
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
    num_kv_heads,
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
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
    COUNT_PAGES: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """The partial softmax of one of ``chunks`` parts of a block's list: what ``combine_splits`` joins, among ``parts``.

    With ``WANT_BOUNDS`` ``kept[row, chunk]`` is (peak, total) of the lower and the upper logits of the keys attended,
    then of those listed but not attended. With ``COUNT_PAGES`` every key attended is added to the count of its page,
    ``page_counts[row, slot]``. With ``FLAGGED`` only of the rows whose ``flags`` are not 0, whose list is all keys: an
    entry is its own position.
    """
    batch, kv_head, index, _head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    block = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    first = start + firsts
    last = end - recents
    values = value + batch * stride_vb + kv_head * stride_vh
    positions += block * capacity
    # A row without a proof has an empty list.
    if FLAGGED:
        valid = valid & (tl.load(flags + row, mask=valid, other=0) != 0)
    count = tl.load(listed + row, mask=valid, other=0)
    limit = tl.load(threshold + row, mask=valid, other=float("inf"))
    limit_end = tl.load(ties_end + row, mask=valid, other=0)
    residue = tl.zeros([BLOCK_M], dtype=tl.int32)
    if COUNT_PAGES:
        residue = tl.load(origin + batch * stride_ob + index * stride_ol, mask=valid, other=0) & (PAGE - 1)
    most = tl.max(count, axis=0)
    tiles = tl.cdiv(most, BLOCK_E)
    dv = tl.arange(0, BLOCK_DV)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    whole = tl.zeros([BLOCK_M], dtype=tl.float32)
    in_low_peak = highest
    in_low = whole
    in_high_peak = highest
    in_high = whole
    out_low_peak = highest
    out_low = whole
    out_high_peak = highest
    out_high = whole
    for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
        e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
        position = e
        if not FLAGGED:
            position = tl.load(positions + e, mask=e < most, other=0)
        here = e[None, :] < count[:, None]
        if FLAGGED:  # keys before the interval have no scores
            here = here & (position[None, :] >= start[:, None])
        at = row[:, None] * capacity + e[None, :]
        score = tl.load(scores + at, mask=here, other=0.0)
        listed_here = here & (position[None, :] >= start[:, None]) & (position[None, :] < end[:, None])
        ranked = tl.where(score == score, score, float("inf"))
        forced = (position[None, :] < first[:, None]) | (position[None, :] >= last[:, None])
        best = (ranked > limit[:, None]) | ((ranked == limit[:, None]) & (position[None, :] < limit_end[:, None]))
        chosen = listed_here & (forced | best)
        logits = logits_base2(score, scale, softcap, HAS_SOFTCAP)
        highest, whole, weights, shrink = fold(tl.where(chosen, logits, float("-inf")), highest, whole)
        attended = tl.max(chosen.to(tl.int32), axis=0) > 0
        rows = values + position.to(tl.int64) * stride_vl
        tile_values = tl.load(rows[:, None] + dv[None, :], mask=attended[:, None] & (dv < DV)[None, :], other=0.0)
        sums = add_values(sums * shrink[:, None], weights, chosen, tile_values, BLOCK_M, BLOCK_DV)
        if COUNT_PAGES:
            in_page = chosen & (position[None, :] >= residue[:, None])
            slot = (position[None, :] - residue[:, None]) // PAGE
            tl.atomic_add(page_counts + row[:, None] * slots + slot, 1, mask=in_page, sem="relaxed")
        if WANT_BOUNDS:
            error = tl.load(errors + at, mask=here, other=0.0)
            lower = logits_base2(score - error, scale, softcap, HAS_SOFTCAP)
            upper = logits_base2(score + error, scale, softcap, HAS_SOFTCAP)
            lower -= logit_slack(lower, softcap, HAS_SOFTCAP)
            upper += logit_slack(upper, softcap, HAS_SOFTCAP)
            lower = tl.where(lower == lower, lower, float("-inf"))
            upper = tl.where(upper == upper, upper, float("inf"))
            rest = listed_here & ~chosen
            in_low_peak, in_low, _w, _s = fold(tl.where(chosen, lower, float("-inf")), in_low_peak, in_low)
            in_high_peak, in_high, _w, _s = fold(tl.where(chosen, upper, float("-inf")), in_high_peak, in_high)
            out_low_peak, out_low, _w, _s = fold(tl.where(rest, lower, float("-inf")), out_low_peak, out_low)
            out_high_peak, out_high, _w, _s = fold(tl.where(rest, upper, float("-inf")), out_high_peak, out_high)
    part = row * parts + chunk
    tl.store(acc + part[:, None] * DV + dv[None, :], sums, mask=valid[:, None] & (dv[None, :] < DV))
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, whole, mask=valid)
    if WANT_BOUNDS:
        kept += (row * chunks + chunk) * 8
        tl.store(kept, in_low_peak, mask=valid)
        tl.store(kept + 1, in_low, mask=valid)
        tl.store(kept + 2, in_high_peak, mask=valid)
        tl.store(kept + 3, in_high, mask=valid)
        tl.store(kept + 4, out_low_peak, mask=valid)
        tl.store(kept + 5, out_low, mask=valid)
        tl.store(kept + 6, out_high_peak, mask=valid)
        tl.store(kept + 7, out_high, mask=valid)


@triton.jit
def add_values(sums, weights, among, values, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """``sums + weights @ values`` of ``[BLOCK_M, BLOCK_DV]``; a value that is not finite spoils the rows ``among``.

    0 * NaN and 0 * inf must not reach a row that has no use for the key.
    """
    # Written so that NaN fails the comparison too.
    sound = tl.abs(values.to(tl.float32)) < float("inf")
    if tl.max(tl.max(tl.where(sound, 0, 1), axis=1), axis=0) > 0:
        spoilt = tl.where(sound, 0.0, 1.0).to(values.dtype)
        spoilt = dot(among.to(tl.float32).to(values.dtype), spoilt, tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32))
        sums = tl.where(spoilt > 0, float("nan"), sums)
        values = tl.where(sound, values, 0.0)
    return dot(weights.to(values.dtype), values, sums)


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


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "chunks"])
def bounds_kernel(
    visible,
    flags,
    outside,
    kept,
    bounds,
    stride_ib,
    stride_il,
    num_heads,
    Lq,
    Lk,
    splits,
    chunks,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Kept mass of a row from below and above, ``bounds[row, 2]``. All keys of a flagged row are in its list."""
    row = tl.program_id(0).to(tl.int64)
    interval = visible + row // (Lq * num_heads) * stride_ib + row % Lq * stride_il
    start = tl.maximum(tl.load(interval), 0)
    end = tl.minimum(tl.load(interval + 1), Lk)
    in_low_peak, in_low = join_parts(kept + row * chunks * 8, 8, chunks, BLOCK_C)
    in_high_peak, in_high = join_parts(kept + row * chunks * 8 + 2, 8, chunks, BLOCK_C)
    out_low_peak, out_low = join_parts(kept + row * chunks * 8 + 4, 8, chunks, BLOCK_C)
    out_high_peak, out_high = join_parts(kept + row * chunks * 8 + 6, 8, chunks, BLOCK_C)
    unlisted = tl.where(tl.load(flags + row) != 0, 0, splits)
    more_low_peak, more_low = join_parts(outside + row * splits * 4, 4, unlisted, BLOCK_S)
    more_high_peak, more_high = join_parts(outside + row * splits * 4 + 2, 4, unlisted, BLOCK_S)
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

"""What the Triton kernels share: rows of a program, score tiles, and softmax times value over ranges of keys.

A program works on ``BLOCK_M`` rows of one key/value head. Rows are (query, query head of the group) pairs, the head
running fastest, so that every tile of keys is loaded once for the whole group and any group size fills the block. Row
vectors are ``[BLOCK_M]``, tiles ``[BLOCK_M, BLOCK_N]``.
"""

import triton
import triton.language as tl

# A row whose ties are all admitted counts down from here; no row has as many keys.
EVERY_TIE = tl.constexpr(1 << 30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_NO_ROW = tl.constexpr(2147483647)
# Triton's interpreter multiplies bfloat16 as integers; there, dots take their (exactly converted) operands in float32.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def program_rows(
    visible,
    budget,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    BLOCK_M: tl.constexpr,
):
    """The rows of this program: (batch, kv head, query index, query head, valid, start, end, budget).

    Blocks run from the last queries to the first, so that the long ones start first. Rows beyond the end, and rows that
    see no key, come out with ``start = end`` and a budget of 0.
    """
    blocks = tl.cdiv(Lq * group, BLOCK_M)
    program = tl.program_id(0)
    kv_row = program // blocks
    batch = (kv_row // num_kv_heads).to(tl.int64)
    kv_head = (kv_row % num_kv_heads).to(tl.int64)
    flat = (blocks - 1 - program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = flat < Lq * group
    index = (flat // group).to(tl.int64)
    head = kv_head * group + flat % group
    interval = visible + batch * stride_ib + index * stride_il
    start = tl.maximum(tl.load(interval, mask=valid, other=0), 0)
    end = tl.minimum(tl.load(interval + 1, mask=valid, other=0), Lk)
    end = tl.maximum(start, end)
    wanted = tl.load(budget + batch * stride_nb + head * stride_nh + index * stride_nl, mask=valid, other=0)
    wanted = tl.minimum(tl.maximum(wanted, 0), end - start)
    return batch, kv_head, index, head, valid, start, end, wanted


@triton.jit
def span(low, high, among):
    """(smallest ``low``, largest ``high``) of the rows in ``among``; an empty range when there are none."""
    least = tl.min(tl.where(among, low, _NO_ROW), axis=0)
    most = tl.max(tl.where(among, high, 0), axis=0)
    return tl.minimum(least, most), most


@triton.jit
def load_query(query_rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr):
    """The block's queries ``[BLOCK_M, BLOCK_D]``; where scores are summed in chunks, only a stand-in that is not read."""
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        return tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
    return tl.load(query_rows, mask=valid, other=0.0)


@triton.jit
def dot(left, right, acc):
    """``left @ right + acc`` in float32, without TF32."""
    if _INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def dot_scores(
    queries,
    query_rows,
    valid,
    keys,
    columns,
    in_range,
    stride_kl,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Raw scores q·k in float32 of the keys at ``columns``; ``EDGE`` reads only the columns that are ``in_range``.

    Every pass calls this with the same shapes, so that a score comes out with the same bits in all of them.
    """
    key_columns = keys + columns.to(tl.int64) * stride_kl
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        if EDGE:
            tile = tl.load(key_columns[None, :] + d[:, None], mask=(d[:, None] < D) & in_range[None, :], other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(key_columns[None, :] + d[:, None])
        else:
            tile = tl.load(key_columns[None, :] + d[:, None], mask=d[:, None] < D, other=0.0)
        return dot(queries, tile, tl.zeros([queries.shape[0], tile.shape[1]], dtype=tl.float32))
    scores = tl.zeros([query_rows.shape[0], columns.shape[0]], dtype=tl.float32)
    for chunk in range(0, D, CHUNK_D):
        d = chunk + tl.arange(0, CHUNK_D)
        part = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
        tile = tl.load(key_columns[None, :] + d[:, None], mask=(d[:, None] < D) & in_range[None, :], other=0.0)
        scores = dot(part, tile, scores)
    return scores


@triton.jit
def logits_base2(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw scores scaled, soft-capped, and times log2(e), so that the softmax can use exp2."""
    if HAS_SOFTCAP:
        ratio = scores * (scale / softcap)
        shrink = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2_E))
        bent = (1.0 - shrink) / (1.0 + shrink)
        return tl.where(ratio < 0, -bent, bent) * (softcap * LOG2_E)
    return scores * (scale * LOG2_E)


@triton.jit
def finite_or_zero(peak):
    """The subtrahend of a softmax whose largest logit is ``peak``: inf - inf must not turn a weight into NaN."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def attend(
    queries,
    query_rows,
    valid,
    keys,
    values,
    stride_kl,
    stride_vl,
    start,
    end,
    sinks_end,
    recents_start,
    threshold,
    ties,
    low_first,
    tiles_first,
    low_second,
    tiles_second,
    high,
    scale,
    softcap,
    repair,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BY_SCORE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_DENSE: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """One online-softmax pass over two runs of key tiles: (acc, peak, total, dense peak, dense total), logits in base 2.

    A row attends the keys of its interval ``[start, end)`` below ``sinks_end``, from ``recents_start`` on, and, with
    ``BY_SCORE``, those that score above ``threshold`` and the first ``ties`` of those that equal it. ``REPAIR`` is for
    values that hold NaN or infinity: with ``repair = 0`` these count as zero, with ``repair = 1`` acc counts them.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    dense_peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    dense_total = tl.zeros([BLOCK_M], dtype=tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    if BY_SCORE:
        any_limited = tl.max((ties < EVERY_TIE).to(tl.int32), axis=0) > 0
    for tile in range(0, tiles_first + tiles_second):
        begin = tl.where(
            tile < tiles_first, low_first + tile * BLOCK_N, low_second + (tile - tiles_first) * BLOCK_N
        )
        columns = begin + tl.arange(0, BLOCK_N)
        in_range = columns < high
        raw = dot_scores(
            queries, query_rows, valid, keys, columns, in_range, stride_kl, D, BLOCK_D, CHUNK_D, True
        )
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
        forced = (columns[None, :] < sinks_end[:, None]) | (columns[None, :] >= recents_start[:, None])
        if BY_SCORE:
            # NaN ranks with +inf, above every finite score.
            ranked = tl.where(raw == raw, raw, float("inf"))
            tied = (ranked == threshold[:, None]) & (ties > 0)[:, None]
            if any_limited:
                rivals = (tied & seen & ~forced).to(tl.int32)
                count = tl.sum(rivals, axis=1)
                if tl.max((count > ties).to(tl.int32), axis=0) > 0:
                    tied = tied & (tl.cumsum(rivals, axis=1) <= ties[:, None])
                ties = tl.maximum(ties - count, 0)
            attended = seen & (forced | (ranked > threshold[:, None]) | tied)
        else:
            attended = seen & forced
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        if WANT_DENSE:
            dense = tl.where(seen, logits, float("-inf"))
            dense_peak, dense_total, _, _ = fold(dense, dense_peak, dense_total)
        peak, total, weights, shrink = fold(tl.where(attended, logits, float("-inf")), peak, total)
        tile_values = tl.load(
            values + columns.to(tl.int64)[:, None] * stride_vl + dv[None, :],
            mask=in_range[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        if REPAIR:
            # Written so that NaN fails the comparison too.
            sound = tl.abs(tile_values.to(tl.float32)) < float("inf")
            cleaned = tl.where(sound, tile_values.to(tl.float32), 0.0)
            tile_values = tl.where(repair > 0, 1.0 - sound.to(tl.float32), cleaned).to(values.dtype.element_ty)
            weights = tl.where(repair > 0, attended.to(tl.float32), weights)
            shrink = tl.where(repair > 0, 1.0, shrink)
        acc = dot(weights.to(values.dtype.element_ty), tile_values, acc * shrink[:, None])
    return acc, peak, total, dense_peak, dense_total


@triton.jit
def fold(logits, peak, total):
    """Takes a tile of base-2 logits into a running softmax: (new peak, new total, weights, factor of what came before)."""
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    base = finite_or_zero(higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    return higher, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def write_rows(
    output_rows,
    acc,
    peak,
    total,
    sinks,
    head,
    valid,
    wanted,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Normalises and stores the output; returns the log-sum-exp in base 2, the sink logit included."""
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        base = finite_or_zero(tl.maximum(peak, sink))
        share = tl.exp2(peak - base)
        denominator = total * share + tl.exp2(sink - base)
    else:
        base = finite_or_zero(peak)
        share = tl.exp2(peak - base)
        denominator = total
    # A row that attends nothing is zero; one whose every attended logit is -inf is 0 / 0, as in any softmax.
    rows = tl.where((wanted > 0)[:, None], acc * (share / denominator)[:, None], 0.0)
    dv = tl.arange(0, BLOCK_DV)
    tl.store(
        output_rows[:, None] + dv[None, :],
        rows.to(output_rows.dtype.element_ty),
        mask=valid[:, None] & (dv[None, :] < DV),
    )
    return base + tl.log2(denominator)


@triton.jit
def not_finite(acc):
    """How many elements of ``acc`` are NaN or infinite: 0 * NaN in a tile reaches rows that do not attend the key."""
    return tl.sum(tl.sum((~(tl.abs(acc) < float("inf"))).to(tl.int32), axis=1), axis=0)


@triton.jit
def write_nan_where(output_rows, touched, valid, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Stores NaN where an attended value was NaN or infinite."""
    dv = tl.arange(0, BLOCK_DV)
    poison = tl.full(touched.shape, float("nan"), dtype=tl.float32)
    tl.store(
        output_rows[:, None] + dv[None, :],
        poison.to(output_rows.dtype.element_ty),
        mask=(touched > 0) & valid[:, None] & (dv[None, :] < DV),
    )


@triton.jit
def write_stats(lse_rows, kept_rows, lse, peak, total, dense_peak, dense_total, valid, sees_any):
    """Stores the natural log-sum-exp and the kept mass; a query that sees no key keeps everything."""
    kept = total * tl.exp2(peak - dense_peak) / dense_total
    tl.store(lse_rows, lse * LN_2, mask=valid)
    tl.store(kept_rows, tl.where(sees_any, kept, 1.0), mask=valid)

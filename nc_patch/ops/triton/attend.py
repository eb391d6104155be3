"""The kernel that accumulates softmax times value over the keys each row attends; ``topk`` and ``window`` share it."""

import triton
import triton.language as tl

from nc_patch.ops.triton.tiles import PER_CALL, dot, dot_scores, forced_keys, load_query, program_rows, span

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Columns of V that are mended at once: few, so that mending, which is rare, needs fewer registers than the common path.
_MEND_COLUMNS = tl.constexpr(32)


@triton.jit(do_not_specialize=PER_CALL)
def attend_kernel(
    query,
    key,
    value,
    visible,
    budget,
    sinks,
    threshold,
    ties_end,
    output,
    lse,
    kept_mass,
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
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BY_SCORE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """Output, and on request log-sum-exp and kept mass, of one block of rows.

    A row attends the first and the last keys that the selection forces and, with ``BY_SCORE``, those that score above
    its ``threshold`` and, at positions below ``ties_end``, those that equal it. Without, only tiles that may hold
    forced keys are read: one run of them from the rows' first start, one from their first recent key.
    """
    batch, kv_head, index, head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, BY_SCORE)
    sinks_end = start + firsts
    recents_start = end - recents
    low, high = span(start, end, end > start)
    if BY_SCORE:
        limit = tl.load(threshold + row, mask=valid, other=float("inf"))
        limit_end = tl.load(ties_end + row, mask=valid, other=0)
        early_tiles = tl.cdiv(high - low, BLOCK_N)
        late_low = high
        late_tiles = 0
    else:
        limit = start
        limit_end = start
        early_tiles = tl.cdiv(tl.max(tl.where(firsts > 0, sinks_end, low), axis=0) - low, BLOCK_N)
        # The late run begins where the early one ends, if not later, so that no key counts twice.
        late_first, _last = span(recents_start, end, wanted > 0)
        late_low = tl.maximum(late_first, low + early_tiles * BLOCK_N)
        late_tiles = tl.cdiv(tl.maximum(high - late_low, 0), BLOCK_N)

    acc, peak, total = attend(
        queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start, limit,
        limit_end, low, early_tiles, late_low, late_tiles, high, scale, softcap, 0, DV, D, BLOCK_M, BLOCK_N, BLOCK_D,
        BLOCK_DV, CHUNK_D, BY_SCORE, HAS_SOFTCAP, False,
    )  # fmt: skip
    base, share, denominator = join_sink(peak, total, sinks, head, valid, HAS_SINKS)
    write_rows(output + row * DV, acc, share / denominator, valid, wanted, DV, BLOCK_DV)
    # The passes below read the queries anew, so that none but the main pass has to hold them.
    if WANT_STATS:
        seen_peak, seen_total = sum_seen(
            load_query(query_rows, valid, D, BLOCK_D, CHUNK_D), query_rows, valid, keys, stride_kl, start, end, low,
            high, scale, softcap, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, HAS_SOFTCAP,
        )  # fmt: skip
        kept = total * tl.exp2(peak - seen_peak) / seen_total
        tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=valid)
        tl.store(kept_mass + row, tl.where(end > start, kept, 1.0), mask=valid)
    # In a tile, 0 * NaN and 0 * inf reach rows that do not attend the key: such blocks are computed again.
    tl.debug_barrier()
    if count_not_finite(output + row * DV, valid, DV, BLOCK_DV) > 0:
        again = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
        for column in range(0, DV, _MEND_COLUMNS):
            for count_broken in range(2):
                mended, _peak, _total = attend(
                    again, query_rows, valid, keys, values + column, stride_kl, stride_vl, start, end, sinks_end,
                    recents_start, limit, limit_end, low, early_tiles, late_low, late_tiles, high, scale, softcap,
                    count_broken, DV - column, D, BLOCK_M, BLOCK_N, BLOCK_D, _MEND_COLUMNS, CHUNK_D, BY_SCORE,
                    HAS_SOFTCAP, True,
                )  # fmt: skip
                tl.debug_barrier()
                if count_broken == 0:
                    write_rows(
                        output + row * DV + column,
                        mended,
                        share / denominator,
                        valid,
                        wanted,
                        DV - column,
                        _MEND_COLUMNS,
                    )
                else:
                    write_nan_where(output + row * DV + column, mended, valid, DV - column, _MEND_COLUMNS)


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
    ties_end,
    early_low,
    early_tiles,
    late_low,
    late_tiles,
    high,
    scale,
    softcap,
    count_broken,
    columns_left,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BY_SCORE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MEND: tl.constexpr,
):
    """One online-softmax pass over two runs of key tiles: (acc, peak, total).

    Logits are in base 2. ``MEND`` is for values that hold NaN or infinity: with ``count_broken = 0`` these count as
    zero, with ``count_broken = 1`` acc holds how many of them each row attends.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    for tile in range(early_tiles + late_tiles):
        begin = tl.where(tile < early_tiles, early_low + tile * BLOCK_N, late_low + (tile - early_tiles) * BLOCK_N)
        columns = begin + n
        in_range = columns < high
        raw = dot_scores(
            queries, query_rows, valid, keys + begin.to(tl.int64) * stride_kl, n * stride_kl, in_range, D, BLOCK_D,
            CHUNK_D, True,
        )  # fmt: skip
        attended = attended_keys(raw, columns, start, end, sinks_end, recents_start, threshold, ties_end, BY_SCORE)
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        peak, total, weights, shrink = fold(tl.where(attended, logits, float("-inf")), peak, total)
        tile_values = tl.load(
            values + begin.to(tl.int64) * stride_vl + (n[:, None] * stride_vl + dv[None, :]),
            mask=in_range[:, None] & (dv[None, :] < columns_left),
            other=0.0,
        )
        if MEND:
            # Written so that NaN fails the comparison too.
            sound = tl.abs(tile_values.to(tl.float32)) < float("inf")
            cleaned = tl.where(sound, tile_values.to(tl.float32), 0.0)
            tile_values = tl.where(count_broken > 0, 1.0 - sound.to(tl.float32), cleaned).to(values.dtype.element_ty)
            weights = tl.where(count_broken > 0, attended.to(tl.float32), weights)
            shrink = tl.where(count_broken > 0, 1.0, shrink)
        acc = dot(weights.to(values.dtype.element_ty), tile_values, acc * shrink[:, None])
    return acc, peak, total


@triton.jit
def attended_keys(raw, columns, start, end, sinks_end, recents_start, threshold, ties_end, BY_SCORE: tl.constexpr):
    """Which keys of a tile each row attends, from their raw scores."""
    seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
    attended = (columns[None, :] < sinks_end[:, None]) | (columns[None, :] >= recents_start[:, None])
    if BY_SCORE:
        # NaN ranks with +inf, above every finite score.
        ranked = tl.where(raw == raw, raw, float("inf"))
        tied = (ranked == threshold[:, None]) & (columns[None, :] < ties_end[:, None])
        attended = attended | (ranked > threshold[:, None]) | tied
    return attended & seen


@triton.jit
def sum_seen(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    start,
    end,
    low,
    high,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(peak, total) of the softmax over all visible keys, logits in base 2."""
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)
    for begin in range(low, high, BLOCK_N):
        columns = begin + n
        raw = dot_scores(
            queries, query_rows, valid, keys + tl.cast(begin, tl.int64) * stride_kl, n * stride_kl, columns < high, D,
            BLOCK_D, CHUNK_D, True,
        )  # fmt: skip
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        peak, total, _weights, _shrink = fold(tl.where(seen, logits, float("-inf")), peak, total)
    return peak, total


@triton.jit
def logits_base2(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw scores scaled, soft-capped, and times log2(e), so that the softmax can use exp2."""
    bent, factor = factored_logits(scores, scale, softcap, HAS_SOFTCAP)
    return bent * factor


@triton.jit
def factored_logits(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Two factors of ``logits_base2``: a tensor, and a positive number."""
    if HAS_SOFTCAP:
        ratio = scores * (scale / softcap)
        shrink = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2_E))
        bent = (1.0 - shrink) / (1.0 + shrink)
        bent = tl.where(ratio < 0, -bent, bent)
        factor = softcap * LOG2_E
    else:
        bent = scores
        factor = scale * LOG2_E
    return bent, factor


@triton.jit
def finite_or_zero(peak):
    """What a softmax with this largest logit subtracts: never inf - inf, which would turn zero weights into NaN."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def fold(logits, peak, total):
    """Takes a tile of logits into a running softmax: (peak, total, the tile's weights, factor of what came before)."""
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    base = finite_or_zero(higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    return higher, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def join_sink(peak, total, sinks, head, valid, HAS_SINKS: tl.constexpr):
    """(base, share, denominator): the softmax's denominator relative to 2**base, and the factor of acc to match it."""
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        base = finite_or_zero(tl.maximum(peak, sink))
        share = tl.exp2(peak - base)
        denominator = total * share + tl.exp2(sink - base)
    else:
        base = finite_or_zero(peak)
        share = tl.exp2(peak - base)
        denominator = total
    return base, share, denominator


@triton.jit
def write_rows(output_rows, acc, factor, valid, wanted, columns_left, BLOCK_DV: tl.constexpr):
    """Stores ``acc * factor``, and zero where a row attends nothing; one that attends only -inf stays 0 / 0."""
    dv = tl.arange(0, BLOCK_DV)
    rows = tl.where((wanted > 0)[:, None], acc * factor[:, None], 0.0)
    mask = valid[:, None] & (dv[None, :] < columns_left)
    tl.store(output_rows[:, None] + dv[None, :], rows.to(output_rows.dtype.element_ty), mask=mask)


@triton.jit
def write_nan_where(output_rows, broken, valid, columns_left, BLOCK_DV: tl.constexpr):
    """Stores NaN where a value that is attended was NaN or infinite."""
    dv = tl.arange(0, BLOCK_DV)
    poison = tl.full(broken.shape, float("nan"), dtype=tl.float32)
    mask = (broken > 0) & valid[:, None] & (dv[None, :] < columns_left)
    tl.store(output_rows[:, None] + dv[None, :], poison.to(output_rows.dtype.element_ty), mask=mask)


@triton.jit
def count_not_finite(output_rows, valid, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """How many elements of the stored output are NaN or infinite; read back, so that acc can be let go."""
    dv = tl.arange(0, BLOCK_DV)
    mask = valid[:, None] & (dv[None, :] < DV)
    stored = tl.load(output_rows[:, None] + dv[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.sum((~(tl.abs(stored) < float("inf"))).to(tl.int32), axis=1), axis=0)

"""``topk`` with a tail, over whole rows: what a row does not attend enters by the means of its pages.

``tail.py`` defines the tail. ``attend_tail_kernel`` takes the place of ``attend.attend_kernel``. After the keys
that a row attends it goes over the row's pages, sixteen at a time: their keys are scored once more to count how many of
each page are attended, in registers, and the pages join the softmax by one dot product with their mean keys and one
with their mean values. Nothing of size Lq * Lk is stored. Beside a pass of the search that precedes it, which costs
2 * D floating point operations for each pair of a row and a key, the tail costs 2 * D + 32 + (2 * D + 2 * Dv) / 16.

Rows of one program may belong to sequences that begin anywhere: rows whose pages begin at the same positions modulo the
page size go together, and the program goes over the pages once for each such set of rows, one where nothing is packed.
"""

import triton
import triton.language as tl

from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.ops.triton.attend import (
    LN_2,
    attend,
    attended_keys,
    count_not_finite,
    fold,
    join_sink,
    logits_base2,
    sum_seen,
    write_nan_where,
    write_rows,
)
from nc_patch.ops.triton.tiles import PER_CALL, dot, dot_scores, forced_keys, load_query, program_rows, span

PAGE = tl.constexpr(TAIL_PAGE_SIZE)
# Pages that are taken at once: the least that a matrix instruction takes along each of its axes.
PAGES = tl.constexpr(16)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Elements of head_dim that are multiplied at once with mean keys.
_MEAN_CHUNK = tl.constexpr(64)
# Columns of V that are mended at once, as in ``attend``.
_MEND_COLUMNS = tl.constexpr(32)


@triton.jit(do_not_specialize=PER_CALL)
def attend_tail_kernel(
    query,
    key,
    value,
    mean_key,
    mean_value,
    visible,
    origin,
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
    stride_mb,
    stride_mh,
    stride_mp,
    stride_wb,
    stride_wh,
    stride_wp,
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
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """Output, and on request log-sum-exp and kept mass, of one block of rows; see ``attend_kernel``."""
    batch, kv_head, index, head, row, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh
    mean_keys = mean_key + batch * stride_mb + kv_head * stride_mh
    mean_values = mean_value + batch * stride_wb + kv_head * stride_wh
    begin = tl.load(origin + batch * stride_ob + index * stride_ol, mask=valid, other=0)
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    firsts, recents = forced_keys(wanted, sink_keys, recent_keys, True)
    sinks_end = start + firsts
    recents_start = end - recents
    low, high = span(start, end, end > start)
    limit = tl.load(threshold + row, mask=valid, other=float("inf"))
    limit_end = tl.load(ties_end + row, mask=valid, other=0)
    tiles = tl.cdiv(high - low, BLOCK_N)

    acc, kept_peak, kept_total = attend(
        queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start, limit,
        limit_end, low, tiles, high, 0, high, scale, softcap, 0, DV, D, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D,
        True, HAS_SOFTCAP, False,
    )  # fmt: skip
    acc, peak, total = add_tail(
        acc, kept_peak, kept_total, query_rows, valid, keys, mean_keys, mean_values, stride_kl, stride_mp,
        stride_wp, start, end, sinks_end, recents_start, limit, limit_end, begin, scale, softcap, 0, DV, D, BLOCK_M,
        BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, HAS_SOFTCAP, False,
    )  # fmt: skip
    base, share, denominator = join_sink(peak, total, sinks, head, valid, HAS_SINKS)
    write_rows(output + row * DV, acc, share / denominator, valid, wanted, DV, BLOCK_DV)
    # The passes below read the queries anew, so that none but the main pass has to hold them.
    if WANT_STATS:
        seen_peak, seen_total = sum_seen(
            load_query(query_rows, valid, D, BLOCK_D, CHUNK_D), query_rows, valid, keys, stride_kl, start, end, low,
            high, scale, softcap, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, HAS_SOFTCAP,
        )  # fmt: skip
        kept = kept_total * tl.exp2(kept_peak - seen_peak) / seen_total
        tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=valid)
        tl.store(kept_mass + row, tl.where(end > start, kept, 1.0), mask=valid)
    # In a tile, 0 * NaN and 0 * inf reach rows that do not attend the key: such blocks are computed again.
    tl.debug_barrier()
    if count_not_finite(output + row * DV, valid, DV, BLOCK_DV) > 0:
        again = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
        for column in range(0, DV, _MEND_COLUMNS):
            for count_broken in range(2):
                mended, peak_again, total_again = attend(
                    again, query_rows, valid, keys, values + column, stride_kl, stride_vl, start, end, sinks_end,
                    recents_start, limit, limit_end, low, tiles, high, 0, high, scale, softcap, count_broken,
                    DV - column, D, BLOCK_M, BLOCK_N, BLOCK_D, _MEND_COLUMNS, CHUNK_D, True, HAS_SOFTCAP, True,
                )  # fmt: skip
                mended, _peak, _total = add_tail(
                    mended, peak_again, total_again, query_rows, valid, keys, mean_keys, mean_values + column,
                    stride_kl, stride_mp, stride_wp, start, end, sinks_end, recents_start, limit, limit_end, begin,
                    scale, softcap, count_broken, DV - column, D, BLOCK_M, BLOCK_N, BLOCK_D, _MEND_COLUMNS, CHUNK_D,
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
def add_tail(
    acc,
    peak,
    total,
    query_rows,
    valid,
    keys,
    mean_keys,
    mean_values,
    stride_kl,
    stride_mp,
    stride_wp,
    start,
    end,
    sinks_end,
    recents_start,
    threshold,
    ties_end,
    origin,
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
    HAS_SOFTCAP: tl.constexpr,
    MEND: tl.constexpr,
):
    """Takes the pages of each row into what ``attend`` returned of its keys: (acc, peak, total).

    ``MEND`` and ``count_broken`` as there.
    """
    # Queries that are read again in parts, rather than held in the layouts of two products.
    MEAN_CHUNK: tl.constexpr = CHUNK_D if CHUNK_D < _MEAN_CHUNK else _MEAN_CHUNK
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, PAGES)
    residue, own = pages_of_rows(origin, end)
    waiting = tl.where(own > start, residue, -1)
    current = tl.max(waiting, axis=0)
    while current >= 0:
        among = waiting == current
        low, high = span(start, own, among)
        first = tl.cdiv(low - current, PAGE)
        last = (high - current) // PAGE
        for slot in range(first, last, PAGES):
            # Read anew, so that they are held for this loop alone; the barrier keeps the compiler from merging loads.
            tl.debug_barrier()
            queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
            counts = tl.zeros([BLOCK_M, PAGES], dtype=tl.float32)
            for part in range(0, tl.minimum(last - slot, PAGES) * PAGE, BLOCK_N):
                begin = slot * PAGE + current + part
                columns = begin + n
                raw = dot_scores(
                    queries, query_rows, valid, keys + begin.to(tl.int64) * stride_kl, n * stride_kl, columns < high,
                    D, BLOCK_D, CHUNK_D, True,
                )  # fmt: skip
                attended = attended_keys(raw, columns, start, end, sinks_end, recents_start, threshold, ties_end, True)
                page = (part + n)[:, None] // PAGE == p[None, :]
                element = mean_values.dtype.element_ty
                if _INTERPRETED:
                    # There conversions to bfloat16 are from float32 alone, and ``dot`` takes its operands in float32.
                    counts = dot(attended.to(tl.float32), page.to(tl.float32), counts)
                else:
                    counts = dot(attended.to(element), page.to(element), counts)
            page_begin = (slot + p) * PAGE + current
            missing = -counts + PAGE
            within = (page_begin[None, :] >= start[:, None]) & (page_begin[None, :] < own[:, None])
            within = within & among[:, None] & (missing > 0.5)
            mean_rows = mean_keys + tl.cast(slot, tl.int64) * stride_mp
            raw = dot_scores(
                queries, query_rows, valid, mean_rows, p * stride_mp, slot + p < last, D, BLOCK_D, MEAN_CHUNK, True
            )
            logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP) + tl.log2(tl.maximum(missing, 1.0))
            peak, total, weights, shrink = fold(tl.where(within, logits, float("-inf")), peak, total)
            dv = tl.arange(0, BLOCK_DV)
            values = tl.load(
                mean_values + tl.cast(slot, tl.int64) * stride_wp + (p[:, None] * stride_wp + dv[None, :]),
                mask=(slot + p < last)[:, None] & (dv[None, :] < columns_left),
                other=0.0,
            )
            if MEND:
                # Written so that NaN fails the comparison too.
                sound = tl.abs(values.to(tl.float32)) < float("inf")
                cleaned = tl.where(sound, values.to(tl.float32), 0.0)
                values = tl.where(count_broken > 0, 1.0 - sound.to(tl.float32), cleaned).to(
                    mean_values.dtype.element_ty
                )
                weights = tl.where(count_broken > 0, within.to(tl.float32), weights)
                shrink = tl.where(count_broken > 0, 1.0, shrink)
            acc = dot(weights.to(mean_values.dtype.element_ty), values, acc * shrink[:, None])
        waiting = tl.where(among, -1, waiting)
        current = tl.max(waiting, axis=0)
    return acc, peak, total


@triton.jit
def pages_of_rows(origin, end):
    """(residue, own): a row's pages begin at ``residue`` modulo the page size, and the one of its own at ``own``.

    The bits of a negative origin are those of the number modulo any power of two.
    """
    residue = origin & (PAGE - 1)
    last = end - 1 - residue
    return residue, last - (last & (PAGE - 1)) + residue

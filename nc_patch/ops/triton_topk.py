"""Exact token-level top-k attention in one Triton kernel; ``reference.py`` defines what it computes.

A program takes a block of rows of one key/value head and runs over the keys that any of them sees, several times, with
the scores recomputed each time, so that nothing of size Lq * Lk is ever stored:

1. one tile of evenly spaced keys, for the first guess at the thresholds;
2. counting passes over the candidates (``triton_threshold``), each reading K once and multiplying QK^T once, until every
   row of the block has its exact threshold; at most 25, and none where every budget covers the row's interval;
3. one pass that reads K and V once and accumulates the softmax of the attended keys times V.

So a block costs (passes + 1) reads of K and one of V, and 2 * D * (passes + 1) + 2 * Dv floating point operations per pair of
query and key; two runs of a pass take part in it again only where a value that is read holds NaN or infinity. One program per
``BLOCK_M`` rows means that decoding one token fills no large GPU.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton_launch import attention_call
from nc_patch.ops.triton_threshold import find_thresholds
from nc_patch.ops.triton_tiles import attend, load_query, not_finite, program_rows, span, write_nan_where, write_rows, write_stats


def triton_topk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query over its ``sink_keys`` first, ``recent_keys`` last and highest scoring keys, k in all.

    Args:
        query: ``[B, Hq, Lq, D]`` in bfloat16, float16 or float32. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``, both
            in the query's dtype. D and Dv at most 256. Any strides.
        visible: int32 ``[B, Lq, 2]``, the half-open interval of keys each query may see.
        budget: int32 ``[B, Hq or 1, Lq]``, k of each row.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator, or None.
        scale: factor of q·k, positive. softcap: limit of the scaled scores, 0 for none.
        want_stats: whether to return the log-sum-exp and the kept mass.

    Returns:
        (output, lse, kept_mass): ``[B, Hq, Lq, Dv]`` in the query's dtype, and float32 ``[B, Hq, Lq]`` twice; the last two are
        empty unless ``want_stats``.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernel does not take.
    """
    call = attention_call(
        query, key, value, visible, budget, sinks, scale, softcap, sink_keys, recent_keys, want_stats
    )
    return call.launch(topk_kernel)


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys"])
def topk_kernel(
    query,
    key,
    value,
    visible,
    budget,
    sinks,
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
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """One block of ``BLOCK_M`` rows; see the module's docstring."""
    batch, kv_head, index, head, valid, start, end, wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)

    recents = tl.minimum(wanted, recent_keys)
    firsts = tl.minimum(wanted - recents, sink_keys)
    sinks_end = start + firsts
    recents_start = end - recents
    low, high = span(start, end, end > start)
    threshold, ties = find_thresholds(
        queries,
        query_rows,
        valid,
        keys,
        stride_kl,
        sinks_end,
        recents_start,
        wanted - recents - firsts,
        low,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        CHUNK_D,
    )
    tiles = tl.cdiv(high - low, BLOCK_N)
    acc, peak, total, dense_peak, dense_total = attend(
        queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start, threshold,
        ties, low, tiles, high, 0, high, scale, softcap, 0, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, True,
        HAS_SOFTCAP, WANT_STATS, False,
    )  # fmt: skip
    row = (batch * num_kv_heads * group + head) * Lq + index
    output_rows = output + row * DV
    row_lse = write_rows(output_rows, acc, peak, total, sinks, head, valid, wanted, DV, BLOCK_DV, HAS_SINKS)
    if WANT_STATS:
        write_stats(lse + row, kept_mass + row, row_lse, peak, total, dense_peak, dense_total, valid, end > start)
    if not_finite(acc) > 0:
        for repair in range(0, 2):
            acc, peak, total, _, _ = attend(
                queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start,
                threshold, ties, low, tiles, high, 0, high, scale, softcap, repair, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV, CHUNK_D, True, HAS_SOFTCAP, False, True,
            )  # fmt: skip
            tl.debug_barrier()
            if repair == 0:
                write_rows(output_rows, acc, peak, total, sinks, head, valid, wanted, DV, BLOCK_DV, HAS_SINKS)
            else:
                write_nan_where(output_rows, acc, valid, DV, BLOCK_DV)

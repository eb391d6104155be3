"""Attention over the first and the most recent visible keys in one Triton kernel; ``reference.py`` defines it.

A program takes a block of rows of one key/value head and reads K and V once, in the tiles that hold its rows' first keys
and the tiles that hold their recent ones; a budget that covers the interval makes it dense attention. With statistics
asked for, it also reads all of K once, for the dense log-sum-exp.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton_launch import attention_call
from nc_patch.ops.triton_tiles import (
    attend,
    dot_scores,
    fold,
    load_query,
    logits_base2,
    not_finite,
    program_rows,
    span,
    write_nan_where,
    write_rows,
    write_stats,
)


def triton_window_attention(
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
    """Attention of each query over its ``sink_keys`` first and its most recent visible keys, ``budget`` in all.

    Arguments, results and errors are those of ``triton_topk_attention``; ``recent_keys`` changes nothing, since whatever the
    budget leaves after the sinks is recent.
    """
    call = attention_call(
        query, key, value, visible, budget, sinks, scale, softcap, sink_keys, recent_keys, want_stats
    )
    return call.launch(window_kernel)


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys"])
def window_kernel(
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

    firsts = tl.minimum(tl.maximum(wanted - 1, 0), sink_keys)
    sinks_end = start + firsts
    recents_start = end - (wanted - firsts)
    # Both runs of tiles together cover every attended key once: the second begins where the first ends.
    sink_low, high = span(start, end, wanted > 0)
    sink_high = tl.max(tl.where(firsts > 0, sinks_end, sink_low), axis=0)
    sink_tiles = tl.cdiv(sink_high - sink_low, BLOCK_N)
    recent_low, _ = span(recents_start, end, wanted > 0)
    recent_low = tl.maximum(recent_low, sink_low + sink_tiles * BLOCK_N)
    recent_tiles = tl.cdiv(tl.maximum(high - recent_low, 0), BLOCK_N)
    acc, peak, total, _, _ = attend(
        queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start, start, start,
        sink_low, sink_tiles, recent_low, recent_tiles, high, scale, softcap, 0, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        CHUNK_D, False, HAS_SOFTCAP, False, False,
    )  # fmt: skip
    row = (batch * num_kv_heads * group + head) * Lq + index
    output_rows = output + row * DV
    row_lse = write_rows(output_rows, acc, peak, total, sinks, head, valid, wanted, DV, BLOCK_DV, HAS_SINKS)
    if WANT_STATS:
        dense_peak, dense_total = dense_sum(
            queries, query_rows, valid, keys, stride_kl, start, end, scale, softcap, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D,
            HAS_SOFTCAP,
        )  # fmt: skip
        write_stats(lse + row, kept_mass + row, row_lse, peak, total, dense_peak, dense_total, valid, end > start)
    if not_finite(acc) > 0:
        for repair in range(0, 2):
            acc, peak, total, _, _ = attend(
                queries, query_rows, valid, keys, values, stride_kl, stride_vl, start, end, sinks_end, recents_start, start,
                start, sink_low, sink_tiles, recent_low, recent_tiles, high, scale, softcap, repair, D, DV, BLOCK_M, BLOCK_N,
                BLOCK_D, BLOCK_DV, CHUNK_D, False, HAS_SOFTCAP, False, True,
            )  # fmt: skip
            tl.debug_barrier()
            if repair == 0:
                write_rows(output_rows, acc, peak, total, sinks, head, valid, wanted, DV, BLOCK_DV, HAS_SINKS)
            else:
                write_nan_where(output_rows, acc, valid, DV, BLOCK_DV)


@triton.jit
def dense_sum(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    start,
    end,
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
    low, high = span(start, end, end > start)
    for begin in range(low, high, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        raw = dot_scores(
            queries, query_rows, valid, keys, columns, columns < high, stride_kl, D, BLOCK_D, CHUNK_D, True
        )
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        peak, total, _, _ = fold(tl.where(seen, logits, float("-inf")), peak, total)
    return peak, total

"""Rows whose keys could not be chosen from codes, searched over all their keys; in one launch, which most steps waste.

A program searches the threshold of its rows and then attends by it, as the kernels for whole rows do one after the
other: both divide rows into the same blocks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from nc_patch.ops.tail import PageMeans
from nc_patch.ops.triton_attend import attend_kernel
from nc_patch.ops.triton_launch import (
    Tiles,
    addressable,
    architecture_of,
    compile_options,
    tail_constants,
    tiles_for,
)
from nc_patch.ops.triton_specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton_tail import attend_tail_kernel
from nc_patch.ops.triton_threshold import threshold_kernel
from nc_patch.ops.triton_tiles import program_rows


def search_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    flags: torch.Tensor,
    threshold: torch.Tensor,
    ties_end: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    kept_mass: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> None:
    """Computes ``topk`` of the rows whose flag, int32 ``[B, Hq, Lq]``, is not 0, and writes these rows alone.

    ``threshold`` float32 and ``ties_end`` int32 ``[B * Hq * Lq]`` are overwritten for these rows. The other arguments
    are those of ``launch_rows``; ``visible`` has a dense last axis.
    """
    B, _Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group = query.shape[1] // Hkv
    device = query.device
    architecture = architecture_of(device)
    tiles = tiles_for(architecture, query.dtype, D, DV, 1)
    query, key, value = (addressable(x, tiles.keys) for x in (query, key, value))
    means = PageMeans(key, value) if tail is None else PageMeans(*(addressable(x, tiles.keys) for x in tail))
    begins = visible[..., 0] if origin is None else origin
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        search_kernel[(triton.cdiv(Lq * group, tiles.rows) * B * Hkv,)](
            *(query, key, value, *means, visible, begins, budget, lse if sinks is None else sinks.contiguous()),
            *(flags, threshold, ties_end, output, lse, kept_mass, *query.stride()[:3], *key.stride()[:3]),
            *(*value.stride()[:3], *means.key.stride()[:3], *means.value.stride()[:3], *visible.stride()[:2]),
            *(*begins.stride(), budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2)),
            *(Hkv, group, Lq, Lk, sink_keys, recent_keys, scale, softcap),
            **search_constants(D, DV, tiles, sinks is not None, softcap > 0, tail is not None),
            **compile_options(tiles, architecture),
        )


def search_constants(
    head_dim: int, value_dim: int, tiles: Tiles, has_sinks: bool, has_softcap: bool, has_tail: bool
) -> dict[str, Any]:
    """The compile-time arguments of ``search_kernel``."""
    constants = tail_constants(head_dim, value_dim, tiles, has_sinks, has_softcap, want_stats=True)
    del constants["FLAGGED"]
    return {**constants, "HAS_TAIL": has_tail}


@triton.jit(do_not_specialize=["num_kv_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys"])
def search_kernel(
    query,
    key,
    value,
    mean_key,
    mean_value,
    visible,
    origin,
    budget,
    sinks,
    flags,
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
    HAS_TAIL: tl.constexpr,
):
    """Output, log-sum-exp and kept mass of the flagged rows of one block; see the two kernels that it consists of."""
    _batch, _kv_head, _index, _head, row, valid, _start, _end, _wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    if tl.max(tl.load(flags + row, mask=valid, other=0), axis=0) != 0:
        threshold_kernel(
            query, key, visible, budget, flags, threshold, ties_end, stride_qb, stride_qh, stride_ql,
            stride_kb, stride_kh, stride_kl, stride_ib, stride_il, stride_nb, stride_nh, stride_nl,
            num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D,
            True,
        )  # fmt: skip
        # Thresholds go by way of memory, from the threads that find them to those that use them.
        tl.debug_barrier()
        if HAS_TAIL:
            attend_tail_kernel(
                query, key, value, mean_key, mean_value, visible, origin, budget, sinks, flags,
                threshold, ties_end, output, lse, kept_mass, stride_qb, stride_qh, stride_ql,
                stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_mb,
                stride_mh, stride_mp, stride_wb, stride_wh, stride_wp, stride_ib, stride_il,
                stride_ob, stride_ol, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk,
                sink_keys, recent_keys, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                CHUNK_D, HAS_SINKS, HAS_SOFTCAP, WANT_STATS, True,
            )  # fmt: skip
        else:
            attend_kernel(
                query, key, value, visible, budget, sinks, flags, threshold, ties_end, output, lse,
                kept_mass, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
                stride_vb, stride_vh, stride_vl, stride_ib, stride_il, stride_nb, stride_nh,
                stride_nl, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, scale, softcap, D, DV,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, True, HAS_SINKS, HAS_SOFTCAP,
                WANT_STATS, True,
            )  # fmt: skip


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernel with sinks and a soft-cap. With a tail as well it spills some on sm_80: not listed."""
    for dtype, head_dim, has_tail in (
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 256, False),
    ):
        tiles = tiles_for(target, dtype, head_dim, head_dim, 1)
        types = {
            **dict.fromkeys(("query", "key", "value", "mean_key", "mean_value", "output"), pointer_to(dtype)),
            **dict.fromkeys(("visible", "origin", "budget", "flags", "ties_end"), "*i32"),
            **dict.fromkeys(("sinks", "threshold", "lse", "kept_mass"), "*fp32"),
            **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb", "stride_mb", "stride_wb"), "i64"),
        }
        yield Specialisation(
            f"search-{DTYPE_NAMES[dtype]}-d{head_dim}{'-tail' if has_tail else ''}",
            search_kernel,
            search_constants(head_dim, head_dim, tiles, True, True, has_tail),
            types,
            compile_options(tiles, target),
            data_strides(search_kernel, "qkvmw"),
        )

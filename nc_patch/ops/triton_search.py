"""Rows whose keys could not be chosen from codes, searched over all their keys; in one launch, which most steps waste.

A program searches the threshold of its rows and then attends by it, as the kernels for whole rows do one after the
other: both divide rows into the same blocks. With a tail it is these kernels, in two launches: one program that did all
would need more registers than there are.
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
    attend_constants,
    compile_options,
    tail_constants,
    threshold_constants,
    tiles_for,
)
from nc_patch.ops.triton_specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton_tail import attend_tail_kernel
from nc_patch.ops.triton_threshold import threshold_kernel
from nc_patch.ops.triton_tiles import PER_CALL, program_rows


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
    tiles = search_tiles(architecture, query.dtype, D, DV, tail is not None)
    query, key, value = (addressable(x, tiles.keys) for x in (query, key, value))
    programs = triton.cdiv(Lq * group, tiles.rows) * B * Hkv
    logits = lse if sinks is None else sinks.contiguous()
    query_key = (*query.stride()[:3], *key.stride()[:3])
    limits = (budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2))
    rows = (*visible.stride()[:2], *limits)
    sizes = (Hkv, group, Lq, Lk, sink_keys, recent_keys)
    options = (sinks is not None, softcap > 0)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if tail is None or origin is None:
            search_kernel[(programs,)](
                *(query, key, value, visible, budget, logits, flags, threshold, ties_end, output, lse, kept_mass),
                *(*query_key, *value.stride()[:3], *rows, *sizes, scale, softcap),
                **search_constants(D, DV, tiles, *options),
                **compile_options(tiles, architecture),
            )
            return
        means = PageMeans(*(addressable(x, tiles.keys) for x in tail))
        threshold_kernel[(programs,)](
            *(query, key, visible, budget, flags, threshold, ties_end, *query_key, *rows, *sizes),
            **threshold_constants(D, tiles, flagged=True),
            **compile_options(tiles, architecture),
        )
        attend_tail_kernel[(programs,)](
            *(query, key, value, *means, visible, origin, budget, logits, flags, threshold, ties_end, output, lse),
            *(kept_mass, *query_key, *value.stride()[:3], *means.key.stride()[:3], *means.value.stride()[:3]),
            *(*visible.stride()[:2], *origin.stride(), *limits, *sizes, scale, softcap),
            **tail_constants(D, DV, tiles, *options, want_stats=True, flagged=True),
            **compile_options(tiles, architecture),
        )


def search_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, has_tail: bool) -> Tiles:
    """Tiles of the search."""
    return tiles_for(architecture, dtype, head_dim, value_dim, 1, has_tail)


def search_constants(head_dim: int, value_dim: int, tiles: Tiles, has_sinks: bool, has_softcap: bool) -> dict[str, Any]:
    """The compile-time arguments of ``search_kernel``."""
    constants = attend_constants(head_dim, value_dim, tiles, True, has_sinks, has_softcap)
    return {name: constants[name] for name in search_kernel.arg_names if name in constants}


@triton.jit(do_not_specialize=PER_CALL)
def search_kernel(
    query,
    key,
    value,
    visible,
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
        attend_kernel(
            query, key, value, visible, budget, sinks, flags, threshold, ties_end, output, lse, kept_mass,
            stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
            stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, sink_keys,
            recent_keys, scale, softcap, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CHUNK_D, True, HAS_SINKS,
            HAS_SOFTCAP, True, True,
        )  # fmt: skip


def specialisations(target: str) -> Iterator[Specialisation]:
    """What ``search_rows`` launches, with sinks and a soft-cap, for every tile shape and dtype."""
    for dtype, head_dim in (
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.float32, 256),
    ):
        types = {
            **dict.fromkeys(("query", "key", "value", "mean_key", "mean_value", "output"), pointer_to(dtype)),
            **dict.fromkeys(("visible", "origin", "budget", "flags", "ties_end"), "*i32"),
            **dict.fromkeys(("sinks", "threshold", "lse", "kept_mass"), "*fp32"),
            **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb", "stride_mb", "stride_wb"), "i64"),
        }
        whole, narrow = (search_tiles(target, dtype, head_dim, head_dim, has_tail) for has_tail in (False, True))
        with_tail = tail_constants(head_dim, head_dim, narrow, True, True, want_stats=True, flagged=True)
        for name, kernel, tiles, constants in (
            ("search", search_kernel, whole, search_constants(head_dim, head_dim, whole, True, True)),
            ("threshold_flagged", threshold_kernel, narrow, threshold_constants(head_dim, narrow, flagged=True)),
            ("topk_tail_flagged", attend_tail_kernel, narrow, with_tail),
        ):
            suffix = f"{DTYPE_NAMES[dtype]}-d{head_dim}"
            compiler, aligned = compile_options(tiles, target), data_strides(kernel, "qkvmw")
            yield Specialisation(f"{name}-{suffix}", kernel, constants, types, compiler, aligned)

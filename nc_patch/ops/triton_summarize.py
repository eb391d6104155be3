"""Upkeep of page statistics: the pages that new keys fall into are summarised again, in place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton_specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to

_CHANNELS = 64
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def triton_summarize_pages_(
    key: torch.Tensor,
    origin: torch.Tensor,
    first: torch.Tensor,
    count: int,
    end: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    block_size: int,
) -> None:
    """Writes the statistics of each page that holds any of the keys ``first[b]`` to ``first[b] + count``; one launch.

    Reads each touched page's keys once, at most ``count + 2 * (block_size - 1)`` keys a sequence and head.

    Args:
        key: ``[B, Hkv, N, D]``, any strides.
        origin, first, end: int ``[B]`` on the device, see ``pages.summarize_pages``.
        count: how many positions from ``first`` on have changed.
        mean, variance: ``[B, Hkv, P, D]`` in the keys' dtype, changed in place; pages beyond P are left out.
    """
    B, Hkv, N, D = key.shape
    touched = (count + block_size - 2) // block_size + 1 if count > 0 else 0
    if touched == 0 or B * Hkv * D == 0:
        return
    if key.stride(-1) != 1:
        key = key.contiguous()
    if mean.stride(-1) != 1 or variance.stride(-1) != 1:
        raise ValueError(f"statistics need a dense last axis, got strides {mean.stride()} and {variance.stride()}")
    device = key.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        summarize_kernel[(touched, triton.cdiv(D, _CHANNELS), B * Hkv)](
            *(key, origin.contiguous(), first.contiguous(), end.contiguous(), mean, variance),
            *(*key.stride()[:3], *mean.stride()[:3], *variance.stride()[:3]),
            *(Hkv, N, mean.shape[2], D, count),
            **summarize_constants(block_size),
            **_OPTIONS,
        )


def summarize_constants(block_size: int) -> dict[str, Any]:
    """The compile-time arguments of ``summarize_kernel``."""
    return {"BLOCK_SIZE": block_size, "BLOCK_K": triton.next_power_of_2(block_size), "CHANNELS": _CHANNELS}


@triton.jit(do_not_specialize=["num_kv_heads", "N", "P", "D", "count"])
def summarize_kernel(
    key,
    origin,
    first,
    end,
    mean,
    variance,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_mb,
    stride_mh,
    stride_mp,
    stride_sb,
    stride_sh,
    stride_sp,
    num_kv_heads,
    N,
    P,
    D,
    count,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and variance of ``CHANNELS`` channels of one page: in float32, the variance in a second pass."""
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    begin = tl.load(origin + batch).to(tl.int64)
    changed = tl.load(first + batch).to(tl.int64)
    last = tl.minimum(tl.load(end + batch).to(tl.int64), N)
    # Padding before the sequence belongs to no page.
    page = tl.maximum(changed - begin, 0) // BLOCK_SIZE + tl.program_id(0)
    page_begin = begin + page * BLOCK_SIZE
    if (page < P) & (page_begin < changed + count):
        k = tl.arange(0, BLOCK_K)
        position = page_begin + k
        exists = (k < BLOCK_SIZE) & (position >= 0) & (position < last)
        d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        keys = key + batch * stride_kb + kv_head * stride_kh
        mask = exists[:, None] & (d[None, :] < D)
        tile = tl.load(keys + position[:, None] * stride_kl + d[None, :], mask=mask, other=0.0).to(tl.float32)
        number = tl.maximum(tl.sum(exists.to(tl.float32), axis=0), 1.0)
        center = tl.sum(tile, axis=0) / number
        off = tl.where(mask, tile - center[None, :], 0.0)
        spread = tl.sum(off * off, axis=0) / number
        means = mean + batch * stride_mb + kv_head * stride_mh + page * stride_mp
        variances = variance + batch * stride_sb + kv_head * stride_sh + page * stride_sp
        tl.store(means + d, center.to(mean.dtype.element_ty), mask=d < D)
        tl.store(variances + d, spread.to(variance.dtype.element_ty), mask=d < D)


def specialisations(target: str) -> Iterator[Specialisation]:
    """Every page size, and both widths of the integers."""
    positions = ("origin", "first", "end")
    for dtype, block_size, integer in (
        (torch.bfloat16, 16, "*i64"),
        (torch.bfloat16, 32, "*i64"),
        (torch.float16, 64, "*i32"),
        (torch.bfloat16, 128, "*i64"),
        (torch.float32, 128, "*i32"),
    ):
        types = {
            **dict.fromkeys(("key", "mean", "variance"), pointer_to(dtype)),
            **dict.fromkeys(positions, integer),
            "stride_kb": "i64",
        }
        yield Specialisation(
            f"summarize-{DTYPE_NAMES[dtype]}-p{block_size}",
            summarize_kernel,
            summarize_constants(block_size),
            types,
            _OPTIONS,
            data_strides(summarize_kernel, "kms"),
        )

"""Upkeep of the tail's means: pages of keys and values averaged in one launch, whole prompts or what has changed.

``tail.py`` defines them. Each page is read once: sixteen keys and sixteen values for every mean of either.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans
from nc_patch.ops.triton.launch import dense_last
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to

_CHANNELS = 64
# Slots of a program: one where few pages are touched, several in a prompt.
_FEW, _MANY = 1, 8
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def triton_page_means(key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> PageMeans:
    """Means over the pages that start at ``starts``; see ``tail.page_means``. One launch.

    Args:
        key: ``[B, Hkv, N, D]``. value: ``[B, Hkv, N, Dv]``. Any strides.
        starts: int64 ``[B, S]``. A negative start gives a mean of other keys.
    """
    shape = (*key.shape[:2], starts.shape[1])
    means = PageMeans(key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3]))
    starts = starts.contiguous()
    _launch(key, value, starts, starts, starts, shape[2], means, True)
    return means


def triton_page_means_(
    key: torch.Tensor, value: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int, means: PageMeans
) -> None:
    """Writes the means of each page that holds any of the keys ``first[b]`` to ``first[b] + count``; one launch.

    Reads at most ``count + 30`` keys and values a sequence and head.

    Args:
        key: ``[B, Hkv, N, D]``. value: ``[B, Hkv, N, Dv]``. Any strides.
        origin, first: int ``[B]`` on the device.
        means: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, dense along the last axis, changed in place.

    Raises:
        ValueError: means without a dense last axis.
    """
    if any(t.stride(-1) != 1 for t in means):
        raise ValueError(f"means need a dense last axis, got strides {means.key.stride()} and {means.value.stride()}")
    touched = (count + TAIL_PAGE_SIZE - 2) // TAIL_PAGE_SIZE + 1 if count > 0 else 0
    origin, first = origin.contiguous(), first.contiguous()
    _launch(key, value, origin, origin, first, min(touched, means.key.shape[2]), means, False)


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    origin: torch.Tensor,
    first: torch.Tensor,
    touched: int,
    means: PageMeans,
    listed: bool,
) -> None:
    B, Hkv, N, D = key.shape
    DV = value.shape[3]
    if touched == 0 or N == 0 or B * Hkv == 0:
        return
    key, value = dense_last(key), dense_last(value)
    constants = means_constants(listed, touched > _MANY)
    columns = triton.cdiv(D, _CHANNELS) + triton.cdiv(DV, _CHANNELS)
    device = key.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        means_kernel[(triton.cdiv(touched, constants["BLOCK_P"]), columns, B * Hkv)](
            *(key, value, starts, origin, first, *means),
            *(*key.stride()[:3], *value.stride()[:3], *means.key.stride()[:3], *means.value.stride()[:3]),
            *(Hkv, N, means.key.shape[2], touched, D, DV),
            **constants,
            **_OPTIONS,
        )


def means_constants(listed: bool, many: bool) -> dict[str, Any]:
    """The compile-time arguments of ``means_kernel``."""
    return {"PAGE": TAIL_PAGE_SIZE, "BLOCK_P": _MANY if many else _FEW, "CHANNELS": _CHANNELS, "LISTED": listed}


@triton.jit(do_not_specialize=["num_kv_heads", "N", "S", "touched", "D", "DV"])
def means_kernel(
    key,
    value,
    starts,
    origin,
    first,
    mean_key,
    mean_value,
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
    num_kv_heads,
    N,
    S,
    touched,
    D,
    DV,
    PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """``CHANNELS`` channels of ``BLOCK_P`` slots: of the keys' means, then of the values'.

    With ``LISTED`` slot i's page begins at ``starts[b, i]``; without, the slots are the ``touched`` ones from that of
    the key ``first[b]`` on, and their pages are counted from ``origin[b]``.
    """
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    here = slot < touched
    if LISTED:
        start = tl.load(starts + batch * S + slot, mask=here, other=0)
    else:
        # Division that rounds down, for origins before the first key too.
        begin = tl.load(origin + batch).to(tl.int64) & (PAGE - 1)
        changed = tl.load(first + batch).to(tl.int64) - begin
        changed = (changed - (changed & (PAGE - 1))) // PAGE
        # Where the first slot is clamped some are written twice, with the same means.
        slot += tl.minimum(tl.maximum(changed, 0), S - touched)
        start = slot * PAGE + begin
    block = tl.program_id(1)
    of_keys = tl.cdiv(D, CHANNELS)
    if block < of_keys:
        average_rows(
            key + batch * stride_kb + kv_head * stride_kh, stride_kl,
            mean_key + batch * stride_mb + kv_head * stride_mh, stride_mp,
            start, slot, here, block * CHANNELS, N, D, PAGE, CHANNELS,
        )  # fmt: skip
    else:
        average_rows(
            value + batch * stride_vb + kv_head * stride_vh, stride_vl,
            mean_value + batch * stride_wb + kv_head * stride_wh, stride_wp,
            start, slot, here, (block - of_keys) * CHANNELS, N, DV, PAGE, CHANNELS,
        )  # fmt: skip


@triton.jit
def average_rows(
    rows,
    stride_row,
    means,
    stride_mean,
    start,
    slot,
    here,
    channel,
    N,
    width,
    PAGE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Stores at ``slot`` the mean of the ``PAGE`` rows from ``start`` on, both ``[BLOCK_P]``, in ``CHANNELS`` columns.

    Summed in the order, and divided as early, as in ``tail.page_means``.
    """
    d = channel + tl.arange(0, CHANNELS)
    mask = here[:, None] & (d[None, :] < width)
    total = tl.zeros([start.shape[0], CHANNELS], dtype=tl.float32)
    for offset in tl.static_range(PAGE):
        position = tl.minimum(tl.maximum(start + offset, 0), N - 1)
        row = tl.load(rows + (position * stride_row)[:, None] + d[None, :], mask=mask, other=0.0)
        total += row.to(tl.float32) * (1.0 / PAGE)
    tl.store(means + (slot * stride_mean)[:, None] + d[None, :], total.to(means.dtype.element_ty), mask=mask)


def specialisations(target: str) -> Iterator[Specialisation]:
    """Both uses, few and many slots, every dtype, and both widths of the integers."""
    for dtype, listed, many, integer in (
        (torch.bfloat16, False, False, "*i32"),
        (torch.float32, False, True, "*i64"),
        (torch.float16, True, False, "*i64"),
        (torch.bfloat16, True, True, "*i64"),
        (torch.float32, True, True, "*i64"),
    ):
        types = {
            **dict.fromkeys(("key", "value", "mean_key", "mean_value"), pointer_to(dtype)),
            **dict.fromkeys(("starts", "origin", "first"), integer),
            **dict.fromkeys(("stride_kb", "stride_vb"), "i64"),
        }
        name = f"means-{DTYPE_NAMES[dtype]}-{'listed' if listed else 'touched'}{'-many' if many else ''}"
        constants = means_constants(listed, many)
        yield Specialisation(name, means_kernel, constants, types, _OPTIONS, data_strides(means_kernel, "kvmw"))

"""Upkeep of the tail's means: pages of keys and values averaged in one launch, whole prompts or what has changed.

``ops/means.py`` defines them. Each page is read once: sixteen keys and sixteen values for every mean of either.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans, touched_slots
from nc_patch.ops.triton.launch import dense_last, on_device
from nc_patch.ops.triton.rows import head_of
from nc_patch.ops.triton.structs import heads

_CHANNELS = 64
# Slots of a program: one where few pages are touched, several in a prompt.
_FEW, _MANY = 1, 8
_NO_PAGES = {"starts": None, "origin": None, "first": None}
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def triton_page_means(key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> PageMeans:
    """``means.page_means`` in one launch: over the pages that start at ``starts``, int64 ``[B, S]``."""
    shape = (*key.shape[:2], starts.shape[1])
    means = PageMeans(key.new_empty(*shape, key.shape[3]), value.new_empty(*shape, value.shape[3]))
    _launch(key, value, means, shape[2], starts=starts.contiguous())
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
    touched = touched_slots(count, means.key.shape[2])
    _launch(key, value, means, touched, origin=origin.contiguous(), first=first.contiguous())


def _launch(key: torch.Tensor, value: torch.Tensor, means: PageMeans, touched: int, **pages: torch.Tensor) -> None:
    """Averages the ``touched`` slots that ``pages``, the ``starts`` or ``origin`` and ``first``, tell."""
    B, Hkv, N, D = key.shape
    DV = value.shape[3]
    if touched == 0 or N == 0 or B * Hkv == 0:
        return
    slots = _MANY if touched > _MANY else _FEW
    columns = triton.cdiv(D, _CHANNELS) + triton.cdiv(DV, _CHANNELS)
    with on_device(key.device):
        means_kernel[(triton.cdiv(touched, slots), columns, B * Hkv)](
            key=heads(dense_last(key)), value=heads(dense_last(value)), mean_key=heads(means.key),
            mean_value=heads(means.value), num_kv_heads=Hkv, N=N, S=means.key.shape[2], touched=touched, D=D, DV=DV,
            PAGE=TAIL_PAGE_SIZE, BLOCK_P=slots, CHANNELS=_CHANNELS, **{**_NO_PAGES, **pages}, **_OPTIONS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_kv_heads", "N", "S", "touched", "D", "DV"])
def means_kernel(
    key, value, starts, origin, first, mean_key, mean_value, num_kv_heads, N, S, touched, D, DV,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``CHANNELS`` channels of ``BLOCK_P`` slots: of the keys' means, then of the values'.

    Slot i's page begins at ``starts[b, i]``. Without ``starts`` the slots are the ``touched`` ones from that of the key
    ``first[b]`` on, and their pages are counted from ``origin[b]``.
    """
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    here = slot < touched
    if starts is not None:
        start = tl.load(starts + batch * S + slot, mask=here, other=0)
    else:
        changed, residue = changed_slots(tl.load(origin + batch), tl.load(first + batch), touched, S, PAGE)
        slot += changed
        start = slot * PAGE + residue
    block = tl.program_id(1)
    of_keys = tl.cdiv(D, CHANNELS)
    if block < of_keys:
        keys, means = head_of(key, batch, kv_head), head_of(mean_key, batch, kv_head)
        average_rows(keys, means, start, slot, here, block * CHANNELS, N, D, PAGE, CHANNELS)
    else:
        values, means = head_of(value, batch, kv_head), head_of(mean_value, batch, kv_head)
        average_rows(values, means, start, slot, here, (block - of_keys) * CHANNELS, N, DV, PAGE, CHANNELS)


@triton.jit
def changed_slots(origin, first, touched, S, PAGE: tl.constexpr):
    """(first of the ``touched`` slots from that of the key ``first`` on, what pages begin at modulo ``PAGE``)."""
    # Division that rounds down, for origins before the first key too.
    residue = origin.to(tl.int64) & (PAGE - 1)
    changed = first.to(tl.int64) - residue
    changed = (changed - (changed & (PAGE - 1))) // PAGE
    # Where the first slot is clamped some are written twice, with the same means.
    return tl.minimum(tl.maximum(changed, 0), S - touched), residue


@triton.jit
def average_rows(rows, means, start, slot, here, channel, N, width, PAGE: tl.constexpr, CHANNELS: tl.constexpr):
    """Stores at ``slot`` the mean of the ``PAGE`` rows from ``start`` on, both ``[BLOCK_P]``, in ``CHANNELS`` columns.

    Summed in the order, and divided as early, as in ``means.page_means``.
    """
    d = channel + tl.arange(0, CHANNELS)
    mask = here[:, None] & (d[None, :] < width)
    total = tl.zeros([start.shape[0], CHANNELS], dtype=tl.float32)
    for offset in tl.static_range(PAGE):
        position = tl.minimum(tl.maximum(start + offset, 0), N - 1)
        row = tl.load(rows.data + (position * rows.stride)[:, None] + d[None, :], mask=mask, other=0.0)
        total += row.to(tl.float32) * (1.0 / PAGE)
    tl.store(means.data + (slot * means.stride)[:, None] + d[None, :], total.to(means.data.dtype.element_ty), mask=mask)

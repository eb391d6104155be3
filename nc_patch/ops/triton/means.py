"""The tail's means in one launch: pages of keys and values, each read once.

``ops/means.py`` defines them.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans
from nc_patch.ops.triton.launch import dense_last, on_device
from nc_patch.ops.triton.rows import head_of
from nc_patch.ops.triton.structs import heads

_CHANNELS = 64
# Slots of a program: one where there are few, several in a prompt.
_FEW, _MANY = 1, 8


def triton_page_means(key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> PageMeans:
    """``means.page_means`` in one launch: over the pages that start at ``starts``, int64 ``[B, S]``."""
    (B, Hkv, N, D), S, DV = key.shape, starts.shape[1], value.shape[3]
    means = PageMeans(key.new_empty(B, Hkv, S, D), value.new_empty(B, Hkv, S, DV))
    if S == 0 or N == 0 or B * Hkv == 0:
        return means
    slots = _MANY if S > _MANY else _FEW
    columns = triton.cdiv(D, _CHANNELS) + triton.cdiv(DV, _CHANNELS)
    with on_device(key.device):
        means_kernel[(triton.cdiv(S, slots), columns, B * Hkv)](
            key=heads(dense_last(key)), value=heads(dense_last(value)), starts=starts.contiguous(),
            mean_key=heads(means.key), mean_value=heads(means.value), num_kv_heads=Hkv, N=N, S=S, D=D, DV=DV,
            PAGE=TAIL_PAGE_SIZE, BLOCK_P=slots, CHANNELS=_CHANNELS, num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return means


@triton.jit(do_not_specialize=["num_kv_heads", "N", "S", "D", "DV"])
def means_kernel(
    key, value, starts, mean_key, mean_value, num_kv_heads, N, S, D, DV,
    PAGE: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``CHANNELS`` channels of ``BLOCK_P`` slots: of the keys' means, then of the values'.

    Slot i's page begins at ``starts[b, i]``.
    """
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    here = slot < S
    start = tl.load(starts + batch * S + slot, mask=here, other=0)
    block = tl.program_id(1)
    of_keys = tl.cdiv(D, CHANNELS)
    if block < of_keys:
        keys, means = head_of(key, batch, kv_head), head_of(mean_key, batch, kv_head)
        average_rows(keys, means, start, slot, here, block * CHANNELS, N, D, PAGE, CHANNELS)
    else:
        values, means = head_of(value, batch, kv_head), head_of(mean_value, batch, kv_head)
        average_rows(values, means, start, slot, here, (block - of_keys) * CHANNELS, N, DV, PAGE, CHANNELS)


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

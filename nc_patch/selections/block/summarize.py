"""Upkeep of page statistics: the pages that new keys have completed are summarised, in place."""

from collections import namedtuple
from functools import lru_cache

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.launch import Tiles, architecture_of, compile_options, dense_last, on_device, padded_dim
from nc_patch.ops.triton.rows import head_of
from nc_patch.ops.triton.structs import Heads, constants, heads
from nc_patch.selections.block.pages import LARGEST_CODE, VECTORS, PageStatistics

_LARGEST_CODE = tl.constexpr(LARGEST_CODE)
_VECTORS = tl.constexpr(VECTORS)
_EXPONENT = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
# Elements of a page that are held at once, and how many of them are channels at least.
_ELEMENTS = 4096
_CHANNELS = 32


# The constants of a page: channels, keys, keys padded, channels that are summarised at once, and the keys of a block of
# memory, 0 where pages do not lie in such.
PageShape = namedtuple("PageShape", "D BLOCK_SIZE BLOCK_K CHANNELS KEYS")


@lru_cache(maxsize=64)
def page_shape_of(head_dim: int, block_size: int, keys_stored: int = 0) -> PageShape:
    """The constants of pages of ``block_size`` keys, in blocks of memory of so many where they lie in such."""
    keys = max(16, triton.next_power_of_2(block_size))
    channels = min(padded_dim(head_dim), max(_CHANNELS, _ELEMENTS // keys))
    shape: PageShape = constants(PageShape(head_dim, block_size, keys, channels, keys_stored))
    return shape


def score_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the kernels that summarise pages and score them: sums of as many warps have the same bits."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8 if padded_dim(head_dim) > 128 else 4, 1, 32)
    return Tiles(16, 32, 4, 1)


def triton_summarize_pages_(
    key: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int, end: torch.Tensor,
    statistics: PageStatistics, block_size: int,
) -> None:  # fmt: skip
    """``pages.update_pages_`` in one launch; statistics that are not contiguous are copied, and copied back.

    Where a page's keys do not fit into registers they are read several times.
    """
    (B, Hkv, N, D), pages = key.shape, statistics.codes.shape[2]
    dense = PageStatistics(*(tensor.contiguous() for tensor in statistics))
    touched = (count + block_size - 2) // block_size + 1 if count > 0 else 0
    if touched == 0 or B * Hkv * D == 0:
        return
    with on_device(key.device):
        summarize_kernel[(touched, B * Hkv)](
            key=heads(dense_last(key)), origin=origin.contiguous(), first=first.contiguous(), end=end.contiguous(),
            statistics=dense, num_kv_heads=Hkv, N=N, stored_pages=pages, count=count,
            page=page_shape_of(D, block_size),
            **compile_options(score_tiles(key.dtype, D), architecture_of(key.device)),
        )  # fmt: skip
    for given, written in zip(statistics, dense, strict=True):
        if written is not given:
            given.copy_(written)


@triton.jit(do_not_specialize=["num_kv_heads", "N", "stored_pages", "count"])
def summarize_kernel(key, origin, first, end, statistics, num_kv_heads, N, stored_pages, count, page):
    """The statistics of one page of those that have changed."""
    sequence = tl.program_id(1).to(tl.int64)
    batch = sequence // num_kv_heads
    begin = tl.load(origin + batch).to(tl.int64)
    changed = tl.load(first + batch).to(tl.int64)
    stop = tl.minimum(tl.load(end + batch).to(tl.int64), N)
    # Padding before the sequence belongs to no page.
    number = tl.maximum(changed - begin, 0) // page.BLOCK_SIZE + tl.program_id(0)
    first = begin + number * page.BLOCK_SIZE
    if (first < changed + count) & (number < stored_pages) & (first + page.BLOCK_SIZE <= stop):
        keys, pages = head_of(key, batch, sequence % num_kv_heads), heads_of_pages(statistics, 0, stored_pages, page)
        summarize_page(keys, pages, 0, sequence, number, first, page)


def triton_summarize_slots_(
    key: torch.Tensor, statistics: PageStatistics, slots: torch.Tensor, block_size: int
) -> None:
    """The pages in blocks of memory whose last keys are in these slots, in one launch; see ``paged``."""
    Hkv, N, D = key.shape[1:]
    with on_device(key.device):
        summarize_slots_kernel[(len(slots), Hkv)](
            key=heads(key), statistics=PageStatistics(*map(heads, statistics)),  # type: ignore[arg-type]
            slots=slots.contiguous(), page=page_shape_of(D, block_size, N),
            **compile_options(score_tiles(key.dtype, D), architecture_of(key.device)),
        )  # fmt: skip


@triton.jit
def summarize_slots_kernel(key, statistics, slots, page):
    """The statistics of the page that the key in a slot completes, of one head."""
    slot = tl.load(slots + tl.program_id(0))
    if (slot >= 0) & (slot % page.BLOCK_SIZE == page.BLOCK_SIZE - 1):
        block, head = slot // page.KEYS, tl.program_id(1).to(tl.int64)
        number = slot % page.KEYS // page.BLOCK_SIZE
        first = number * page.BLOCK_SIZE
        summarize_page(head_of(key, block, head), statistics, block, head, number, first, page)


@triton.jit
def heads_of_pages(statistics, num_kv_heads, stored_pages, page):
    """The contiguous statistics of so many pages of each head as ``Heads``; with no heads as if sequences were one."""
    rows = tl.cast(stored_pages, tl.int64) * _VECTORS
    codes = Heads(statistics.codes, num_kv_heads * rows * page.D, rows * page.D, _VECTORS * page.D)
    scales = Heads(statistics.scales, num_kv_heads * rows, rows, _VECTORS)
    return PageStatistics(codes, scales)  # type: ignore[arg-type]


@triton.jit
def summarize_page(keys, statistics, batch, head, number, first, page):
    """Stores the statistics of the whole page of ``keys``, of one head, whose first key is at ``first``.

    It has this number of those of a head, or in a block of memory, in ``Heads`` of statistics. In passes over its
    channels: range, distances, ranges of the vectors, codes.
    """
    D: tl.constexpr = page.D
    k = tl.arange(0, page.BLOCK_K)
    exists = (k < page.BLOCK_SIZE) & (first + k >= 0)
    there = tl.maximum(tl.sum(exists.to(tl.float32), axis=0), 1.0)
    others = tl.maximum(there - 1.0, 1.0)
    rows = keys.data + (first + k) * keys.stride
    largest = tl.zeros([page.BLOCK_K], dtype=tl.float32)
    broken = tl.zeros([page.BLOCK_K], dtype=tl.int32)
    for channel in range(0, D, page.CHANNELS):
        size = tl.abs(load_scaled(rows, exists, channel, 1.0, page))
        # Written so that NaN fails the comparison too.
        broken += tl.sum((~(size < float("inf"))).to(tl.int32), axis=1)
        largest = tl.maximum(largest, tl.max(size, axis=1))
    sound = tl.sum(broken, axis=0) == 0
    # Not ``exists & sound``: a mask made from a scalar's truth is none in the interpreter of Triton 3.9.
    exists = exists & (k < tl.where(sound, page.BLOCK_SIZE, 0))
    most = tl.max(tl.where(broken == 0, largest, 0.0), axis=0)
    unit = power_of_two(most)
    distance = tl.zeros([page.BLOCK_K], dtype=tl.float32)
    for channel in range(0, D, page.CHANNELS):
        tile = load_scaled(rows, exists, channel, unit, page)
        off = tile - (tl.sum(tile, axis=0) / there)[None, :]
        distance += tl.sum(off * off, axis=1)
    distance = tl.where(exists, distance, -1.0)
    # Of equals the first.
    far = tl.min(tl.where(distance == tl.max(distance, axis=0), k, page.BLOCK_K), axis=0)
    other = exists & (k != far)
    v = tl.arange(0, 4)
    step = tl.zeros([4], dtype=tl.float32)
    for channel in range(0, D, page.CHANNELS):
        tile = load_scaled(rows, exists, channel, unit, page)
        step = tl.maximum(step, tl.max(tl.abs(vectors(tile, k, far, other, others)), axis=1) / _LARGEST_CODE)
    codes = head_of(statistics.codes, batch, head)
    codes = codes.data + number * codes.stride
    for channel in range(0, D, page.CHANNELS):
        d = channel + tl.arange(0, page.CHANNELS)
        tile = load_scaled(rows, exists, channel, unit, page)
        code = tl.div_rn(vectors(tile, k, far, other, others), tl.where(step > 0.0, step, 1.0)[:, None])
        code = tl.minimum(tl.maximum(tl.floor(code + 0.5), -_LARGEST_CODE), _LARGEST_CODE).to(tl.int8)
        tl.store(codes + (v * D)[:, None] + d[None, :], code, mask=(v < _VECTORS)[:, None] & (d < D)[None, :])
    scales = head_of(statistics.scales, batch, head)
    scales = scales.data + number * scales.stride
    scale = tl.where(sound, tl.where(v == 2, tl.sqrt(step), step) * unit, float("nan"))
    tl.store(scales + v, scale, mask=v < _VECTORS)


@triton.jit
def power_of_two(largest):
    """The power of two at or below numbers that are not negative, at least the smallest normal one."""
    power = (largest.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    return tl.maximum(power, _SMALLEST)


@triton.jit
def load_scaled(rows, exists, first_channel, unit, page):
    """``CHANNELS`` channels of a page's keys in float32 over ``unit``, zero where there is no key."""
    d = first_channel + tl.arange(0, page.CHANNELS)
    tile = tl.load(rows[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < page.D), other=0.0)
    tile = tile.to(tl.float32)
    return tl.div_rn(tile, tl.zeros_like(tile) + unit)


@triton.jit
def vectors(tile, k, far, other, others):
    """``[4, CHANNELS]``: the key apart, mean and variance of the others, and zeros."""
    apart = tl.sum(tl.where((k == far)[:, None], tile, 0.0), axis=0)
    mean = tl.sum(tl.where(other[:, None], tile, 0.0), axis=0) / others
    off = tl.where(other[:, None], tile - mean[None, :], 0.0)
    variance = tl.sum(off * off, axis=0) / others
    v = tl.arange(0, 4)[:, None]
    return tl.where(v == 0, apart[None, :], tl.where(v == 1, mean[None, :], tl.where(v == 2, variance[None, :], 0.0)))

"""Codes of new keys, written in place into the codes of a cache; ``codes.encode_keys`` defines them.

One launch. Reads each new key and writes D + 8 bytes for it; center and spread are read once a program.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.launch import dense_last, on_device, padded_dim
from nc_patch.ops.triton.rows import head_of
from nc_patch.ops.triton.structs import constants, heads
from nc_patch.selections.topk.codes import HIGH_UNIT, LARGEST_CODE, KeyCodes

_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST_CODE = tl.constexpr(float(LARGEST_CODE))
_HIGH_UNIT = tl.constexpr(float(HIGH_UNIT))
# Elements of a tile of keys: few registers, and a single new key wastes little.
_TILE = 2048


class KeyShape(NamedTuple):
    """The constants of a program over keys: ``head_dim``, keys, and padded half of ``head_dim``."""

    D: Any
    BLOCK_N: Any
    BLOCK_H: Any


def triton_encode_keys_(key: torch.Tensor, first: torch.Tensor, count: int, codes: KeyCodes) -> None:
    """Writes the codes of the keys ``[first, first + count)`` of each sequence into ``codes``.

    Args:
        key: ``[B, Hkv, N, D]``, any strides. first: int32 or int64 ``[B]``, on the device. count: of keys; those at
            positions outside the keys or the codes are skipped.
        codes: contiguous, as those of an index are.
    """
    B, Hkv, N, D = key.shape
    if first.dtype not in (torch.int32, torch.int64) or tuple(first.shape) != (B,):
        raise ValueError(f"first must be int32 or int64 [{B}], got {first.dtype} {list(first.shape)}")
    for name, tensor in zip(codes._fields, codes, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"codes must be contiguous, got strides {tensor.stride()} of {name} {list(tensor.shape)}")
    length = codes.high.shape[2]
    if count <= 0 or min(N, length) == 0 or B * Hkv == 0:
        return
    padded = padded_dim(D)
    shape = KeyShape(D, max(1, _TILE // padded), padded // 2)
    # The other axes of a grid end at 65,535, which the blocks of a long prompt exceed.
    grid = (triton.cdiv(count, shape.BLOCK_N), B * Hkv)
    with on_device(key.device):
        encode_kernel[grid](
            key=heads(dense_last(key)), first=first.contiguous(), codes=codes, num_kv_heads=Hkv, count=count,
            keys=min(N, length), length=length, rounding=8 * math.sqrt(D) * 2.0**-24, shape=constants(shape),
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_kv_heads", "count", "keys", "length"])
def encode_kernel(key, first, codes, num_kv_heads, count, keys, length, rounding, shape):
    """Encodes ``BLOCK_N`` keys of one head; ``rounding`` is what x may be off by, relative to its largest element.

    There are ``keys``, and room for ``length`` codes. A tile holds half of the channels, those that fill the lower bits
    of the codes' bytes, or those of the upper bits.
    """
    kv_row = tl.program_id(1).to(tl.int64)
    batch = kv_row // num_kv_heads
    place = tl.program_id(0) * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
    position = tl.load(first + batch).to(tl.int64) + place
    within = (place < count) & (position >= 0) & (position < keys)
    D: tl.constexpr = shape.D
    half: tl.constexpr = (D + 1) // 2
    h = tl.arange(0, shape.BLOCK_H)
    matrix = head_of(key, batch, kv_row % num_kv_heads)
    rows = matrix.data + position * matrix.stride
    center = codes.center + kv_row * D + h
    spread = codes.spread + kv_row * D + h
    x, broken = standardised(rows, center, spread, within, h, half)
    y, also_broken = standardised(rows + half, center + half, spread + half, within, h, D - half)
    broken = broken | also_broken
    x = tl.where(broken[:, None], 0.0, x)
    y = tl.where(broken[:, None], 0.0, y)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), tl.max(tl.abs(y), axis=1))
    scale = tl.where(largest < _SMALLEST, 0.0, largest / _LARGEST_CODE)
    code_x = codes_of(x, scale)
    code_y = codes_of(y, scale)
    # Times a power of two is exact; a GPU's division of float32 may be off by two units in the last place.
    high_x = tl.floor((code_x + _HIGH_UNIT / 2) * (1.0 / _HIGH_UNIT))
    high_y = tl.floor((code_y + _HIGH_UNIT / 2) * (1.0 / _HIGH_UNIT))
    slack = largest * rounding + _SMALLEST
    far = norm_of(x - scale[:, None] * (_HIGH_UNIT * high_x), y - scale[:, None] * (_HIGH_UNIT * high_y), D) + slack
    near = norm_of(x - scale[:, None] * code_x, y - scale[:, None] * code_y, D) + slack
    at = kv_row * length + position
    targets = (at * half)[:, None] + h[None, :]
    stored = within[:, None] & (h < half)[None, :]
    tl.store(codes.high + targets, pack(high_x, high_y), mask=stored)
    tl.store(codes.low + targets, pack(code_x - _HIGH_UNIT * high_x, code_y - _HIGH_UNIT * high_y), mask=stored)
    tl.store(codes.scale + at, scale, mask=within)
    tl.store(codes.coarse + at, rounded_up(tl.where(broken, float("inf"), far)), mask=within)
    tl.store(codes.residual + at, rounded_up(tl.where(broken, float("inf"), near)), mask=within)


@triton.jit
def standardised(rows, center, spread, within, h, count):
    """``count`` channels of keys, centred and scaled, ``[BLOCK_N, BLOCK_H]``; and whether any is not finite."""
    mask = within[:, None] & (h < count)[None, :]
    k = tl.load(rows[:, None] + h[None, :], mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(center, mask=h < count, other=0.0)
    width = tl.load(spread, mask=h < count, other=1.0)
    x = tl.where(mask, tl.div_rn(k - middle[None, :], tl.broadcast_to(width[None, :], k.shape)), 0.0)
    # Written so that NaN fails the comparison too.
    return x, tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1) > 0


@triton.jit
def codes_of(x, scale):
    """Whole numbers, as float32, that times ``scale`` are nearest to x."""
    level = x / tl.where(scale > 0, scale, 1.0)[:, None]
    level = tl.where((scale > 0)[:, None], tl.floor(level + 0.5), 0.0)
    return tl.minimum(tl.maximum(level, -_LARGEST_CODE), _LARGEST_CODE)


@triton.jit
def norm_of(x, y, D: tl.constexpr):
    """At least the norm of each row of both tiles together, without overflow or underflow on the way."""
    unit = tl.maximum(tl.max(tl.abs(x), axis=1), tl.max(tl.abs(y), axis=1))
    size = tl.where(unit > 0, unit, 1.0)[:, None]
    norm = unit * tl.sqrt(tl.sum((x / size) * (x / size), axis=1) + tl.sum((y / size) * (y / size), axis=1))
    return norm * (1.0 + (D + 8) * _HALF_ULP)


@triton.jit
def pack(first, second):
    """int8 of two whole numbers from -8 to 7, in the lower and in the upper four bits."""
    return ((first.to(tl.int32) & 15) | (second.to(tl.int32) << 4)).to(tl.int8)


@triton.jit
def rounded_up(numbers):
    """bfloat16 that is at least these float32, none of which is negative or NaN."""
    bits = numbers.to(tl.int32, bitcast=True)
    return ((bits + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)

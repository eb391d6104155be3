"""Codes of new keys, written in place into the codes of a cache; ``codes.encode_keys`` defines them.

One launch. Reads each new key and writes D + 8 bytes for it; center and spread are read once a program.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.launch import dense_last, padded_dim
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.selections.topk.codes import HIGH_UNIT, LARGEST_CODE, KeyCodes

_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST_CODE = tl.constexpr(float(LARGEST_CODE))
_HIGH_UNIT = tl.constexpr(float(HIGH_UNIT))
# Elements of a tile of keys: few registers, and a single new key wastes little.
_TILE = 2048


def triton_encode_keys_(key: torch.Tensor, first: torch.Tensor, count: int, codes: KeyCodes) -> None:
    """Writes the codes of the keys ``[first, first + count)`` of each sequence into ``codes``.

    Args:
        key: ``[B, Hkv, N, D]``, any strides. first: int32 or int64 ``[B]``, on the device. count: of keys; those at
            positions outside the keys or the codes are skipped.
        codes: their buffers may be strided, with a dense last axis.
    """
    B, Hkv, N, D = key.shape
    if first.dtype not in (torch.int32, torch.int64) or tuple(first.shape) != (B,):
        raise ValueError(f"first must be int32 or int64 [{B}], got {first.dtype} {list(first.shape)}")
    key = dense_last(key)
    for name, tensor in zip(codes._fields, codes, strict=True):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} must be dense, got stride {tensor.stride(-1)}")
    length = min(N, codes.high.shape[2])
    if count <= 0 or length == 0 or B * Hkv == 0:
        return
    constants = encode_constants(D)
    # The other axes of a grid end at 65,535, which the blocks of a long prompt exceed.
    grid = (triton.cdiv(count, constants["BLOCK_N"]), B * Hkv)
    with torch.cuda.device(key.device) if key.device.type == "cuda" else contextlib.nullcontext():
        encode_kernel[grid](
            *(key, first.contiguous(), *codes[:5], codes.center.contiguous(), codes.spread.contiguous()),
            *(*key.stride()[:3], *code_strides(codes)),
            *(Hkv, count, length, 8 * math.sqrt(D) * 2.0**-24),
            **constants,
            **encode_options(),
        )


def code_strides(codes: KeyCodes) -> tuple[int, ...]:
    """Strides of the codes as kernels take them: one set for both halves, one for scale and residuals.

    Raises:
        ValueError: they differ, as they do not where an index made them.
    """
    halves = {tensor.stride()[:3] for tensor in (codes.high, codes.low)}
    numbers = {tensor.stride() for tensor in (codes.scale, codes.coarse, codes.residual)}
    if len(halves) > 1 or len(numbers) > 1 or codes.scale.stride(2) != 1:
        raise ValueError(
            "halves of codes must have the same strides, and so must scale, coarse and residual, the last of them 1; "
            f"got {sorted(halves)} and {sorted(numbers)}"
        )
    return (*halves.pop(), *numbers.pop()[:2])


def encode_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of ``encode_kernel``."""
    padded = padded_dim(head_dim)
    return {"D": head_dim, "BLOCK_N": max(1, _TILE // padded), "BLOCK_H": padded // 2}


def encode_options() -> dict[str, int | bool]:
    """Options of the compiler."""
    return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["num_kv_heads", "count", "length"])
def encode_kernel(
    key,
    first,
    high,
    low,
    code_scale,
    coarse,
    residual,
    center,
    spread,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_cb,
    stride_ch,
    stride_cl,
    stride_sb,
    stride_sh,
    num_kv_heads,
    count,
    length,
    rounding,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Encodes ``BLOCK_N`` keys of one head; ``rounding`` is what x may be off by, relative to its largest element.

    A tile holds half of the channels, those that fill the lower bits of the codes' bytes, or those of the upper bits.
    """
    kv_row = tl.program_id(1).to(tl.int64)
    batch = kv_row // num_kv_heads
    head = kv_row % num_kv_heads
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(first + batch).to(tl.int64) + place
    within = (place < count) & (position >= 0) & (position < length)
    half = (D + 1) // 2
    h = tl.arange(0, BLOCK_H)
    rows = key + batch * stride_kb + head * stride_kh + position * stride_kl
    channels = kv_row * D + h
    x, broken = standardised(rows, center + channels, spread + channels, within, h, half)
    y, also_broken = standardised(rows + half, center + channels + half, spread + channels + half, within, h, D - half)
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
    targets = batch * stride_cb + head * stride_ch + position * stride_cl
    targets = targets[:, None] + h[None, :]
    stored = within[:, None] & (h < half)[None, :]
    tl.store(high + targets, pack(high_x, high_y), mask=stored)
    tl.store(low + targets, pack(code_x - _HIGH_UNIT * high_x, code_y - _HIGH_UNIT * high_y), mask=stored)
    numbers = batch * stride_sb + head * stride_sh + position
    tl.store(code_scale + numbers, scale, mask=within)
    tl.store(coarse + numbers, rounded_up(tl.where(broken, float("inf"), far)), mask=within)
    tl.store(residual + numbers, rounded_up(tl.where(broken, float("inf"), near)), mask=within)


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


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernel for every dtype and for small and large heads."""
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 256)):
        types = {
            "key": pointer_to(dtype),
            "first": "*i64",
            **dict.fromkeys(("high", "low"), "*i8"),
            **dict.fromkeys(("coarse", "residual"), "*bf16"),
            **dict.fromkeys(("code_scale", "center", "spread"), "*fp32"),
            **dict.fromkeys(("stride_kb", "stride_cb"), "i64"),
            "rounding": "fp32",
        }
        aligned = data_strides(encode_kernel, "kc")
        name = f"encode-{DTYPE_NAMES[dtype]}-d{head_dim}"
        yield Specialisation(name, encode_kernel, encode_constants(head_dim), types, encode_options(), aligned)

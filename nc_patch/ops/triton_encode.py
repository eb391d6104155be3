"""Codes of new keys, written in place into the codes of a cache; ``codes.encode_keys`` defines them.

One launch. Reads each new key and writes D + 8 bytes for it; center and spread are read once a program.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nc_patch.ops.codes import KeyCodes
from nc_patch.ops.triton_launch import padded_dim
from nc_patch.ops.triton_specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to

_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST_CODE = tl.constexpr(127.0)
# Elements of a tile of keys: few registers, and a single new key wastes little.
_TILE = 2048


def triton_encode_keys_(key: torch.Tensor, first: torch.Tensor, count: int, codes: KeyCodes) -> None:
    """Writes codes, scale and residual of the keys ``[first, first + count)`` of each sequence into ``codes``.

    Args:
        key: ``[B, Hkv, N, D]``, any strides with a dense last axis. first: int32 or int64 ``[B]``, on the device.
            count: of keys; those at positions outside the keys or the codes are skipped.
        codes: their buffers may be strided, with a dense last axis.
    """
    B, Hkv, N, D = key.shape
    if first.dtype not in (torch.int32, torch.int64) or tuple(first.shape) != (B,):
        raise ValueError(f"first must be int32 or int64 [{B}], got {first.dtype} {list(first.shape)}")
    for name, tensor in (("key", key), *zip(codes._fields, codes, strict=True)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} must be dense, got stride {tensor.stride(-1)}")
    length = min(N, codes.codes.shape[2])
    if count <= 0 or length == 0 or B * Hkv == 0:
        return
    constants = encode_constants(D)
    grid = (B * Hkv, triton.cdiv(count, constants["BLOCK_N"]))
    with torch.cuda.device(key.device) if key.device.type == "cuda" else contextlib.nullcontext():
        encode_kernel[grid](
            *(key, first.contiguous(), *codes[:3], codes.center.contiguous(), codes.spread.contiguous()),
            *(*key.stride()[:3], *codes.codes.stride()[:3], *codes.scale.stride()[:2], *codes.residual.stride()[:2]),
            *(Hkv, count, length, 8 * math.sqrt(D) * 2.0**-24),
            **constants,
            **encode_options(),
        )


def encode_constants(head_dim: int) -> dict[str, int]:
    """The compile-time arguments of ``encode_kernel``."""
    padded = padded_dim(head_dim)
    return {"D": head_dim, "BLOCK_N": max(1, _TILE // padded), "BLOCK_D": padded}


def encode_options() -> dict[str, int | bool]:
    """Options of the compiler."""
    return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["num_kv_heads", "count", "length"])
def encode_kernel(
    key,
    first,
    codes,
    code_scale,
    code_residual,
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
    stride_rb,
    stride_rh,
    num_kv_heads,
    count,
    length,
    rounding,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Encodes ``BLOCK_N`` keys of one head; ``rounding`` is what x may be off by, relative to its largest element."""
    kv_row = tl.program_id(0).to(tl.int64)
    batch = kv_row // num_kv_heads
    head = kv_row % num_kv_heads
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(first + batch).to(tl.int64) + place
    within = (place < count) & (position >= 0) & (position < length)
    d = tl.arange(0, BLOCK_D)
    mask = within[:, None] & (d < D)[None, :]
    rows = key + batch * stride_kb + head * stride_kh + position * stride_kl
    k = tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(center + kv_row * D + d, mask=d < D, other=0.0)
    width = tl.load(spread + kv_row * D + d, mask=d < D, other=1.0)
    x = tl.where(mask, tl.div_rn(k - middle[None, :], tl.broadcast_to(width[None, :], k.shape)), 0.0)
    # Written so that NaN fails the comparison too.
    broken = tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1) > 0
    x = tl.where(broken[:, None], 0.0, x)
    largest = tl.max(tl.abs(x), axis=1)
    scale = tl.where(largest < _SMALLEST, 0.0, largest / _LARGEST_CODE)
    level = x / tl.where(scale > 0, scale, 1.0)[:, None]
    level = tl.where((scale > 0)[:, None], tl.floor(level + 0.5), 0.0)
    level = tl.minimum(tl.maximum(level, -_LARGEST_CODE), _LARGEST_CODE)
    left_over = x - scale[:, None] * level
    unit = tl.max(tl.abs(left_over), axis=1)
    parts = left_over / tl.where(unit > 0, unit, 1.0)[:, None]
    norm = unit * tl.sqrt(tl.sum(parts * parts, axis=1))
    norm = norm * (1.0 + (D + 8) * _HALF_ULP) + largest * rounding + _SMALLEST
    norm = tl.where(broken, float("inf"), norm)
    targets = codes + batch * stride_cb + head * stride_ch + position * stride_cl
    tl.store(targets[:, None] + d[None, :], level.to(tl.int8), mask=mask)
    tl.store(code_scale + batch * stride_sb + head * stride_sh + position, scale, mask=within)
    tl.store(code_residual + batch * stride_rb + head * stride_rh + position, norm, mask=within)


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernel for every dtype and for small and large heads."""
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 256)):
        types = {
            "key": pointer_to(dtype),
            "first": "*i64",
            "codes": "*i8",
            **dict.fromkeys(("code_scale", "code_residual", "center", "spread"), "*fp32"),
            **dict.fromkeys(("stride_kb", "stride_cb"), "i64"),
            "rounding": "fp32",
        }
        aligned = data_strides(encode_kernel, "kc")
        name = f"encode-{DTYPE_NAMES[dtype]}-d{head_dim}"
        yield Specialisation(name, encode_kernel, encode_constants(head_dim), types, encode_options(), aligned)

"""Codes of new keys, written in place into the codes of a cache; ``codes.encode_keys`` defines them.

Reads each new key and writes D + 8 bytes for it; center and spread are read once a program.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops import rounding
from nc_patch.ops.triton.launch import Tiles, dense_last, on_device, padded_dim, shape_of
from nc_patch.ops.triton.rows import head_of
from nc_patch.ops.triton.structs import Shape, heads
from nc_patch.selections.topk.codes import LARGEST_CODE, KeyCodes

# Half a unit in the last place of a float32 near 1, what it loses near its smallest number, and the largest code.
HALF_ULP, SMALLEST = tl.constexpr(rounding.HALF_ULP), tl.constexpr(rounding.SMALLEST)
LARGEST = tl.constexpr(float(LARGEST_CODE))
# Elements of a tile of keys: few registers, and a single new key wastes little.
_TILE = 2048


def key_shape(head_dim: int, value_dim: int) -> Shape:
    """The shape of a tile of keys that are encoded together."""
    return shape_of(head_dim, value_dim, Tiles(1, max(1, _TILE // padded_dim(head_dim)), 4, 1))


def triton_encode_keys_(key: torch.Tensor, first: torch.Tensor, count: int, codes: KeyCodes) -> None:
    """Writes the codes of the keys ``[first, first + count)`` of each sequence into ``codes``; one launch.

    Args:
        key: ``[B, Hkv, N, D]``, any strides. first: int ``[B]``, on the device. count: of keys; those at positions
            outside the keys or the codes are skipped.
        codes: contiguous, as those of an index are.
    """
    (B, Hkv, N, D), length = key.shape, codes.codes.shape[2]
    assert all(tensor.is_contiguous() for tensor in codes)
    if count <= 0 or min(N, length) == 0 or B * Hkv == 0:
        return
    shape = key_shape(D, D)
    # The other axes of a grid end at 65,535, which the blocks of a long prompt exceed.
    grid = (triton.cdiv(count, shape.BLOCK_N.value), B * Hkv)
    with on_device(key.device):
        encode_kernel[grid](
            key=heads(dense_last(key)), first=first.contiguous(), codes=codes, num_kv_heads=Hkv, count=count,
            keys=min(N, length), length=length, shape=shape, num_warps=4, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_kv_heads", "count", "keys", "length"])
def encode_kernel(key, first, codes, num_kv_heads, count, keys, length, shape):
    """Encodes ``BLOCK_N`` keys of one head. There are ``keys``, and room for ``length`` codes."""
    kv_row = tl.program_id(1).to(tl.int64)
    batch = kv_row // num_kv_heads
    begin = tl.load(first + batch).to(tl.int64)
    matrix = head_of(key, batch, kv_row % num_kv_heads)
    stop = tl.minimum(begin + count, keys)
    encode_run(matrix, codes, kv_row, begin + tl.program_id(0) * shape.BLOCK_N, stop, length, shape)


@triton.jit
def encode_run(keys, codes, kv_row, begin, stop, length, shape):
    """Encodes the ``BLOCK_N`` keys from ``begin`` on of a head (``Matrix``), as far as they lie in ``[0, stop)``.

    ``kv_row`` is its number among all heads of all sequences.
    """
    position = begin + tl.arange(0, shape.BLOCK_N)
    within = (position >= 0) & (position < stop)
    d = tl.arange(0, shape.BLOCK_D)
    exists = d < shape.D
    mask = within[:, None] & exists[None, :]
    k = tl.load(keys.data + (position * keys.stride)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(codes.center + kv_row * shape.D + d, mask=exists, other=0.0)
    width = tl.load(codes.spread + kv_row * shape.D + d, mask=exists, other=1.0)
    x = tl.where(mask, tl.div_rn(k - middle[None, :], tl.broadcast_to(width[None, :], k.shape)), 0.0)
    # Written so that NaN fails the comparison too.
    broken = tl.sum((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1) > 0
    x = tl.where(broken[:, None], 0.0, x)
    largest = tl.max(tl.abs(x), axis=1)
    scale = tl.where(largest < SMALLEST, 0.0, largest / LARGEST)
    code = x / tl.where(scale > 0, scale, 1.0)[:, None]
    code = tl.where((scale > 0)[:, None], tl.floor(code + 0.5), 0.0)
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    # At least the norm of what is left over, without overflow or underflow on the way.
    rest = x - scale[:, None] * code
    unit = tl.max(tl.abs(rest), axis=1)
    size = tl.where(unit > 0, unit, 1.0)[:, None]
    norm = unit * tl.sqrt(tl.sum((rest / size) * (rest / size), axis=1)) * (1.0 + (shape.D + 8) * HALF_ULP)
    norm += largest * (8.0 * (shape.D**0.5) * HALF_ULP) + SMALLEST
    at = kv_row * length + position
    tl.store(codes.codes + (at * shape.D)[:, None] + d[None, :], code.to(tl.int8), mask=mask)
    tl.store(codes.scale + at, scale, mask=within)
    tl.store(codes.residual + at, tl.where(broken, float("inf"), norm), mask=within)

"""Codes of keys: one byte an element in two planes, and what is needed to bound every score from them.

A key is centred and scaled per channel, ``x = (k - center) / spread``, and stored as ``scale * codes`` with eight bits
a channel; ``residual`` bounds the norm of what that leaves out. With ``w = q * spread``

    |q.k - (q.center + scale * w.codes)| <= |w| * residual        (Cauchy-Schwarz)

so that every score is known from both sides before a key is read. A code is ``16 * high + low``, four bits each, kept
apart: the high ones alone, with a residual of their own, tell of most keys that they are none of the best, so that the
low ones are read of few. ``center`` and ``spread`` are fixed when the codes are first made: any values are right, those
of the keys make the bounds tight. Bounds include the rounding of the float32 arithmetic that they are computed in.
"""

import math
from typing import NamedTuple

import torch

from nc_patch.ops.rows import HALF_ULP, SMALLEST, product_slack

# The largest code, so that codes are symmetric and both halves of one fit four signed bits: 16 * 7 + 7.
LARGEST_CODE = 119
# What a high half is worth.
HIGH_UNIT = 16
# Keys that center and spread are taken from.
SAMPLED_KEYS = 4096
# A channel's spread is at least this part of the largest channel's: a constant channel must not blow up rounding.
_SPREAD_FLOOR = 1e-4


class KeyCodes(NamedTuple):
    """The codes of the keys ``[B, Hkv, N, D]``.

    Attributes:
        high, low: int8 ``[B, Hkv, N, ceil(D / 2)]``, two signed halves of four bits a byte: channel j in the lower bits
            of byte j, channel ``ceil(D / 2) + j`` in its upper ones.
        scale: float32 ``[B, Hkv, N]``.
        coarse: bfloat16 ``[B, Hkv, N]``, at least the norm of ``(k - center) / spread - scale * 16 * high``.
        residual: bfloat16 ``[B, Hkv, N]``, at least the norm of ``(k - center) / spread - scale * (16 * high + low)``.
            Both are infinite for keys that hold NaN or infinity.
        center: float32 ``[B, Hkv, D]``.
        spread: float32 ``[B, Hkv, D]``, positive.
    """

    high: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    coarse: torch.Tensor
    residual: torch.Tensor
    center: torch.Tensor
    spread: torch.Tensor


def channel_moments(key: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Center and spread, float32 ``[B, Hkv, D]`` each: mean and standard deviation of evenly spaced keys.

    Args:
        key: ``[B, Hkv, N, D]``.
        start, end: int ``[B]``, the keys of each sequence; what lies outside is not looked at. Nothing is read back
            from the device.
    """
    count = min(SAMPLED_KEYS, key.shape[2])
    at = (2 * torch.arange(count, device=key.device) + 1)[None]
    start, end = start.long()[:, None], end.long()[:, None]
    position = (start + (end - start).clamp(min=0) * at // (2 * count)).clamp(0, key.shape[2] - 1)
    index = position[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    sample = key.gather(2, index).float()
    sample = torch.where(sample.isfinite().all(-1, keepdim=True), sample, 0.0)
    center = sample.mean(2)
    spread = (sample - center[:, :, None]).square().mean(2).sqrt()
    spread = torch.maximum(spread, spread.amax(-1, keepdim=True) * _SPREAD_FLOOR)
    usable = spread.isfinite() & (spread > 1e-15) & (spread < 1e15) & center.isfinite()
    return torch.where(center.isfinite(), center, 0.0), torch.where(usable, spread, 1.0)


def encode_keys(
    key: torch.Tensor, center: torch.Tensor, spread: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first five of ``KeyCodes`` of ``key`` ``[B, Hkv, N, D]``: high and low halves, scale, coarse and residual."""
    x = (key.float() - center[:, :, None]) / spread[:, :, None]
    sound = x.isfinite().all(-1)
    x = torch.where(sound[..., None], x, 0.0)
    largest = x.abs().amax(-1)
    scale = torch.where(largest < SMALLEST, 0.0, largest / LARGEST_CODE)
    codes = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    high = torch.floor((codes + HIGH_UNIT // 2) / HIGH_UNIT)
    coarse, residual = (
        _rounded_up(torch.where(sound, _norm(x - scale[..., None] * stored, largest), torch.inf))
        for stored in (HIGH_UNIT * high, codes)
    )
    return pack_halves(high), pack_halves(codes - HIGH_UNIT * high), scale, coarse, residual


def _norm(left_over: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """At least the norm of what codes leave out of vectors whose largest element is ``largest``."""
    D = left_over.shape[-1]
    # Squares are taken of numbers near one, so that neither tiny nor huge residuals are lost.
    unit = left_over.abs().amax(-1)
    norm = unit * torch.where(unit[..., None] > 0, left_over / unit[..., None], 0.0).square().sum(-1).sqrt()
    return norm * (1 + D * HALF_ULP) + largest * (8 * math.sqrt(D) * HALF_ULP) + SMALLEST


def _rounded_up(numbers: torch.Tensor) -> torch.Tensor:
    """bfloat16 that is at least these float32, none of which is negative or NaN."""
    bits = numbers.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def pack_halves(halves: torch.Tensor) -> torch.Tensor:
    """int8 ``[..., ceil(D / 2)]`` of integers from -8 to 7 ``[..., D]``; see ``KeyCodes``."""
    if halves.shape[-1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    first, second = halves.to(torch.int16).chunk(2, -1)
    return (HIGH_UNIT * second + (first & HIGH_UNIT - 1)).to(torch.int8)


def unpack_codes(high: torch.Tensor, low: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The codes int8 ``[..., D]`` whose halves are packed in ``high`` and ``low``."""
    firsts = (high << 4) + (low << 4 >> 4)
    seconds = (high & -HIGH_UNIT) + (low >> 4)
    return torch.cat((firsts, seconds), -1)[..., :head_dim]


def code_slack(head_dim: int) -> float:
    """What to add to ``residual``, per unit of ``scale``, for the rounding of a float32 dot product with the codes."""
    return LARGEST_CODE * math.sqrt(head_dim) * (head_dim + 16) * HALF_ULP


def norm_of(vectors: torch.Tensor) -> torch.Tensor:
    """Norms over the last dimension, float32 and not below the true ones but for its rounding of ordinary numbers.

    They are taken in float64: in float32 the squares of tiny numbers vanish, and those of huge ones overflow.
    """
    return vectors.double().norm(dim=-1).float() + 2.0**-149


def score_slack(query: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Rounding, per row, of ``q.center`` and of an exact score ``q.k`` in float32, in units of raw scores.

    Args:
        query: float32 ``[..., R, D]``. center: float32 ``[..., D]`` of each row's head.
    """
    return product_slack(norm_of(query) * norm_of(center)[..., None], query.shape[-1])

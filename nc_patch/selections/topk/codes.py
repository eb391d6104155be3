"""Codes of keys: one byte an element, and what is needed to bound every score from them.

A key is centred and scaled per channel, ``x = (k - center) / spread``, and stored as ``scale * codes`` with eight bits
a channel; ``residual`` bounds the norm of what that leaves out. With ``w = q * spread``

    |q.k - (q.center + scale * w.codes)| <= |w| * residual        (Cauchy-Schwarz)

so that every score is known from both sides before a key is read. ``center`` and ``spread`` are fixed when the codes
are first made: any values are right, those of the keys make the bounds tight. Bounds include the rounding of the
float32 arithmetic that they are computed in.
"""

import math
from typing import NamedTuple

import torch

from nc_patch.ops.rounding import HALF_ULP, SMALLEST

LARGEST_CODE = 127
# Keys that center and spread are taken from.
SAMPLED_KEYS = 4096
# A channel's spread is at least this part of the largest channel's: a constant channel must not blow up rounding.
_SPREAD_FLOOR = 1e-4
# Keys that PyTorch encodes at once, to bound its memory.
_KEYS_AT_ONCE = 8192


class KeyCodes(NamedTuple):
    """The codes of the keys ``[B, Hkv, N, D]``.

    Attributes:
        codes: int8 ``[B, Hkv, N, D]``, from -127 to 127. scale: float32 ``[B, Hkv, N]``.
        residual: float32 ``[B, Hkv, N]``, at least the norm of ``(k - center) / spread - scale * codes``; infinite for
            keys that hold NaN or infinity.
        center, spread: float32 ``[B, Hkv, D]``; the latter is positive.
    """

    codes: torch.Tensor
    scale: torch.Tensor
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first three of ``KeyCodes`` of ``key`` ``[B, Hkv, N, D]``: codes, scale and residual."""
    x = (key.float() - center[:, :, None]) / spread[:, :, None]
    sound = x.isfinite().all(-1)
    x = torch.where(sound[..., None], x, 0.0)
    largest = x.abs().amax(-1)
    scale = torch.where(largest < SMALLEST, 0.0, largest / LARGEST_CODE)
    codes = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    left_over = x - scale[..., None] * codes
    # Squares are taken of numbers near one, so that neither tiny nor huge residuals are lost.
    unit = left_over.abs().amax(-1)
    norm = unit * torch.where(unit[..., None] > 0, left_over / unit[..., None], 0.0).square().sum(-1).sqrt()
    D = key.shape[-1]
    residual = norm * (1 + D * HALF_ULP) + largest * (8 * math.sqrt(D) * HALF_ULP) + SMALLEST
    return codes.to(torch.int8), scale, torch.where(sound, residual, torch.inf)


def encode_keys_(key: torch.Tensor, first: torch.Tensor, count: int, codes: KeyCodes) -> None:
    """Writes the codes of the keys ``[first[b], first[b] + count)`` of each sequence b, as far as there are any."""
    Hkv, N, D = key.shape[1:]
    for offset in torch.arange(count, device=key.device).split(_KEYS_AT_ONCE):
        # A key's codes depend on it alone, so that writing one twice, where a position is clamped, does no harm.
        at = (first.long()[:, None] + offset).clamp(0, N - 1)[:, None, :, None].expand(-1, Hkv, -1, D)
        encoded = encode_keys(key.gather(2, at), codes.center, codes.spread)
        for target, new in zip(codes, encoded, strict=False):
            target.scatter_(2, at if new.dim() == 4 else at[..., 0], new)


def code_slack(head_dim: int) -> float:
    """What to add to ``residual``, per unit of ``scale``, for the rounding of a float32 dot product with the codes."""
    return LARGEST_CODE * math.sqrt(head_dim) * (head_dim + 16) * HALF_ULP

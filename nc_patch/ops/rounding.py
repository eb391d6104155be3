"""What float32 rounds off: of a dot product, and of a kept mass that is computed from them."""

import math

import torch

from nc_patch.ops.problem import Problem

# Half a unit in the last place of a float32 near 1, and what float32 loses in numbers near its smallest.
HALF_ULP, SMALLEST = 2.0**-24, 1e-25
# Relative error of sums of exponentials in float32, and absolute error of what underflows.
_SUM_SLACK = 1e-4
_SMALLEST_MASS = 1e-30
# What a factor of a float32 matrix product is rounded by, by ``torch.get_float32_matmul_precision``.
_FACTOR_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


def rounding_bounds(kept: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Bounds float32 ``[B, Hq, Lq, 2]`` of the kept mass that was computed as ``kept [B, Hq, Lq]`` in float32."""
    query, key, visible, scale = problem.query, problem.key, problem.visible, problem.scale
    Lk, D = key.shape[2:]
    empty = visible[..., 1] <= visible[..., 0]
    if Lk == 0:
        return torch.ones(*kept.shape, 2, dtype=torch.float32, device=kept.device)
    norms = lambda rows: torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)  # noqa: E731
    largest: torch.Tensor | None = getattr(kept, "_nc_largest_norms", None)
    if largest is None:  # no kernel that has read every key has left them
        # A buffer may hold anything beyond the keys that are seen.
        position = torch.arange(Lk, device=key.device)
        start = visible[..., 0].masked_fill(empty, Lk).amin(-1)[:, None, None]
        end = visible[..., 1].amax(-1)[:, None, None]
        largest = norms(key).masked_fill((position < start) | (position >= end), 0.0).amax(-1)
    of_query, of_key = norms(query).double(), largest.double().repeat_interleave(problem.group, 1)[..., None]
    size = of_query * of_key
    kept = kept.double().clamp(0, 1)
    rest = 1 - kept
    # What a dot product of float32 may be off by, and be rounded, and then a score. Matrix units may cut where others
    # round, and take factors of fewer digits.
    factors = _FACTOR_ROUNDING[torch.get_float32_matmul_precision()]
    product = 4 * (D + 16) * HALF_ULP + 2 * factors + factors**2
    magnitude = (scale * size).clamp(max=problem.softcap or math.inf)
    # Products of bfloat16 may take for zero what is smaller than every normal number.
    vanishing = SMALLEST + (of_query + of_key) * (math.sqrt(D) * torch.finfo(torch.float32).tiny)
    off = size * (scale * product) + magnitude * (16 * HALF_ULP) + 2 * scale * vanishing
    # Twice: what is attended may be lower and the rest higher than computed.
    shift = torch.exp(2 * off)
    slack = magnitude * (8 * HALF_ULP) + (_SUM_SLACK + 8 * HALF_ULP * math.log(max(Lk, 2)))
    lower = kept / (kept + rest * shift) * (1 - slack * shift) - _SMALLEST_MASS
    kept = kept * shift
    upper = kept / (kept + rest) * (1 + slack) + _SMALLEST_MASS
    # The float64 limits are rounded away from each other.
    lower = lower.nan_to_num(nan=0.0) * (1 - 2 * HALF_ULP)
    upper = upper.nan_to_num(nan=1.0) * (1 + 2 * HALF_ULP)
    return torch.stack((lower, upper), -1).clamp(0, 1).float().masked_fill(empty[:, None, :, None], 1.0)

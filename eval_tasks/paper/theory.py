"""What is expected where the scores of a row are independent and normal, N(0, σ²): so many keys hold so much.

The weights exp(σ z) are lognormal, and tilting a normal density by exp(σ z) shifts it by σ: the mass lies on the keys
with z near σ. While σ² < 2 ln n there are many of those and the law of large numbers gives what follows; beyond, the
few largest keys hold the mass (the frozen phase of Derrida's random energy model).
"""

import math
from typing import Any

from scipy.special import ndtr, ndtri


def growing_spread(n: float, s: Any) -> Any:
    """σ with σ² = s²·2·ln n, at which the exponent of the entropy support, 1 − s² or 0, does not depend on n."""
    return s * math.sqrt(2.0 * math.log(n))


def entropy_support(n: float, sigma: float) -> float:
    """exp(H) = n·exp(−σ²/2) keys, and not below 1: H = ln Z − Σ p·score = (ln n + σ²/2) − σ²."""
    return max(1.0, n * math.exp(-sigma * sigma / 2.0))


def mass_share(sigma: Any, epsilon: float) -> Any:
    """The share of the keys, from the largest down, that hold 1 − ε of the mass: Φ(−σ − Φ⁻¹(ε)).

    The mass above a threshold t, in units of σ, is Φ(σ − t), the share of keys above it Φ(−t). It does not depend on n:
    with a fixed σ the number of keys is proportional to n.
    """
    return ndtr(-sigma - ndtri(epsilon))

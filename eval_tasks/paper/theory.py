"""What is expected where the scores of a row are independent and normal, N(0, σ²): so many keys hold so much.

Tilting a normal density by exp(σ z) shifts it by σ: the mass lies on the keys with z near σ. While σ² < 2 ln n there
are many of those; beyond, the few largest keys hold the mass (the frozen phase of Derrida's random energy model).
"""

import math
from typing import Any

from scipy.special import ndtr, ndtri


def growing_spread(n: float, s: Any) -> Any:
    """σ with σ² = s²·2·ln n, at which the entropy support n·exp(−σ²/2) is n^(1 − s²), for s up to 1."""
    return s * math.sqrt(2.0 * math.log(n))


def mass_share(sigma: Any, epsilon: float) -> Any:
    """The share of the keys, from the largest down, that hold 1 − ε of the mass: Φ(−σ − Φ⁻¹(ε)).

    The mass above a threshold t, in units of σ, is Φ(σ − t), the share of keys above it Φ(−t). It does not depend on n:
    with a fixed σ the number of keys is proportional to n.
    """
    return ndtr(-sigma - ndtri(epsilon))

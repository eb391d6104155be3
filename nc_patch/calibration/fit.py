"""Power laws k = alpha * n^C through numbers of keys: robust lines, with intervals."""

from dataclasses import dataclass

import numpy as np

from nc_patch.common import student_quantile

_NORMAL = 1.6448536  # the 95 % quantile of the normal distribution
_BOOTSTRAPS = 200
_SAME = 0.05  # lengths whose logarithms are nearer to each other say nothing about a slope


@dataclass(frozen=True, eq=False)
class Fit:
    """The law ``keys = alpha * n^C`` of the keys that hold ``1 - eps`` of a head's mass; float64 ``[M, H]``.

    Attributes:
        eps: share of the mass that may be missing.
        alpha, C: factor, and exponent in [0, 1]. C_low, C_high: the ends of its 90 % interval.
        level_half: half the width of the 90 % interval of log keys at the geometric mean of the lengths.
        support: ``[L, M, H]``, the points: geometric mean of the keys at each length.
    """

    eps: float
    alpha: np.ndarray
    C: np.ndarray
    C_low: np.ndarray
    C_high: np.ndarray
    level_half: np.ndarray
    support: np.ndarray


def fit_power_laws(log_n: np.ndarray, log_k: np.ndarray, eps: float, seed: int = 0) -> Fit:
    """The law of each head: a Theil-Sen line through the mean logarithms at each length.

    ``log_n [L, M]`` is of the keys that rows see, ``log_k [P, L, M, H, R]`` of those that R rows of each of P pieces
    need. The standard error is the larger of the bootstrap's, over pieces and their rows, and of that of the line's
    residuals, so that a law that bends has a wide interval.
    """
    P, L, M, H, R = log_k.shape
    points = log_k.mean((0, 4))  # [L, M, H]
    slope, intercept = theil_sen(log_n, points)
    residual = ((points - (intercept + slope * log_n[..., None])) ** 2).sum(0)

    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(P, np.full(P, 1 / P), size=_BOOTSTRAPS)
    weights = generator.multinomial(drawn * R, np.full(R, 1 / R)).reshape(_BOOTSTRAPS, P * R)
    flat = log_k.transpose(0, 4, 1, 2, 3).reshape(P * R, -1)
    resampled = (weights.astype(float) @ flat / (P * R)).reshape(_BOOTSTRAPS, L, M, H)
    widened = np.sqrt(P / (P - 1)) if P > 1 else 1.0
    slope_error = np.std([theil_sen(log_n, one)[0] for one in resampled], 0) * widened
    level_error = resampled.mean(1).std(0) * widened
    spread = ((log_n - log_n.mean(0)) ** 2).sum(0)[:, None]
    if L > 2:
        line = np.sqrt(residual / (L - 2))
        slope_error = np.maximum(slope_error, line / np.sqrt(np.maximum(spread, _SAME**2)))
        level_error = np.maximum(level_error, line / np.sqrt(L))
    quantile = student_quantile(max(P - 1, 2), _NORMAL) if P > 1 else _NORMAL
    C_half = np.where(spread < _SAME**2, 1.0, quantile * slope_error)
    exponents = np.clip([slope, slope - C_half, slope + C_half], 0.0, 1.0)
    return Fit(eps, *map(significant, (np.exp(intercept), *exponents, quantile * level_error, np.exp(points))))


def theil_sen(log_n: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Theil-Sen line through points ``[L, M, H]`` at ``log_n`` ``[L, M]``: slope in [0, 1], intercept; ``[M, H]``.

    Where all lengths are the same (a window that is full at every length) the slope is 0.
    """
    first, second = np.triu_indices(len(log_n), 1)
    run = (log_n[second] - log_n[first])[..., None]
    far = np.abs(run) > _SAME
    slopes = np.where(far, (points[second] - points[first]) / np.where(far, run, 1.0), np.nan)
    slopes = np.where(far.any(0), slopes, 0.0)
    slope = np.clip(np.nanmedian(slopes, axis=0), 0.0, 1.0)
    return slope, np.median(points - slope * log_n[..., None], axis=0)


def significant(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """The values rounded to significant digits, so that files stay short."""
    return np.vectorize(lambda value: float(f"{value:.{digits}g}"), otypes=[float])(values)

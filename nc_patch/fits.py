"""Power laws k = alpha * n^C through what was counted, robustly, with the interval in which C is expected."""

from dataclasses import dataclass

import numpy as np

# Ninety of a hundred intervals are meant to hold the truth.
CONFIDENCE = 0.90
_NORMAL_QUANTILE = 1.6448536
_BOOTSTRAPS = 200
# Lengths nearer to each other than this, as a difference of logarithms, say nothing about a slope.
_SAME = 0.05


@dataclass(frozen=True)
class PowerLaws:
    """Laws of all heads, arrays ``[M, H]``.

    Attributes:
        log_alpha, C: of ``k = alpha * n^C``; C in [0, 1].
        r2: the share of the variance of log k over the lengths that the law explains; 1 where k does not vary at all.
        C_half: half the width of the interval of C.
        level_half: half the width of the interval of log k at the middle of the lengths.
        middle: ``[M]``, that middle: the mean of log n.
    """

    log_alpha: np.ndarray
    C: np.ndarray
    r2: np.ndarray
    C_half: np.ndarray
    level_half: np.ndarray
    middle: np.ndarray


def fit_power_laws(log_n: np.ndarray, log_k: np.ndarray, seed: int = 0) -> PowerLaws:
    """Theil and Sen's line (the median of all slopes, then of all intercepts) through the lengths' mean logarithms.

    One length that lies off moves it little. Its standard error is the larger of two: the bootstrap's, over pieces of
    text and the rows of each, and that of a line with these residuals, which a law that bends would show in. With few
    pieces the interval widens as Student's t does; with a single one it says nothing about other texts.

    Args:
        log_n: ``[L, M]``, log of the keys that rows see.
        log_k: ``[P, L, M, H, R]``, log of the keys counted in P pieces and R rows of each.
        seed: of the bootstrap.
    """
    P, L, M, H, R = log_k.shape
    points = log_k.mean((0, 4))  # [L, M, H]
    slope, intercept = theil_sen(log_n, points)
    predicted = intercept + slope * log_n[..., None]
    residual = ((points - predicted) ** 2).sum(0)
    variance = ((points - points.mean(0)) ** 2).sum(0)
    r2 = np.where(variance > 1e-12, 1 - residual / np.maximum(variance, 1e-12), 1.0)

    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(P, np.full(P, 1 / P), size=_BOOTSTRAPS)
    weights = np.empty((_BOOTSTRAPS, P, R))
    for b in range(_BOOTSTRAPS):
        weights[b] = [generator.multinomial(count * R, np.full(R, 1 / R)) for count in drawn[b]]
    flat = log_k.transpose(0, 4, 1, 2, 3).reshape(P * R, -1)
    resampled = (weights.reshape(_BOOTSTRAPS, -1) @ flat / (P * R)).reshape(_BOOTSTRAPS, L, M, H)
    slopes = np.stack([theil_sen(log_n, one)[0] for one in resampled])
    widened = np.sqrt(P / (P - 1)) if P > 1 else 1.0
    slope_error = slopes.std(0) * widened
    level_error = resampled.mean(1).std(0) * widened
    spread = ((log_n - log_n.mean(0)) ** 2).sum(0)[:, None]
    if L > 2:
        line = np.sqrt(residual / (L - 2))
        slope_error = np.maximum(slope_error, line / np.sqrt(np.maximum(spread, _SAME**2)))
        level_error = np.maximum(level_error, line / np.sqrt(L))
    quantile = student_quantile(P - 1)
    # Where all lengths are the same nothing is known of the slope.
    C_half = np.where(spread < _SAME**2, 1.0, quantile * slope_error)
    return PowerLaws(intercept, slope, r2, C_half, quantile * level_error, log_n.mean(0))


def theil_sen(log_n: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope, limited to [0, 1], and intercept ``[M, H]`` through points ``[L, M, H]`` at ``log_n`` ``[L, M]``.

    Where all lengths are the same (a window that is full at every length) the slope is 0.
    """
    first, second = np.triu_indices(len(log_n), 1)
    run = (log_n[second] - log_n[first])[..., None]
    far = np.abs(run) > _SAME
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.where(far, (points[second] - points[first]) / np.where(far, run, 1.0), np.nan)
    any_far = far.any(0)
    slope = np.zeros(points.shape[1:])
    if any_far.any():
        slope[any_far[:, 0]] = np.nanmedian(slopes[:, any_far[:, 0]], axis=0)
    slope = np.clip(slope, 0.0, 1.0)
    return slope, np.median(points - slope * log_n[..., None], axis=0)


def student_quantile(freedom: int) -> float:
    """The 95 % quantile of Student's t (Cornish and Fisher's expansion; 2 % low at 3 degrees of freedom).

    Without a degree of freedom nothing is known about other texts; then it is the normal one.
    """
    z = _NORMAL_QUANTILE
    if freedom < 1:
        return z
    v = float(max(freedom, 2))
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)

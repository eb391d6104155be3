"""Power laws k = alpha * n^C through what was counted, robustly, with the interval in which C is expected."""

from dataclasses import dataclass

import numpy as np

_NORMAL_QUANTILE = 1.6448536  # of 95 %: ninety of a hundred intervals are meant to hold the truth
_BOOTSTRAPS = 200
# Lengths nearer to each other than this, as a difference of logarithms, say nothing about a slope.
_SAME = 0.05
# Intervals of log alpha end here, where they say nothing any more.
_WIDEST = 25.0


@dataclass(frozen=True, eq=False)
class Fit:
    """The law ``keys = alpha * n^C`` of the keys that hold ``1 - eps`` of a head's mass; arrays ``[M, H]``.

    Attributes:
        eps: share of the mass that may be missing.
        alpha, alpha_low, alpha_high: factor, with its 90 % interval.
        C, C_low, C_high: exponent in [0, 1], with its 90 % interval.
        r2: share of the variance of log keys over the lengths that the law explains; 1 where they do not vary at all.
        level_half: half the width of the 90 % interval of log keys at the middle (geometric mean) of the lengths.
        support: ``[L, M, H]``, the points: geometric mean of the keys counted at each length.
    """

    eps: float
    alpha: np.ndarray
    alpha_low: np.ndarray
    alpha_high: np.ndarray
    C: np.ndarray
    C_low: np.ndarray
    C_high: np.ndarray
    r2: np.ndarray
    level_half: np.ndarray
    support: np.ndarray


def fit_power_laws(log_n: np.ndarray, log_k: np.ndarray, eps: float, seed: int = 0) -> Fit:
    """The law of each head by Theil and Sen's line through the lengths' mean logarithms.

    Its standard error is the larger of two: the bootstrap's, over pieces of text and the rows of each, and that of a
    line with these residuals, which a law that bends would show in. With few pieces the interval widens as Student's t
    does; with a single one it says nothing about other texts.

    Args:
        log_n: ``[L, M]``, log of the keys that rows see.
        log_k: ``[P, L, M, H, R]``, log of the keys counted in P pieces and R rows of each.
        eps: as in ``Fit``.
        seed: of the bootstrap.
    """
    P, L, M, H, R = log_k.shape
    points = log_k.mean((0, 4))  # [L, M, H]
    slope, intercept = theil_sen(log_n, points)
    residual = ((points - (intercept + slope * log_n[..., None])) ** 2).sum(0)
    variance = ((points - points.mean(0)) ** 2).sum(0)

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
    quantile = student_quantile(P - 1)
    # Where all lengths are the same nothing is known of the slope.
    C_half = np.where(spread < _SAME**2, 1.0, quantile * slope_error)
    # log alpha is the level at the middle minus C times the middle, so its error has both.
    alpha_half = np.hypot(quantile * level_error, C_half * log_n.mean(0)[:, None])
    arrays = {
        "alpha": np.exp(intercept),
        "alpha_low": np.exp(np.maximum(intercept - alpha_half, -_WIDEST)),
        "alpha_high": np.exp(np.minimum(intercept + alpha_half, _WIDEST)),
        "C": slope,
        "C_low": np.clip(slope - C_half, 0.0, 1.0),
        "C_high": np.clip(slope + C_half, 0.0, 1.0),
        "r2": np.where(variance > 1e-12, 1 - residual / np.maximum(variance, 1e-12), 1.0),
        "level_half": quantile * level_error,
        "support": np.exp(points),
    }
    return Fit(eps, **{name: significant(values) for name, values in arrays.items()})


def theil_sen(log_n: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept ``[M, H]`` through points ``[L, M, H]`` at ``log_n`` ``[L, M]``: medians, hence robust.

    The slope is the median of those of all pairs, limited to [0, 1], the intercept the median of those of all points.
    Where all lengths are the same (a window that is full at every length) the slope is 0.
    """
    first, second = np.triu_indices(len(log_n), 1)
    run = (log_n[second] - log_n[first])[..., None]
    far = np.abs(run) > _SAME
    slopes = np.where(far, (points[second] - points[first]) / np.where(far, run, 1.0), np.nan)
    slopes = np.where(far.any(0), slopes, 0.0)
    slope = np.clip(np.nanmedian(slopes, axis=0), 0.0, 1.0)
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


def significant(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """The values with so many significant digits, so that files stay short and are read back the same."""
    return np.vectorize(lambda value: float(f"{value:.{digits}g}"), otypes=[float])(values)

"""Means over independent samples, with intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from eval_tasks.bootstrap import CONFIDENCE

Estimate = tuple[float, float | None, float | None]


def estimate(values: "Sequence[float] | np.ndarray") -> Estimate:
    """The mean and its interval by Student's t at ``CONFIDENCE``; no interval for a single value."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return mean, mean - half, mean + half


def geometric(values: "Sequence[float] | np.ndarray") -> Estimate:
    """The geometric mean, and the interval of the mean of the logarithms: for counts that spread over decades."""
    mean, low, high = estimate(np.log(np.asarray(values, dtype=np.float64)))
    return math.exp(mean), None if low is None else math.exp(low), None if high is None else math.exp(high)


def exponents(lengths: Sequence[int], counts: np.ndarray) -> np.ndarray:
    """The slope of log count against log n of each sample: counts ``[lengths, samples]`` → ``[samples]``."""
    return np.polyfit(np.log(lengths), np.log(counts), 1)[0]

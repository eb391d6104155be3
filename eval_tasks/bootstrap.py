"""Bootstrap intervals of paired differences over samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
# With fewer samples than this, resampling says nothing about the spread.
MIN_SAMPLES = 2


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences and its percentile bootstrap interval.

    Attributes:
        mean: of the differences.
        low, high: the interval at ``CONFIDENCE``; None with fewer than two samples.
        samples: how many pairs.
    """

    mean: float
    low: float | None
    high: float | None
    samples: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(values: Sequence[float], reference: Sequence[float], seed: int = 0) -> PairedDifference:
    """The difference ``values - reference`` over the same samples in the same order.

    Args:
        values, reference: one number per sample; each sample is one stretch of text, the unit that is resampled.
        seed: of the resampling.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(f"pairs need the same samples, at least one: got {len(values)} and {len(reference)}")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count < MIN_SAMPLES:
        return PairedDifference(mean, None, None, count)
    drawn = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences[drawn].mean(axis=1), [tail, 1 - tail])
    return PairedDifference(mean, float(low), float(high), count)

"""Bootstrap intervals of paired differences, clustered by document."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
# With fewer documents than this, resampling says nothing about the spread.
MIN_SAMPLES = 2


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences and its percentile bootstrap interval.

    Attributes:
        mean: of the differences.
        low, high: the interval at ``CONFIDENCE``; None with fewer than two documents.
        samples: how many pairs.
        documents: how many documents they come from; what is resampled.
    """

    mean: float
    low: float | None
    high: float | None
    samples: int
    documents: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_difference(
    values: Sequence[float], reference: Sequence[float], seed: int = 0, documents: Sequence[Hashable] | None = None
) -> PairedDifference:
    """The difference ``values - reference`` over the same samples in the same order.

    Args:
        values, reference: one number per sample.
        seed: of the resampling.
        documents: which document each sample comes from; None where each is one of its own. Samples of one document
            resemble each other, so whole documents are resampled.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    sums, counts = by_document(values, reference, documents)
    mean, samples, found = float(sums.sum() / counts.sum()), int(counts.sum()), len(sums)
    if found < MIN_SAMPLES:
        return PairedDifference(mean, None, None, samples, found)
    low, high = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return PairedDifference(mean, float(low), float(high), samples, found)


def by_document(
    values: Sequence[float], reference: Sequence[float], documents: Sequence[Hashable] | None = None
) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """The sum of differences and the number of samples of each document, float64 ``[documents]`` both."""
    owners = list(range(len(values))) if documents is None else list(documents)
    if not len(values) == len(reference) == len(owners) or not len(values):
        raise ValueError(
            f"pairs need the same samples, at least one: got {len(values)}, {len(reference)} and {len(owners)}"
        )
    differences = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    place = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    rows = np.array([place[owner] for owner in owners])
    return np.bincount(rows, differences), np.bincount(rows).astype(np.float64)

"""Each method against dense attention on the same samples: tests, a margin, and what could have been detected.

A difference that is not significant proves nothing. So a method is called non-inferior only when the data exclude a
loss of more than a stated margin, and every verdict carries the number of documents and the smallest difference that
so many would have shown.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from eval_tasks.bootstrap import MIN_SAMPLES, by_document, paired_difference

SIGNIFICANCE = 0.05
POWER = 0.8
_PERMUTATIONS = 9_999
# Documents all of which must differ the same way for a two-sided test to reach significance at all.
_FEWEST = 6


@dataclass(frozen=True)
class Comparison:
    """One method against dense attention at one task and length; differences above zero are losses.

    Attributes:
        task, length, method: which.
        documents: how many independent documents.
        difference: mean loss over dense: nats per token, or the share of answers lost.
        low, high: its bootstrap interval.
        margin: the loss, in the same units, that counts as none.
        detectable: the smallest difference that a test on so many documents finds in 80 of 100 cases, taken alone;
            None where they find none.
        p_difference: of a difference either way: McNemar's exact test for right or wrong answers, else sign flips of
            whole documents.
        p_margin: of a loss below the margin, one-sided; None where there is too little to test.
        dense_fails: dense attention itself fails here, so there is nothing to compare with.
    """

    task: str
    length: int
    method: str
    documents: int
    difference: float
    low: float | None
    high: float | None
    margin: float
    detectable: float | None
    p_difference: float | None
    p_margin: float | None
    dense_fails: bool = False

    @property
    def verdict(self) -> str:
        """What the corrected tests say, in words."""
        if self.dense_fails:
            return "dense fails here: no verdict"
        if self.p_difference is None or self.p_margin is None:
            return "too few documents"
        within = self.p_margin <= SIGNIFICANCE
        if self.p_difference <= SIGNIFICANCE:
            if self.difference < 0:
                return "better"
            return "worse, yet within the margin" if within else "worse"
        return "non-inferior" if within else "undecided"


def compare(
    task: str,
    length: int,
    method: str,
    values: Sequence[float],
    reference: Sequence[float],
    documents: Sequence[Hashable],
    margin: float,
    right_or_wrong: bool = False,
    dense_fails: bool = False,
) -> Comparison:
    """Compares losses of a method with those of dense attention on the same samples; p-values are uncorrected.

    Args:
        task, length, method: names for the result.
        values, reference: loss per sample, lower is better; for answers 1 − score.
        documents: of each sample.
        margin: as in ``Comparison``.
        right_or_wrong: whether every loss is 0 or 1.
        dense_fails: as in ``Comparison``.
    """
    interval = paired_difference(values, reference, documents=documents)
    sums, counts = by_document(values, reference, documents)
    means = sums / counts
    p_difference = p_margin = None
    if len(means) >= MIN_SAMPLES:
        p_difference = mcnemar(values, reference) if right_or_wrong else _sign_flips(means, 0.0, "two-sided")
        p_margin = _sign_flips(means, margin, "less")
    return Comparison(
        task, length, method, interval.documents, interval.mean, interval.low, interval.high, margin,
        smallest_detectable(means, right_or_wrong), p_difference, p_margin, dense_fails,
    )  # fmt: skip


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values after Holm's correction over all of them, for each of the two questions.

    Those without a verdict do not count towards the family.
    """
    judged = [c for c in comparisons if not c.dense_fails and c.p_difference is not None and c.p_margin is not None]
    differences = holm([c.p_difference for c in judged if c.p_difference is not None])
    margins = holm([c.p_margin for c in judged if c.p_margin is not None])
    found = {
        id(c): replace(c, p_difference=a, p_margin=b) for c, a, b in zip(judged, differences, margins, strict=True)
    }
    return [found.get(id(c), c) for c in comparisons]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mcnemar(values: Sequence[float], reference: Sequence[float]) -> float:
    """p of McNemar's exact test: among samples on which the two differ, each is as often the wrong one."""
    only_here = sum(a > b for a, b in zip(values, reference, strict=True))
    only_there = sum(a < b for a, b in zip(values, reference, strict=True))
    if only_here + only_there == 0:
        return 1.0
    return float(stats.binomtest(only_here, only_here + only_there).pvalue)


def smallest_detectable(means: Sequence[float] | np.ndarray, right_or_wrong: bool = False) -> float | None:
    """The smallest difference that so many documents show, uncorrected, with a power of ``POWER``.

    For answers that are right or wrong: the share lost at which McNemar's test finds enough of them when none are won.
    Else that of a paired two-sided t-test with the spread that was found.

    Returns:
        None where no difference, however large, reaches significance: below six documents.
    """
    count = len(means)
    if count < _FEWEST:
        return None
    if right_or_wrong:
        # So many lost answers and none won are significant: 2 · ½^6 < 0.05.
        power = lambda share: stats.binom.sf(_FEWEST - 1, count, share) - POWER  # noqa: E731
        return float(optimize.brentq(power, 0.0, 1.0))
    deviation = float(np.std(means, ddof=1))
    quantiles = stats.t.ppf([1 - SIGNIFICANCE / 2, POWER], count - 1).sum()
    return float(quantiles * deviation / math.sqrt(count))


def effective_length(ratios: dict[int, float], within: float) -> int | None:
    """The longest length up to which a method's loss over dense stays within a factor.

    Args:
        ratios: length → (quality of dense / quality of the method) − 1; 0.05 is five percent worse.
        within: how much worse still counts, as such a ratio.

    Returns:
        None when the shortest length is outside already.
    """
    reached = None
    for length in sorted(ratios):
        if ratios[length] > within:
            break
        reached = length
    return reached


def _sign_flips(means: np.ndarray, null: float, alternative: str) -> float:
    """p of a permutation test that flips the sign of each document's difference from ``null``; exact for few."""
    if np.allclose(means, null, rtol=0.0, atol=1e-12):
        return 1.0
    found = stats.permutation_test(
        (means - null,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        alternative=alternative,
        n_resamples=_PERMUTATIONS,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)

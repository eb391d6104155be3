"""Each method against dense attention on the same samples: intervals, tests, a margin, and what could be detected.

A difference that is not significant proves nothing. So a method is non-inferior only when the data exclude a loss of
more than a stated margin. Of many comparisons, all of this is at the level that Holm's procedure asks of the first.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

RESAMPLES, CONFIDENCE, SIGNIFICANCE, POWER = 10_000, 0.95, 0.05, 0.8
# Fewer documents say nothing about the spread; of unbounded losses, too little about their tail to test the margin.
MIN_SAMPLES, MARGIN_DOCUMENTS = 2, 20
DENSE_FAILS = "dense fails here: no verdict"
# Steps into which the sum of all differences is divided for the exact distribution of its flips.
_STEPS = 1 << 17

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences, its bootstrap interval (None below two documents), and what it rests on."""

    mean: float
    low: float | None
    high: float | None
    samples: int
    documents: int


@dataclass(frozen=True)
class Comparison:
    """One method against dense attention, on so many independent documents.

    ``difference`` is the mean loss over dense, in nats per token or as the share of answers lost, with its bootstrap
    interval; ``margin`` the loss that counts as none; ``detectable`` the smallest difference that so many documents
    show in 80 of 100 cases. ``p_difference`` is of a difference either way, ``p_margin`` of a loss below the margin,
    one-sided; None where there is too little to test. ``needed`` and ``needed_within`` are the documents below which
    neither can be shown.
    """

    documents: int
    difference: float
    low: float | None
    high: float | None
    margin: float
    detectable: float | None
    p_difference: float | None
    p_margin: float | None
    needed: int
    needed_within: int
    dense_fails: bool = False

    @property
    def verdict(self) -> str:
        """What the corrected tests say, in words."""
        if self.dense_fails:
            return DENSE_FAILS
        if self.p_difference is None:
            return "too few documents"
        within = self.p_margin is not None and self.p_margin <= SIGNIFICANCE
        if self.p_difference <= SIGNIFICANCE:
            if self.difference < 0:
                return "better"
            return "worse, yet within the margin" if within else "worse"
        return "non-inferior" if within else "undecided"


def paired_difference(
    values: Numbers, reference: Numbers, seed: int = 0, documents: Sequence[Hashable] | None = None
) -> PairedDifference:
    """The difference ``values - reference`` over the same samples in the same order.

    Samples of one document resemble each other, so whole documents are resampled; None where each is one of its own.
    Raises ValueError for sequences that differ in length or are empty.
    """
    sums, counts = _by_document(values, reference, documents)
    mean, samples, found = float(sums.sum() / counts.sum()), int(counts.sum()), len(sums)
    if found < MIN_SAMPLES:
        return PairedDifference(mean, None, None, samples, found)
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile"}
    options |= {"paired": True, "vectorized": True, "rng": np.random.default_rng(seed)}
    low, high = stats.bootstrap(
        (sums, counts), lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis), **options
    ).confidence_interval
    return PairedDifference(mean, float(low), float(high), samples, found)


def compare(
    values: Numbers,
    reference: Numbers,
    documents: Sequence[Hashable],
    margin: float,
    answers: bool = False,
    dense_fails: bool = False,
    family: int = 1,
) -> Comparison:
    """Compares a method's losses with dense attention's (``reference``) on the same samples; p-values are uncorrected.

    ``documents`` are those of each sample, ``answers`` says whether losses are 1 − score, and ``family`` is how many
    comparisons are corrected together.
    """
    found = paired_difference(values, reference, documents=documents)
    sums, counts = _by_document(values, reference, documents)
    means = sums / counts
    # McNemar's and the binomial test take samples for independent, which those of one document are not.
    right_or_wrong = answers and len(means) == len(values) and bool(np.isin([*values, *reference], (0.0, 1.0)).all())
    p_difference = p_margin = None
    if len(means) >= MIN_SAMPLES:
        p_difference = mcnemar(values, reference) if right_or_wrong else sign_flips(means)
        p_margin = losses_within(means, margin) if answers else mean_within(means, margin)
    detectable = smallest_detectable(means, right_or_wrong, family)
    needed = documents_for_difference(family), documents_for_margin(margin, answers, family)
    difference = (found.documents, found.mean, found.low, found.high)
    return Comparison(*difference, margin, detectable, p_difference, p_margin, *needed, dense_fails)


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values after Holm's correction, of each of the two questions, over all with a verdict.

    One whose margin could not be tested counts as if its p were 1, since it was asked.
    """
    judged = [i for i, c in enumerate(comparisons) if not c.dense_fails and c.p_difference is not None]
    differences = holm([comparisons[i].p_difference or 0.0 for i in judged])
    margins = holm([1.0 if (p := comparisons[i].p_margin) is None else p for i in judged])
    result = list(comparisons)
    for i, difference, margin in zip(judged, differences, margins, strict=True):
        result[i] = replace(result[i], p_difference=difference, p_margin=None if result[i].p_margin is None else margin)
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979)."""
    order, count = np.argsort(p_values, kind="stable"), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(count, 0, -1) * np.asarray(p_values)[order]))
    return list(map(float, adjusted))


def mcnemar(values: Numbers, reference: Numbers) -> float:
    """p of McNemar's exact test: among samples on which the two differ, each is as often the wrong one."""
    signs = np.sign(np.asarray(values) - np.asarray(reference))
    differ = int(np.abs(signs).sum())
    return float(stats.binomtest(int((signs > 0).sum()), differ).pvalue) if differ else 1.0


def sign_flips(means: Numbers) -> float:
    """p of the permutation test that flips the sign of each document's difference, two-sided.

    All flips are counted, by the distribution of their sum: the differences are rounded to one part in 131,072 of the
    sum of all of them, which leaves the test exact, and p as small as the documents allow.
    """
    sizes = np.abs(np.asarray(means, dtype=np.float64))
    if not np.any(sizes > 1e-12):
        return 1.0
    steps = np.rint(np.asarray(means) * (_STEPS / sizes.sum())).astype(np.int64)
    # The sum of all flips is the sum of all sizes, less twice that of those which count as negative.
    negative = np.ones(1)
    for size in np.abs(steps):
        negative = 0.5 * (np.pad(negative, (0, size)) + np.pad(negative, (size, 0)))
    total = int(np.abs(steps).sum())
    flipped = total - 2 * np.arange(total + 1)
    return float(min(1.0, negative[np.abs(flipped) >= abs(int(steps.sum()))].sum()))


def losses_within(means: Numbers, margin: float) -> float:
    """p of the hypothesis that answers lose ``margin`` or more on average, from each document's loss in [-1, 1].

    What was won counts as nothing lost. Answers that are right or wrong are then lost by a binomial chance of at least
    the margin (Clopper and Pearson, Biometrika 26, 1934); of partial scores the bound is Hoeffding's (JASA 58, 1963,
    theorem 1).
    """
    lost = np.clip(np.asarray(means, dtype=np.float64), 0.0, 1.0)
    if np.all(np.isin(means, (-1.0, 0.0, 1.0))):
        return float(stats.binom.cdf(int(lost.sum()), len(lost), margin))
    mean = float(lost.mean())
    if mean >= margin:
        return 1.0
    divergence = special.rel_entr(mean, margin) + special.rel_entr(1 - mean, 1 - margin)
    return float(np.exp(-len(lost) * divergence))


def mean_within(means: Numbers, margin: float) -> float | None:
    """p of the hypothesis that the mean loss is ``margin`` or more, from each document's loss, which has no bound.

    The larger one-sided p of the t-test and of Johnson's (JASA 73, 1978), corrected for skewness: a few documents with
    large losses, of which none or few were drawn, deceive the first. None below ``MARGIN_DOCUMENTS``.
    """
    count = len(means)
    if count < MARGIN_DOCUMENTS:
        return None
    mean, deviation = float(np.mean(means)), float(np.std(means, ddof=1))
    excess = mean - margin
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return 0.0 if excess < 0 else 1.0
    third = float(np.mean((np.asarray(means) - mean) ** 3))
    skewed = third / (6 * count * deviation**2) + third * excess**2 / (3 * deviation**4)
    statistic = max(excess, excess + skewed) * math.sqrt(count) / deviation
    return float(stats.t.cdf(statistic, count - 1))


def documents_for_difference(family: int = 1) -> int:
    """Documents of which all must differ the same way for the first of a family to be significant: 2 · ½^n ≤ 0.05/m."""
    return math.ceil(1 + math.log2(max(1, family) / SIGNIFICANCE))


def documents_for_margin(margin: float, answers: bool, family: int = 1) -> int:
    """Documents that can show a loss within the margin to the first of a family, when nothing is lost.

    Answers need (1 − margin)^n ≤ 0.05/m: 59 for five points, alone.
    """
    if not answers:
        return MARGIN_DOCUMENTS
    return math.ceil(math.log(SIGNIFICANCE / max(1, family)) / math.log1p(-margin)) if 0 < margin < 1 else 1


def smallest_detectable(means: Numbers, right_or_wrong: bool = False, family: int = 1) -> float | None:
    """The smallest difference that so many documents show as the first of a family, with a power of ``POWER``.

    Of answers the share lost that McNemar's test finds when none are won, else that of a paired two-sided t-test with
    the spread that was found; None where no difference, however large, reaches significance.
    """
    count, fewest = len(means), documents_for_difference(family)
    if count < fewest:
        return None
    if right_or_wrong:
        return float(optimize.brentq(lambda share: stats.binom.sf(fewest - 1, count, share) - POWER, 0.0, 1.0))
    deviation = float(np.std(means, ddof=1))
    quantiles = stats.t.ppf([1 - SIGNIFICANCE / 2 / max(1, family), POWER], count - 1).sum()
    return float(quantiles * deviation / math.sqrt(count))


def effective_length(ratios: dict[int, float], within: float) -> int | None:
    """The longest length up to which a method's loss, as a share of dense attention's quality, is within a margin."""
    return max(itertools.takewhile(lambda length: ratios[length] <= within, sorted(ratios)), default=None)


def _by_document(
    values: Numbers, reference: Numbers, documents: Sequence[Hashable] | None = None
) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]:
    """The sum of differences and the number of samples of each document, float64 ``[documents]`` both."""
    owners = list(range(len(values)) if documents is None else documents)
    if not len(values) == len(reference) == len(owners) or not len(values):
        counts = f"{len(values)}, {len(reference)} and {len(owners)}"
        raise ValueError(f"pairs need the same samples, at least one: got {counts}")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    rows, _ = pd.factorize(np.array(owners, dtype=object))
    return np.bincount(rows, differences), np.bincount(rows).astype(np.float64)

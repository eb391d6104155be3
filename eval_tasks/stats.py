"""Each method against dense attention on the same samples: intervals, tests, a margin, and what could be detected.

A difference that is not significant proves nothing. So a method is “as good” only when the data exclude a loss of
more than a stated margin. Of many comparisons, all of this is at the level that Holm's procedure asks of the first.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special, stats

RESAMPLES, CONFIDENCE, SIGNIFICANCE, POWER = 10_000, 0.95, 0.05, 0.8
# Fewer documents say nothing about the spread; of unbounded losses, too little about their tail to test the margin.
MIN_SAMPLES, MARGIN_DOCUMENTS = 2, 20
DENSE_FAILS = "dense fails"
# Steps into which the sum of all differences is divided for the exact distribution of its flips.
_STEPS = 1 << 17

Numbers = Sequence[float] | np.ndarray


def paired_difference(values: Numbers, reference: Numbers, seed: int = 0) -> tuple[float, float, float]:
    """The mean of ``values - reference``, one of each document, and its bootstrap interval, NaN below two documents."""
    differences, interval = np.subtract(values, reference, dtype=np.float64), (math.nan, math.nan)
    if len(differences) >= MIN_SAMPLES:
        options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile", "rng": seed}
        interval = stats.bootstrap((differences,), np.mean, vectorized=True, **options).confidence_interval
    return float(differences.mean()), float(interval[0]), float(interval[1])


def compare(
    values: Numbers, reference: Numbers, margin: float, answers: bool = False, family: int = 1
) -> dict[str, float]:
    """Compares a method's losses with dense attention's (``reference``), one of each document; p is uncorrected.

    ``answers`` says whether losses are 1 − score; ``family`` is how many comparisons are corrected together.

    ``difference`` is the mean loss over dense, in nats per token or as the share of answers lost, ``margin`` the loss
    that counts as none, ``detectable`` as in ``smallest_detectable``. ``p_difference`` is of a difference either way,
    ``p_margin`` of a loss below the margin, one-sided; NaN where there is too little to test. ``needed`` and
    ``needed_within`` are the documents below which neither can be shown.
    """
    difference, low, high = paired_difference(values, reference)
    losses = np.subtract(values, reference)
    right_or_wrong = answers and bool(np.isin([*values, *reference], (0.0, 1.0)).all())
    p_difference = p_margin = math.nan
    if len(losses) >= MIN_SAMPLES:
        p_difference = mcnemar(losses) if right_or_wrong else sign_flips(losses)
        p_margin = losses_within(losses, margin) if answers else mean_within(losses, margin)
    return {
        "documents": len(losses),
        "difference": difference,
        "low": low,
        "high": high,
        "margin": margin,
        "detectable": smallest_detectable(losses, right_or_wrong, family),
        "p_difference": p_difference,
        "p_margin": p_margin,
        "needed": documents_for_difference(family),
        "needed_within": documents_for_margin(margin, answers, family),
    }


def corrected(compared: pd.DataFrame) -> pd.DataFrame:
    """Comparisons with the p-values of each question after Holm's correction, and the ``verdict`` in words.

    Lines with ``dense_fails``, or too few documents, have no verdict and do not count. A margin that could not be
    tested counts, since it was asked.
    """
    table, judged = compared.copy(), ~compared["dense_fails"] & compared["p_difference"].notna()
    for name in ("p_difference", "p_margin"):
        table.loc[judged, name] = holm(table.loc[judged, name].to_numpy())
    shown, within = table["p_difference"] <= SIGNIFICANCE, table["p_margin"] <= SIGNIFICANCE
    verdicts = {
        DENSE_FAILS: table["dense_fails"],
        "too few samples": table["p_difference"].isna(),
        "better": shown & (table["difference"] < 0),
        "slightly worse": shown & within,
        "worse": shown,
        "as good": within,
    }
    return table.assign(verdict=np.select([*verdicts.values()], [*verdicts], "undecided"))


def holm(p_values: Numbers) -> np.ndarray:
    """p-values adjusted by Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979).

    NaN is sorted last and stays, and counts as one of them.
    """
    order, count = np.argsort(p_values, kind="stable"), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(count, 0, -1) * np.asarray(p_values)[order]))
    return adjusted


def mcnemar(losses: Numbers) -> float:
    """p of McNemar's exact test: among samples on which the two differ, each is as often the wrong one."""
    lost, differ = int(np.sum(np.greater(losses, 0))), int(np.count_nonzero(losses))
    return float(stats.binomtest(lost, differ).pvalue) if differ else 1.0


def sign_flips(losses: Numbers) -> float:
    """p of the permutation test that flips the sign of each document's difference, two-sided.

    All flips are counted, by the distribution of their sum: the differences are rounded to one part in 131,072 of the
    sum of all of them, which leaves the test exact, and p as small as the documents allow.
    """
    sizes = np.abs(np.asarray(losses, dtype=np.float64))
    if not np.any(sizes > 1e-12):
        return 1.0
    steps = np.rint(np.asarray(losses) * (_STEPS / sizes.sum())).astype(np.int64)
    # The sum of all flips is the sum of all sizes, less twice that of those which count as negative.
    negative = np.ones(1)
    for size in np.abs(steps):
        negative = 0.5 * (np.pad(negative, (0, size)) + np.pad(negative, (size, 0)))
    total = int(np.abs(steps).sum())
    flipped = total - 2 * np.arange(total + 1)
    return float(min(1.0, negative[np.abs(flipped) >= abs(int(steps.sum()))].sum()))


def losses_within(losses: Numbers, margin: float) -> float:
    """p of the hypothesis that answers lose ``margin`` or more on average, from each document's loss in [-1, 1].

    What was won counts as nothing lost. Answers that are right or wrong are then lost by a binomial chance of at least
    the margin (Clopper and Pearson, Biometrika 26, 1934); of partial scores the bound is Hoeffding's (JASA 58, 1963,
    theorem 1).
    """
    lost = np.clip(np.asarray(losses, dtype=np.float64), 0.0, 1.0)
    if np.all(np.isin(losses, (-1.0, 0.0, 1.0))):
        return float(stats.binom.cdf(int(lost.sum()), len(lost), margin))
    mean = float(lost.mean())
    if mean >= margin:
        return 1.0
    divergence = special.rel_entr(mean, margin) + special.rel_entr(1 - mean, 1 - margin)
    return float(np.exp(-len(lost) * divergence))


def mean_within(losses: Numbers, margin: float) -> float:
    """p of the hypothesis that the mean loss is ``margin`` or more, from each document's loss, which has no bound.

    The larger one-sided p of the t-test and of Johnson's (JASA 73, 1978), corrected for skewness: a few documents with
    large losses, of which none or few were drawn, deceive the first. NaN below ``MARGIN_DOCUMENTS``.
    """
    count = len(losses)
    if count < MARGIN_DOCUMENTS:
        return math.nan
    mean, deviation = float(np.mean(losses)), float(np.std(losses, ddof=1))
    excess = mean - margin
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return 0.0 if excess < 0 else 1.0
    third = float(np.mean((np.asarray(losses) - mean) ** 3))
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


def smallest_detectable(losses: Numbers, right_or_wrong: bool = False, family: int = 1) -> float:
    """The smallest difference that so many documents show as the first of a family, with a power of ``POWER``.

    Of answers the share lost that McNemar's test finds when none are won, else that of a paired two-sided t-test with
    the spread that was found; NaN where no difference, however large, reaches significance.
    """
    count, fewest = len(losses), documents_for_difference(family)
    if count < fewest:
        return math.nan
    if right_or_wrong:  # the share at which the binomial chance of so many lost answers is POWER
        return float(stats.beta.ppf(POWER, fewest, count - fewest + 1))
    deviation = float(np.std(losses, ddof=1))
    quantiles = stats.t.ppf([1 - SIGNIFICANCE / 2 / max(1, family), POWER], count - 1).sum()
    return float(quantiles * deviation / math.sqrt(count))

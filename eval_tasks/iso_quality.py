"""The budget that quality needs: the smallest k that stays within a margin of dense, by length, and the law it follows.

For each length the smallest k is read off the measured budgets, between which log k is interpolated; then
log k = log α + C·log n is fitted, beside the constant and the logarithmic law of one parameter. Laws are compared by
how well each predicts a length that it was not fitted to. Documents are resampled through all of these steps.

A budget is known only where one measured budget is outside the margin and a larger one within. Elsewhere it is
censored: at most the smallest measured one, or more than the largest. Lengths where it is censored bound the law but
do not enter the fit, and in resamples it is taken for anything between those bounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval_tasks.bootstrap import CONFIDENCE, MIN_SAMPLES, RESAMPLES

# Fewer lengths than this leave no point to check a fitted line by.
_LENGTHS_NEEDED = 3


@dataclass(frozen=True)
class NeededBudget:
    """The smallest budget within the margin at one length.

    Attributes:
        length: of the context.
        keys: the budget; None where no measured one is within the margin.
        low, high: bootstrap interval; None below two documents. In resamples where the smallest measured budget is
            within the margin, one key may do, and where none is, all keys may be needed.
        reached: the share of resamples in which some measured budget is within the margin; None below two documents.
        at_most: whether the smallest measured budget already is within it, so that ``keys`` is an upper bound.
        largest: the largest measured budget, which is not enough where ``keys`` is None.
    """

    length: int
    keys: float | None
    low: float | None
    high: float | None
    reached: float | None
    at_most: bool
    largest: int = 0

    @property
    def censored(self) -> bool:
        """Whether the budget is only bounded, on one side, by those that were measured."""
        return self.keys is None or self.at_most


@dataclass(frozen=True)
class FittedLaw:
    """The power law through the needed budgets, and how it and its rivals predict lengths left out.

    Attributes:
        alpha, C: of k = α·n^C.
        alpha_interval, C_interval: bootstrap intervals; None below two documents. Resamples with a censored budget
            count with the smallest value that its bounds allow for the low end, and the largest for the high one.
        lengths: how many lengths it rests on.
        errors: name of a law → typical factor by which it misses a length that was left out; 1 is perfect.
        fitted: the share of resamples in which no budget of these lengths was censored.
    """

    alpha: float
    C: float
    alpha_interval: tuple[float, float] | None
    C_interval: tuple[float, float] | None
    lengths: int
    errors: dict[str, float]
    fitted: float


@dataclass(frozen=True)
class IsoQuality:
    """What one method needs on one task.

    Attributes:
        task, method: which.
        within: the margin on the loss, in nats per token (or the share of answers).
        documents: how many are shared by all lengths and budgets.
        needed: by length.
        law: None where the needed budget is known at fewer than three lengths.
    """

    task: str
    method: str
    within: float
    documents: int
    needed: tuple[NeededBudget, ...]
    law: FittedLaw | None


def iso_quality(
    task: str, method: str, differences: Mapping[int, Mapping[int, Sequence[float]]], within: float, seed: int = 0
) -> IsoQuality:
    """Finds the needed budgets and fits the laws.

    Args:
        task, method: names for the result.
        differences: length → budget → loss over dense of each document, the same documents in the same order
            throughout.
        within: how much loss counts as none.
        seed: of the resampling.

    Raises:
        ValueError: the documents differ in number, or there are none.
    """
    counts = {len(values) for budgets in differences.values() for values in budgets.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every length and budget needs the same documents, at least one; got {sorted(counts)}")
    documents = counts.pop()
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), RESAMPLES) / documents
    lengths = sorted(differences)
    point, resampled, lowest, highest = [], [], [], []
    for length in lengths:
        budgets = sorted(differences[length])
        losses = np.array([differences[length][k] for k in budgets], dtype=np.float64)
        point.append(float(_smallest(budgets, losses.mean(axis=1)[:, None], within)[0]))
        sample = _smallest(budgets, losses @ drawn.T, within)
        resampled.append(sample)
        # What may be needed at least and at most: one key, and all of them, beyond what was measured.
        lowest.append(np.where(np.isnan(sample), budgets[-1], np.where(sample == budgets[0], 1.0, sample)))
        highest.append(np.where(np.isnan(sample), max(length, budgets[-1]), sample))
    needed = [
        _needed(length, keys, sample, low, high, sorted(differences[length]), documents)
        for length, keys, sample, low, high in zip(lengths, point, resampled, lowest, highest, strict=True)
    ]
    known = np.array([not n.censored for n in needed])
    n, k = np.array(lengths, dtype=np.float64)[known], np.array(point)[known]
    law = _fit(n, k, np.array(lowest)[known], np.array(highest)[known], documents)
    return IsoQuality(task, method, within, documents, tuple(needed), law)


def _smallest(budgets: Sequence[int], losses: np.ndarray, within: float) -> np.ndarray:
    """The smallest budget from which on all are within the margin; losses ``[budgets, R]`` → ``[R]``, NaN for none."""
    inside = losses <= within
    # The first budget from which on every larger one is inside.
    first = len(budgets) - np.logical_and.accumulate(inside[::-1], axis=0).sum(axis=0)
    keys = np.full(losses.shape[1], np.nan)
    logs = np.log(np.array(budgets, dtype=np.float64))
    columns = np.arange(losses.shape[1])
    at_first = first == 0
    keys[at_first] = budgets[0]
    between = (first > 0) & (first < len(budgets))
    above, below = first[between], first[between] - 1
    high, low = losses[below, columns[between]], losses[above, columns[between]]
    share = (high - within) / (high - low)
    keys[between] = np.exp(logs[below] + share * (logs[above] - logs[below]))
    return keys


def _needed(
    length: int,
    keys: float,
    resampled: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    budgets: Sequence[int],
    documents: int,
) -> NeededBudget:
    low = high = reached = None
    if documents >= MIN_SAMPLES:
        reached = float(np.mean(~np.isnan(resampled)))
        low, high = _interval(lowest, highest)
    found = None if math.isnan(keys) else keys
    return NeededBudget(length, found, low, high, reached, keys == budgets[0], budgets[-1])


def _fit(n: np.ndarray, k: np.ndarray, lowest: np.ndarray, highest: np.ndarray, documents: int) -> FittedLaw | None:
    """The law through the budgets ``k [L]`` at lengths ``n [L]``; of resamples the bounds ``[L, R]`` of them."""
    if len(n) < _LENGTHS_NEEDED:
        return None
    line = stats.linregress(np.log(n), np.log(k))
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    if documents >= MIN_SAMPLES:
        intercepts, slopes = _bounds(np.log(n), np.log(lowest), np.log(highest))
        intervals = (_interval(*(np.exp(bound) for bound in intercepts)), _interval(*slopes))
    fitted = float(np.mean((lowest == highest).all(axis=0)))
    return FittedLaw(
        float(np.exp(line.intercept)), float(line.slope), *intervals, len(n), _errors(n, k), fitted
    )  # fmt: skip


def _bounds(
    x: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The least and the greatest intercept and slope of lines fitted at ``x`` to anything between ``low`` and ``high``.

    Both are sums of the values with fixed weights, so each is extreme where every value is at one of its ends.
    """
    slope_weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    weights = (1 / len(x) - x.mean() * slope_weights, slope_weights)
    intercept, slope = (
        (np.maximum(w, 0) @ low + np.minimum(w, 0) @ high, np.maximum(w, 0) @ high + np.minimum(w, 0) @ low)
        for w in weights
    )
    return intercept, slope


def _errors(n: np.ndarray, k: np.ndarray) -> dict[str, float]:
    """Root mean square, as a factor, of the error in log k at each length, predicted from the others."""
    missed: dict[str, list[float]] = {"constant": [], "logarithmic": [], "power": []}
    logs, log_n = np.log(k), np.log(n)
    for left_out in range(len(n)):
        rest = np.arange(len(n)) != left_out
        line = stats.linregress(log_n[rest], logs[rest])
        missed["constant"].append(logs[rest].mean() - logs[left_out])
        missed["logarithmic"].append((logs - np.log(log_n))[rest].mean() + np.log(log_n[left_out]) - logs[left_out])
        missed["power"].append(line.intercept + line.slope * log_n[left_out] - logs[left_out])
    return {law: float(np.exp(np.sqrt(np.mean(np.square(errors))))) for law, errors in missed.items()}


def _interval(lowest: np.ndarray, highest: np.ndarray) -> tuple[float, float]:
    """The interval of values of which each is known to lie between two bounds."""
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(lowest, tail)), float(np.quantile(highest, 1 - tail))

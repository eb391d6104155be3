"""The budget that quality needs: the smallest k that stays within a margin of dense, by length, and the law it follows.

For each length the smallest k is read off the measured budgets, between which log k is interpolated; then
log k = log α + C·log n is fitted, beside the constant and the logarithmic law of one parameter. Laws are compared by
how well each predicts a length that it was not fitted to. Documents are resampled through all of these steps.
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
        low, high: bootstrap interval, over the resamples in which there is one; None below two documents.
        reached: the share of resamples in which some measured budget is within the margin; None below two documents.
        at_most: whether the smallest measured budget already is within it, so that ``keys`` is an upper bound.
    """

    length: int
    keys: float | None
    low: float | None
    high: float | None
    reached: float | None
    at_most: bool


@dataclass(frozen=True)
class FittedLaw:
    """The power law through the needed budgets, and how it and its rivals predict lengths left out.

    Attributes:
        alpha, C: of k = α·n^C.
        alpha_interval, C_interval: bootstrap intervals; None where fewer than half of the resamples could be fitted.
        lengths: how many lengths it rests on.
        errors: name of a law → typical factor by which it misses a length that was left out; 1 is perfect.
        fitted: the share of resamples that could be fitted.
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
        law: None where fewer than three lengths have a needed budget.
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
    point, resampled = [], []
    for length in lengths:
        budgets = sorted(differences[length])
        losses = np.array([differences[length][k] for k in budgets], dtype=np.float64)
        point.append(float(_smallest(budgets, losses.mean(axis=1)[:, None], within)[0]))
        resampled.append(_smallest(budgets, losses @ drawn.T, within))
    needed = [
        _needed(length, keys, sample, min(differences[length]), documents)
        for length, keys, sample in zip(lengths, point, resampled, strict=True)
    ]
    law = _fit(np.array(lengths, dtype=np.float64), np.array(point), np.array(resampled), documents)
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


def _needed(length: int, keys: float, resampled: np.ndarray, smallest: int, documents: int) -> NeededBudget:
    found = resampled[~np.isnan(resampled)]
    low = high = reached = None
    if documents >= MIN_SAMPLES:
        reached = len(found) / len(resampled)
        if len(found):
            low, high = _interval(found)
    return NeededBudget(length, None if math.isnan(keys) else keys, low, high, reached, keys == smallest)


def _fit(lengths: np.ndarray, keys: np.ndarray, resampled: np.ndarray, documents: int) -> FittedLaw | None:
    usable = ~np.isnan(keys)
    if usable.sum() < _LENGTHS_NEEDED:
        return None
    n, k = lengths[usable], keys[usable]
    line = stats.linregress(np.log(n), np.log(k))
    whole = resampled[usable]
    whole = whole[:, ~np.isnan(whole).any(axis=0)]
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    if documents >= MIN_SAMPLES and 2 * whole.shape[1] >= resampled.shape[1]:
        slopes, intercepts = np.polyfit(np.log(n), np.log(whole), 1)
        intervals = (_interval(np.exp(intercepts)), _interval(slopes))
    return FittedLaw(
        float(np.exp(line.intercept)), float(line.slope), *intervals, len(n), _errors(n, k),
        whole.shape[1] / resampled.shape[1],
    )  # fmt: skip


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


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)

"""The budget that quality needs: the smallest k that stays within a margin of dense, by length, and the law it follows.

For each length the smallest k is interpolated in log k between measured budgets; then log k = log α + C·log n is
fitted, and laws are compared by how well each predicts a length that it was not fitted to. Documents are resampled
through all of these steps. A budget is known where one measured budget is outside the margin and a larger one within.
Elsewhere it is censored: such lengths do not enter the fit, and in resamples it is taken for anything in its bounds.
"""

import math

import numpy as np
import pandas as pd

from eval_tasks.stats import CONFIDENCE, MIN_SAMPLES, RESAMPLES

LAWS = ("constant", "logarithmic", "power")
# Fewer lengths than this leave no point to check a fitted line by.
_LENGTHS_NEEDED = 3


def iso_quality(losses: pd.DataFrame, within: float, seed: int = 0) -> pd.DataFrame:
    """Finds the needed budgets and fits the laws.

    ``losses`` are those over dense of each document, a row each, by columns (length, budget). ``within``: how much loss
    counts as none, in nats per token or as a share of the answers.

    Returns a line for each length: ``keys``, missing where no measured budget is within the margin, their bootstrap
    interval ``low`` to ``high`` (one key or all keys where a resample is censored), ``reached``, the share of resamples
    in which some budget is within it, ``at_most``, whether the smallest already is, the ``largest`` measured one, and
    the ``documents``. On every line stand the law through all lengths, ``alpha`` and ``C`` with its interval ``C_low``
    to ``C_high``, and by the name of each law in ``LAWS`` the typical factor by which it misses a length that was left
    out; NaN where fewer than three lengths are known. Intervals of one document are NaN.
    """
    documents = len(losses)
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), RESAMPLES) / documents
    rows, lowest, highest = [], [], []
    for length in sorted(set(losses.columns.get_level_values(0))):
        own = losses[length].sort_index(axis=1)
        budgets, values = own.columns.to_numpy(), own.to_numpy(float).T
        keys = float(_smallest(budgets, values.mean(axis=1)[:, None], within)[0])
        sample = _smallest(budgets, values @ drawn.T, within)
        # What may be needed at least and at most: one key, and all of them, beyond what was measured.
        lowest.append(np.where(np.isnan(sample), budgets[-1], np.where(sample == budgets[0], 1.0, sample)))
        highest.append(np.where(np.isnan(sample), max(length, budgets[-1]), sample))
        spread = [math.nan] * 3
        if documents >= MIN_SAMPLES:
            spread = [*_interval(lowest[-1], highest[-1]), float(np.mean(~np.isnan(sample)))]
        rows.append([length, keys, *spread, keys == budgets[0], budgets[-1]])
    needed = pd.DataFrame(rows, columns=["length", "keys", "low", "high", "reached", "at_most", "largest"])
    known = (needed["keys"].notna() & ~needed["at_most"].astype(bool)).to_numpy()
    law = dict.fromkeys(("alpha", "C", "C_low", "C_high", *LAWS), math.nan)
    if known.sum() >= _LENGTHS_NEEDED:
        log_n, log_k = np.log(needed.loc[known, ["length", "keys"]].to_numpy(float)).T
        C, intercept = np.polyfit(log_n, log_k, 1)
        law |= {"alpha": float(np.exp(intercept)), "C": float(C), **_errors(log_n, log_k)}
        if documents >= MIN_SAMPLES:
            # A slope is a sum of the values with fixed weights, so it is extreme where each is at one of its ends.
            weights = (log_n - log_n.mean()) / ((log_n - log_n.mean()) ** 2).sum()
            rising, falling = np.maximum(weights, 0), np.minimum(weights, 0)
            low, high = np.log(np.array(lowest)[known]), np.log(np.array(highest)[known])
            law["C_low"], law["C_high"] = _interval(rising @ low + falling @ high, rising @ high + falling @ low)
    return needed.assign(documents=documents, **law)


def _smallest(budgets: np.ndarray, losses: np.ndarray, within: float) -> np.ndarray:
    """The smallest budget from which on all are within the margin; losses ``[budgets, R]`` → ``[R]``, NaN for none."""
    inside = losses <= within
    # The first budget from which on every larger one is inside.
    first = len(budgets) - np.logical_and.accumulate(inside[::-1], axis=0).sum(axis=0)
    keys = np.full(losses.shape[1], np.nan)
    keys[first == 0] = budgets[0]
    between = np.flatnonzero((first > 0) & (first < len(budgets)))
    above, below = first[between], first[between] - 1
    high, low = losses[below, between], losses[above, between]
    logs = np.log(budgets.astype(float))
    keys[between] = np.exp(logs[below] + (high - within) / (high - low) * (logs[above] - logs[below]))
    return keys


def _errors(log_n: np.ndarray, log_k: np.ndarray) -> dict[str, float]:
    """Root mean square, as a factor, of the error in log k at each length, predicted from the others."""
    foretold = []
    for left_out in range(len(log_n)):
        rest = np.arange(len(log_n)) != left_out
        power = np.polyval(np.polyfit(log_n[rest], log_k[rest], 1), log_n[left_out])
        logarithmic = (log_k - np.log(log_n))[rest].mean() + np.log(log_n[left_out])
        foretold.append((log_k[rest].mean(), logarithmic, power))
    missed = np.exp(np.sqrt(np.square(np.array(foretold) - log_k[:, None]).mean(axis=0)))
    return dict(zip(LAWS, missed.tolist(), strict=True))


def _interval(lowest: np.ndarray, highest: np.ndarray) -> tuple[float, float]:
    """The interval of values of which each is known to lie between two bounds."""
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(lowest, tail)), float(np.quantile(highest, 1 - tail))

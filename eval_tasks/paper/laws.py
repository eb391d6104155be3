"""The budget laws that are compared, and the statistics of a comparison.

Losses come as a frame with a row for each query, length ``n`` and ``law``, and one column for each loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from eval_tasks.methods import bracket, log_budgets
from eval_tasks.stats import CONFIDENCE, paired_difference
from nc_patch.budget import budgets


@dataclass(frozen=True)
class Law:
    """One budget law: ``alpha * n**C``, of kind ``"log"`` ``alpha * log2(n)``; no key where alpha is 0."""

    name: str
    alpha: float
    C: float
    kind: Literal["power", "log"] = "power"

    def budgets(self, n: np.ndarray) -> np.ndarray:
        """Keys that queries attend which see ``n``, int64."""
        if self.alpha == 0:
            return np.zeros_like(n)
        return log_budgets(n, self.alpha) if self.kind == "log" else budgets(n, self.alpha, self.C)

    def mean(self, lengths: Sequence[int] | int) -> float:
        """The mean budget of queries that see so many keys."""
        return float(self.budgets(np.array(lengths)).mean())

    def largest(self, keys: int, lengths: Sequence[int] | int) -> "Law":
        """The same law with the largest alpha whose mean budget is at most ``keys``."""
        alpha, _ = bracket(lambda alpha: replace(self, alpha=alpha).mean(lengths) <= keys, float(keys))
        return replace(self, alpha=alpha)


def equal_at(keys: int, length: int) -> list[Law]:
    """Laws that all give ``keys`` at ``length``: fixed, logarithmic, and α·n^C for C = 0.25, 0.5, 0.75 and 1."""
    growing = [Law("log n", 1.0, 0.0, "log"), *(Law(f"n^{C:g}", 1.0, C) for C in (0.25, 0.5, 0.75, 1.0))]
    return [Law("fixed", float(keys), 0.0), *(law.largest(keys, length) for law in growing)]


def equal_in_mean(keys: int, lengths: Sequence[int]) -> list[Law]:
    """α·n^C for C = 0 (the fixed budget), 0.1 … 1, of the largest α whose mean budget is at most ``keys``."""
    first, *growing = (Law(f"n^{step / 10:g}, mean {keys}", float(keys), step / 10) for step in range(11))
    return [first, *(law.largest(keys, lengths) for law in growing)]


def compare(laws: Sequence[Law], losses: pd.Series) -> list[dict[str, Any]]:
    """The mean loss of each law of ``equal_in_mean`` over all queries, and its difference from the first's.

    ``losses`` has an index of law and n, and of what else tells queries apart: first their document. All documents have
    as many queries, and documents are resampled.
    """
    document = next(name for name in losses.index.names if name not in ("law", "n"))
    documents, by_length = (losses.groupby(["law", level]).mean() for level in (document, "n"))
    found = []
    for law in laws:
        difference, low, high = paired_difference(documents[law.name], documents[laws[0].name])
        row = {"C": law.C, "alpha": law.alpha, "mean_budget": law.mean(list(by_length[law.name].index))}
        row |= {"loss": float(documents[law.name].mean()), "difference": difference, "low": low, "high": high}
        found.append(row | {"by_length": by_length[law.name].tolist()})
    return found


def estimate(values: ArrayLike) -> tuple[float, float, float]:
    """The mean of two or more independent values, and its interval by Student's t at ``CONFIDENCE``."""
    found = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found)
    return float(found.mean()), float(found.mean() - half), float(found.mean() + half)


def estimates(values: pd.DataFrame, by: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group of samples ``by`` some levels of the index, with the ``estimate`` of each column."""
    groups = values.groupby(list(by), sort=False)
    return [dict(zip(by, key, strict=True)) | {name: estimate(own[name]) for name in own} for key, own in groups]


def errors(losses: pd.DataFrame, laws: Sequence[Law], by: Sequence[str]) -> list[dict[str, Any]]:
    """The ``estimates`` of the losses of some laws, each with its budget; ``by`` has n and law."""
    named = {law.name: law for law in laws}
    rows = estimates(losses[losses.index.isin(named, level="law")], by)
    return [row | {"budget": round(named[row["law"]].mean(row["n"]))} for row in rows]


def exponents(values: pd.DataFrame) -> pd.DataFrame:
    """The slope of log value against log n of each column, by all levels of the index but ``n``."""
    rest = [name for name in values.index.names if name != "n"]
    wide = np.log(values).unstack(rest)
    slopes = np.polyfit(np.log(wide.index.to_numpy(float)), wide, 1)[0]
    return pd.Series(slopes, wide.columns).unstack(0)

"""The budget laws that are compared, and the statistics of a comparison."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from eval_tasks.log_law import log_budgets
from eval_tasks.matching import not_above
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

    def budget(self, n: int) -> int:
        """The same of one query."""
        return int(self.budgets(np.array(n)))


def equal_at(keys: int, length: int) -> list[Law]:
    """Laws that all give ``keys`` at ``length``: fixed, logarithmic, and α·n^C for C = 0.25, 0.5, 0.75 and 1."""
    laws = [Law("fixed", float(keys), 0.0), Law("log n", keys / math.log2(length), 0.0, "log")]
    laws += [Law(f"n^{C:g}", keys / length**C, C) for C in (0.25, 0.5, 0.75, 1.0)]
    at = [lambda alpha, law=law: replace(law, alpha=alpha).budget(length) for law in laws]
    return [replace(law, alpha=not_above(keys, law.alpha, budget)) for law, budget in zip(laws, at, strict=True)]


def equal_in_mean(keys: int, lengths: Sequence[int]) -> list[Law]:
    """α·n^C for C = 0 (the fixed budget), 0.1 … 1, of the largest α whose mean budget is at most ``keys``.

    Raises ValueError where that is below one key, or more than the shortest length.
    """
    if not 1 <= keys <= min(lengths):
        raise ValueError(f"keys must be between 1 and the shortest length {min(lengths)}, got {keys}")
    laws = [Law(f"n^{step / 10:g}, mean {keys}", float(keys), step / 10) for step in range(11)]
    for place, law in enumerate(laws[1:], 1):
        low, high = replace(law, alpha=0.0), law
        for _ in range(60):
            middle = replace(law, alpha=(low.alpha + high.alpha) / 2)
            low, high = (low, middle) if middle.budgets(np.array(lengths)).mean() > keys else (middle, high)
        laws[place] = low
    return laws


def compare(
    laws: Sequence[Law], lengths: Sequence[int], losses: np.ndarray, documents: Sequence[Hashable] | None = None
) -> list[dict[str, Any]]:
    """The mean loss of each law of ``equal_in_mean`` over all lengths and samples, and its difference from the first's.

    ``losses`` are ``[lengths, samples, laws]``; a sample's losses are averaged over lengths. Documents are resampled,
    by default each sample as one of its own.
    """
    found = []
    for law, own in zip(laws, np.moveaxis(losses, -1, 0), strict=True):
        difference = paired_difference(own.mean(0).tolist(), losses[..., 0].mean(0).tolist(), documents=documents)
        row = {"C": law.C, "alpha": law.alpha, "mean_budget": float(law.budgets(np.array(lengths)).mean())}
        row |= {"loss": float(own.mean()), "difference": difference.mean}
        found.append(row | {"low": difference.low, "high": difference.high, "by_length": own.mean(1).tolist()})
    return found


def estimate(values: ArrayLike) -> tuple[float, float, float]:
    """The mean of two or more independent values, and its interval by Student's t at ``CONFIDENCE``."""
    found = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found)
    return float(found.mean()), float(found.mean() - half), float(found.mean() + half)


def estimates(lengths: Sequence[int], laws: Sequence[Law], losses: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each length and law, with the ``estimate`` of each loss ``[lengths, samples, laws]``."""
    return [
        {"n": n, "law": law.name, "budget": law.budget(n)} | {name: estimate(x[i, :, k]) for name, x in losses.items()}
        for i, n in enumerate(lengths)
        for k, law in enumerate(laws)
    ]


def exponents(lengths: ArrayLike, counts: np.ndarray) -> np.ndarray:
    """The slope of log count against log n of each sample: counts ``[lengths, samples]`` → ``[samples]``."""
    return np.polyfit(np.log(lengths), np.log(counts), 1)[0]


def gather(nested: Any) -> dict[str, np.ndarray]:
    """Nested lists of dicts of arrays, as one dict of arrays whose first axes are the lists."""
    if isinstance(nested, Mapping):
        return {name: np.asarray(values) for name, values in nested.items()}
    parts = [gather(part) for part in nested]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

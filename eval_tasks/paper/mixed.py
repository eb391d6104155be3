"""Adaptive against fixed budgets over queries of several context lengths, at equal mean cost."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from eval_tasks.bootstrap import paired_difference
from eval_tasks.paper.laws import Law, equal_in_mean

EXPONENTS = tuple(round(0.1 * step, 1) for step in range(11))
FIXED = 0.0


def laws_of_mean(keys: int, lengths: Sequence[int]) -> list[Law]:
    """α·n^C for each of ``EXPONENTS``, the fixed budget (C = 0) first, all with a mean of ``keys`` over ``lengths``."""
    return [equal_in_mean(keys, lengths, C) for C in EXPONENTS]


def compare(
    laws: Sequence[Law],
    lengths: Sequence[int],
    losses: Mapping[str, np.ndarray],
    documents: Sequence[Hashable] | None = None,
) -> list[dict[str, Any]]:
    """The mean loss of each law over all lengths and samples, and its difference from the fixed budget's.

    Args:
        laws: those of ``laws_of_mean``.
        lengths: each as frequent as the others.
        losses: name of a law → ``[lengths, samples]``; a sample's losses are averaged over lengths.
        documents: which document each sample is from, if not one of its own; what is resampled.

    Returns:
        A dict for each law: ``C``, ``alpha``, ``mean_budget``, ``loss``, ``difference`` from fixed with its interval
        ``low`` to ``high`` (null for fewer than two documents), and ``by_length``, the mean loss at each length.
    """
    fixed = next(law for law in laws if law.C == FIXED)
    reference = losses[fixed.name].mean(0).tolist()
    found = []
    for law in laws:
        own = losses[law.name]
        difference = paired_difference(own.mean(0).tolist(), reference, documents=documents)
        found.append(
            {
                "C": law.C,
                "alpha": law.alpha,
                "mean_budget": sum(law.budget(n) for n in lengths) / len(lengths),
                "loss": float(own.mean()),
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "by_length": own.mean(1).tolist(),
            }
        )
    return found

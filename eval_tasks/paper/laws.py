"""The budget laws that are compared: equal at one length, or equal in mean cost over several lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval_tasks.matching import Budgets, not_above
from nc_patch import sparse_attention
from nc_patch.budget import Law as Kind
from nc_patch.budget import budget_of
from nc_patch.ops.reference import AttentionResult

EXPONENTS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Law:
    """One budget law, as ``nc_patch`` evaluates it: ``budget_of(n, alpha, C, law=kind)``."""

    name: str
    alpha: float
    C: float
    kind: Kind = "power"

    def budget(self, n: int) -> int:
        """Keys that a query attends which sees n."""
        return budget_of(n, self.alpha, self.C, law=self.kind)


DENSE = Law("dense", 1.0, 1.0)


def topk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, law: Law, **options: Any
) -> AttentionResult:
    """The paper's sparse attention by ``nc_patch``: the k highest scores, no key for its place, the others dropped.

    ``options`` are more arguments of ``sparse_attention``.
    """
    result = sparse_attention(
        query, key, value, alpha=law.alpha, C=law.C, law=law.kind, sink_keys=0, recent_keys=0, tail="drop",
        return_stats=True, **options,
    )  # fmt: skip
    assert isinstance(result, AttentionResult)
    return result


def equal_at(keys: int, length: int) -> list[Law]:
    """Laws that all give ``keys`` at ``length``: fixed, logarithmic, and α·n^C for each of ``EXPONENTS``."""
    log_factor = Budgets(float(keys), 0.0, length).log_factor
    return [Law("fixed", float(keys), 0.0), Law("log n", log_factor, 0.0, "log")] + [
        Law(f"n^{C:g}", not_above(keys, keys / length**C, length, C, "power"), C) for C in EXPONENTS
    ]


def equal_in_mean(keys: int, lengths: Sequence[int], exponent: float) -> Law:
    """α·n^C of the largest α whose mean budget over ``lengths`` is at most ``keys``.

    Raises:
        ValueError: not even one key per query is that little, or the shortest length has fewer than ``keys``.
    """
    if not 1 <= keys <= min(lengths):
        raise ValueError(f"keys must be between 1 and the shortest length {min(lengths)}, got {keys}")
    low, high = 0.0, float(keys)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(budget_of(n, middle, exponent) for n in lengths) <= keys * len(lengths):
            low = middle
        else:
            high = middle
    # The upper end itself is right for C = 0, where bisection only comes near to it.
    alpha = high if sum(budget_of(n, high, exponent) for n in lengths) <= keys * len(lengths) else low
    return Law(f"n^{exponent:g}, mean {keys}", alpha, exponent)

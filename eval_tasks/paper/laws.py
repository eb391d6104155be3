"""The budget laws that are compared: equal at one length, or equal in mean cost over several lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from eval_tasks.log_law import LogConfig
from eval_tasks.matching import Budgets, not_above
from nc_patch import NCConfig
from nc_patch.budget import budget_of
from nc_patch.functional import attend
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals
from nc_patch.selections import Dense

EXPONENTS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Law:
    """One budget law: ``alpha * n**C``, or of kind ``"log"`` ``alpha * log2(n)``."""

    name: str
    alpha: float
    C: float
    kind: Literal["power", "log"] = "power"

    def budget(self, n: int) -> int:
        """Keys that a query attends which sees n."""
        return int(self.config.budget(n))

    @property
    def config(self) -> NCConfig:
        """The paper's settings with this law: no key is attended for its place, and the others are dropped."""
        kind = LogConfig if self.kind == "log" else NCConfig
        options = {"sink_keys": 0, "recent_keys": 0, "tail": "drop", "dense_below": 0}
        return kind(self.alpha, self.C, selection="topk", **options)


DENSE = Law("dense", 1.0, 1.0)


def topk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, law: Law, **options: Any
) -> AttentionResult:
    """The paper's sparse attention by ``nc_patch``: the k highest scores, no key for its place, the others dropped.

    ``options`` are ``scale`` and, where not causal, ``visible`` as in ``sparse_attention``.
    """
    (B, _, Lq, _), Lk, config = query.shape, key.shape[2], law.config
    visible = options.pop("visible", None)
    if visible is None:
        visible = causal_intervals(B, Lq, Lk, query.device)
    rows = (visible.contiguous(), visible[..., 0].contiguous(), config.row_budgets(visible, Lk))
    problem = Problem(query, key, value, *rows, stats=True, **options)
    return attend(problem, Dense() if config.is_dense() else config.prefill, config.backend)


def equal_at(keys: int, length: int) -> list[Law]:
    """Laws that all give ``keys`` at ``length``: fixed, logarithmic, and α·n^C for each of ``EXPONENTS``."""
    log_factor = Budgets(float(keys), 0.0, length).log_factor
    factor = lambda C: not_above(keys, keys / length**C, lambda alpha: budget_of(length, alpha, C))  # noqa: E731
    return [Law("fixed", float(keys), 0.0), Law("log n", log_factor, 0.0, "log")] + [
        Law(f"n^{C:g}", factor(C), C) for C in EXPONENTS
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

"""What makes budgets equal: the ways of matching, and the parameters of the laws that follow from each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval_tasks.errors import EvalError
from nc_patch.budget import budget_of, budgets
from nc_patch.calibration.profile import Profile
from nc_patch.common import ProfileError
from nc_patch.config import NCConfig
from nc_patch.ops.backends import Backend

Match = Literal["deploy", "scored", "total", "iso"]
MATCHED_BY: dict[Match, str] = {
    "deploy": "budgets are equal at {equal_at:,} tokens and then follow their own laws",
    "scored": "at every length all budgets are equal for the query that sees all of it",
    "total": "at every length all queries together may attend equally many keys under every law",
    "iso": "no budgets are equal: the smallest that keeps the quality of dense attention is sought",
}


@dataclass(frozen=True)
class Budgets:
    """The budgets of a comparison: α·n^C, and the other laws matched to it.

    With ``match="deploy"`` all methods have the same budget at ``equal_at`` tokens, at least 2; ``profile`` is the path
    of a calibrated profile. Raises EvalError for a value out of its range.
    """

    alpha: float
    C: float
    equal_at: int
    backend: Backend = "auto"
    match: Match = "deploy"
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.equal_at < 2:
            raise EvalError(f"equal_at must be a length of at least 2, got {self.equal_at}")
        try:
            NCConfig(self.alpha, self.C, backend=self.backend)
        except ValueError as error:
            raise EvalError(str(error)) from error

    @lru_cache(maxsize=256)  # noqa: B019 (budgets are small, and keep what they worked out)
    def at(self, length: int) -> "Budgets":
        """The budgets at one context length, whose laws are matched as ``match`` says."""
        return self if self.match in ("deploy", "iso") else replace(self, equal_at=length)

    @cached_property
    def laws(self) -> dict[str, tuple[float, float]]:
        """Factor and exponent of each law by its name; the factor of ``log`` is that of ``log2(n)``.

        All equal the power law for the last query of ``equal_at`` tokens; with ``match="total"`` their totals over all
        queries come nearest to its.
        """
        length, n = self.equal_at, np.arange(1, self.equal_at + 1)
        if self.match == "total":
            wanted = total_of(length, self.alpha, self.C)
            fixed = int(np.argmin(np.abs(n * length - n * (n - 1) // 2 - wanted))) + 1
            _, log = bracket(lambda factor: log_budgets(n, factor).sum() < wanted, float(length))
            _, fraction = bracket(lambda factor: total_of(length, factor, 1.0) < wanted, 1.0)
        else:
            fixed = budget_of(length, self.alpha, self.C)
            log, _ = bracket(lambda factor: log_budgets(n[-1], factor) <= fixed, fixed / math.log2(length))
            fraction, _ = bracket(lambda factor: budget_of(length, factor, 1.0) <= fixed, fixed / length)
        return {"power": (self.alpha, self.C), "fixed": (fixed, 0.0), "log": (log, 0.0), "fraction": (fraction, 1.0)}

    @cached_property
    def profile_config(self) -> NCConfig:
        """Top-k with the budgets of the profile, shared among layers and heads and matched as all others are.

        Raises EvalError where there is no profile, or it cannot be read.
        """
        if self.profile is None:
            raise EvalError("the method profile needs a calibrated profile: --profile FILE, from nc-patch calibrate")
        n, profile = self.equal_at, load_profile(self.profile)
        try:
            if self.match == "total":
                keys = total_of(n, self.alpha, self.C) / n
                shared = profile.at_budget(keys=keys, n=n, over="sequence", dense_below=0)
            else:
                shared = profile.at_budget(keys=self.laws["fixed"][0], n=n, over="last", dense_below=0)
            return shared.config(selection="topk", tail="drop", backend=self.backend, dense_below=0)
        except ProfileError as error:
            raise EvalError(f"{self.profile}: {error}") from error


@lru_cache(maxsize=4)
def load_profile(path: str) -> Profile:
    """The profile in a file; raises EvalError where it cannot be read."""
    try:
        return Profile.load(Path(path).expanduser())
    except ProfileError as error:
        raise EvalError(str(error)) from error


def total_of(length: int, alpha: float, C: float) -> int:
    """Keys that the law lets the queries of a sequence attend together, each seeing those up to itself."""
    return int(budgets(np.arange(1, length + 1), alpha, C).sum())


def bracket(below: Callable[[float], Any], high: float) -> tuple[float, float]:
    """Two factors, 2^-40 of ``high`` apart, between which ``below``, true from 0 on, ends; ``high`` twice if beyond."""
    low = high if below(high) else 0.0
    for _ in range(40 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def log_budgets(n: np.ndarray, factor: float, min_keys: int = 1) -> np.ndarray:
    """Keys of queries that see ``n`` each, ``min(n, max(min_keys, ceil(factor * log2(n))))``, int64 as ``n``."""
    raw = np.ceil(np.minimum(factor * np.log2(np.maximum(n, 1)), n)).astype(np.int64)
    return np.asarray(np.minimum(n, np.maximum(min_keys, raw)))


@dataclass(frozen=True, init=False)
class LogConfig(NCConfig):
    """Settings of attention over ``ceil(alpha * log2(n))`` keys instead of ``ceil(alpha * n**C)``; ``C`` has no use.

    Every query has the budget of the keys that it sees. Neither ``torch.compile`` nor files know this law.
    """

    def budget(self, n: int | torch.Tensor, layer: int | None = None, head: int | None = None) -> Any:
        assert isinstance(self.alpha, float)
        if isinstance(n, int):
            return int(log_budgets(np.array(n), self.alpha, self.min_keys))
        return torch.from_numpy(log_budgets(n.cpu().numpy(), self.alpha, self.min_keys)).to(n.device, torch.int32)

    def _row_budgets(self, visible: torch.Tensor, max_n: int, laws: Sequence[tuple[float, float]]) -> torch.Tensor:
        table = self.budget(torch.arange(max_n + 1)).to(visible.device)
        return table[(visible[..., 1] - visible[..., 0]).long()][:, None]

    def largest_budget(self, n: int, layer: int | None = None) -> int:
        return int(self.budget(n))

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"law": "log"}

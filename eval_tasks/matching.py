"""What makes budgets equal: the ways of matching, and the parameters of the laws that follow from each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from eval_tasks.errors import EvalError
from eval_tasks.log_law import log_budgets
from nc_patch.budget import budget_of, budgets
from nc_patch.calibration.profile import Over, Profile
from nc_patch.common import ProfileError
from nc_patch.config import Backend, NCConfig

Match = Literal["deploy", "scored", "total", "iso"]
MATCHES: tuple[Match, ...] = get_args(Match)
MATCHED_BY = {
    "deploy": "budgets are equal at {equal_at:,} tokens and then follow their own laws",
    "scored": "at every length all budgets are equal for the query that sees all of it",
    "total": "at every length all queries together may attend equally many keys under every law",
    "iso": "no budgets are equal: the smallest that keeps the quality of dense attention is sought",
}


@dataclass(frozen=True)
class Budgets:
    """The budgets of a comparison: α·n^C, and the other laws matched to it.

    With ``match="deploy"`` all methods have the same budget at ``equal_at`` tokens, at least 2. ``parameters`` are
    fixed budget, logarithmic factor and fraction in place of those that follow from it; ``profile`` is the path of a
    calibrated profile. Raises ValueError for a value out of its range.
    """

    alpha: float
    C: float
    equal_at: int
    backend: Backend = "auto"
    match: Match = "deploy"
    parameters: tuple[int, float, float] | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.equal_at < 2:
            raise ValueError(f"equal_at must be a length of at least 2, got {self.equal_at}")
        if self.match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {self.match!r}")
        NCConfig(self.alpha, self.C, backend=self.backend)

    def at(self, length: int) -> "Budgets":
        """The budgets at one context length, whose laws are matched as ``match`` says."""
        if self.match in ("deploy", "iso"):
            return self
        if self.match == "scored":
            return replace(self, equal_at=length)
        return replace(self, equal_at=length, parameters=_same_total(self.alpha, self.C, length))

    @property
    def fixed(self) -> int:
        """The budget that the fixed methods keep."""
        return self.parameters[0] if self.parameters else budget_of(self.equal_at, self.alpha, self.C)

    @property
    def log_factor(self) -> float:
        """The factor a of ``ceil(a * log2(n))``."""
        if self.parameters:
            return self.parameters[1]
        fits = lambda factor: log_budgets(np.array(self.equal_at), factor) <= self.fixed  # noqa: E731
        return bracket(fits, self.fixed / math.log2(self.equal_at))[0]

    @property
    def fraction(self) -> float:
        """The share f of ``ceil(f * n)``."""
        if self.parameters:
            return self.parameters[2]
        fits = lambda fraction: budget_of(self.equal_at, fraction, 1.0) <= self.fixed  # noqa: E731
        return bracket(fits, self.fixed / self.equal_at)[0]

    def profile_config(self) -> NCConfig:
        """Top-k with the budgets of the profile, shared among layers and heads and matched as all others are.

        Raises EvalError where there is no profile, or it cannot be read.
        """
        if self.profile is None:
            raise EvalError("the method profile needs a calibrated profile: --profile FILE, from nc-patch calibrate")
        if self.parameters:
            keys = total_of(self.equal_at, self.alpha, self.C) / self.equal_at
            return _config_of_profile(self.profile, keys, self.equal_at, "sequence")
        return _config_of_profile(self.profile, float(self.fixed), self.equal_at, "last")


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


@lru_cache(maxsize=256)
def _config_of_profile(path: str, keys: float, n: int, over: Over) -> NCConfig:
    try:
        shared = load_profile(path).at_budget(keys=keys, n=n, over=over, dense_below=0)
        return shared.config(selection="topk", tail="drop")
    except ProfileError as error:
        raise EvalError(f"{path}: {error}") from error


@lru_cache(maxsize=256)
def _same_total(alpha: float, C: float, length: int) -> tuple[int, float, float]:
    """Fixed budget, logarithmic factor and fraction whose totals over a sequence come nearest to the power law's."""
    wanted, n = total_of(length, alpha, C), np.arange(1, length + 1)
    fixed = int(np.argmin(np.abs(n * length - n * (n - 1) // 2 - wanted))) + 1
    _, log_factor = bracket(lambda factor: log_budgets(n, factor).sum() < wanted, float(length))
    _, fraction = bracket(lambda factor: total_of(length, factor, 1.0) < wanted, 1.0)
    return fixed, log_factor, fraction


def bracket(below: Callable[[float], Any], high: float) -> tuple[float, float]:
    """Two factors, 2^-40 of ``high`` apart, between which ``below``, true from 0 on, ends; ``high`` twice if beyond."""
    low = high if below(high) else 0.0
    for _ in range(40 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high

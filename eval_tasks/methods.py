"""The methods a sweep compares, in one list, and what makes their budgets equal: ways of matching, parameters of laws.

The command line, the report and the tests read the list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch

from eval_tasks.errors import EvalError
from eval_tasks.measure import Attention, Press
from nc_patch.budget import budget_of, budgets
from nc_patch.calibration.profile import Profile
from nc_patch.common import ProfileError
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
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


STREAMING_SINKS = 4
DENSE, PROFILE = "dense", "profile"
NC = "nc"  # what patch_model does unasked
_KEYS = "@"  # between a method and its number of keys, where iso-quality asks for that: fixed-topk@64
PRESS = "kvpress:"  # before the name of a class of the package kvpress


@dataclass(frozen=True)
class Method:
    """One way to attend: its name in results, its label in plots, a sentence for a newcomer.

    ``config`` gives the settings for given budgets; None is the unpatched model. ``press`` is the class of kvpress that
    compresses the cache, for methods that are not this package's; it keeps as many keys as ``config`` attends.
    """

    name: str
    title: str
    description: str
    config: Callable[[Budgets], NCConfig | None]
    press: str | None = None


def _sparse(
    name: str, title: str, description: str, law: str, selection: str, make: type[NCConfig] = NCConfig, **options: Any
) -> Method:
    """A method that follows a law of ``Budgets`` from the first key on: methods are compared by what laws choose."""
    options |= {"selection": selection, "dense_below": 0}
    return Method(name, title, description, lambda b: make(*b.laws[law], backend=b.backend, **options))


_RECENT = f"the first {STREAMING_SINKS} keys and the most recent ones"
_STREAMING = f"{_RECENT}, a fixed number (StreamingLLM)"
_SHARE = "the highest scores, a fixed share of all keys"
_MEANS = "and beside it the mean of the other keys in every page of 16, which counts as no key"
_UNASKED = (
    "what patch_model does with α·n^C keys: prefill by blocks of keys, decoding by top-k and means of the other keys, "
    f"and every key where a query sees at most {DEFAULT_DENSE_BELOW:,}"
)
_CALIBRATED = "the highest scores, as many as a calibrated profile gives each layer and head; needs --profile FILE"
_LISTED = (
    Method(DENSE, "dense", "every key, the unpatched model", lambda b: None),
    _sparse("window", "fixed window", "the most recent keys, a fixed number", "fixed", "window", sink_keys=0),
    _sparse("streaming", "sinks + fixed window", _STREAMING, "fixed", "window", sink_keys=STREAMING_SINKS),
    _sparse("fixed-topk", "fixed-k top-k", "the highest scores, a fixed number", "fixed", "topk", tail="drop"),
    _sparse("log-topk", "log n top-k", "the highest scores, a·log2(n) of them", "log", "topk", LogConfig, tail="drop"),
    _sparse("fraction-topk", "fixed-fraction top-k", _SHARE, "fraction", "topk", tail="drop"),
    _sparse("nc-window", "α·n^C window", f"{_RECENT}, α·n^C in all", "power", "window", sink_keys=STREAMING_SINKS),
    _sparse("nc-topk", "α·n^C top-k", "the highest scores, α·n^C of them", "power", "topk", tail="drop"),
    _sparse("fixed-topk-mean", "fixed-k top-k + means", f"fixed-topk, {_MEANS}", "fixed", "topk", tail="mean"),
    _sparse("nc-topk-mean", "α·n^C top-k + means", f"nc-topk, {_MEANS}", "power", "topk", tail="mean"),
    Method(NC, "default", _UNASKED, lambda b: NCConfig(b.alpha, b.C, backend=b.backend)),
    Method(PROFILE, "calibrated top-k", _CALIBRATED, lambda b: b.profile_config),
    _sparse("block", "α·n^C blocks", "the best blocks of keys, α·n^C keys in all", "power", "block"),
)
METHODS: dict[str, Method] = {method.name: method for method in _LISTED}
DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("fraction-topk", "fixed-topk-mean", PROFILE))


def with_keys(name: str, keys: int) -> str:
    """The name of a method that attends a given number of keys, whatever its own law."""
    return f"{name}{_KEYS}{keys}"


def keys_of(name: str) -> tuple[str, int | None]:
    """A method's name and the number of keys that ``with_keys`` put to it, or None."""
    base, _, keys = name.partition(_KEYS)
    return base, int(keys) if keys.isdecimal() else None


def find_method(name: str) -> Method:
    """The method of a name: one of ``METHODS``, one with a number of keys, or a press; raises EvalError for others."""
    if name.startswith(PRESS):
        press = name.removeprefix(PRESS)
        title, what = f"{press.removesuffix('Press')} (kvpress)", f"the cache compressed by {press} of kvpress"
        return Method(name, title, what, METHODS["nc-topk"].config, press)
    base, keys = keys_of(name)
    if base not in METHODS:
        raise EvalError(f"unknown method {base!r}; allowed are {', '.join(METHODS)}, and {PRESS}NAMEPress")
    method = METHODS[base]
    if keys is None:
        return method
    fixed = {"alpha": float(keys), "C": 0.0, "dense_below": 0}
    config = lambda budgets: NCConfig(**vars(method.config(budgets)) | fixed)  # noqa: E731
    return replace(method, name=name, title=f"{method.title}, {keys} keys", config=config)


def order_of(name: str) -> tuple[int, str, int]:
    """A key that sorts methods as they are listed, then by their number of keys."""
    base, keys = keys_of(name)
    return list(METHODS).index(base) if base in METHODS else len(METHODS), base, keys or 0


def attention_by(name: str, budgets: Budgets, n: int) -> Attention:
    """What a method attends by at a context length."""
    method = find_method(name)
    return Press(method.press, budget_at(name, budgets, n)) if method.press else method.config(budgets.at(n))


def budget_at(name: str, budgets: Budgets, n: int) -> int:
    """How many of ``n`` keys the method's law lets a query attend, on average over heads; ``n`` without a law."""
    law = find_method(name).config(budgets.at(n))
    if law is None:
        return n
    if not isinstance(law.alpha, tuple):
        return int(law.budget(n))
    layers = range(len(law.alpha))
    return round(fmean(int(law.budget(n, layer, head)) for layer in layers for head in range(len(law.laws(layer)))))

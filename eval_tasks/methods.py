"""The methods a sweep compares, in one list; the command line, the report and the tests read it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.matching import Budgets, LogConfig
from eval_tasks.measure import Attention, Press
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig

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

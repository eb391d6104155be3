"""The methods a sweep compares, in one list; the command line, the report and the tests read it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.log_law import LogConfig
from eval_tasks.matching import Budgets
from eval_tasks.measure import Attention
from eval_tasks.presses import Press
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig

STREAMING_SINKS = 4
DENSE, PROFILE = "dense", "profile"
NC = "nc"  # what patch_model does unasked
_KEYS = "@"  # between a method and its number of keys, where iso-quality asks for that: fixed-topk@64
PRESS = "kvpress:"  # before the name of a class of the package kvpress


@dataclass(frozen=True)
class Method:
    """One way to attend: its name in results, its label in plots, a sentence for a newcomer.

    ``config`` gives the settings for given budgets; None is the unpatched model. A ``default`` method is measured
    unasked; ``press`` is the class of kvpress that compresses the cache, for methods that are not this package's.
    """

    name: str
    title: str
    description: str
    config: Callable[[Budgets], NCConfig | None]
    default: bool = True
    press: str | None = None


_LAWS: dict[str, Callable[[Budgets], tuple[float, float]]] = {
    "fixed": lambda budgets: (budgets.fixed, 0.0),
    "log": lambda budgets: (budgets.log_factor, 0.0),
    "fraction": lambda budgets: (budgets.fraction, 1.0),
    "power": lambda budgets: (budgets.alpha, budgets.C),
}


def _by(law: str, selection: str, make: type[NCConfig] = NCConfig, **options: Any) -> Callable[[Budgets], NCConfig]:
    """The settings of a law alone, from the first key on: methods are compared by what their laws choose."""
    return lambda b: make(*_LAWS[law](b), backend=b.backend, dense_below=0, selection=selection, **options)


def _profiled(budgets: Budgets) -> NCConfig:
    return replace(budgets.profile_config(), backend=budgets.backend, dense_below=0)


_DROP: dict[str, Any] = {"tail": "drop"}
_MEAN: dict[str, Any] = {"tail": "mean"}
_SINKS: dict[str, Any] = {"sink_keys": STREAMING_SINKS}
_RECENT = f"the first {STREAMING_SINKS} keys and the most recent ones"
_MEANS = "and beside it the mean of the other keys in every page of 16, which counts as no key"
_UNASKED = (
    "what patch_model does with α·n^C keys: prefill by blocks of keys, decoding by top-k and means of the other keys, "
    f"and every key where a query sees at most {DEFAULT_DENSE_BELOW:,}"
)
_CALIBRATED = "the highest scores, as many as a calibrated profile gives each layer and head; needs --profile FILE"
_LISTED = (
    Method(DENSE, "dense", "every key, the unpatched model", lambda b: None),
    Method("window", "fixed window", "the most recent keys, a fixed number", _by("fixed", "window", sink_keys=0)),
    Method(
        "streaming",
        "sinks + fixed window",
        f"{_RECENT}, a fixed number (StreamingLLM)",
        _by("fixed", "window", **_SINKS),
    ),
    Method("fixed-topk", "fixed-k top-k", "the highest scores, a fixed number", _by("fixed", "topk", **_DROP)),
    Method("log-topk", "log n top-k", "the highest scores, a·log2(n) of them", _by("log", "topk", LogConfig, **_DROP)),
    Method(
        *("fraction-topk", "fixed-fraction top-k", "the highest scores, a fixed share of all keys"),
        *(_by("fraction", "topk", **_DROP), False),
    ),
    Method("nc-window", "α·n^C window", f"{_RECENT}, α·n^C in all", _by("power", "window", **_SINKS)),
    Method("nc-topk", "α·n^C top-k", "the highest scores, α·n^C of them", _by("power", "topk", **_DROP)),
    Method(
        "fixed-topk-mean",
        "fixed-k top-k + means",
        f"fixed-topk, {_MEANS}",
        _by("fixed", "topk", **_MEAN),
        default=False,
    ),
    Method("nc-topk-mean", "α·n^C top-k + means", f"nc-topk, {_MEANS}", _by("power", "topk", **_MEAN)),
    Method(NC, "default", _UNASKED, lambda b: NCConfig(b.alpha, b.C, backend=b.backend)),
    Method(PROFILE, "calibrated top-k", _CALIBRATED, _profiled, default=False),
    Method("block", "α·n^C blocks", "the best blocks of keys, α·n^C keys in all", _by("power", "block")),
)
METHODS: dict[str, Method] = {method.name: method for method in _LISTED}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.default)


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
        return Method(name, title, what, lambda b: None, press=press)
    base, keys = keys_of(name)
    if base not in METHODS:
        raise EvalError(f"unknown method {base!r}; allowed are {', '.join(METHODS)}, and {PRESS}NAMEPress")
    method = METHODS[base]
    if keys is None:
        return method
    if base == DENSE:
        raise EvalError(f"{base} attends by no budget and takes no number of keys")
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
    """How many of ``n`` keys the method's law lets a query attend, on average over heads; ``n`` without a law.

    A press keeps as many as ``nc-topk`` attends.
    """
    law = find_method("nc-topk" if find_method(name).press else name).config(budgets.at(n))
    if law is None:
        return n
    if not isinstance(law.alpha, tuple):
        return int(law.budget(n))
    layers = range(len(law.alpha))
    return round(fmean(int(law.budget(n, layer, head)) for layer in layers for head in range(len(law.laws(layer)))))

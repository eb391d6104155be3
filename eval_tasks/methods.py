"""The methods a sweep compares, in one list; the command line, the report and the tests read it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.log_law import LogConfig
from eval_tasks.matching import Budgets
from eval_tasks.measure import Attention, Phase
from eval_tasks.presses import Press
from eval_tasks.simulated import Simulated
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.selections import Block

STREAMING_SINKS = 4
ORACLE_MASS = 0.95  # that its keys hold
DENSE, PROFILE, BLOCK = "dense", "profile", "block"
NC = "nc"  # what patch_model does unasked
_KEYS = "@"  # between a method and its number of keys, where iso-quality asks for that: fixed-topk@64
PRESS = "kvpress:"  # before the name of a class of the package kvpress


@dataclass(frozen=True)
class Method:
    """One way to attend: its name on command lines and in results, its label in plots, a sentence for a newcomer.

    Attributes:
        config: the settings for given budgets, or what is simulated; None is the unpatched model.
        selects: ``"all"``, ``"recent"`` (by position), ``"content"`` (by score) or ``"chance"``.
        default: whether a sweep measures it unasked. simulated: whether it is a mask over dense attention.
        press: the class of kvpress that compresses the cache, for methods that are not this package's.
    """

    name: str
    title: str
    description: str
    config: Callable[[Budgets], NCConfig | Simulated | None]
    selects: str = "content"
    default: bool = True
    press: str | None = None
    simulated: bool = False


def _law(budgets: Budgets, alpha: float, C: float = 0.0, make: type[NCConfig] = NCConfig, **options: Any) -> NCConfig:
    """The settings of a law alone, from the first key on: methods are compared by what their laws choose."""
    return make(alpha, C, backend=budgets.backend, dense_below=0, **options)


def _topk(budgets: Budgets, alpha: float, C: float = 0.0, tail: str = "drop", **options: Any) -> NCConfig:
    return _law(budgets, alpha, C, selection="topk", tail=tail, **options)


def _window(budgets: Budgets, alpha: float, C: float = 0.0, sinks: int = STREAMING_SINKS) -> NCConfig:
    return _law(budgets, alpha, C, selection="window", sink_keys=sinks)


def _nc_topk(budgets: Budgets) -> NCConfig:
    return _topk(budgets, budgets.alpha, budgets.C)


_RECENT = f"the first {STREAMING_SINKS} keys and the most recent ones"
_MEANS = "and beside it the mean of the other keys in every page of 16, which counts as no key"
_LISTED = (
    Method(DENSE, "dense", "every key, the unpatched model", lambda b: None, "all"),
    Method(
        "window",
        "fixed window",
        "the most recent keys, a fixed number",
        lambda b: _window(b, b.fixed, sinks=0),
        "recent",
    ),
    Method(
        *("streaming", "sinks + fixed window", f"{_RECENT}, a fixed number (StreamingLLM)"),
        lambda b: _window(b, b.fixed),
        "recent",
    ),
    Method("fixed-topk", "fixed-k top-k", "the highest scores, a fixed number", lambda b: _topk(b, b.fixed)),
    Method(
        "log-topk",
        "log n top-k",
        "the highest scores, a·log2(n) of them",
        lambda b: _topk(b, b.log_factor, make=LogConfig),
    ),
    Method(
        *("fraction-topk", "fixed-fraction top-k", "the highest scores, a fixed share of all keys"),
        lambda b: _topk(b, b.fraction, 1.0),
        default=False,
    ),
    Method("nc-window", "α·n^C window", f"{_RECENT}, α·n^C in all", lambda b: _window(b, b.alpha, b.C), "recent"),
    Method("nc-topk", "α·n^C top-k", "the highest scores, α·n^C of them", _nc_topk),
    Method(
        *("fixed-topk-mean", "fixed-k top-k + means", f"fixed-topk, {_MEANS}"),
        lambda b: _topk(b, b.fixed, tail="mean"),
        default=False,
    ),
    Method("nc-topk-mean", "α·n^C top-k + means", f"nc-topk, {_MEANS}", lambda b: _topk(b, b.alpha, b.C, "mean")),
    Method(
        NC,
        "default",
        "what patch_model does with α·n^C keys: prefill by blocks of keys, decoding by top-k and means of the other "
        f"keys, and every key where a query sees at most {DEFAULT_DENSE_BELOW:,}",
        lambda b: NCConfig(b.alpha, b.C, backend=b.backend),
    ),
    Method(
        PROFILE,
        "calibrated top-k",
        "the highest scores, as many as a calibrated profile gives each layer and head; needs --profile FILE",
        lambda b: replace(b.profile_config(), backend=b.backend, dense_below=0),
        default=False,
    ),
    Method(
        *(BLOCK, "α·n^C blocks", "the best blocks of keys, α·n^C keys in all"),
        lambda b: _law(b, b.alpha, b.C, selection="block", block_size=b.block_size),
    ),
    Method(
        "random",
        "α·n^C random keys",
        "nc-topk with keys drawn by lot beside the first and the own one: a floor (simulated, without a time)",
        lambda b: Simulated("random", config=_nc_topk(b)),
        "chance",
        default=False,
        simulated=True,
    ),
    Method(
        "oracle",
        f"oracle, {ORACLE_MASS:.0%} of the mass",
        f"of every query the fewest keys that hold {ORACLE_MASS:.0%} of its attention, which none can know beforehand: "
        "a ceiling (simulated, without a time)",
        lambda b: Simulated("top-p", mass=ORACLE_MASS),
        default=False,
        simulated=True,
    ),
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

    def fixed(budgets: Budgets) -> NCConfig:
        config = method.config(budgets)
        if not isinstance(config, NCConfig):
            raise EvalError(f"{method.name} attends by no budget and takes no number of keys")
        return NCConfig(**vars(config) | {"alpha": float(keys), "C": 0.0, "dense_below": 0})

    return replace(method, name=name, title=f"{method.title}, {keys} keys", config=fixed)


def order_of(name: str) -> tuple[int, str, int]:
    """A key that sorts methods as they are listed, then by their number of keys."""
    base, keys = keys_of(name)
    return list(METHODS).index(base) if base in METHODS else len(METHODS), base, keys or 0


def attention_by(name: str, budgets: Budgets, n: int) -> Attention:
    """What a method attends by at a context length."""
    press = find_method(name).press
    return Press(press, budget_at(name, budgets, n)) if press else find_method(name).config(budgets.at(n))


def budget_at(name: str, budgets: Budgets, n: int) -> int:
    """How many of ``n`` keys the method's law lets a query attend, on average over heads; ``n`` without a law."""
    method, matched = find_method(name), budgets.at(n)
    config = _nc_topk(matched) if method.press else method.config(matched)
    law = config.config if isinstance(config, Simulated) else config
    if law is None:
        return n
    if not isinstance(law.alpha, tuple):
        return int(law.budget(n))
    layers = range(len(law.alpha))
    return round(fmean(int(law.budget(n, layer, head)) for layer in layers for head in range(len(law.laws(layer)))))


def blocks_chosen(budget: int, block_size: int, phase: Phase) -> int:
    """How many blocks of keys the method ``block`` chooses by content; with none it is a window.

    The first block and those of the queries' own positions are attended always, in prefill also those of the 64 keys
    before them. In prefill 64 positions choose together, in decoding one.
    """
    recent = 1 if phase == "decode" else Block.query_block_size + Block.local_keys
    always = 1 + -(-recent // block_size)
    return max(0, -(-budget // block_size) - always)


def without_choice(cells: Sequence[tuple[str, int, int]], block_size: int, phase: Phase) -> list[str]:
    """Where no block of keys is chosen by content, as a sentence; none where there is nothing of the kind.

    ``cells`` are method, length and budget of all that is measured; those of ``block`` that leave keys out matter.
    """
    listed = ", ".join(
        f"{find_method(method).title} at {n:,} tokens ({budget} keys)"
        for method, n, budget in cells
        if keys_of(method)[0] == BLOCK and budget < n and not blocks_chosen(budget, block_size, phase)
    )
    if not listed:
        return []
    said = "The blocks that are always attended, the first, those of the queries' own positions and in prefill those "
    said += f"of the {Block.local_keys} keys before them, use up the budget of {listed}: there no block is chosen by "
    return [f"{said}content, and more keys may be attended than the budget has."]

"""The methods a sweep compares, in one list; the command line, the report and the tests read it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.log_law import LogConfig
from eval_tasks.matching import Budgets
from eval_tasks.measure import Phase
from eval_tasks.simulated import Simulated
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.selections import Block

STREAMING_SINKS = 4
# What the oracle's keys hold.
ORACLE_MASS = 0.95
DENSE = "dense"
PROFILE = "profile"
BLOCK = "block"
# What patch_model does unasked.
NC = "nc"
# Between a method and its number of keys, where iso-quality asks for that: fixed-topk@64.
_KEYS = "@"
# Before the name of a class of the package kvpress.
PRESS = "kvpress:"


@dataclass(frozen=True)
class Method:
    """One way to attend.

    Attributes:
        name: what the command line and the results call it.
        title: a short label for plots and tables.
        description: one sentence for a newcomer.
        config: the settings for given budgets, or what is simulated; None is the unpatched model.
        selects: ``"all"``, ``"recent"`` (by position), ``"content"`` (by score) or ``"chance"``.
        grows: whether the budget follows n^C.
        default: whether a sweep measures it unasked.
        press: the class of kvpress that compresses the cache, for methods that are not this package's.
        simulated: whether it is a mask over dense attention, which has no time.
    """

    name: str
    title: str
    description: str
    config: Callable[[Budgets], NCConfig | Simulated | None]
    selects: str
    grows: bool
    default: bool = True
    press: str | None = None
    simulated: bool = False


def _dense(budgets: Budgets) -> None:
    return None


def _law(alpha: float, C: float, budgets: Budgets, make: type[NCConfig] = NCConfig, **options: Any) -> NCConfig:
    """The settings of a law alone, from the first key on: methods are compared by what their laws choose."""
    return make(alpha, C, backend=budgets.backend, dense_below=0, **options)


def _window(budgets: Budgets) -> NCConfig:
    return _law(budgets.fixed, 0.0, budgets, selection="window", sink_keys=0)


def _streaming(budgets: Budgets) -> NCConfig:
    return _law(budgets.fixed, 0.0, budgets, selection="window", sink_keys=STREAMING_SINKS)


def _nc_window(budgets: Budgets) -> NCConfig:
    return _law(budgets.alpha, budgets.C, budgets, selection="window", sink_keys=STREAMING_SINKS)


def _fixed_topk(budgets: Budgets) -> NCConfig:
    return _law(budgets.fixed, 0.0, budgets, selection="topk", tail="drop")


def _log_topk(budgets: Budgets) -> NCConfig:
    return _law(budgets.log_factor, 0.0, budgets, LogConfig, selection="topk", tail="drop")


def _nc_topk(budgets: Budgets) -> NCConfig:
    return _law(budgets.alpha, budgets.C, budgets, selection="topk", tail="drop")


def _fraction_topk(budgets: Budgets) -> NCConfig:
    return _law(budgets.fraction, 1.0, budgets, selection="topk", tail="drop")


def _fixed_topk_mean(budgets: Budgets) -> NCConfig:
    return replace(_fixed_topk(budgets), tail="mean")  # type: ignore[call-arg]


def _nc_topk_mean(budgets: Budgets) -> NCConfig:
    return replace(_nc_topk(budgets), tail="mean")  # type: ignore[call-arg]


def _profile(budgets: Budgets) -> NCConfig:
    return replace(budgets.profile_config(), backend=budgets.backend, dense_below=0)


def _block(budgets: Budgets) -> NCConfig:
    return _law(budgets.alpha, budgets.C, budgets, selection="block", block_size=budgets.block_size)


def _nc(budgets: Budgets) -> NCConfig:
    return NCConfig(budgets.alpha, budgets.C, backend=budgets.backend)


def _random(budgets: Budgets) -> Simulated:
    return Simulated("random", config=_nc_topk(budgets))


def _oracle(budgets: Budgets) -> Simulated:
    return Simulated("top-p", mass=ORACLE_MASS)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense", "dense", "every key, the unpatched model", _dense, "all", False),
        Method("window", "fixed window", "the most recent keys, a fixed number", _window, "recent", False),
        Method(
            "streaming",
            "sinks + fixed window",
            f"the first {STREAMING_SINKS} keys and the most recent ones, a fixed number (StreamingLLM)",
            _streaming,
            "recent",
            False,
        ),
        Method("fixed-topk", "fixed-k top-k", "the highest scores, a fixed number", _fixed_topk, "content", False),
        Method("log-topk", "log n top-k", "the highest scores, a·log2(n) of them", _log_topk, "content", False),
        Method(
            "fraction-topk",
            "fixed-fraction top-k",
            "the highest scores, a fixed share of all keys",
            _fraction_topk,
            "content",
            False,
            default=False,
        ),
        Method(
            "nc-window",
            "α·n^C window",
            f"the first {STREAMING_SINKS} keys and the most recent ones, α·n^C in all",
            _nc_window,
            "recent",
            True,
        ),
        Method("nc-topk", "α·n^C top-k", "the highest scores, α·n^C of them", _nc_topk, "content", True),
        Method(
            "fixed-topk-mean",
            "fixed-k top-k + means",
            "fixed-topk, and beside it the mean of the other keys in every page of 16, which counts as no key",
            _fixed_topk_mean,
            "content",
            False,
            default=False,
        ),
        Method(
            "nc-topk-mean",
            "α·n^C top-k + means",
            "nc-topk, and beside it the mean of the other keys in every page of 16, which counts as no key",
            _nc_topk_mean,
            "content",
            True,
        ),
        Method(
            NC,
            "default",
            "what patch_model does with α·n^C keys: prefill by blocks of keys, decoding by top-k and means of "
            f"the other keys, and every key where a query sees at most {DEFAULT_DENSE_BELOW:,}",
            _nc,
            "content",
            True,
        ),
        Method(
            PROFILE,
            "calibrated top-k",
            "the highest scores, as many as a calibrated profile gives each layer and head; needs --profile FILE",
            _profile,
            "content",
            True,
            default=False,
        ),
        Method(BLOCK, "α·n^C blocks", "the best blocks of keys, α·n^C keys in all", _block, "content", True),
        Method(
            "random",
            "α·n^C random keys",
            "nc-topk with keys drawn by lot beside the first and the own one: a floor (simulated, without a time)",
            _random,
            "chance",
            True,
            default=False,
            simulated=True,
        ),
        Method(
            "oracle",
            f"oracle, {ORACLE_MASS:.0%} of the mass",
            f"of every query the fewest keys that hold {ORACLE_MASS:.0%} of its attention, which none can know "
            "beforehand: a ceiling (simulated, without a time)",
            _oracle,
            "content",
            False,
            default=False,
            simulated=True,
        ),
    )
}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.default)


def with_keys(name: str, keys: int) -> str:
    """The name of a method that attends a given number of keys, whatever its own law."""
    return f"{name}{_KEYS}{keys}"


def keys_of(name: str) -> tuple[str, int | None]:
    """A method's name and the number of keys that ``with_keys`` put to it, or None."""
    base, _, keys = name.partition(_KEYS)
    return base, int(keys) if keys else None


def find_method(name: str) -> Method:
    """The method of a name: one of ``METHODS``, one with a number of keys, or a press of the package kvpress.

    Raises:
        EvalError: there is none; the message lists those there are.
    """
    if name.startswith(PRESS):
        press = name.removeprefix(PRESS)
        label = f"{press.removesuffix('Press')} (kvpress)"
        return Method(
            name, label, f"the cache compressed by {press} of kvpress", _no_config, "content", True, press=press
        )
    base, keys = keys_of(name)
    if base not in METHODS:
        raise EvalError(f"unknown method {base!r}; allowed are {', '.join(METHODS)}, and {PRESS}NAMEPress")
    method = METHODS[base]
    if keys is None:
        return method
    fixed = lambda budgets: NCConfig(**vars(_sparse(method, budgets)) | {"alpha": float(keys), "C": 0.0})  # noqa: E731
    return replace(method, name=name, title=f"{method.title}, {keys} keys", config=fixed, grows=False)


def order_of(name: str) -> tuple[int, str, int]:
    """A key that sorts methods as they are listed, then by their number of keys."""
    base, keys = keys_of(name)
    return list(METHODS).index(base) if base in METHODS else len(METHODS), base, keys or 0


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
    """How many blocks of keys the method ``block`` chooses by content for queries with a budget.

    The first block and those of the queries' own positions are attended always: in prefill 64 positions choose
    together, in decoding one. In prefill those of the 64 keys before them come next. What is left of the budget is
    chosen. With nothing left the method is a window.
    """
    recent = 1 if phase == "decode" else Block.query_block_size + Block.local_keys
    always = 1 + -(-recent // block_size)
    return max(0, -(-budget // block_size) - always)


def _sparse(method: Method, budgets: Budgets) -> NCConfig:
    config = method.config(budgets)
    if config is None:
        raise EvalError(f"{method.name} attends every key and takes no number of them")
    if isinstance(config, Simulated):
        raise EvalError(f"{method.name} is simulated and takes no number of keys")
    return config


def _no_config(budgets: Budgets) -> None:
    return None


def without_choice(cells: Sequence[tuple[str, int, int]], block_size: int, phase: Phase) -> list[str]:
    """Where no block of keys is chosen by content, as a sentence; none where there is nothing of the kind.

    Args:
        cells: method, length and budget of whatever is measured; only those of ``block`` that leave keys out matter.
        block_size: keys of a block.
        phase: what of a forward pass is sparse.
    """
    listed = ", ".join(
        f"{find_method(method).title} at {n:,} tokens ({budget} keys)"
        for method, n, budget in cells
        if keys_of(method)[0] == BLOCK and budget < n and not blocks_chosen(budget, block_size, phase)
    )
    if not listed:
        return []
    return [
        "The blocks that are always attended, the first, those of the queries' own positions and in prefill those of "
        f"the {Block.local_keys} keys before them, use up the budget of {listed}: there no block is chosen by content, "
        "and more keys may be attended than the budget has."
    ]

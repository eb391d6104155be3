"""The methods a sweep compares, in one list; the command line, the report and the tests read it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nc_patch.budget import budget_of
from nc_patch.config import Backend, NCConfig

STREAMING_SINKS = 4


@dataclass(frozen=True)
class Budgets:
    """The budgets of a comparison: α·n^C, and the fixed and logarithmic ones that equal it at one length.

    Attributes:
        alpha: factor of the power law, positive.
        C: exponent of the power law, in [0, 1].
        equal_at: the length n0 at which all methods have the same budget, at least 2.
        block_size: keys per block of the method ``block``; as in ``NCConfig``.
        backend: as in ``NCConfig``.
    """

    alpha: float
    C: float
    equal_at: int
    block_size: int = 32
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.equal_at < 2:
            raise ValueError(f"equal_at must be a length of at least 2, got {self.equal_at}")
        NCConfig(
            self.alpha, self.C, block_size=self.block_size, backend=self.backend
        )  # raises for values outside their ranges

    @property
    def fixed(self) -> int:
        """The budget at ``equal_at``, which the fixed methods keep at every length."""
        return budget_of(self.equal_at, self.alpha, self.C)

    @property
    def log_factor(self) -> float:
        """The factor a of ``ceil(a * log2(n))`` that gives the same budget at ``equal_at``."""
        factor = self.fixed / math.log2(self.equal_at)
        # Rounding in the division must not lift the product above the integer it stands for.
        while budget_of(self.equal_at, factor, 0.0, law="log") > self.fixed:
            factor = math.nextafter(factor, 0.0)
        return factor


@dataclass(frozen=True)
class Method:
    """One way to attend.

    Attributes:
        name: what the command line and the results call it.
        title: a short label for plots and tables.
        description: one sentence for a newcomer.
        config: the settings for given budgets; None is the unpatched model.
        selects: ``"all"``, ``"recent"`` (by position) or ``"content"`` (by score).
        grows: whether the budget follows n^C.
    """

    name: str
    title: str
    description: str
    config: Callable[[Budgets], NCConfig | None]
    selects: str
    grows: bool


def _dense(budgets: Budgets) -> None:
    return None


def _window(budgets: Budgets) -> NCConfig:
    return NCConfig.create(budgets.fixed, selection="window", sink_keys=0, backend=budgets.backend)


def _streaming(budgets: Budgets) -> NCConfig:
    return NCConfig.create(budgets.fixed, selection="window", sink_keys=STREAMING_SINKS, backend=budgets.backend)


def _nc_window(budgets: Budgets) -> NCConfig:
    return NCConfig.create(
        budgets.alpha, budgets.C, selection="window", sink_keys=STREAMING_SINKS, backend=budgets.backend
    )


def _fixed_topk(budgets: Budgets) -> NCConfig:
    return NCConfig.create(budgets.fixed, selection="topk", backend=budgets.backend)


def _log_topk(budgets: Budgets) -> NCConfig:
    return NCConfig.create(budgets.log_factor, selection="topk", law="log", backend=budgets.backend)


def _nc_topk(budgets: Budgets) -> NCConfig:
    return NCConfig.create(budgets.alpha, budgets.C, selection="topk", backend=budgets.backend)


def _block(budgets: Budgets) -> NCConfig:
    return NCConfig.create(
        budgets.alpha, budgets.C, selection="block", block_size=budgets.block_size, backend=budgets.backend
    )


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
            "nc-window",
            "α·n^C window",
            f"the first {STREAMING_SINKS} keys and the most recent ones, α·n^C in all",
            _nc_window,
            "recent",
            True,
        ),
        Method("nc-topk", "α·n^C top-k", "the highest scores, α·n^C of them", _nc_topk, "content", True),
        Method("block", "α·n^C blocks", "the best blocks of keys, α·n^C keys in all", _block, "content", True),
    )
}
DENSE = "dense"


def budget_at(name: str, budgets: Budgets, n: int) -> int:
    """How many of ``n`` keys the method's law lets a query attend; ``n`` for dense."""
    config = METHODS[name].config(budgets)
    return n if config is None else int(config.budget(n))

"""``Selection``: which keys fill a query's budget. A subclass with one method, ``keep``, works everywhere."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch

from nc_patch.common import check_choice, plain
from nc_patch.ops.attend_rows import attend_rows
from nc_patch.ops.problem import AttentionResult, Problem, visible_mask
from nc_patch.ops.reference import raw_scores, reference_attention
from nc_patch.ops.rows import Choice, RowBlock, Rows
from nc_patch.selections.index import extend

Kind = TypeVar("Kind", bound="type[Selection]")


class Selection:
    """Which keys fill the budget of each query. Subclasses are frozen dataclasses whose fields are their options.

    ``keep`` is the definition; the forward pass in PyTorch, its gradient, ``torch.compile``, caches and ``generate``
    follow from it. ``prefill_torch``, ``_triton`` and ``_cpu``, and with a key index ``decode_torch``, ``_triton`` and
    ``_cpu``, make it faster. An option is a bool, a number, a string or None.

    Attributes:
        name: by which ``NCConfig`` and the command line know it; set by ``register``.
        options: names of the fields, set by ``register``. checks: for each option a function of its name and
            value, which returns the value to take, or raises. None is not checked where it is the default.
        shorthand: what an option is called outside of its selection, where that differs.
        index_kind: the kind of ``KeyIndex`` that it decodes by, or None. needs_index: whether it cannot decode without.
        counts_attended: whether only it knows how many keys it attends. chooses_together: whether the queries of a
            prefill share a choice. estimates: whether a prefill returns an ``audit``, on request, in place of the kept
            mass of every row. bounds_kept_mass: whether decoding by its index bounds that.
        on_host: the (phase, backend) pairs whose implementation reads the device's memory on the host.
    """

    name: ClassVar[str] = ""
    options: ClassVar[tuple[str, ...]] = ()
    checks: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {}
    shorthand: ClassVar[dict[str, str]] = {}
    index_kind: ClassVar[str | None] = None
    needs_index: ClassVar[bool] = False
    counts_attended: ClassVar[bool] = False
    chooses_together: ClassVar[bool] = False
    estimates: ClassVar[bool] = False
    bounds_kept_mass: ClassVar[bool] = False
    on_host: ClassVar[tuple[tuple[str, str], ...]] = (("prefill", "torch"), ("decode", "torch"))
    # Of ``written``, once: while ``torch.compile`` traces, options may be symbols, which have no text.
    _written: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option, check in self.checks.items():
            value = getattr(self, option)
            if value is not None or getattr(type(self), option) is not None:
                object.__setattr__(self, option, check(self.shorthand.get(option, option), value))
        object.__setattr__(self, "_written", self._write())

    def keep(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Which keys rows attend: exactly as many as their budget, none that they do not see.

        Args:
            scores: q·k ``[H, R, N]``, neither scaled nor soft-capped, of ``rows`` and N keys; NaN where a key's is.
            rows: what the rows see, their budgets and origins, and the position of each key.

        Returns:
            bool ``[H or 1, R, N]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which keys it keeps")

    def mask(self, problem: Problem, scores: torch.Tensor, decode: bool = False) -> torch.Tensor:
        """Which keys queries attend, bool ``[B, Hq, Lq, Lk]``, by their scores q·k, float64 ``[B, Hq, Lq, Lk]``."""
        attended = torch.zeros_like(scores, dtype=torch.bool)
        for b in range(len(scores)):
            rows = RowBlock(b, 0, scores.shape[2], 0, scores.shape[3])
            attended[b] = self.keep(scores[b], Rows.of(problem, rows))
        return attended & visible_mask(problem.visible, scores.shape[-1])

    def reference(self, problem: Problem, decode: bool = False) -> AttentionResult:
        """Attention in float64 over what ``mask`` says, which everything else is tested against."""
        return reference_attention(problem, self.mask(problem, raw_scores(problem), decode), self.uses_means)

    def with_means(self, problem: Problem, backend: str) -> Problem:
        """The problem with the page means that the selection adds what it leaves out by; most add nothing."""
        return problem if problem.means is None else problem._replace(means=None)

    @property
    def uses_means(self) -> bool:
        """Whether ``with_means`` adds any."""
        return False

    @property
    def page_size(self) -> int:
        """Keys per page of its index, where that has pages."""
        return 1

    def choice(self, problem: Problem) -> Choice:
        """What each block of rows attends, for a forward or backward pass in PyTorch."""
        return Choice(problem, self.keep)

    def prefill_torch(self, problem: Problem) -> AttentionResult:
        """Attention in PyTorch without an index, in blocks of rows: O(rows · keys) extra memory."""
        problem = self.with_means(problem, "torch")
        return attend_rows(problem, self.choice(problem))

    def takes_in(self, problem: Problem, backend: str) -> bool:
        """Whether the implementation takes the ``new`` keys of a problem into its index by itself."""
        return False

    def run(self, problem: Problem, backend: str) -> AttentionResult:
        """Attention on ``backend``, by the index where the problem has one; ``new`` keys are taken in first."""
        if problem.new and not self.takes_in(problem, backend):
            problem = extend(problem, self.index_kind, backend)
        result: AttentionResult = getattr(self, f"{problem.phase}_{backend}")(problem)
        return result

    def bound(self, problem: Problem, backend: str) -> Callable[[Problem], AttentionResult]:
        """What each layer of a forward pass runs its problem by: one like this, with the same settings, and tensors of
        the same shapes, strides, dtypes, devices and alignment to 16 bytes.
        """
        return lambda like: self.run(like, backend)

    def backends(self, phase: str) -> tuple[str, ...]:
        """The backends that have the phase, ``"prefill"`` or ``"decode"``."""
        return tuple(name for name in ("triton", "cpu", "torch") if hasattr(self, f"{phase}_{name}"))

    def written(self) -> str:
        """The name and the options as text, which is how operations of ``torch.library`` take them."""
        return self._written or self._write()

    def _write(self) -> str:
        return f"{self.name} {[plain(getattr(self, option)) for option in self.options]}"

    def to_dict(self) -> dict[str, Any]:
        """The name and every option, as JSON can hold them."""
        return {"name": self.name, **{option: getattr(self, option) for option in self.options}}


_SELECTIONS: "dict[str, type[Selection]]" = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Decorator that makes a frozen dataclass of ``Selection`` known by a name, in place of one that had it."""

    def add(kind: Kind) -> Kind:
        kind.name, kind.options = name, tuple(option.name for option in fields(kind))  # type: ignore[arg-type]
        for option in fields(kind):  # type: ignore[arg-type]
            if not isinstance(option.default, (int, float, str, type(None))):
                raise TypeError(
                    f"{kind.__name__}.{option.name} needs a default that is a number, a bool, a string or None"
                )
        _SELECTIONS[name] = kind
        read_selection.cache_clear()
        return kind

    return add


def selection_names() -> tuple[str, ...]:
    """The names of all selections, in the order in which they were registered."""
    return tuple(_SELECTIONS)


def selection_class(name: str, setting: str = "a selection") -> "type[Selection]":
    """The selection of a name; raises ValueError where there is none, which lists those that a ``setting`` may be."""
    return _SELECTIONS[check_choice(setting, name, selection_names())]


@lru_cache(maxsize=256)
def read_selection(text: str) -> Selection:
    """The inverse of ``Selection.written``."""
    name, options = text.split(" ", 1)
    return selection_class(name)(*ast.literal_eval(options))

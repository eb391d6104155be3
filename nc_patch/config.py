"""``NCConfig``: every setting of sparse attention in one frozen, validated object that JSON can hold."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from nc_patch.budget import budget_of, budgets, is_dense_law, row_budgets
from nc_patch.common import as_number, check_bool, check_choice, check_integer, check_number, once, plain, shown
from nc_patch.ops.backends import BACKENDS, Backend
from nc_patch.selections import Block, Dense, Selection, TopK, selection_class, selection_names

IndexUse = Literal["auto", "always", "never"]
OnDrop = Literal["ignore", "warn", "raise", "dense"]
PerHead = float | tuple[float, ...] | tuple[tuple[float, ...], ...]

# The budget of patch_model(model): see the table in docs/choosing.md.
DEFAULT_ALPHA, DEFAULT_C = 12.0, 0.5
DEFAULT_DENSE_BELOW = 1024
_DEFAULT_SELECTIONS: dict[str, Selection] = {"prefill": Block(), "decode": TopK()}
_PHASES = tuple(_DEFAULT_SELECTIONS)


@dataclass(frozen=True, init=False)
class NCConfig:
    """Settings of attention over ``k(n) = min(n, max(min_keys, ceil(alpha * n**C)))`` of the n visible keys.

    Attributes:
        alpha: factor of the budget law, positive. One number; one per layer; or one per layer and query head.
        C: exponent of the budget law, in [0, 1]; the same forms as ``alpha``. 0 is a fixed budget; 1 with
            ``alpha >= 1`` is dense.
        prefill: selection for calls with more than one query: ``TopK()``, ``Block()``, ``Window()``, ``Dense()`` of
            ``nc_patch.selections``, or its name: ``"topk"``, ``"block"``, ``"window"`` or ``"dense"``.
        decode: selection for calls with one query per sequence, or with up to 32 queries that continue a cache. With
            blocks for both ``prefill`` and ``decode``, calls with several queries count as prefill.
        min_keys: lower limit of the budget.
        dense_below: a query that sees at most so many keys attends them all, since sparse attention saves no time
            there; a call in which no query sees more runs dense. 0 is the law alone.
        track: whether ``nc_stats`` holds the kept mass: see docs/certificates.md for what that costs.
        on_drop: what happens when a call of a layer drops more than ``max_dropped_mass``: ``"ignore"``, ``"warn"`` once
            a layer, ``"raise"`` a ``DroppedMassError``, or redo the call ``"dense"``. All but ``"ignore"`` read the
            device in every call, and refuse to be compiled into a graph.
        max_dropped_mass: the part of the dense softmax mass, in [0, 1), that a row (a query and head) may drop.
        dense_layers: indices of layers that keep dense attention.
        backend: ``"triton"`` for GPUs, ``"cpu"`` for kernels that Numba compiles, ``"torch"`` for PyTorch alone, or
            ``"auto"`` for the fastest that has what a call needs.
        key_index: whether a layer keeps an index beside its keys to decode by: ``"always"``, ``"never"``, or ``"auto"``
            where it saves time: for blocks, and for top-k on Triton. It changes no result.

    Args:
        options: ``selection``, which sets both ``prefill`` and ``decode``; and options of selections by name, such as
            ``block_size=16`` or ``tail="drop"``, for each of the two that has them.

    Raises:
        ValueError: a value is outside its range; the message names the range.
        TypeError: a value has the wrong type, or an option an unknown name.
    """

    alpha: PerHead
    C: PerHead = 0.0
    _: KW_ONLY
    prefill: Selection = _DEFAULT_SELECTIONS["prefill"]
    decode: Selection = _DEFAULT_SELECTIONS["decode"]
    min_keys: int = 1
    dense_below: int = DEFAULT_DENSE_BELOW
    track: bool = False
    on_drop: OnDrop = "ignore"
    max_dropped_mass: float = 0.1
    dense_layers: tuple[int, ...] = ()
    backend: Backend = "auto"
    key_index: IndexUse = "auto"

    def __init__(self, alpha: Any, C: Any = 0.0, **options: Any) -> None:
        settings = check_option_names({"alpha": alpha, "C": C, **options})
        given = _DEFAULTS | {name: value for name, value in settings.items() if name in _DEFAULTS}
        fields: dict[str, Any] = {
            **_selections_of(settings),
            "alpha": _per_head("alpha", alpha, "a positive number", lambda v: v > 0),
            "C": _per_head("C", C, "a number in [0, 1]", lambda v: 0 <= v <= 1),
            **{name: _CHECKS[name](name, value) for name, value in given.items()},
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """``alpha``, ``C`` and what differs from its default; lists per layer by their size and range."""
        written = {name: _summary(getattr(self, name)) for name in ("alpha", "C")}
        if self.prefill == self.decode:
            kind, options = type(self.prefill), self.prefill.options
            written["selection"] = repr(kind.name)
            changed = [option for option in options if getattr(self.prefill, option) != getattr(kind, option)]
            written |= {kind.shorthand.get(option, option): repr(getattr(self.prefill, option)) for option in changed}
        defaults = _DEFAULTS if "selection" in written else _DEFAULT_SELECTIONS | _DEFAULTS
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        written |= {name: repr(getattr(self, name)) for name in changed}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in written.items())})"

    def budget(self, n: int | torch.Tensor, layer: int | None = None, head: int | None = None) -> Any:
        """The budget law: how many of ``n`` visible keys, an int or an int tensor of any shape, a query attends.

        ``layer`` and ``head`` are needed where alpha or C differ by them. Returns an int for an int, and an int32
        tensor of the same shape and device for a tensor.

        Raises:
            ValueError: ``n`` is negative or too large, or no layer or head is given where one is needed.
            TypeError: ``n`` is no integer.
        """
        laws = self.laws(layer)
        alpha, C = laws[0] if len(laws) == 1 else _entry("alpha and C", laws, "head", head)
        law = (alpha, C, self.min_keys, self.dense_below)
        if not isinstance(n, torch.Tensor):
            return budget_of(check_integer("n", n, 0), *law)
        if n.dtype.is_floating_point or n.dtype == torch.bool:
            raise TypeError(f"n must be an integer tensor, got {n.dtype}")
        if n.numel():
            check_integer("n", int(n.min()), 0), check_integer("n", int(n.max()), 0)
        return torch.from_numpy(budgets(n.cpu().numpy(), *law)).to(n.device, torch.int32)

    def row_budgets(self, visible: torch.Tensor, max_n: int, layer: int | None = None) -> torch.Tensor:
        """Budgets int32 ``[B, 1 or Hq, Lq]`` of a layer's queries, of which none sees more than ``max_n`` keys.

        ``visible`` is int32 ``[B, Lq, 2]``, the interval of keys that each query sees. Layers of one law share them.
        """
        laws = self.laws(layer)
        find = lambda: self._row_budgets(visible, max_n, laws)  # noqa: E731
        if len(laws) > 1:  # large, and as a rule of one layer alone
            return find()
        found: torch.Tensor = once(visible, ("budget", laws, self.min_keys, self.dense_below), find)
        return found

    @property
    def layers(self) -> int | None:
        """For how many layers alpha or C are given one by one; None where they are not."""
        given = [len(values) for values in (self.alpha, self.C) if isinstance(values, tuple)]
        return max(given, default=None)

    def budgets_by_layer(self, visible: torch.Tensor, max_n: int) -> tuple[torch.Tensor, ...]:
        """``row_budgets`` of every layer, where alpha or C are per layer, found at once."""
        laws = [self.laws(layer) for layer in range(self.layers or 0)]
        found = self._row_budgets(visible, max_n, list(itertools.chain.from_iterable(laws)))
        return tuple(each.contiguous() for each in found.split([len(of_layer) for of_layer in laws], 1))

    def _row_budgets(self, visible: torch.Tensor, max_n: int, laws: Sequence[tuple[float, float]]) -> torch.Tensor:
        alphas, exponents = map(list, zip(*laws, strict=True))
        return row_budgets(visible, max_n, alphas, exponents, self.min_keys, self.dense_below)

    def largest_budget(self, n: int, layer: int | None = None) -> int:
        """The largest budget that any head of a layer, or of all layers, has for up to ``n`` visible keys."""
        if layer is None and self.layers is not None:
            return max(self.largest_budget(n, layer) for layer in range(self.layers))
        law = max(budget_of(n, alpha, C, self.min_keys) for alpha, C in self.laws(layer))
        return max(law, min(n, self.dense_below))

    def laws(self, layer: int | None = None) -> tuple[tuple[float, float], ...]:
        """The (alpha, C) pairs of a layer: one pair shared by all heads, or one per query head."""
        if not isinstance(self.alpha, tuple) and not isinstance(self.C, tuple):
            return ((self.alpha, self.C),)
        alpha, C = (
            _entry(name, value, "layer", layer) if isinstance(value, tuple) else value
            for name, value in (("alpha", self.alpha), ("C", self.C))
        )
        heads = max(len(v) if isinstance(v, tuple) else 1 for v in (alpha, C))
        return tuple(zip(*(v if isinstance(v, tuple) else (v,) * heads for v in (alpha, C)), strict=True))

    def is_dense(self, layer: int | None = None) -> bool:
        """Whether the layer attends every key at every length, whatever the selection."""
        if layer is not None and layer in self.dense_layers:
            return True
        return all(is_dense_law(alpha, C) for alpha, C in self.laws(layer))

    def is_short(self, key_length: int) -> bool:
        """Whether a call of so many keys runs dense; not in an exported graph, which is of all lengths."""
        return not torch.compiler.is_exporting() and key_length <= self.dense_below

    def dense_reason(self, layer: int, selection: Selection, key_length: int) -> str | None:
        """Why a layer attends every key by a selection where no query sees more than ``key_length``; None where not."""
        if layer in self.dense_layers:
            return "the layer is in dense_layers"
        if isinstance(selection, Dense):
            return 'the selection is "dense"'
        if self.is_dense(layer):
            return "alpha >= 1 with C = 1 attends every key"
        if self.is_short(key_length):
            return f"no query sees more than dense_below={self.dense_below} keys"
        return None

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raises ValueError unless per-layer and per-head values, and dense_layers, fit a model of this shape."""
        for name, value in (("alpha", self.alpha), ("C", self.C)):
            if not isinstance(value, tuple):
                continue
            if len(value) != num_layers:
                raise ValueError(f"{name} has {len(value)} layers, the model has {num_layers}")
            for layer, heads in enumerate(value):
                if isinstance(heads, tuple) and len(heads) != num_heads:
                    raise ValueError(f"{name}[{layer}] has {len(heads)} heads, the queries have {num_heads}")
        beyond = [layer for layer in self.dense_layers if layer >= num_layers]
        if beyond:
            raise ValueError(f"dense_layers names layers {beyond}, the model has layers 0 to {num_layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that JSON can hold and ``from_dict`` takes back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dict(json.loads(json.dumps(values, default=Selection.to_dict)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NCConfig":
        """The config that ``to_dict`` wrote; raises as the constructor."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a config is a mapping of names to values, got {type(values).__name__}")
        if "alpha" not in values:
            raise TypeError("alpha is missing: give the factor of the budget law, for example alpha=2.0")
        return cls(**values)

    def to_json(self) -> str:
        """The config as a JSON object."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "NCConfig":
        """The config that ``to_json`` wrote; raises ValueError for what is no JSON, and as the constructor."""
        try:
            values = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"a config is a JSON object, and this cannot be read as one: {error}") from error
        return cls.from_dict(values)


# The defaults of all settings but the budget law and the selections, and what each is checked by.
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(NCConfig)[4:]}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "min_keys": partial(check_integer, least=1),
    "dense_below": partial(check_integer, least=0),
    "track": check_bool,
    "on_drop": partial(check_choice, allowed=get_args(OnDrop)),
    "max_dropped_mass": partial(check_number, allowed="a number in [0, 1)", ok=lambda v: 0 <= v < 1),
    "dense_layers": lambda name, value: _layers(value),
    "backend": partial(check_choice, allowed=BACKENDS),
    "key_index": partial(check_choice, allowed=get_args(IndexUse)),
}


def option_owners() -> dict[str, list[tuple[type[Selection], str]]]:
    """By the name of each option of a selection: the selections that have it, and what their field is called."""
    owners: dict[str, list[tuple[type[Selection], str]]] = {}
    for kind in map(selection_class, selection_names()):
        for option in kind.options:
            owners.setdefault(kind.shorthand.get(option, option), []).append((kind, option))
    return owners


def as_selection(name: str, given: Any) -> Selection:
    """A selection that is given as one, by its name, or as ``Selection.to_dict`` writes it; ``name`` is the setting's.

    Raises:
        ValueError: no selection has that name, or an option is out of its range.
        TypeError: the selection has no such option.
    """
    if isinstance(given, Selection):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    kind = selection_class(options.pop("name", None), name)
    unknown = sorted(map(str, options.keys() - set(kind.options)))
    if unknown:
        raise TypeError(f"{name}: {kind.name!r} has no option {', '.join(unknown)}; it has {', '.join(kind.options)}")
    return kind(**options)


def _selections_of(settings: Mapping[str, Any]) -> dict[str, Selection]:
    """``prefill`` and ``decode``, with the options that are given by name."""
    both = settings.get("selection")
    clash = [phase for phase in _PHASES if phase in settings and both is not None]
    if clash:
        raise TypeError(f"selection sets prefill and decode; leave it out or leave out {' and '.join(clash)}")
    chosen = {
        phase: as_selection(phase, settings.get(phase, default)) if both is None else as_selection("selection", both)
        for phase, default in _DEFAULT_SELECTIONS.items()
    }
    for option, owners in option_owners().items():
        if option not in settings:
            continue
        for kind, field in owners:
            kind(**{field: settings[option]})  # an option that no phase has is checked too
            chosen = {
                phase: dataclasses.replace(each, **{field: settings[option]}) if type(each) is kind else each  # type: ignore[type-var]
                for phase, each in chosen.items()
            }
    return chosen


def check_option_names(settings: dict[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of ``NCConfig`` by name; raises TypeError where a name is none, and lists those that there are.

    ``but``: those that are not allowed here.
    """
    names = [name for name in ("alpha", "C", *_PHASES, *_DEFAULTS, *option_owners(), "selection") if name not in but]
    unknown = [name for name in settings if name not in names]
    if unknown:
        lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(str(unknown[0]).lower(), lower, n=1)
        wrong = ", ".join(shown(name).strip("'") for name in unknown[:9])
        raise TypeError(
            f"unknown option {wrong}; allowed are {', '.join(names[:-1])}, and selection"
            f"{f'. Did you mean {lower[near[0]]}?' if near else ''}"
        )
    return settings


def _layers(given: Any) -> tuple[int, ...]:
    layers = plain(given)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"dense_layers must be a sequence of layer indices, got {shown(layers)}")
    return tuple(sorted({check_integer("dense_layers", layer, 0) for layer in layers}))


def _summary(value: PerHead) -> str:
    """A number as it is; lists per layer in full where they are short, else by their size and range."""
    if not isinstance(value, tuple) or len(repr(value)) <= 40:
        return repr(value)
    rows = [row if isinstance(row, tuple) else (row,) for row in value]
    every = [number for row in rows for number in row]
    heads = f" of {len(rows[0])} heads" if isinstance(value[0], tuple) else ""
    return f"<{len(rows)} layers{heads}, {min(every):.4g} to {max(every):.4g}>"


def _per_head(name: str, value: Any, allowed: str, ok: Callable[[float], bool], depth: int = 0) -> Any:
    """Checks a number, a list per layer, or a list of lists, and returns it as floats and tuples."""
    value = plain(value)
    if isinstance(value, (list, tuple)):
        if depth == 2 or not value:
            raise ValueError(
                f"{name} must be a number, a list per layer, or a list per layer and head, got {shown(value)}"
            )
        return tuple(_per_head(name, item, allowed, ok, depth + 1) for item in value)
    if as_number(value) is None:
        raise TypeError(f"{name} must be {allowed}, or a list of them, got {shown(value)}")
    return check_number(name, value, allowed, ok)


def _entry(name: str, values: tuple[Any, ...], of: str, number: int | None) -> Any:
    """What is given for one layer or head; ``of`` says of which of the two."""
    if number is None:
        raise ValueError(f"{name} is given per {of}: say which {of}")
    if not 0 <= number < len(values):
        raise ValueError(f"{name} is given for {len(values)} {of}s, got {of} {number}")
    return values[number]

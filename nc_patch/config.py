"""``NCConfig``: every setting of sparse attention in one frozen, validated object that JSON can hold."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from nc_patch.budget import budget_of, budgets, is_dense_law, row_budgets
from nc_patch.common import (
    LARGEST_INTEGER,
    as_integer,
    as_number,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    plain,
    shown,
)
from nc_patch.ops.backends import check_backend
from nc_patch.selections import Block, Selection, TopK, selection_class, selection_names

Backend = Literal["auto", "triton", "cpu", "torch"]
IndexUse = Literal["auto", "always", "never"]
OnDrop = Literal["ignore", "warn", "raise", "dense"]
PerHead = float | tuple[float, ...] | tuple[tuple[float, ...], ...]

INDEX_USES: tuple[IndexUse, ...] = ("auto", "always", "never")
ON_DROP: tuple[OnDrop, ...] = ("ignore", "warn", "raise", "dense")
# The budget of patch_model(model): see the table in docs/choosing.md.
DEFAULT_ALPHA, DEFAULT_C = 12.0, 0.5
DEFAULT_DENSE_BELOW = 1024
DEFAULT_PREFILL, DEFAULT_DECODE = Block(), TopK()
_DEFAULT_SELECTIONS = {"prefill": DEFAULT_PREFILL, "decode": DEFAULT_DECODE}
_PHASES = tuple(_DEFAULT_SELECTIONS)
# Options of earlier versions: the value that ``to_dict`` wrote by default, which files may still hold, and what is now.
_REMOVED: dict[str, tuple[Any, str]] = {
    "estimator": ("sampled", "block-sparse prefill always scores sampled queries; leave it out"),
    "refine": (True, "decoding by an index is always exact; leave it out"),
    "law": ("power", "the budget is alpha * n**C, and its logarithm was a baseline to compare with; leave it out"),
}


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
        dense_below: a query that sees at most so many keys attends them all, whatever the selection: with so few sparse
            attention saves no time. A call in which no query sees more runs dense. 0 is the law alone.
        track: whether ``nc_stats`` holds the kept mass, layer by layer and head by head: see docs/certificates.md for
            what that costs.
        on_drop: what happens when a call of a layer drops more than ``max_dropped_mass``: ``"ignore"``, ``"warn"`` once
            a layer, ``"raise"`` a ``DroppedMassError``, or redo the call ``"dense"``. What a call keeps is judged by
            the proven lower limit of every row, and in prefill by blocks by an estimate for each head. All but
            ``"ignore"`` read the device in every call, and refuse to be compiled into a graph.
        max_dropped_mass: the part of the dense softmax mass, in [0, 1), that a row (a query and head) may drop.
        dense_layers: indices of layers that keep dense attention.
        backend: ``"triton"`` for GPUs (NVIDIA's from Ampere on, and AMD's), ``"cpu"`` for kernels that Numba compiles
            for the CPU, ``"torch"`` for PyTorch alone, or ``"auto"`` for the fastest that has what a call needs.
            Where Triton has not, or Numba is not installed, the log says so once.
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
    prefill: Selection = DEFAULT_PREFILL
    decode: Selection = DEFAULT_DECODE
    min_keys: int = 1
    dense_below: int = DEFAULT_DENSE_BELOW
    track: bool = False
    on_drop: OnDrop = "ignore"
    max_dropped_mass: float = 0.1
    dense_layers: tuple[int, ...] = ()
    backend: Backend = "auto"
    key_index: IndexUse = "auto"

    def __init__(self, alpha: Any, C: Any = 0.0, **options: Any) -> None:
        settings = _known({"alpha": alpha, "C": C, **options})
        for name, value in _selections_of(settings).items():
            object.__setattr__(self, name, value)
        given = _DEFAULTS | {name: value for name, value in settings.items() if name in _DEFAULTS}
        fields: dict[str, Any] = {
            "alpha": _per_head("alpha", alpha, "a positive number", lambda v: v > 0),
            "C": _per_head("C", C, "a number in [0, 1]", lambda v: 0 <= v <= 1),
            "min_keys": check_integer("min_keys", given["min_keys"], 1),
            "dense_below": check_integer("dense_below", given["dense_below"], 0),
            "track": check_bool("track", given["track"]),
            "max_dropped_mass": check_number(
                "max_dropped_mass", given["max_dropped_mass"], "a number in [0, 1)", lambda v: 0 <= v < 1
            ),
            "dense_layers": _layers(given["dense_layers"]),
        }
        check_choice("on_drop", given["on_drop"], ON_DROP)
        check_choice("key_index", given["key_index"], INDEX_USES)
        check_backend(given["backend"])
        for name, value in {**given, **fields}.items():
            object.__setattr__(self, name, value)
        _same_form(self.alpha, self.C)

    def __repr__(self) -> str:
        """``alpha``, ``C`` and what differs from its default; lists per layer by their size and range."""
        written = {name: _summary(getattr(self, name)) for name in ("alpha", "C")}
        if self.prefill == self.decode:
            kind, options = type(self.prefill), self.prefill.options
            written["selection"] = repr(kind.name)
            changed = [option for option in options if getattr(self.prefill, option) != getattr(kind, option)]
            written |= {kind.shorthand.get(option, option): repr(getattr(self.prefill, option)) for option in changed}
        else:
            chosen = {phase: getattr(self, phase) for phase in _PHASES}
            written |= {phase: repr(each) for phase, each in chosen.items() if each != _DEFAULT_SELECTIONS[phase]}
        changed = [name for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        written |= {name: repr(getattr(self, name)) for name in changed}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in written.items())})"

    def budget(self, n: int | torch.Tensor, layer: int | None = None, head: int | None = None) -> Any:
        """The budget law: how many of ``n`` visible keys a query attends.

        Args:
            n: number of visible keys, an int or an int tensor ``[...]`` of any shape.
            layer: layer index; needed when alpha or C are per layer.
            head: query head; needed when alpha or C are per layer and head.

        Returns:
            An int for an int, an int32 tensor of the same shape and device for a tensor.

        Raises:
            ValueError: a negative ``n``, or no layer or head where alpha or C need one.
            TypeError: a tensor that does not hold integers.
        """
        alpha, C = _pick("alpha", self.alpha, layer, head), _pick("C", self.C, layer, head)
        if not isinstance(n, torch.Tensor):
            count = as_integer(n)
            if count is None:
                raise TypeError(f"n must be an int or an int tensor, got {shown(n)}")
            return budget_of(count, alpha, C, self.min_keys, self.dense_below)
        if n.dtype.is_floating_point or n.dtype == torch.bool:
            raise TypeError(f"n must be an int tensor, got {n.dtype}")
        if n.numel() == 0:
            return n.to(torch.int32)
        if int(n.min()) < 0:
            raise ValueError(f"n must be at least 0 everywhere, got {int(n.min())}")
        if int(n.max()) > LARGEST_INTEGER:
            raise ValueError(f"n must be at most {LARGEST_INTEGER} everywhere, got {int(n.max())}")
        found = budgets(n.cpu().numpy(), alpha, C, self.min_keys, self.dense_below)
        return torch.from_numpy(found).to(n.device, torch.int32)

    def row_budgets(self, visible: torch.Tensor, max_n: int, layer: int | None = None) -> torch.Tensor:
        """Budgets int32 ``[B, 1 or Hq, Lq]`` of a layer's queries, of which none sees more than ``max_n`` keys.

        Args:
            visible: int32 ``[B, Lq, 2]``, the interval of keys that each query sees.
        """
        alphas, exponents = zip(*self.laws(layer), strict=True)
        return row_budgets(visible, max_n, list(alphas), list(exponents), self.min_keys, self.dense_below)

    @property
    def layers(self) -> int | None:
        """For how many layers alpha or C are given one by one; None where they are not."""
        given = [len(values) for values in (self.alpha, self.C) if isinstance(values, tuple)]
        return max(given, default=None)

    def budgets_by_layer(self, visible: torch.Tensor, max_n: int) -> tuple[torch.Tensor, ...]:
        """``row_budgets`` of every layer, where alpha or C are per layer, found at once."""
        laws = [self.laws(layer) for layer in range(self.layers or 0)]
        alphas, exponents = zip(*itertools.chain.from_iterable(laws), strict=True)
        found = row_budgets(visible, max_n, list(alphas), list(exponents), self.min_keys, self.dense_below)
        return tuple(each.contiguous() for each in found.split([len(of_layer) for of_layer in laws], 1))

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
        alpha, C = _of_layer("alpha", self.alpha, layer), _of_layer("C", self.C, layer)
        heads = max(len(v) if isinstance(v, tuple) else 1 for v in (alpha, C))
        spread = lambda v: v if isinstance(v, tuple) else (v,) * heads  # noqa: E731
        return tuple(zip(spread(alpha), spread(C), strict=True))

    def is_dense(self, layer: int | None = None) -> bool:
        """Whether the layer attends every key at every length, whatever the selection."""
        if layer is not None and layer in self.dense_layers:
            return True
        return all(is_dense_law(alpha, C) for alpha, C in self.laws(layer))

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raises ValueError unless per-layer and per-head values, and dense_layers, fit a model of this shape."""
        for name, value in (("alpha", self.alpha), ("C", self.C)):
            if not isinstance(value, tuple):
                continue
            if len(value) != num_layers:
                raise ValueError(f"{name} has {len(value)} layers, the model has {num_layers}")
            for layer, heads in enumerate(value):
                if isinstance(heads, tuple) and len(heads) != num_heads:
                    raise ValueError(f"{name}[{layer}] has {len(heads)} heads, the model has {num_heads}")
        beyond = [layer for layer in self.dense_layers if layer >= num_layers]
        if beyond:
            raise ValueError(f"dense_layers names layers {beyond}, the model has layers 0 to {num_layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that JSON can hold and ``from_dict`` takes back."""
        plain_values = {field.name: _as_lists(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return plain_values | {phase: getattr(self, phase).to_dict() for phase in _PHASES}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NCConfig":
        """The config that ``to_dict`` wrote, here or in earlier versions.

        Raises:
            TypeError: an unknown name, a value of a wrong type, or no mapping at all.
            ValueError: a value outside its range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config is a mapping of names to values, got {type(values).__name__}")
        if "alpha" not in values:
            raise TypeError("alpha is missing: give the factor of the budget law, for example alpha=2.0")
        return cls(**{name: value for name, value in values.items() if not _is_removed_default(name, value)})

    def to_json(self) -> str:
        """The config as a JSON object."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "NCConfig":
        """The config that ``to_json`` wrote.

        Raises:
            ValueError: the text is no JSON, or names a setting twice; or as the constructor.
            TypeError: as the constructor.
        """
        try:
            values = json.loads(text, object_pairs_hook=_each_once)
        except RecursionError as error:
            raise ValueError("a config is a JSON object, got one that is nested too deep to read") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"a config is a JSON object, and this is no JSON: {error}") from error
        return cls.from_dict(values)


# The defaults of all settings but the budget law and the selections.
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(NCConfig)[4:]}


def option_owners() -> dict[str, list[tuple[type[Selection], str]]]:
    """By the name of each option of a selection: the selections that have it, and what their field is called."""
    owners: dict[str, list[tuple[type[Selection], str]]] = {}
    for kind in map(selection_class, selection_names()):
        for option in kind.options:
            owners.setdefault(kind.shorthand.get(option, option), []).append((kind, option))
    return owners


def check_option_names(names: Iterable[str]) -> None:
    """Raises TypeError where a name is no setting of ``NCConfig``; the message lists those that there are."""
    _known(dict.fromkeys(names))


def as_selection(name: str, given: Any) -> Selection:
    """A selection that is given as one, by its name, or as ``Selection.to_dict`` writes it; ``name`` is the setting's.

    Raises:
        ValueError: no selection has that name, or an option is out of its range.
        TypeError: the selection has no such option.
    """
    if isinstance(given, Selection):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    kind_name = options.pop("name", None)
    if not isinstance(kind_name, str) or kind_name not in selection_names():
        raise ValueError(f"{name} must be one of {', '.join(map(repr, selection_names()))}, got {shown(kind_name)}")
    kind = selection_class(kind_name)
    unknown = sorted(map(str, options.keys() - set(kind.options)))
    if unknown:
        raise TypeError(f"{name}: {kind_name!r} has no option {', '.join(unknown)}; it has {', '.join(kind.options)}")
    return kind(**options)


def _selections_of(settings: Mapping[str, Any]) -> dict[str, Selection]:
    """``prefill`` and ``decode``, with the options that are given by name."""
    both = settings.get("selection")
    if both is not None:
        clash = [phase for phase in _PHASES if phase in settings]
        if clash:
            raise TypeError(f"selection sets prefill and decode; leave it out or leave out {' and '.join(clash)}")
    name = lambda phase: phase if both is None else "selection"  # noqa: E731
    given = {phase: settings.get(phase, _DEFAULT_SELECTIONS[phase]) if both is None else both for phase in _PHASES}
    chosen = {phase: as_selection(name(phase), value) for phase, value in given.items()}
    for option, owners in option_owners().items():
        if option not in settings:
            continue
        for kind, field in owners:
            kind(**{field: settings[option]})  # an option that no phase has is checked too
        fields = dict(owners)
        chosen = {
            phase: dataclasses.replace(each, **{fields[type(each)]: settings[option]}) if type(each) in fields else each  # type: ignore[type-var]
            for phase, each in chosen.items()
        }
    return chosen


def _is_removed_default(name: Any, value: Any) -> bool:
    """Whether an entry of a file is a removed option at its default, which asks for what is done anyway."""
    return name in _REMOVED and type(value) is type(_REMOVED[name][0]) and value == _REMOVED[name][0]


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings; raises TypeError where a name is none."""
    names = ["alpha", "C", *_PHASES, *_DEFAULTS, *option_owners(), "selection"]
    for name, (_, instead) in _REMOVED.items():
        if name in settings:
            raise TypeError(f"the option {name} was removed: {instead}")
    written = lambda name: name[:80] if isinstance(name, str) and name.isprintable() else shown(name)  # noqa: E731
    unknown = sorted(map(written, settings.keys() - set(names)))
    if unknown:
        hint = _meant(unknown[0], names)
        raise TypeError(
            f"unknown option {', '.join(unknown[:9])}; allowed are {', '.join(names[:-1])}, and selection"
            f"{f'. Did you mean {hint}?' if hint else ''}"
        )
    return settings


def _layers(given: Any) -> tuple[int, ...]:
    layers = plain(given)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"dense_layers must be a sequence of layer indices, got {shown(layers)}")
    return tuple(sorted({check_integer("dense_layers", layer, 0) for layer in layers}))


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"a config holds every setting once, got {', '.join(map(shown, twice))} several times")
    return dict(pairs)


def _meant(unknown: str, names: list[str]) -> str | None:
    """The name that a misspelled one most likely stands for, if any comes near."""
    same = [name for name in names if name.lower() == unknown.lower()]
    return next(iter(same or difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)), None)


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


def _same_form(alpha: PerHead, C: PerHead) -> None:
    if isinstance(alpha, tuple) and isinstance(C, tuple):
        if len(alpha) != len(C):
            raise ValueError(f"alpha has {len(alpha)} layers and C has {len(C)}; give both the same number")
        for layer, (a, c) in enumerate(zip(alpha, C, strict=True)):
            if isinstance(a, tuple) and isinstance(c, tuple) and len(a) != len(c):
                raise ValueError(f"layer {layer}: alpha has {len(a)} heads and C has {len(c)}; give both the same")


def _of_layer(name: str, value: PerHead, layer: int | None) -> float | tuple[float, ...]:
    if not isinstance(value, tuple):
        return value
    if layer is None:
        raise ValueError(f"{name} is given per layer: say which layer")
    if not 0 <= layer < len(value):
        raise ValueError(f"{name} is given for {len(value)} layers, got layer {layer}")
    return value[layer]


def _pick(name: str, value: PerHead, layer: int | None, head: int | None) -> float:
    of_layer = _of_layer(name, value, layer)
    if not isinstance(of_layer, tuple):
        return of_layer
    if head is None:
        raise ValueError(f"{name} is given per head: say which head")
    if not 0 <= head < len(of_layer):
        raise ValueError(f"{name} is given for {len(of_layer)} heads, got head {head}")
    return of_layer[head]


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value

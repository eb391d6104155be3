"""``NCConfig``: every setting of sparse attention in one frozen, validated object that JSON can hold."""

import dataclasses
import difflib
import json
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nc_patch.budget import LAWS, Law, budget_of, budget_table, is_dense_law
from nc_patch.common import as_bool, as_integer, as_number, plain

Selection = Literal["topk", "block", "window", "dense"]
Backend = Literal["auto", "triton", "torch"]
IndexUse = Literal["auto", "always", "never"]
Tail = Literal["mean", "drop"]
OnDrop = Literal["ignore", "warn", "raise", "dense"]
PerHead = float | tuple[float, ...] | tuple[tuple[float, ...], ...]

SELECTIONS: tuple[Selection, ...] = ("topk", "block", "window", "dense")
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")
INDEX_USES: tuple[IndexUse, ...] = ("auto", "always", "never")
TAILS: tuple[Tail, ...] = ("mean", "drop")
ON_DROP: tuple[OnDrop, ...] = ("ignore", "warn", "raise", "dense")
BLOCK_SIZES = (16, 32, 64, 128)
# Numbers of keys are kept in 32 bits.
LARGEST_INTEGER = 2**31 - 1
# Up to here budgets of many n are looked up in a table of all of them.
_LARGEST_TABLE = 2**22
# The budget of patch_model(model): see the table in docs/choosing.md.
DEFAULT_ALPHA, DEFAULT_C = 2.0, 0.5
QUERY_BLOCK_SIZES = (64, 128)
SAMPLE_STRIDES = (4, 8, 16, 32, 64)
Estimator = Literal["sampled", "antidiagonal", "pooled"]
ESTIMATORS: tuple[Estimator, ...] = ("sampled", "antidiagonal", "pooled")


@dataclass(frozen=True)
class NCConfig:
    """Settings of attention over ``k(n) = min(n, max(min_keys, ceil(alpha * n**C)))`` of the n visible keys.

    Args:
        alpha: factor of the budget law, positive. One number; one per layer; or one per layer and query head.
        C: exponent of the budget law, in [0, 1]; the same forms as ``alpha``. 0 is a fixed budget; 1 with
            ``alpha >= 1`` is dense.
        prefill: selection for calls with more than one query: ``"topk"``, ``"block"``, ``"window"`` or ``"dense"``.
        decode: selection for calls with one query per sequence, or with up to 32 queries that continue a cache. With
            ``"block"`` for both ``prefill`` and ``decode``, calls with several queries count as prefill.
        sink_keys: the first visible keys, attended always (within the budget).
        recent_keys: the last visible keys, attended always (within the budget, before the sinks).
        min_keys: lower limit of the budget.
        block_size: keys per block of ``"block"``: 16, 32, 64 or 128.
        query_block_size: how many positions choose their blocks together in prefill: 64 or 128.
        sample_stride: in prefill one query in so many is scored against all keys to choose blocks: 4, 8, 16, 32 or 64.
        estimator: how blocks are scored in prefill: by ``"sampled"`` queries; or, to compare with, by
            ``"antidiagonal"`` sums as in XAttention, or by means of queries and keys, ``"pooled"``.
        min_mass: kept mass in (0, 1) to aim at in prefill by blocks: where the sampled queries keep less within the
            budget, their block of queries attends more key blocks. None for the budget alone.
        max_factor: the most that ``min_mass`` may attend, as a multiple of the budget's blocks, at least 1.
        track: whether ``nc_stats`` holds the kept mass, layer by layer and head by head: see docs/certificates.md for
            what that costs.
        on_drop: what happens when a call of a layer drops more than ``max_dropped_mass``: ``"ignore"``, ``"warn"`` once
            a layer, ``"raise"`` a ``DroppedMassError``, or redo the call ``"dense"``. What a call keeps is judged by
            the proven lower limit of every row, and in prefill by ``"block"`` by an estimate for each head. All but
            ``"ignore"`` read the device in every call, and refuse to be compiled into a graph.
        max_dropped_mass: the part of the dense softmax mass, in [0, 1), that a row (a query and head) may drop.
        dense_layers: indices of layers that keep dense attention.
        backend: ``"triton"``, ``"torch"``, or ``"auto"`` for Triton on GPUs (NVIDIA's from Ampere on, and AMD's) where
            it has a kernel for the call, and PyTorch elsewhere. What Triton lacks is logged once.
        key_index: whether a layer keeps an index beside its keys to decode by: ``"always"``, ``"never"``, or ``"auto"``
            where it saves time: for ``"block"``, and for ``"topk"`` on Triton. It changes no result.
        refine: whether ``"topk"`` decodes exactly by its index. With False the 8-bit scores of the index choose and
            weigh the keys, which is cheaper and approximate.
        tail: what ``"topk"`` does with the keys that it does not attend. ``"mean"``: every page of 16 keys enters as
            one more key, its mean, which counts as often as the page has keys that are not attended; this costs a
            sixteenth of dense attention more. ``"drop"``: nothing, which is the paper's definition. Other selections
            always drop them; for ``"block"`` means were measured to do harm.
        law: ``"power"``, or ``"log"`` for ``ceil(alpha * log2(n))``, a baseline to compare with; it takes no C.

    Raises:
        ValueError: a value is outside its range; the message names the range.
        TypeError: a value has the wrong type.
    """

    alpha: PerHead
    C: PerHead = 0.0
    _: dataclasses.KW_ONLY
    prefill: Selection = "topk"
    decode: Selection = "topk"
    sink_keys: int = 4
    recent_keys: int = 1
    min_keys: int = 1
    block_size: int = 32
    query_block_size: int = 64
    sample_stride: int = 16
    estimator: Estimator = "sampled"
    min_mass: float | None = None
    max_factor: float = 4.0
    track: bool = False
    on_drop: OnDrop = "ignore"
    max_dropped_mass: float = 0.1
    dense_layers: tuple[int, ...] = ()
    backend: Backend = "auto"
    key_index: IndexUse = "auto"
    refine: bool = True
    tail: Tail = "mean"
    law: Law = "power"

    def __repr__(self) -> str:
        """``alpha``, ``C`` and what differs from its default; lists per layer by their size and range."""
        written = {name: _summary(getattr(self, name)) for name in ("alpha", "C")}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in written and value != field.default:
                written[field.name] = repr(value)
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in written.items())})"

    def __post_init__(self) -> None:
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        _choice("law", self.law, LAWS)
        set_field("alpha", _per_head("alpha", self.alpha, "a positive number", lambda v: v > 0))
        set_field("C", _per_head("C", self.C, "a number in [0, 1]", lambda v: 0 <= v <= 1))
        if self.law == "log" and self.C != 0.0:
            raise ValueError(f'law="log" has no exponent: C must be 0, got {self.C}')
        _same_form(self.alpha, self.C)
        _choice("prefill", self.prefill, SELECTIONS)
        _choice("decode", self.decode, SELECTIONS)
        _choice("backend", self.backend, BACKENDS)
        _choice("key_index", self.key_index, INDEX_USES)
        for name in ("refine", "track"):
            given = as_bool(getattr(self, name))
            if given is None:
                raise TypeError(f"{name} must be True or False, got {shown(getattr(self, name))}")
            set_field(name, given)
        if not self.refine and self.key_index == "never":
            raise ValueError('refine=False scores keys by their index, which key_index="never" takes away')
        _choice("tail", self.tail, TAILS)
        _choice("on_drop", self.on_drop, ON_DROP)
        for name, least in (("sink_keys", 0), ("recent_keys", 0), ("min_keys", 1), ("block_size", 1)):
            set_field(name, _integer(name, getattr(self, name), least))
        _choice("block_size", self.block_size, BLOCK_SIZES)
        self._check_blocks()
        layers = plain(self.dense_layers)
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"dense_layers must be a sequence of layer indices, got {shown(layers)}")
        set_field("dense_layers", tuple(sorted({_integer("dense_layers", layer, 0) for layer in layers})))

    def _check_blocks(self) -> None:
        """Checks the settings of block prefill, and of the mass that may be dropped."""
        for name, allowed in (("query_block_size", QUERY_BLOCK_SIZES), ("sample_stride", SAMPLE_STRIDES)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), 1))
            _choice(name, getattr(self, name), allowed)
        _choice("estimator", self.estimator, ESTIMATORS)
        if self.estimator == "antidiagonal" and self.sample_stride > self.block_size:
            raise ValueError(
                'estimator="antidiagonal" scores whole strides of keys: sample_stride must be at most block_size, got '
                f"{self.sample_stride} and {self.block_size}"
            )
        for name, allowed_range, fits in (
            ("min_mass", "a number in (0, 1), or None", lambda v: 0 < v < 1),
            ("max_factor", "a number of at least 1", lambda v: 1 <= v < math.inf),
            ("max_dropped_mass", "a number in [0, 1)", lambda v: 0 <= v < 1),
        ):
            if getattr(self, name) is not None or name != "min_mass":
                object.__setattr__(self, name, _number(name, getattr(self, name), allowed_range, fits))

    @classmethod
    def create(cls, alpha: Any, C: Any = 0.0, *, selection: Selection | None = None, **options: Any) -> "NCConfig":
        """Builds a config from keyword options, where ``selection`` sets both ``prefill`` and ``decode``.

        Raises:
            TypeError: an option has no such name, or ``selection`` comes together with ``prefill`` or ``decode``.
        """
        if selection is not None:
            clash = sorted({"prefill", "decode"} & options.keys())
            if clash:
                raise TypeError(f"selection sets prefill and decode; leave it out or leave out {' and '.join(clash)}")
            _choice("selection", selection, SELECTIONS)
            options |= {"prefill": selection, "decode": selection}
        return cls(**_known_options({"alpha": alpha, "C": C, **options}))

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
            return budget_of(count, alpha, C, self.min_keys, self.law)
        if n.dtype.is_floating_point or n.dtype == torch.bool:
            raise TypeError(f"n must be an int tensor, got {n.dtype}")
        if n.numel() == 0:
            return n.to(torch.int32)
        if int(n.min()) < 0:
            raise ValueError(f"n must be at least 0 everywhere, got {int(n.min())}")
        largest = int(n.max())
        if largest > LARGEST_INTEGER:
            raise ValueError(f"n must be at most {LARGEST_INTEGER} everywhere, got {largest}")
        if largest <= _LARGEST_TABLE:
            return budget_table(largest, ((alpha, C),), self.min_keys, self.law, n.device)[0, n.long()]
        each, where = n.unique(return_inverse=True)
        budgets = [budget_of(count, alpha, C, self.min_keys, self.law) for count in each.tolist()]
        return torch.tensor(budgets, dtype=torch.int32, device=n.device)[where]

    def largest_budget(self, n: int, layer: int | None = None) -> int:
        """The largest budget that any head of a layer has for up to ``n`` visible keys."""
        return max(budget_of(n, alpha, C, self.min_keys, self.law) for alpha, C in self.laws(layer))

    def laws(self, layer: int | None = None) -> tuple[tuple[float, float], ...]:
        """The (alpha, C) pairs of a layer: one pair shared by all heads, or one per query head."""
        alpha, C = _of_layer("alpha", self.alpha, layer), _of_layer("C", self.C, layer)
        heads = max(len(v) if isinstance(v, tuple) else 1 for v in (alpha, C))
        spread = lambda v: v if isinstance(v, tuple) else (v,) * heads  # noqa: E731
        return tuple(zip(spread(alpha), spread(C), strict=True))

    def is_dense(self, layer: int | None = None) -> bool:
        """Whether the layer attends every key at every length, whatever the selection."""
        if layer is not None and layer in self.dense_layers:
            return True
        return all(is_dense_law(alpha, C, self.law) for alpha, C in self.laws(layer))

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
        return {name: _as_lists(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "NCConfig":
        """The config that ``to_dict`` wrote.

        Raises:
            TypeError: an unknown name, a value of a wrong type, or no mapping at all.
            ValueError: a value outside its range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config is a mapping of names to values, got {type(values).__name__}")
        return cls(**_known_options(dict(values)))

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
            raise ValueError("a config is a flat JSON object, got one that is nested too deep to read") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"a config is a JSON object, and this is no JSON: {error}") from error
        return cls.from_dict(values)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"a config holds every setting once, got {', '.join(map(shown, twice))} several times")
    return dict(pairs)


class _Short(reprlib.Repr):
    """Representations of whatever a user or a file may give: never long, never deep."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """``repr`` of any value for a message, cut where it is long or deep."""
    return _SHORT.repr(value)


def check_option_names(names: Iterable[str]) -> None:
    """Raises TypeError where a name is no option of ``NCConfig.create``; the message lists those that there are."""
    _known_options({"alpha": None, **dict.fromkeys(name for name in names if name != "selection")})


# Here rather than where they are used: torch.compile cannot trace ``dataclasses.fields``.
_NAMES = [field.name for field in dataclasses.fields(NCConfig)]


def _known_options(options: dict[str, Any]) -> dict[str, Any]:
    written = lambda name: name[:80] if isinstance(name, str) and name.isprintable() else shown(name)  # noqa: E731
    unknown = sorted(map(written, options.keys() - set(_NAMES)))
    if unknown:
        hint = _meant(unknown[0], [*_NAMES, "selection"])
        raise TypeError(
            f"unknown option {', '.join(unknown[:9])}; allowed are {', '.join(_NAMES)}, and selection"
            f"{f'. Did you mean {hint}?' if hint else ''}"
        )
    if "alpha" not in options:
        raise TypeError("alpha is missing: give the factor of the budget law, for example alpha=2.0")
    return options


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


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, int)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def _integer(name: str, value: Any, least: int) -> int:
    found = as_integer(value)
    if found is None:
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not least <= found <= LARGEST_INTEGER:
        bound = f"at least {least}" if found < least else f"at most {LARGEST_INTEGER}"
        raise ValueError(f"{name} must be {bound}, got {shown(value)}")
    return found


def _number(name: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> float:
    found = as_number(value)
    if found is None:
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}")
    if not abs(found) <= sys.float_info.max or not ok(float(found)):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return float(found)


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
    return _number(name, value, allowed, ok)


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

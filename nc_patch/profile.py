"""``Profile``: what calibration measured on a model, and the budgets of every layer and head that follow from it."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nc_patch.allocation import Costs, Laws, allocate, attends_all
from nc_patch.common import ProfileError, as_integer, as_number, plain
from nc_patch.config import NCConfig
from nc_patch.fingerprint import weights_fingerprint
from nc_patch.fits import theil_sen
from nc_patch.patch import model_shape
from nc_patch.profile_file import FORMAT, checked_fields, read_profile, write_profile

logger = logging.getLogger("nc_patch")

Over = Literal["sequence", "last"]
# A head that needs more than this share of all keys at the longest length is not sparse.
SPARSE_BELOW = 0.5


@dataclass(frozen=True, eq=False)
class Fit:
    """The law ``keys = alpha * n^C`` of the keys that hold ``1 - eps`` of a head's mass; arrays ``[M, H]``.

    Attributes:
        eps: share of the mass that may be missing.
        alpha, alpha_low, alpha_high: factor, with its 90 % interval.
        C, C_low, C_high: exponent, with its 90 % interval.
        r2: share of the variance over the lengths that the law explains.
        level_half: half the width of the 90 % interval of log keys at the middle (geometric mean) of the lengths.
        support: ``[L, M, H]``, the points: geometric mean of the keys counted at each length.
    """

    eps: float
    alpha: np.ndarray
    alpha_low: np.ndarray
    alpha_high: np.ndarray
    C: np.ndarray
    C_low: np.ndarray
    C_high: np.ndarray
    r2: np.ndarray
    level_half: np.ndarray
    support: np.ndarray


@dataclass(frozen=True, eq=False)
class Profile:
    """What a model's attention holds, and budget laws for it. L lengths, M layers, H query heads, G numbers of keys.

    ``calibrate`` makes one; ``at_budget`` and ``at_mass`` give one with other laws; ``patch_model(model,
    profile=profile)`` applies it.

    Attributes:
        model: name of the model. model_class: its class. fingerprint: of its weights.
        texts: SHA-256 of the tokens that were read. pieces: how many pieces of text.
        lengths: numbers of tokens at which rows were taken, ascending.
        visible: ``[L, M]``, keys that these rows see; less than the length where a layer slides.
        windows: the most keys that a layer's queries see, 0 where there is no such limit; ``[M]``.
        keys: numbers of keys at which curves were taken; ``[G]``.
        kept: ``[L, M, H, G]``, mean share of the softmax mass that top-k keeps with each number of keys.
        error: ``[L, M, H, G]``, mean squared norm of the output's error with each number of keys.
        sensitivity: ``[M, H]``, the loss in nats per token that a unit of this error adds, to second order.
        fits: the law of the support, one for each eps, ascending.
        alpha, C: ``[M, H]``, the laws in force.
        aim: in words, what the laws in force were made for.
        dense_layers: layers that attend every key.
        versions: of the software that measured.
    """

    model: str
    model_class: str
    fingerprint: str
    texts: str
    pieces: int
    lengths: tuple[int, ...]
    visible: np.ndarray
    windows: tuple[int, ...]
    keys: tuple[int, ...]
    kept: np.ndarray
    error: np.ndarray
    sensitivity: np.ndarray
    fits: tuple[Fit, ...]
    alpha: np.ndarray
    C: np.ndarray
    aim: str
    dense_layers: tuple[int, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, heads = self.shape
        return (
            f"Profile({self.model!r}, {layers} layers of {heads} heads, lengths={self.lengths}, pieces={self.pieces}, "
            f"aim={self.aim!r})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """How many layers and query heads."""
        return int(self.alpha.shape[0]), int(self.alpha.shape[1])

    def config(self, **options: Any) -> NCConfig:
        """The ``NCConfig`` with this profile's laws.

        Args:
            options: every other option of ``NCConfig.create``; ``dense_layers`` adds to the profile's own.

        Raises:
            TypeError: an option is one that the profile brings, or as in ``NCConfig``.
            ValueError: as in ``NCConfig``.
        """
        dense = sorted({*self.dense_layers, *options.pop("dense_layers", ())})
        for name in ("alpha", "C", "law"):
            if name in options:
                raise TypeError(f"a profile brings {name} of its own; leave it out")
        return NCConfig.create(self.alpha.tolist(), self.C.tolist(), dense_layers=tuple(dense), **options)

    def check_model(self, model: torch.nn.Module) -> None:
        """Refuses a model of another shape, and warns of one with other weights.

        Raises:
            ProfileError: the model has other numbers of layers or heads.
        """
        shape = model_shape(model)
        if shape != self.shape:
            raise ProfileError(
                f"the profile of {self.model} is for {self.shape[0]} layers of {self.shape[1]} query heads; "
                f"{type(model).__name__} has {shape[0]} of {shape[1]}. Calibrate this model."
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            return  # a model without weights has no fingerprint
        found = weights_fingerprint(model)
        if found != self.fingerprint:
            logger.warning(
                f"The profile was measured on {self.model} with the weights {self.fingerprint}; these are {found}: "
                "another checkpoint or another dtype. Its budgets may not suit them; calibrate this model to be sure."
            )

    def at_budget(
        self,
        fraction: float | None = None,
        *,
        keys: float | None = None,
        n: int | None = None,
        over: Over = "sequence",
        dense_layers: tuple[int, ...] | None = None,
        min_keys: int = 1,
    ) -> "Profile":
        """The profile with the laws that lose least, as predicted, for a total budget.

        All layers and heads share the keys. What is least is the sum over heads of ``sensitivity * error``, the loss
        that their errors are predicted to add.

        Args:
            fraction: attended keys / visible keys over all layers, heads and counted queries, in (0, 1].
            keys: in place of ``fraction``, the mean number of keys of a query and head.
            n: context length for which the budget holds; None for the sequences of all calibrated lengths together.
                Beyond them the laws are extrapolated.
            over: ``"sequence"`` counts every query of a sequence of n tokens, as a prefill does; ``"last"`` the query
                that sees all n, as a decoding step does.
            dense_layers: layers that attend every key, which counts; None for the profile's own.
            min_keys: the ``min_keys`` of the config, which counts too.

        Raises:
            ProfileError: values out of range, or a budget that cannot be had.
        """
        if (fraction is None) == (keys is None):
            raise ProfileError("give fraction, for example at_budget(fraction=0.1), or keys, and not both")
        if over not in ("sequence", "last"):
            raise ProfileError(f'over must be "sequence" or "last", got {over!r}')
        n = check_context(n)
        dense = self.dense_layers if dense_layers is None else checked_layers(dense_layers, self.shape[0])
        least = as_integer(min_keys)
        if least is None or least < 1:
            raise ProfileError(f"min_keys must be a positive number of keys, got {min_keys!r}")
        ends = self.lengths if n is None else (n,)
        rows = np.array(ends) if over == "last" else np.concatenate([np.arange(1, end + 1) for end in ends])
        if keys is not None:
            keys = _number("keys", keys, 0, np.inf)
            seen = np.mean([np.minimum(rows, window).mean() if window else rows.mean() for window in self.windows])
            fraction, asked = min(float(keys / seen), 1.0), f"{keys:g} keys"
        else:
            fraction = check_fraction(fraction)
            asked = f"{100 * fraction:g} % of the keys"
        laws = allocate(self._costs, rows, fraction, dense, least, (self.lengths[0], self.lengths[-1]))
        where = "over all calibrated lengths" if n is None else f"at {n:,} tokens"
        return self._with(laws, f"{asked} {where}, {over}", dense)

    def at_mass(self, mass: float, *, dense_layers: tuple[int, ...] | None = None) -> "Profile":
        """The profile with laws under which every head keeps this share of its softmax mass, on average.

        Args:
            mass: in (0, 1).
            dense_layers: as in ``at_budget``.

        Raises:
            ProfileError: ``mass`` is out of range.
        """
        mass = _number("mass", mass, 0, 1)
        if mass == 1:
            raise ProfileError("mass must be below 1: every key is needed to keep all of it")
        dense = self.dense_layers if dense_layers is None else checked_layers(dense_layers, self.shape[0])
        log_k = np.log(np.maximum(self._keys_for(mass), 1.0))
        C, intercept = theil_sen(np.log(self.visible), log_k)
        alpha = np.exp(intercept)
        for layer, head in np.ndindex(*alpha.shape):
            if attends_all(float(alpha[layer, head]), float(C[layer, head]), self.lengths[0], self.lengths[-1]):
                alpha[layer, head] = C[layer, head] = 1.0
        return self._with(Laws(alpha, C), f"{100 * mass:g} % of every head's mass", dense)

    def kept_mass(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The share of the mass that the laws in force are predicted to keep for a query that sees n keys.

        Within the calibrated lengths it is interpolated, beyond them the measured curve is stretched as the support of
        each head grows.

        Returns:
            Arrays ``[M, H]``: the estimate and the ends of its 90 % interval.
        """
        budget = np.minimum(n, np.ceil(self.alpha * float(n) ** self.C))
        middle = self._mass_at(budget, n)
        spread = self._log_spread(n, middle)
        low, high = (self._mass_at(budget * np.exp(sign * spread), n) for sign in (-1, 1))
        dense = np.zeros(self.shape, dtype=bool)
        dense[list(self.dense_layers)] = True
        return tuple(np.where(dense, 1.0, part) for part in (middle, low, high))  # type: ignore[return-value]

    def is_sparse(self) -> np.ndarray:
        """Which heads are sparse, bool ``[M, H]``: 95 % (the nearest eps) of their mass in under half of the keys."""
        nearest = min(self.fits, key=lambda fit: abs(fit.eps - 0.05))
        return np.asarray(nearest.support[-1] < SPARSE_BELOW * self.visible[-1][:, None])

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON, whole or not at all.

        Raises:
            ProfileError: the file cannot be written.
        """
        write_profile(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Reads what ``save`` wrote.

        Raises:
            ProfileError: the file is missing, damaged, of a newer format, or no profile.
        """
        return cls.from_dict(read_profile(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that JSON can hold and ``from_dict`` takes back."""
        found: dict[str, Any] = {"format": FORMAT}
        for one in fields(self):
            found[one.name] = _plain(getattr(self, one.name))
        found["fits"] = [{one.name: _plain(getattr(fit, one.name)) for one in fields(fit)} for fit in self.fits]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """The profile of a dictionary that ``to_dict`` gave.

        Raises:
            ProfileError: a field is missing, unknown, of a wrong type or shape, or out of its range.
        """
        checked = checked_fields(values)
        fits = tuple(Fit(**fit) for fit in checked.pop("fits"))
        return cls(**checked, fits=fits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and json.dumps(self.to_dict()) == json.dumps(other.to_dict())

    __hash__ = None  # type: ignore[assignment]

    def _with(self, laws: Laws, aim: str, dense: tuple[int, ...]) -> "Profile":
        return replace(self, alpha=laws.alpha, C=np.clip(laws.C, 0.0, 1.0), aim=aim, dense_layers=dense)

    @cached_property
    def _costs(self) -> Costs:
        cost = self.sensitivity[..., None] * self.error
        return Costs(np.array(self.keys, dtype=float), self.visible, cost, np.array(self.windows))

    def _keys_for(self, mass: float) -> np.ndarray:
        """Keys at which each head keeps a share of its mass at each length, ``[L, M, H]``."""
        keys = np.minimum(np.array(self.keys, dtype=float), self.visible[:, :, None, None])
        kept = np.where(keys >= self.visible[:, :, None, None], 1.0, self.kept)
        found = np.empty(kept.shape[:-1])
        for at in np.ndindex(*found.shape):
            x, y = np.log(keys[at[0], at[1], 0]), np.maximum.accumulate(kept[at])
            found[at] = np.exp(np.interp(mass, y, x))
        return found

    def _mass_at(self, budget: np.ndarray, n: int) -> np.ndarray:
        """Mass ``[M, H]`` that budgets keep of n keys."""
        found = np.empty(self.shape)
        log_lengths = np.log(np.array(self.lengths, dtype=float))
        longest = self.lengths[-1]
        for layer, head in np.ndindex(*self.shape):
            seen = min(n, self.windows[layer]) if self.windows[layer] else n
            keys = min(float(budget[layer, head]), seen)
            if keys >= seen:
                found[layer, head] = 1.0
                continue
            if seen > longest:
                C = self._exponent_near(layer, head, keys, seen)
                keys *= (longest / seen) ** C
            levels = [self._curve(level, layer, head, keys) for level in range(len(self.lengths))]
            found[layer, head] = np.interp(np.log(min(seen, longest)), log_lengths, levels)
        return found

    def _curve(self, level: int, layer: int, head: int, keys: float) -> float:
        seen = self.visible[level, layer]
        if keys >= seen:
            return 1.0
        grid = np.array(self.keys, dtype=float)
        inside = grid < seen
        x = np.log(np.append(grid[inside], seen))
        return float(np.interp(np.log(max(keys, 1.0)), x, np.append(self.kept[level, layer, head][inside], 1.0)))

    def _exponent_near(self, layer: int, head: int, keys: float, n: int) -> float:
        """The exponent of the fit whose support is nearest to so many of n keys."""
        distance = [abs(np.log(fit.alpha[layer, head] * n ** fit.C[layer, head] / max(keys, 1.0))) for fit in self.fits]
        return float(self.fits[int(np.argmin(distance))].C[layer, head])

    def _log_spread(self, n: int, mass: np.ndarray) -> np.ndarray:
        """Half the width of the interval of log keys at n, ``[M, H]``, from the fit nearest to the mass kept."""
        eps = np.array([fit.eps for fit in self.fits])
        nearest = np.abs(np.log(np.maximum(1 - mass, 1e-4)[..., None] / eps)).argmin(-1)
        middle = np.log(self.visible).mean(0)[:, None]
        spreads = []
        for fit in self.fits:
            away = np.log(np.where(np.array(self.windows)[:, None] > 0, np.exp(middle), n)) - middle
            spreads.append(np.sqrt(fit.level_half**2 + ((fit.C_high - fit.C_low) / 2 * away) ** 2))
        return np.take_along_axis(np.stack(spreads, -1), nearest[..., None], -1)[..., 0]


def significant(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """The values with so many significant digits, so that files stay short and are read back the same."""
    return np.vectorize(lambda value: float(f"{value:.{digits}g}"), otypes=[float])(values)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def checked_layers(given: Iterable[Any], layers: int) -> tuple[int, ...]:
    """Layers by their number, each once and ascending; raises ProfileError for what a model of ``layers`` lacks."""
    found = {value: as_integer(value) for value in plain(given)}
    beyond = [value for value, layer in found.items() if layer is None or not 0 <= layer < layers]
    if beyond:
        raise ProfileError(f"dense_layers names {beyond}, the model has layers 0 to {layers - 1}")
    return tuple(sorted({layer for layer in found.values() if layer is not None}))


def check_fraction(fraction: Any) -> float:
    """The share of all keys that budgets are to attend; raises ProfileError unless it is in (0, 1]."""
    return _number("fraction", fraction, 0, 1)


def check_context(n: Any) -> int | None:
    """The context length that budgets are for; raises ProfileError unless it is positive, or None."""
    found = as_integer(n)
    if n is not None and (found is None or found < 1):
        raise ProfileError(f"n must be a positive number of tokens or None, got {n!r}")
    return found


def _number(name: str, value: Any, low: float, high: float) -> float:
    found = as_number(value)
    if found is None or not low < found <= high:
        raise ProfileError(f"{name} must be a number above {low:g} and at most {high:g}, got {value!r}")
    return float(found)

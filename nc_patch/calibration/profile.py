"""``Profile``: what calibration measured on a model, and the budgets of every layer and head that follow from it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nc_patch.budget import budgets, law_values
from nc_patch.calibration.allocate import Demand, Laws, allocate
from nc_patch.calibration.fingerprint import weights_fingerprint
from nc_patch.calibration.fit import Fit, theil_sen
from nc_patch.common import ProfileError, as_integer, check_integer, check_number, logger, plain, replace_file, shown
from nc_patch.config import NCConfig
from nc_patch.patch import model_shape

Over = Literal["sequence", "last"]
FORMAT = 1
# A head that needs more than this share of all keys at the longest length is not sparse.
SPARSE_BELOW = 0.5

checked_count = partial(check_integer, least=1, error=ProfileError)
checked_share = partial(check_number, allowed="a number in (0, 1)", ok=lambda v: 0 < v < 1, error=ProfileError)
checked_fraction = partial(check_number, allowed="a number in (0, 1]", ok=lambda v: 0 < v <= 1, error=ProfileError)

# The lists of a file that hold numbers, by their sides: L lengths, M layers, H query heads, G numbers of keys.
_SIDES = {
    **dict.fromkeys(("alpha", "C", "C_low", "C_high", "level_half", "sensitivity"), "MH"),
    **dict.fromkeys(("kept", "error"), "LMHG"),
    "support": "LMH",
    "visible": "LM",
    "lengths": "L",
    "windows": "M",
    "keys": "G",
}


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """What a model's attention holds, and budget laws for it. L lengths, M layers, H query heads, G numbers of keys.

    ``calibrate`` makes one; ``at_budget`` and ``at_mass`` give one with other laws; ``patch_model(model,
    profile=profile)`` applies it. Arrays are float64.

    Attributes:
        model, model_class: their names. fingerprint: of the weights. versions: of the software that measured.
        texts: SHA-256 of the tokens that were read, in so many ``pieces``.
        lengths: numbers of tokens at which rows were taken, ascending; ``visible [L, M]``: keys that these rows see.
        windows: ``[M]``, the most keys that a layer's queries see, 0 where there is no such limit.
        kept, error: ``[L, M, H, G]``, mean share of the softmax mass that top-k keeps with so many ``keys [G]``, and
            mean squared norm of the output's error.
        sensitivity: ``[M, H]``, the loss in nats per token that a unit of this error adds, to second order.
        fits: laws of the keys that hold ``1 - eps`` of the mass, one for each eps, ascending.
        alpha, C: ``[M, H]``, the laws in force. aim: in words, what they were made for.
        dense_layers: layers that attend every key.
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
        return f"Profile({self.model!r}, {layers} layers of {heads} heads, lengths={self.lengths}, aim={self.aim!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.to_dict() == other.to_dict()

    @property
    def shape(self) -> tuple[int, int]:
        """How many layers and query heads."""
        return int(self.alpha.shape[0]), int(self.alpha.shape[1])

    def config(self, **options: Any) -> NCConfig:
        """The ``NCConfig`` with this profile's laws and other options; ``dense_layers`` adds to the profile's own.

        Raises:
            TypeError: an option is one that the profile brings, or as in ``NCConfig``.
            ValueError: as in ``NCConfig``.
        """
        for name in options.keys() & {"alpha", "C"}:
            raise TypeError(f"a profile brings {name} of its own; leave it out")
        options["dense_layers"] = (*self.dense_layers, *options.get("dense_layers", ()))
        return NCConfig(self.alpha.tolist(), self.C.tolist(), **options)

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
        dense_below: int | None = None,
    ) -> "Profile":
        """The profile whose laws lose least, in the sum of ``sensitivity * error``, for a budget that all heads share.

        Args:
            fraction: attended keys / visible keys over all layers, heads and counted queries, in (0, 1].
            keys: in place of ``fraction``, the mean number of keys of a query and head.
            n: context length for which the budget holds; None for all calibrated lengths together.
            over: ``"sequence"`` counts every query of a sequence of n tokens, as a prefill does; ``"last"`` the query
                that sees all n, as a decoding step does.
            dense_layers, min_keys, dense_below: those of the config, which count too; None for the profile's own layers
                and the default of ``dense_below``.

        Raises:
            ProfileError: values out of range, or a budget that cannot be had.
        """
        if (fraction is None) == (keys is None):
            raise ProfileError("give fraction, for example at_budget(fraction=0.1), or keys, and not both")
        if over not in ("sequence", "last"):
            raise ProfileError(f'over must be "sequence" or "last", got {over!r}')
        dense = self._dense(dense_layers)
        min_keys = checked_count("min_keys", min_keys)
        below = NCConfig(1.0).dense_below if dense_below is None else checked_count("dense_below", dense_below, least=0)
        ends = self.lengths if n is None else (checked_count("n", n),)
        rows = np.array(ends) if over == "last" else np.concatenate([np.arange(1, end + 1) for end in ends])
        if keys is not None:
            keys = check_number("keys", keys, "a positive number", lambda v: v > 0, ProfileError)
            seen = np.mean([np.minimum(rows, window or np.inf).mean() for window in self.windows])
            fraction, asked = min(float(keys / seen), 1.0), f"{keys:g} keys"
        else:
            fraction = checked_fraction("fraction", fraction)
            asked = f"{100 * fraction:g} % of the keys"
        laws = allocate(self._demand, rows, np.array(self.windows), fraction, dense, (min_keys, below), self.lengths)
        where = "over all calibrated lengths" if n is None else f"at {ends[0]:,} tokens"
        return replace(self, **laws._asdict(), aim=f"{asked} {where}, {over}", dense_layers=dense)

    def at_mass(self, mass: float, *, dense_layers: tuple[int, ...] | None = None) -> "Profile":
        """The profile with laws under which every head keeps this share of its softmax mass in (0, 1), on average.

        Raises:
            ProfileError: ``mass`` is out of range.
        """
        mass = checked_share("mass", mass)
        log_keys = np.empty(self.kept.shape[:-1])
        for at in np.ndindex(*log_keys.shape):
            keys, kept = self._curve(*at)
            log_keys[at] = np.interp(mass, kept, keys)
        C, intercept = theil_sen(np.log(self.visible), log_keys)
        laws = Laws(np.exp(intercept), C)
        laws = laws.where(~laws.attend_all(self.lengths))
        return replace(
            self, **laws._asdict(), aim=f"{100 * mass:g} % of every head's mass", dense_layers=self._dense(dense_layers)
        )

    def kept_mass(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The share of the mass that the laws in force are predicted to keep for a query that sees n keys.

        Where a layer slides it sees no more than the window. Beyond the calibrated lengths the measured curve is
        stretched as the support of each head grows.

        Returns:
            Arrays ``[M, H]``: the estimate and the ends of its 90 % interval.
        """
        seen = np.array([min(n, window or n) for window in self.windows])
        budget = budgets(seen[:, None], self.alpha, self.C)
        middle = self._mass_at(budget, n)
        spread = self._log_spread(n, middle)
        low, high = (self._mass_at(budget * np.exp(sign * spread), n) for sign in (-1, 1))
        for mass in (middle, low, high):
            mass[list(self.dense_layers)] = 1.0
        return middle, low, high

    def is_sparse(self) -> np.ndarray:
        """Which heads are sparse, bool ``[M, H]``: 95 % (the nearest eps) of their mass in under half of the keys."""
        nearest = min(self.fits, key=lambda fit: abs(fit.eps - 0.05))
        return np.asarray(nearest.support[-1] < SPARSE_BELOW * self.visible[-1][:, None])

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON, whole or not at all; raises ProfileError where that cannot be done."""
        content = json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))
        try:
            replace_file(Path(path), content.encode())
        except OSError as error:
            raise ProfileError(f"the profile {path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """The profile that ``save`` wrote; raises ProfileError where it is missing or damaged."""
        try:
            values = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ProfileError(f"the profile {path} cannot be read: {reason}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that JSON can hold and ``from_dict`` takes back."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self), default=plain))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """The profile of a dictionary that ``to_dict`` gave.

        Raises:
            ProfileError: a newer format; or a field is missing or of a wrong type or shape.
        """
        number = values.get("format") if isinstance(values, Mapping) else None
        if type(number) is not int or not 1 <= number <= FORMAT:
            raise ProfileError(
                f"this is no profile, or one written by a newer nc_patch: its format must be a number from 1 to "
                f"{FORMAT}, got {shown(number)}. Update nc_patch, or calibrate again."
            )
        try:
            sides = dict(zip("LMHG", np.shape(values["kept"]), strict=True))
            found = _read(values, cls, sides)
            found["fits"] = tuple(Fit(**_read(fit, Fit, sides)) for fit in values["fits"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"the profile is damaged, calibrate again: {type(error).__name__}: {error}") from error
        found["dense_layers"] = checked_layers(found["dense_layers"], sides["M"])
        return cls(**found)

    @cached_property
    def _demand(self) -> Demand:
        return Demand(np.array(self.keys, dtype=float), self.visible, self.sensitivity[..., None] * self.error)

    def _dense(self, layers: tuple[int, ...] | None) -> tuple[int, ...]:
        return checked_layers(self.dense_layers if layers is None else layers, self.shape[0])

    def _curve(self, level: int, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of numbers of keys up to all that the rows of a length see, and the mass that they keep."""
        keys, seen = np.array(self.keys, dtype=float), self.visible[level, layer]
        kept = np.maximum.accumulate(self.kept[level, layer, head])
        return np.log(np.append(keys[keys < seen], seen)), np.append(kept[keys < seen], 1.0)

    def _mass_at(self, budget: np.ndarray, n: int) -> np.ndarray:
        """Mass ``[M, H]`` that budgets keep of n keys."""
        found, longest = np.ones(self.shape), self.lengths[-1]
        for at in np.ndindex(*self.shape):
            seen, keys = min(n, self.windows[at[0]] or n), max(float(budget[at]), 1.0)
            if budget[at] >= seen:
                continue
            if seen > longest:
                # Scaled to the longest length, by the fit that gives most nearly so many keys.
                fit = min(self.fits, key=lambda fit: abs(np.log(law_values(seen, fit.alpha[at], fit.C[at]) / keys)))
                keys *= (longest / seen) ** fit.C[at]
            levels = [np.interp(np.log(keys), *self._curve(level, *at)) for level in range(len(self.lengths))]
            found[at] = np.interp(np.log(min(seen, longest)), np.log(self.lengths), levels)
        return found

    def _log_spread(self, n: int, mass: np.ndarray) -> np.ndarray:
        """Half the width of the interval of log keys at n, ``[M, H]``, from the fit nearest to the mass kept."""
        eps = np.array([fit.eps for fit in self.fits])
        nearest = np.abs(np.log(np.maximum(1 - mass, 1e-4)[..., None] / eps)).argmin(-1)
        # Where a layer slides, a row sees as many keys as it did at the middle of the lengths.
        away = np.where(np.array(self.windows) > 0, 0.0, np.log(n) - np.log(self.visible).mean(0))[:, None]
        spreads = [np.hypot(fit.level_half, (fit.C_high - fit.C_low) / 2 * away) for fit in self.fits]
        return np.take_along_axis(np.stack(spreads, -1), nearest[..., None], -1)[..., 0]


def checked_layers(given: Any, layers: int) -> tuple[int, ...]:
    """Layers by their number, each once and ascending; raises ProfileError for what a model of ``layers`` lacks."""
    values = plain(given)
    found = {as_integer(value) for value in values} if isinstance(values, Iterable) else {None}
    if not found <= set(range(layers)):
        raise ProfileError(f"dense_layers must be a list of layers from 0 to {layers - 1}, got {shown(given)}")
    return tuple(layer for layer in range(layers) if layer in found)


def _read(values: Mapping[str, Any], kind: type, sides: dict[str, int]) -> dict[str, Any]:
    """The fields of a ``kind`` in an object of a file; lists of numbers have ``sides``, and become arrays or tuples."""
    found = {one.name: values[one.name] for one in fields(kind)}
    for name in found.keys() & _SIDES.keys():
        array, wanted = np.array(values[name], dtype=float), tuple(sides[side] for side in _SIDES[name])
        if array.shape != wanted or not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite and of the shape {wanted}, got {shown(values[name])}")
        found[name] = array if array.ndim > 1 else tuple(values[name])
    return found

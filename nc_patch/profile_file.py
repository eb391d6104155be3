"""Profiles on disk: JSON, written whole or not at all, and read without trusting a single field."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nc_patch.common import ProfileError, replace_file

FORMAT = 1
# A model of 120 layers and 128 heads at ten lengths takes 100 MB.
LARGEST_FILE = 512_000_000
_LARGEST_SIDE = 65_536
_LARGEST_NUMBER = 1e12
_LONGEST_TEXT = 4096

# Fields with the letters of their shape (L lengths, M layers, H heads, G numbers of keys) and the range of values.
_ARRAYS = {
    "visible": ("LM", 1, _LARGEST_NUMBER),
    "kept": ("LMHG", 0, 1),
    "error": ("LMHG", 0, _LARGEST_NUMBER),
    "sensitivity": ("MH", 0, _LARGEST_NUMBER),
    "alpha": ("MH", 0, _LARGEST_NUMBER),
    "C": ("MH", 0, 1),
}
_FIT_ARRAYS = {
    "alpha": ("MH", 0, _LARGEST_NUMBER),
    "alpha_low": ("MH", 0, _LARGEST_NUMBER),
    "alpha_high": ("MH", 0, _LARGEST_NUMBER),
    "C": ("MH", 0, 1),
    "C_low": ("MH", 0, 1),
    "C_high": ("MH", 0, 1),
    "r2": ("MH", -_LARGEST_NUMBER, 1),
    "level_half": ("MH", 0, _LARGEST_NUMBER),
    "support": ("LMH", 1, _LARGEST_NUMBER),
}
_POSITIVE = ("alpha", "alpha_low", "alpha_high")
_TEXTS = ("model", "model_class", "fingerprint", "texts", "aim")


def write_profile(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a profile's dictionary; a reader, or an interruption, sees the old file or the new one.

    Raises:
        ProfileError: the file cannot be written.
    """
    content = json.dumps(values, allow_nan=False, separators=(",", ":")).encode()
    try:
        replace_file(path, content)
    except OSError as error:
        raise ProfileError(f"the profile {path} cannot be written: {error.strerror or error}") from error


def read_profile(path: Path) -> dict[str, Any]:
    """The dictionary that a file holds, so far unchecked but for being one.

    Raises:
        ProfileError: the file is missing, too large, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ProfileError(f"{path} has {size:,} bytes; a profile has at most {LARGEST_FILE:,}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)  # what grows meanwhile, or is no plain file
    except OSError as error:
        raise ProfileError(f"the profile {path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_FILE:
        raise ProfileError(f"{path} does not end within {LARGEST_FILE:,} bytes; it is no profile")
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except RecursionError as error:
        raise ProfileError(f"{path} is nested too deeply to be a profile") from error
    except ValueError as error:
        raise ProfileError(f"{path} is no profile: {error}") from error
    if not isinstance(values, dict):
        raise ProfileError(f"{path} is no profile: it holds a {type(values).__name__}, not an object")
    return values


def checked_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a profile with their types and shapes checked: arguments of ``Profile``, and of each ``Fit``.

    Raises:
        ProfileError: the message names the field, what it holds and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ProfileError(f"a profile is a mapping of names to values, got {type(values).__name__}")
    _check_format(values)
    names = {"format", *_TEXTS, "pieces", "lengths", "windows", "keys", "fits", "dense_layers", "versions", *_ARRAYS}
    _check_names("the profile", values, names)
    found: dict[str, Any] = {name: _text(name, values[name]) for name in _TEXTS}
    found["pieces"] = _integer("pieces", values["pieces"], 1)
    for name, least in (("lengths", 1), ("keys", 1), ("windows", 0), ("dense_layers", 0)):
        found[name] = _integers(name, values[name], least)
    for name in ("lengths", "keys"):
        if not found[name] or any(b <= a for a, b in zip(found[name], found[name][1:], strict=False)):
            raise ProfileError(f"{name} must be numbers in ascending order, got {_short(values[name])}")
    heads = values["alpha"][0] if isinstance(values["alpha"], list) and values["alpha"] else None
    if not isinstance(heads, list) or not heads:
        raise ProfileError(f"alpha must be a list of layers, each a list of heads, got {_short(values['alpha'])}")
    sides = {"L": len(found["lengths"]), "M": len(values["alpha"]), "H": len(heads), "G": len(found["keys"])}
    if len(found["windows"]) != sides["M"]:
        raise ProfileError(f"windows has {len(found['windows'])} layers, alpha has {sides['M']}")
    if any(layer >= sides["M"] for layer in found["dense_layers"]):
        raise ProfileError(f"dense_layers names {_short(values['dense_layers'])}; there are {sides['M']} layers")
    for name, (shape, low, high) in _ARRAYS.items():
        found[name] = _array(name, values[name], shape, sides, low, high)
    found["fits"] = _fits(values["fits"], sides)
    versions = values["versions"]
    if not isinstance(versions, dict) or len(versions) > 64:
        raise ProfileError(f"versions must be an object of texts, got {_short(versions)}")
    found["versions"] = {_text("versions", name): _text(f"versions.{name}", versions[name]) for name in versions}
    return found


def _check_format(values: Mapping[str, Any]) -> None:
    number = values.get("format")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ProfileError(f"this is no profile: its format must be a number from 1 to {FORMAT}, got {_short(number)}")
    if number > FORMAT:
        raise ProfileError(
            f"the profile has format {_short(number)}, written by a newer nc_patch; this one reads up to {FORMAT}. "
            "Update nc_patch, or calibrate again."
        )


def _check_names(what: str, values: Mapping[str, Any], names: set[str]) -> None:
    unknown, missing = sorted(map(str, values.keys() - names)), sorted(names - values.keys())
    if unknown:
        raise ProfileError(f"{what} has unknown fields: {_short(', '.join(unknown))}")
    if missing:
        raise ProfileError(f"{what} lacks {', '.join(missing)}")


def _fits(values: Any, sides: Mapping[str, int]) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not 1 <= len(values) <= 64:
        raise ProfileError(f"fits must be a list of 1 to 64 fits, got {_short(values)}")
    fits, before = [], 0.0
    for number, fit in enumerate(values):
        what = f"fits[{number}]"
        if not isinstance(fit, dict):
            raise ProfileError(f"{what} must be an object, got {_short(fit)}")
        _check_names(what, fit, {"eps", *_FIT_ARRAYS})
        eps = _number(f"{what}.eps", fit["eps"], 0, 1)
        if not before < eps < 1:
            raise ProfileError(f"{what}.eps must be in (0, 1) and ascend from fit to fit, got {eps}")
        before = eps
        arrays = {
            name: _array(f"{what}.{name}", fit[name], shape, sides, low, high)
            for name, (shape, low, high) in _FIT_ARRAYS.items()
        }
        fits.append({"eps": eps, **arrays})
    return fits


def _array(name: str, value: Any, shape: str, sides: Mapping[str, int], low: float, high: float) -> np.ndarray:
    numbers: list[float] = []
    _collect(name, value, shape, sides, numbers)
    array = np.array(numbers, dtype=float).reshape([sides[letter] for letter in shape])
    least, most = float(array.min()), float(array.max())
    positive = name.rpartition(".")[2] in _POSITIVE
    if least < low or most > high or (positive and least <= 0):
        raise ProfileError(
            f"{name} must be {'positive and at most' if positive else f'from {low:g} to'} {high:g} everywhere, got "
            f"{least:g} to {most:g}"
        )
    return array


def _collect(name: str, value: Any, shape: str, sides: Mapping[str, int], numbers: list[float]) -> None:
    """Flattens nested lists of a known shape; as deep as the shape, however deep the value."""
    if not shape:
        numbers.append(_number(name, value, -math.inf, math.inf))
        return
    if not isinstance(value, list) or len(value) != sides[shape[0]]:
        got = f"a list of {len(value)}" if isinstance(value, list) else _short(value)
        raise ProfileError(f"{name} must be a list of {sides[shape[0]]} here, got {got}")
    for index, item in enumerate(value):
        _collect(f"{name}[{index}]" if not isinstance(item, list) else name, item, shape[1:], sides, numbers)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProfileError(f"{name} must be a number, got {_short(value)}")
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise ProfileError(f"{name} must be a number of at most {_LARGEST_NUMBER:g}, got a larger one")
    if not math.isfinite(value) or not low <= value <= high:
        raise ProfileError(f"{name} must be a finite number, got {value}")
    return float(value)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_NUMBER:
        raise ProfileError(f"{name} must be an integer of at least {least}, got {_short(value)}")
    return value


def _integers(name: str, value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _LARGEST_SIDE:
        raise ProfileError(f"{name} must be a list of integers, got {_short(value)}")
    return tuple(_integer(name, item, least) for item in value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ProfileError(f"{name} must be a text of at most {_LONGEST_TEXT} characters, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """The start of a value for a message; never all of a hostile one."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        return "a huge number"
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, where only finite numbers belong")

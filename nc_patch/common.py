"""What every part uses: exceptions, the log, numbers in settings, autocast, files written whole."""

import contextlib
import errno
import logging
import operator
import os
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch


class UnsupportedModelError(ValueError):
    """The model, or what it asks of attention, is not supported; the message says why and what to do."""


class BrokenCacheError(RuntimeError):
    """A cache that a failed call left half-updated is used again; the message says how to mend it."""


class UnsupportedMaskError(ValueError):
    """A mask is not one interval of keys per query; the message names it and says what to do."""


class DroppedMassError(RuntimeError):
    """With ``on_drop="raise"``: a call of attention dropped more than ``max_dropped_mass`` of the dense softmax.

    ``layer`` and ``head`` say where; ``position`` is the query's in its sequence, None where an estimate over the whole
    call was acted on; ``kept_mass`` is a proven lower limit if ``certified``, else an estimate for the head's rows.
    """

    def __init__(
        self, message: str, *, layer: int, head: int, position: int | None, kept_mass: float, certified: bool
    ) -> None:
        super().__init__(message)
        self.layer, self.head, self.position = layer, head, position
        self.kept_mass, self.certified = kept_mass, certified

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors of worker processes arrive pickled, which by default passes the message alone.
        keywords = {name: getattr(self, name) for name in ("layer", "head", "position", "kept_mass", "certified")}
        return partial(type(self), **keywords), (str(self),)


class ProfileError(ValueError):
    """A profile, or what is asked of one, does not fit; the message says what came, what is allowed and what to do."""


# Numbers of keys are kept in 32 bits.
LARGEST_INTEGER = 2**31 - 1
logger = logging.getLogger("nc_patch")


warn_anew = lru_cache(maxsize=256)(logger.warning)


@torch.compiler.assume_constant_result
def say_once(message: str) -> None:
    """Warns with a message that has not been said before; of a compiled call while it is traced."""
    warn_anew(message)


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python's lists and numbers; anything else as it is."""
    if type(value) is float:  # in a graph it may be a symbol, which has no attributes to ask for
        return value
    return value.tolist() if hasattr(value, "tolist") else value


def as_integer(value: Any) -> int | None:
    """The value as an int, or None where it is no integer; a bool is none, nor is a float."""
    value = plain(value)
    if isinstance(value, (bool, float)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> int | float | None:
    """The value as an int, which may be beyond every float, or as a float; None where it is no real number."""
    if type(value) is float:  # or a symbol, see ``plain``
        return value
    integer = as_integer(value)
    value = plain(value)
    if integer is not None or isinstance(value, bool) or not hasattr(type(value), "__float__"):
        return integer
    return float(value)


class _Short(reprlib.Repr):
    """Representations of whatever a user or a file may give: never long, never deep."""

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """``repr`` of any value for a message, cut where it is long or deep."""
    return _SHORT.repr(value)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """A setting as it is; raises ValueError unless it is one of those allowed."""
    if not isinstance(value, (str, int)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")
    return value


def check_integer(name: str, value: Any, least: int, error: type[Exception] | None = None) -> int:
    """A setting as an int; raises TypeError or ValueError, or ``error``, unless it is from ``least`` to 2**31 - 1."""
    found = as_integer(value)
    if found is None:
        raise (error or TypeError)(f"{name} must be an integer, got {shown(value)}")
    if not least <= found <= LARGEST_INTEGER:
        bound = f"at least {least}" if found < least else f"at most {LARGEST_INTEGER}"
        raise (error or ValueError)(f"{name} must be {bound}, got {shown(value)}")
    return found


def check_number(
    name: str, value: Any, allowed: str, ok: Callable[[float], bool], error: type[Exception] | None = None
) -> float:
    """A setting as a float; raises as ``check_integer`` unless it is ``ok``, which ``allowed`` says in words."""
    found = as_number(value)
    if found is None:
        raise (error or TypeError)(f"{name} must be {allowed}, got {shown(value)}")
    if not abs(found) <= sys.float_info.max or not ok(float(found)):
        raise (error or ValueError)(f"{name} must be {allowed}, got {shown(value)}")
    return float(found)


def check_bool(name: str, value: Any) -> bool:
    """A setting as a bool; raises TypeError unless it is one, which 0 and 1 are not."""
    found = plain(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return found


def student_quantile(freedom: float, normal: float) -> float:
    """The quantile of Student's t whose counterpart of the normal distribution is ``normal``.

    Abramowitz and Stegun, 26.7.5; within 1 % from 3 degrees of freedom on.
    """
    v, z = freedom, normal
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


# Devices that have autocast, asked for once, since PyTorch 2.11 cannot compile the question.
_KNOWN = ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
_DEVICES = frozenset(filter(torch.amp.is_autocast_available, _KNOWN))


def cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype in which autocast, where it is on, runs ``scaled_dot_product_attention``."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors) or not _is_on(tensors[0].device):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    eligible = lambda t: t.is_floating_point() and t.dtype != torch.float64  # noqa: E731
    return tuple(tensor.to(dtype) if eligible(tensor) else tensor for tensor in tensors)


def autocast_off(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off on a tensor's device: scores and softmax are float32, and indexes bound what they index."""
    if isinstance(tensor, torch.Tensor) and _is_on(tensor.device):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def _is_on(device: torch.device) -> bool:
    return device.type in _DEVICES and torch.is_autocast_enabled(device.type)


def check_directory(directory: Path, names: Iterable[str] = ()) -> None:
    """Makes a directory where it is missing, before a long run whose end is to write files of these names there.

    Raises OSError where it cannot be made or written, or a directory is in the place of a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a directory")
    with tempfile.NamedTemporaryFile(prefix=".nc_patch.", dir=directory) as file:
        file.write(b"0")  # an empty file fits on a full disk


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside ``path`` and puts it in its place; after an OSError ``path`` is as it was."""
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def share(made: torch.Tensor) -> torch.Tensor:
    """The tensor, which if ``torch.compile`` traces was made within the graph: ``once`` may remember on it."""
    if torch.compiler.is_compiling():
        made._nc_traced = {}  # type: ignore[attr-defined]
    return made


def once(shared: torch.Tensor, key: tuple[Any, ...], make: Any) -> Any:
    """``make()``, remembered on a tensor that all layers of one forward pass share: the mask, or what comes of it.

    In a compiled graph what is remembered is one node for all layers, if the tensor is one that ``share`` returned.
    """
    compiling = torch.compiler.is_compiling()
    made: dict[tuple[Any, ...], Any] | None = getattr(shared, "_nc_traced" if compiling else "_nc_once", None)
    if made is None:
        if compiling:
            return make()
        made = {}
        shared._nc_once = made  # type: ignore[attr-defined]
    if key not in made:
        made[key] = make()
    return made[key]

"""What counts as an integer, a number and a truth value in settings and arguments: Python's, numpy's and PyTorch's."""

import operator
from typing import Any


def plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python's lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_integer(value: Any) -> int | None:
    """The value as an int, or None where it is no integer; a bool is none, nor is a float."""
    value = plain(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> int | float | None:
    """The value as an int, which may be beyond every float, or as a float; None where it is no real number."""
    integer = as_integer(value)
    value = plain(value)
    if integer is not None or isinstance(value, bool) or not hasattr(type(value), "__float__"):
        return integer
    return float(value)


def as_bool(value: Any) -> bool | None:
    """The value as a bool, or None where it is neither true nor false; 0 and 1 are numbers."""
    value = plain(value)
    return value if isinstance(value, bool) else None

"""The exceptions of this package that callers may want to catch by name."""

from functools import partial
from typing import Any


class UnsupportedModelError(ValueError):
    """The model, or what it asks of attention, is not supported; the message says why and what to do."""


class BrokenCacheError(RuntimeError):
    """A cache that a failed call left half-updated is used again; the message says how to mend it."""


class UnsupportedMaskError(ValueError):
    """A mask is not one interval of keys per query; the message names it and says what to do."""


class DroppedMassError(RuntimeError):
    """With ``on_drop="raise"``: a call of attention dropped more than ``max_dropped_mass`` of the dense softmax.

    Attributes:
        layer, head: where.
        position: the query's position in its sequence; None where an estimate over the whole call was acted on.
        kept_mass: what it keeps: at least, if ``certified``; an estimate for the head's rows otherwise.
        certified: whether ``kept_mass`` is a proven lower limit.
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

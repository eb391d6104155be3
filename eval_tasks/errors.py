"""The exceptions of the harness that are meant for the user's eyes."""

from collections.abc import Iterator
from contextlib import contextmanager


class EvalError(ValueError):
    """The measurement cannot start or go on; the message says what was received, what is allowed and what to do."""


class MemoryRanOut(EvalError):
    """One measurement needs more memory than there is; others may still fit."""


class ProcessEnded(EvalError):
    """Another process ended or does not answer; what happened there, it has said itself."""


@contextmanager
def told(what: object, done: str, advice: str) -> Iterator[None]:
    """Within, an error of the system becomes an EvalError: what cannot be ``done``, such as read, why, and advice."""
    try:
        yield
    except OSError as error:
        raise EvalError(f"{what} cannot be {done}: {error.strerror or error}. {advice}") from error

"""Objects that several threads may share: one method of such an object runs at a time."""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Locked:
    """Base of what threads share; holds the lock that ``alone`` takes, which copies and pickles leave out."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


def alone(method: Method) -> Method:
    """Makes a method of a ``Locked`` object wait for the others."""

    @functools.wraps(method)
    def locked(self: Locked, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **options)

    return locked  # type: ignore[return-value]

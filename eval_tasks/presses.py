"""Presses of the package ``kvpress`` as peers: they drop keys from the cache that a dense prefill has filled."""

import importlib
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from eval_tasks.errors import EvalError


@dataclass(frozen=True)
class Press:
    """A class of ``kvpress`` by its name, such as ``"SnapKVPress"``, and the keys that every layer and head keeps."""

    name: str
    kept: int

    def compressing(self, model: Any, context: int) -> AbstractContextManager[Any]:
        """Compresses the cache of a prefill of ``context`` tokens that runs within the block."""
        ratio = min(1.0 - 1.0 / context, max(0.0, 1.0 - self.kept / context))
        compressing: AbstractContextManager[Any] = find_press(self.name)(compression_ratio=ratio)(model)
        return compressing


def find_press(name: str) -> type[Any]:
    """The class of a press; raises EvalError where kvpress is missing, does not load, or has none with a ratio."""
    try:
        package = importlib.import_module("kvpress")
    except ImportError as error:
        needs = f"the method kvpress:{name} needs the package kvpress (pip install kvpress)"
        raise EvalError(f"{needs}, which cannot be imported: {error}") from error
    presses: dict[str, type[Any]] = {
        each: found
        for each, found in inspect.getmembers(package, inspect.isclass)
        if each.endswith("Press") and "compression_ratio" in inspect.signature(found).parameters
    }
    if name not in presses:
        raise EvalError(f"kvpress has no press {name!r} with a compression ratio; it has {', '.join(sorted(presses))}")
    return presses[name]

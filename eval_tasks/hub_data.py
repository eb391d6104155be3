"""Data sets of the Hugging Face hub: from the hub, its cache, or copies on disk; errors say what is missing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from eval_tasks.errors import EvalError
from eval_tasks.models import hub_resolves


def load_hub(name: str, copies: str | None = None, **options: Any) -> Any:
    """A data set of the hub, as ``datasets.load_dataset`` returns it; raises EvalError where it is not there.

    ``copies`` is a directory that holds it as ``copies/NAMESPACE/NAME``, as the hub lays it out (``hf download``); None
    asks the hub, and its cache where it cannot be reached.
    """
    import datasets

    directory = None if copies is None else Path(copies).expanduser() / name
    try:
        if directory is None:
            with cache_only_where_offline():
                return datasets.load_dataset(name, **options)
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no directory {directory}")
        return datasets.load_dataset(str(directory), **options)
    except Exception as error:  # `datasets` raises its own, its file systems' and its HTTP client's exceptions
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').split(chr(10))[0]}"
        if copies is None and not hub_resolves():
            reason = "the hub cannot be reached from here, and its cache on this machine does not hold the data set"
        where = "could not be loaded from its copy" if copies is not None else "could not be downloaded from the hub"
        raise EvalError(
            f"the data set {name} {where} ({reason}). Download it where there is a network (hf download --repo-type "
            f'dataset {name} --local-dir DIR/{name}) and give lm-eval --metadata \'{{"hub_copies": "DIR"}}\''
        ) from error


@contextlib.contextmanager
def cache_only_where_offline() -> Iterator[None]:
    """Where the hub cannot be reached, lets its libraries look in their caches at once instead of retrying first."""
    import datasets
    import huggingface_hub

    if hub_resolves():
        yield
        return
    name = "HF_HUB_OFFLINE"
    with mock.patch.object(datasets.config, name, True), mock.patch.object(huggingface_hub.constants, name, True):
        yield

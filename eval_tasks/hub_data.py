"""Data sets of the Hugging Face hub: from the hub, its cache, or copies on disk; errors say what is missing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from eval_tasks.errors import EvalError
from eval_tasks.models import hub_resolves


def load_hub(
    name: str, config: str | None = None, *, copies: str | None = None, loader: Any = None, **options: Any
) -> Any:
    """A data set of the hub, as ``datasets.load_dataset`` returns it; raises EvalError where it is not there.

    ``copies`` is a directory that holds it as ``copies/NAMESPACE/NAME`` (or ``.../NAME/CONFIG``), as the hub lays it
    out or as ``Dataset.save_to_disk`` writes it; None asks the hub, and its cache where it cannot be reached.
    ``loader`` is ``datasets.load_dataset`` where that is replaced meanwhile.
    """
    import datasets

    loader = loader or datasets.load_dataset
    try:
        if copies is not None:
            return _load_copy(loader, Path(copies).expanduser() / name, config, options)
        with cache_only_where_offline():
            return loader(name, config, **options)
    except Exception as error:  # `datasets` raises its own, its file systems' and its HTTP client's exceptions
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').split(chr(10))[0]}"
        if copies is None and not hub_resolves():
            reason = "the hub cannot be reached from here, and its cache on this machine does not hold the data set"
        given = f"{name}, configuration {config}," if config else name
        where = "could not be loaded from its copy" if copies is not None else "could not be downloaded from the hub"
        raise EvalError(
            f"the data set {given} {where} ({reason}). Download it where there is a network (hf download --repo-type "
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


def _load_copy(loader: Any, directory: Path, config: str | None, options: dict[str, Any]) -> Any:
    import datasets

    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    saved = directory / config if config and (directory / config).is_dir() else directory
    for mark in ("dataset_dict.json", "dataset_info.json"):
        if (saved / mark).is_file() and not any(saved.glob("*.parquet")):
            loaded = datasets.load_from_disk(str(saved))
            split = options.get("split")
            return loaded[split] if split is not None and isinstance(loaded, datasets.DatasetDict) else loaded
    return loader(str(directory), config, **options)

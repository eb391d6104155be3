"""lm-eval's response cache (``--use_cache``) made to tell one model's answers from another's.

The cache's key is the request alone, so a second run with another alpha would read the first run's answers. Here every
set of model arguments gets a table of its own in the same file.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sqlitedict import SqliteDict  # type: ignore[import-untyped]

from nc_patch.version import __version__

# Where and in what portions the model runs; rounding apart, the answers do not depend on it.
_PLACEMENT = {
    *("batch_size", "cache_dir", "device", "device_map", "force_download", "local_files_only", "logits_cache"),
    *("max_batch_size", "max_cpu_memory", "max_memory", "max_memory_per_gpu", "offload_folder", "parallelize"),
    *("token", "tp_plan"),
}


def use_own_table(store: Any, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Makes an open response cache use a table of its file that all that answers depend on names.

    Args:
        store: the ``SqliteDict`` that lm-eval opened; its ``CachingLM`` and its ``CacheHook`` share it.
        settings: of attention.
        arguments: of the model, by which its weights and tokenizer are told too.

    Raises:
        RuntimeError: lm-eval keeps its answers in something else, so they cannot be told apart.
    """
    if not isinstance(store, SqliteDict):
        raise RuntimeError(
            f"lm-eval's response cache is a {type(store).__name__}, not a SqliteDict: answers of different settings"
            " could not be told apart; leave out --use_cache"
        )
    relevant = {name: value for name, value in arguments.items() if name not in _PLACEMENT and value is not None}
    content = json.dumps(
        {"nc_patch": __version__, "settings": settings, "arguments": relevant}, sort_keys=True, default=repr
    )
    name = f"nc_hf {hashlib.sha256(content.encode()).hexdigest()[:16]}"
    SqliteDict(store.filename, tablename=name).close()
    store.tablename = name

"""What is timed: one decoding step of one layer, or attention of a whole prompt at one layer, as a model calls it.

A decoding step is the upkeep of the index and the tail's means (one key taken in), the choice of keys, and attention.
The projections and the write to the cache are the same for all methods and left out. Dense attention runs by every
backend of ``scaled_dot_product_attention``, each in two forms: ``gqa``, as it is called in a model, and one that spares
it the repeating of keys. With one query per sequence that is ``rows``, where the query heads of a group stand as rows
of one head; for a prompt it is ``expanded``, over keys and values repeated beforehand, which is not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench.inputs import GEOMETRIES, Inputs, make_inputs
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.selections.index import KeyIndex

# Inputs of decoding rotate until together they are this many times the cache; fewer and more sets do not pay.
_TIMES_CACHE, _FEWEST_SETS, _MOST_SETS = 3, 4, 16
_CPU_CACHE_BYTES = 32 << 20
# Of the free memory, what inputs may take with what methods make of them: indexes, copies in pages, an output.
_MEMORY_SHARE = 0.6
_FLASH = {"flash": SDPBackend.FLASH_ATTENTION}
_OF_GPUS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
# Up to so many keys PyTorch's plain implementation, which stores all scores of a prompt, is tried.
_MATH_KEYS = 4096

Step = Callable[[int], torch.Tensor]  # runs a method on the i-th set of inputs


@dataclass(frozen=True)
class Case:
    """One geometry, batch and length."""

    geometry: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.geometry}, batch {self.batch}, {self.length:,} keys"


@dataclass(frozen=True)
class Settings:
    """What is timed, on what, in the phase ``"decode"`` or ``"prefill"``; ``options`` are those of ``NCConfig``."""

    phase: str
    device: torch.device
    dtype: torch.dtype
    geometry: Sequence[str]
    batch: Sequence[int]
    lengths: Sequence[int]
    selections: Sequence[str]
    alpha: float
    C: float
    repeats: int
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, selection: str) -> NCConfig:
        """The settings of attention by a selection."""
        return NCConfig(self.alpha, self.C, prefill=selection, decode=selection, **self.options)

    def cases(self) -> list[Case]:
        """All cases, short ones first within each geometry and batch."""
        return [Case(g, b, n) for g in self.geometry for b in self.batch for n in sorted(self.lengths)]


def make_sets(settings: Settings, case: Case) -> list[Inputs]:
    """One prompt, or as many decoding steps as keep the cache cold and the memory holds; else raises MemoryError."""
    geometry, device = GEOMETRIES[case.geometry], settings.device
    keys = 2 * geometry.kv_heads * case.batch * case.length * geometry.head_dim * settings.dtype.itemsize
    queries, wanted, size = case.length, 1, keys * (1 + geometry.heads / geometry.kv_heads)
    if settings.phase == "decode":
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
        queries, size = 1, 2.5 * keys
        wanted = min(_MOST_SETS, max(_FEWEST_SETS, -(-_TIMES_CACHE * cache // keys)))
    room = int(_MEMORY_SHARE * free_bytes(device) / size)
    if room < 1:
        raise MemoryError(f"{size / 1e9:.1f} GB of queries, keys, values and what follows leave too little memory")
    generators = [torch.Generator(device).manual_seed(settings.seed + i) for i in range(min(wanted, room))]
    return [make_inputs(geometry, case.batch, case.length, queries, settings.dtype, one) for one in generators]


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def sparse_step(sets: Sequence[Inputs], config: NCConfig, phase: str) -> Step:
    """A step of a selection; in decoding the last key is taken into the index and the page means first."""
    selection, decodes = getattr(config, phase), phase == "decode"
    kind, has_means = selection.index_kind if decodes else None, decodes and selection.uses_means
    indexes = [KeyIndex.build(one.key, kind) if kind else None for one in sets]
    means_of = [KeyIndex.build(one.key, "means", value=one.value) if has_means else None for one in sets]
    batch, _, length, _ = sets[0].key.shape
    end = torch.full((batch,), length, dtype=torch.int32, device=sets[0].key.device)
    settings: dict[str, Any] = {"alpha": config.alpha, "C": config.C, "dense_below": config.dense_below}
    settings["selection"] = selection

    def step(i: int) -> torch.Tensor:
        one, index, means = sets[i], indexes[i], means_of[i]
        if index is not None:
            index.extend(one.key, 1, end)
        if means is not None:
            means.extend(one.key, 1, end, one.value)
        output = sparse_attention(one.query, one.key, one.value, index=index, means=means, **settings)
        assert isinstance(output, torch.Tensor)
        return output

    return step


def dense_steps(sets: Sequence[Inputs]) -> dict[str, Step]:
    """A step of each implementation by name, the plain one last; the first step raises where there is no kernel."""
    query, key = sets[0].query, sets[0].key
    decodes, backends = query.shape[2] == 1, _FLASH | (_OF_GPUS if query.device.type == "cuda" else {})
    if decodes or key.shape[2] <= _MATH_KEYS:
        backends["math"] = SDPBackend.MATH
    forms = ("gqa", "rows" if decodes else "expanded")
    return {f"sdpa {name}, {form}": partial(_dense, sets, backends[name], form) for name in backends for form in forms}


def _dense(sets: Sequence[Inputs], backend: SDPBackend, form: str, i: int) -> torch.Tensor:
    query, keys, values = sets[i].query, *(sets[i].expanded if form == "expanded" else (sets[i].key, sets[i].value))
    rows = query.view(*keys.shape[:2], -1, keys.shape[-1]) if form == "rows" else query
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            rows, keys, values, is_causal=query.shape[2] > 1, enable_gqa=rows.shape[1] != keys.shape[1]
        ).view(query.shape)

"""A decoding step as the first layer of a forward pass works it out; the layers after it repeat it for their tensors.

In eager mode the host decides how long a step takes, so that what follows from the mask and the settings is not asked
again in every layer.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from nc_patch.cache import NO_CACHE, Indexes
from nc_patch.common import LARGEST_INTEGER
from nc_patch.config import NCConfig
from nc_patch.layers import LayerPatch
from nc_patch.ops.derivatives import runs_directly
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.index import LAYOUTS

# Of a mask: ``_dense_reasons``, and the steps that are known, by the reason of their layers.
_ATTRIBUTE = "_nc_steps"
_NO_STEPS: tuple[dict[int, Any], dict[Any, Any]] = ({}, {})


class Step(NamedTuple):
    """What the layers of one forward pass have in common.

    Attributes:
        config, module_config: of the model. run: of ``Selection.bound``.
        problem: of the first layer; what it sees, its budgets and its settings are those of all.
        alike: what of query, key and value the computation was chosen for and checked, and the scale.
        arguments: what else the attention function was given, the cache aside.
        kinds: kind, page size and capacity of the key indexes that each layer keeps: to choose by, and of means.
        paged: whether pages are counted from the first index's origin. budgets: of each layer, where they differ.
        begins: of the mask, see ``KeyIndexMixin.nc_begin``. counted: what ``LayerCounters.add`` takes of a dense step.
    """

    config: NCConfig
    run: Callable[[Problem], AttentionResult]
    problem: Problem
    alike: tuple[Any, ...]
    module_config: Any
    arguments: dict[str, Any]
    kinds: tuple[tuple[str, int, int], ...]
    paged: bool
    budgets: tuple[torch.Tensor, ...]
    begins: tuple[int, ...] | None
    counted: tuple[Any, ...]


def remember(
    mask: torch.Tensor, module: Any, problem: Problem, arguments: dict[str, Any], kept: Indexes, **fields: Any
) -> None:
    """Keeps a step for the layers after it, on the mask that they share; ``fields``: its others, and its ``layer``."""
    others = {name: value for name, value in arguments.items() if name not in ("nc_layer_cache", "scaling")}
    indexes = [index for index in (kept.choosing, kept.means) if index is not None]
    kinds = tuple((index.kind, index.block_size, index.capacity) for index in indexes)
    paged = kept.choosing is not None and LAYOUTS[kept.choosing.kind].paged
    fields |= {"alike": _alike(problem[:3], arguments), "module_config": module.config, "arguments": others}
    reasons, layer = _dense_reasons(fields["config"]), fields.pop("layer")
    known, found = getattr(mask, _ATTRIBUTE, _NO_STEPS)
    step = Step(problem=problem, kinds=kinds, paged=paged, **fields)
    setattr(mask, _ATTRIBUTE, (reasons, {**(found if known is reasons else {}), reasons.get(layer): step}))


def is_plain(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether nothing traces, transforms or differentiates a call, or casts its tensors."""
    casts = torch.is_autocast_enabled(tensors[0].device.type)
    return not torch.is_grad_enabled() and runs_directly(tensors) and forward_ad._current_level < 0 and not casts


def repeat(
    module: torch.nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Any,
    patch: LayerPatch,
    arguments: dict[str, Any],
) -> torch.Tensor | None:
    """Attention ``[B, Hq, Lq, Dv]`` of a layer whose forward pass has a step that fits; None where there is none.

    ``arguments`` are what the attention function was given beside query, key and value.
    """
    reasons, found = getattr(mask, _ATTRIBUTE, _NO_STEPS)
    step: Step | None = found.get(reasons.get(patch.layer))
    held = arguments.get("nc_layer_cache", NO_CACHE).layer
    if step is None or held is None or patch.config is not step.config:
        return None
    told = module.config is step.module_config and module.__dict__.get("masked_key_indices") is None
    told = told and len(arguments) == len(step.arguments) + 2
    if not (told and is_plain(tensors) and _alike(tensors, arguments) == step.alike):
        return None
    for name, given in step.arguments.items():
        if arguments.get(name) is not given:
            return None
    shared, (query, key, value) = step.problem, tensors
    budget = shared.budget
    if step.budgets:
        budget = step.budgets[patch.layer]
        if budget.shape != shared.budget.shape or (budget.data_ptr() - shared.budget.data_ptr()) & 15:
            return None
    held.nc_compare(key, value)
    held.nc_begin(step.begins)
    indexes = held.nc_ready(step.kinds, key)
    if indexes is None:
        return None
    origin, means, chosen = shared.origin, shared.means, shared.key_index
    if means is not None:
        means = PageMeans(*indexes[-1].tensors())
    if chosen:
        chosen = indexes[0].tensors()
        origin = indexes[0].row_origins(query.shape[2]) if step.paged else origin
    seen, settings = (shared.visible, origin, budget), (shared.scale, shared.softcap, shared.sinks)
    problem = Problem._make((query, key, value, *seen, *settings, means, chosen, *shared[11:]))
    result = step.run(problem)
    if step.kinds:
        held.nc_settle()
    if step.counted:
        patch.counters.add(*step.counted)
    else:
        patch.counters.add(budget if result.attended is None else result.attended, shared.visible)
    return result.output


@lru_cache(maxsize=64)
def _dense_reasons(config: NCConfig) -> dict[int, str | None]:
    """Why layers decode densely at every length, by their number; None, or missing, where they are as most are."""
    layers = {*config.dense_layers, *range(config.layers or 0)}
    return {layer: config.dense_reason(layer, config.decode, LARGEST_INTEGER) for layer in layers}


def _alike(tensors: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> tuple[Any, ...]:
    query, key, value = tensors
    return (
        *(query.shape, query.stride(), query.dtype, query.device, query.data_ptr() & 15),
        *(key.shape, key.stride(), key.dtype, key.device, key.data_ptr() & 15),
        *(value.shape, value.stride(), value.dtype, value.data_ptr() & 15, arguments.get("scaling")),
    )

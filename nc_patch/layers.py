"""What a patched module carries, and the hooks that tell its attention function what ``transformers`` does not."""

import inspect
from collections.abc import Callable, Container
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nc_patch.cache import NO_CACHE, layer_cache
from nc_patch.common import UnsupportedModelError, once
from nc_patch.config import NCConfig
from nc_patch.families import check_is_module, mask_builders
from nc_patch.ops.problem import Problem
from nc_patch.stats import LayerCounters
from nc_patch.visibility import BOUNDARIES, begins_by, is_packed, made_for

# The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers looks for them in it.
IMPLEMENTATION = "nc_sparse"
# While continuous batching runs. It must contain "flash", or transformers makes masks of all its requests' keys.
PAGED_IMPLEMENTATION = "nc_sparse_flash"

PATCH_ATTRIBUTE = "_nc_patch"  # of an attention module: its LayerPatch


class Observed(NamedTuple):
    """One call of attention of a layer, as an observer sees it: the problem, whose budget may be empty, and the output
    ``[B, Hq, Lq, Dv]``, which goes on through the model.
    """

    layer: int
    problem: Problem
    output: torch.Tensor


@dataclass(frozen=True)
class LayerPatch:
    """What one attention module needs to know; ``observe`` is who else sees its calls."""

    config: NCConfig
    layer: int
    original_implementation: str
    counters: LayerCounters = field(default_factory=LayerCounters, compare=False)
    observe: Callable[[Observed], None] | None = field(default=None, compare=False)

    @property
    def audit_seed(self) -> int:
        """Seed of the rows that an audit of the next call draws: another for each layer and call."""
        return self.counters.calls * 4096 + self.layer


def patches_of(model: torch.nn.Module) -> dict[Any, LayerPatch]:
    """The patched attention modules of a model, and what they carry; raises UnsupportedModelError for no module."""
    check_is_module(model)
    found = ((module, module.__dict__.get(PATCH_ATTRIBUTE)) for module in model.modules())
    return {module: patch for module, patch in found if patch is not None}


def refuse_switched(module: torch.nn.Module, *_: Any) -> None:
    """Forward pre-hook of a patched attention module: what was switched to another implementation is not run dense."""
    # As it is stored: what a config does to look an attribute up takes longer than the rest of the hook.
    compiling, config = torch.compiler.is_compiling(), module.config
    fields: Any = vars(config) if compiling else object.__getattribute__(config, "__dict__")
    implementation = fields.get("_attn_implementation_internal")
    if implementation not in (IMPLEMENTATION, PAGED_IMPLEMENTATION):
        raise UnsupportedModelError(
            f"{type(module).__name__} is patched, but its attention implementation has been set to {implementation!r} "
            "since, by set_attn_implementation: it would run dense. Call unpatch_model to run it so, or patch_model "
            "again for sparse attention."
        )


# Where packed sequences begin, as the model that is running was told: not every family tells its attention modules.
_TOLD: ContextVar[dict[str, Any]] = ContextVar("nc_patch_boundaries", default={})  # noqa: B039


def told_boundaries() -> dict[str, Any]:
    """Where packed sequences begin, as far as the model that is running was told; empty while it is compiled."""
    return {} if torch.compiler.is_compiling() else _TOLD.get()


def note_boundaries(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model whose attention is patched: takes note of where packed sequences begin."""
    # Checkpointing runs attention again outside of the model, where nothing is told.
    if not torch.compiler.is_compiling() and not (module.training and getattr(module, "gradient_checkpointing", False)):
        _TOLD.set({name: kwargs[name] for name in BOUNDARIES if kwargs.get(name) is not None})


def forget_boundaries(*_: Any) -> None:
    """Forward hook of such a model."""
    if not torch.compiler.is_compiling():
        _TOLD.set({})


def hand_on_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """``refuse_switched`` that also hands the layer of the cache on, to a function that takes more arguments."""
    refuse_switched(module)
    cache = kwargs.get("past_key_values")
    if cache is None:  # transformers 5.24 has renamed it
        cache = kwargs.get("cache")
    # A module that several layers share is told which of them it stands for.
    layer = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
    found = layer_cache(cache, layer)
    return None if found is NO_CACHE else (args, {**kwargs, "nc_layer_cache": found})


def hand_on_mask(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a layer with patched attention: moves the mask to its device once for all layers there, where
    accelerate's hook makes copies, which know nothing of what is remembered on the mask.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    mask: Any = kwargs.get("attention_mask")
    if hook is None or not is_packed(mask) or torch.compiler.is_compiling():
        return None
    places = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,))]
    device = next((torch.device(place) for place in places if place is not None), mask.device)
    if device.type == mask.device.type and device.index in (None, mask.device.index):
        return None

    def move() -> torch.Tensor:
        moved: torch.Tensor = mask.to(device)
        moved._nc_key_length, moved._nc_begins = made_for(mask), begins_by(mask)  # type: ignore[attr-defined]
        return moved

    return args, {**kwargs, "attention_mask": once(mask, ("moved", device), move)}


_HOOKS = (hand_on_cache, hand_on_mask, refuse_switched, note_boundaries, forget_boundaries)


def add_hooks(model: torch.nn.Module, modules: Container[torch.nn.Module]) -> None:
    """Gives a model the hooks that go with the attention ``modules`` which are patched, and no others of ours."""
    remove_hooks(model)
    for module in model.modules():
        if module in modules:
            parameters = inspect.signature(type(module).forward).parameters.values()
            if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):  # it hands them on
                module.register_forward_pre_hook(hand_on_cache, with_kwargs=True)
            else:
                module.register_forward_pre_hook(refuse_switched)
        if "_hf_hook" in vars(module) and any(child in modules for child in module.children()):
            module.register_forward_pre_hook(hand_on_mask, with_kwargs=True)
    for part in mask_builders(model):
        part.register_forward_pre_hook(note_boundaries, with_kwargs=True)
        part.register_forward_hook(forget_boundaries, always_call=True)


def remove_hooks(model: torch.nn.Module) -> None:
    """Takes these hooks away."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if hook in _HOOKS]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_always_called.pop(number, None)

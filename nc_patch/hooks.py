"""Forward hooks by which a patched model hands its attention function what ``transformers`` does not."""

from contextvars import ContextVar
from typing import Any

import torch

from nc_patch.cache import NO_CACHE, layer_cache
from nc_patch.common import UnsupportedModelError, once
from nc_patch.visibility import BOUNDARIES, begins_by, is_packed, made_for

# The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers looks for them in it.
IMPLEMENTATION = "nc_sparse"
# While continuous batching runs. It must contain "flash", or transformers makes masks of all its requests' keys.
PAGED_IMPLEMENTATION = "nc_sparse_flash"


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

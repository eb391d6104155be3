"""What a patched attention module refuses when it is called, in words: arguments, masks, heads, broken caches."""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nc_patch.cache import LayerCache
from nc_patch.errors import BrokenCacheError, UnsupportedMaskError, UnsupportedModelError
from nc_patch.log import say_once
from nc_patch.support import REFUSED_ARGUMENTS
from nc_patch.visibility import made_for


def say_unpatched(name: str) -> None:
    """Says once a class that its modules run dense, though their config says otherwise."""
    say_once(
        f"{name} runs dense: its config names the attention of patched models, from one of which it came, but "
        "the module is not patched. Call patch_model for sparse attention, or set_attn_implementation for another."
    )


def refuse_unsupported(module: torch.nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    """Refuses what the model asks for and sparse attention cannot do."""
    name = type(module).__name__
    for argument, what in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise UnsupportedModelError(
                f"{name} passes {argument}: it {what}, which sparse attention cannot do. Unpatch it."
            )
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        raise UnsupportedModelError(
            f"{name} asks for attention weights (output_attentions), which are never formed. Leave it out, or unpatch "
            "the model."
        )
    if dropout:
        raise UnsupportedModelError(
            f"{name} asks for attention dropout {dropout}, which sparse attention has not. Set attention_dropout to 0 "
            "or use model.eval()."
        )
    if is_causal is False:
        raise UnsupportedModelError(f"{name} asks for attention that is not causal, which sparse attention cannot do.")


def refuse_missing_keys(module: torch.nn.Module, layer: int, mask: torch.Tensor, key_length: int) -> None:
    """Refuses a layer that has not as many keys as the first, by whose keys masks are made.

    A call that failed may have missed one of them, or something drops keys in each layer as it sees fit.
    """
    expected = None if torch.compiler.is_compiling() else made_for(mask)
    if expected is not None and key_length != expected:
        raise BrokenCacheError(
            f"{type(module).__name__} of layer {layer} has {key_length} keys, and its mask is for {expected}. Start "
            "with a new cache, cache.reset() this one, or crop all layers to the n tokens there were, layer.crop(n - "
            "layer.get_seq_length()), if a call that failed has left it half-updated. If another library drops keys "
            "layer by layer, let it keep as many in every layer (of kvpress, a press that does)."
        )


def refuse_masked_keys(module: torch.nn.Module, implementation: str, function: Any, dense: bool) -> None:
    """Refuses a call whose module says of some keys, as those of ``kvpress`` do, that certain heads must not see them.

    ``kvpress`` has its wrapper see to that, which it puts around every attention function there is when it is imported.
    It makes of those keys ones of no weight, by which dense attention is right, and choosing among keys is not.

    Args:
        function: what this library registered as ``implementation``.
        dense: whether the call attends every key.
    """
    if getattr(module, "masked_key_indices", None) is None:
        return
    masks = f"{type(module).__name__} has masked_key_indices, by which kvpress masks keys head by head, and"
    otherwise = "or use a press that drops the same keys from every head."
    if ALL_ATTENTION_FUNCTIONS[implementation] is function:
        raise UnsupportedModelError(
            f"{masks} kvpress was imported before nc_patch, so that nothing reads them: the keys would be attended. "
            f"Import nc_patch first, and leave these layers dense in decoding; {otherwise}"
        )
    if not dense:
        raise UnsupportedModelError(
            f"{masks} sparse attention would choose among these keys. Leave these layers dense in decoding "
            f'(dense_layers, or decode="dense"), {otherwise}'
        )


def check_heads(module: torch.nn.Module, laws: tuple[Any, ...], heads: int) -> None:
    """Refuses budgets per head for another number of heads."""
    if len(laws) not in (1, heads):
        raise UnsupportedModelError(
            f"alpha and C are given for {len(laws)} heads, {type(module).__name__} has {heads} in this process (tensor "
            "parallelism spreads them). Give one value per layer."
        )


def no_mask(module: torch.nn.Module) -> str:
    """What is wrong where a module passes no mask."""
    return (
        f"{type(module).__name__} passed no mask, so that causality and padding would be lost: its model does not "
        "build masks through transformers' mask interface. It cannot be patched."
    )


def refuse_indexes(module: torch.nn.Module, cache: LayerCache | None) -> None:
    """Refuses a compiled call that cannot keep the key indexes of its layer, and cannot drop them in a graph either."""
    if torch.compiler.is_compiling() and cache is not None and cache.layer is not None and cache.layer.nc_indexes:
        raise UnsupportedMaskError(
            f"{type(module).__name__}: the mask has holes that it had not when the cache was filled, and a compiled "
            "call cannot drop the key index, which knows nothing of them. Make this call without torch.compile."
        )

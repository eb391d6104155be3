"""Which attention modules of a model can be patched, what stays dense, and what a patched module refuses.

A family is judged by what its classes do, not by its name, so that those which ``transformers`` adds are judged too:
whether attention goes through ``AttentionInterface`` and is causal, chooses keys by itself, or changes the mask.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nc_patch.cache import KeyIndexMixin
from nc_patch.common import BrokenCacheError, UnsupportedMaskError, UnsupportedModelError, say_once
from nc_patch.visibility import made_for

# Arguments by which a model asks of attention what cannot be had by attending fewer keys.
_REFUSED_ARGUMENTS = {
    "position_bias": "adds a learned bias to every score",
    "indices": "brings its own sparse attention",
    "block_indices": "brings its own sparse attention",
    "cache": "uses the paged cache of a session that began before the model was patched",
}
# Attributes that mark an attention module which selects or compresses keys by itself.
_ALREADY_SPARSE = ("indexer", "block_indexer", "compressor")
# By this name modules find their attention function.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Deeper than so many wrappers of a function nobody looks.
_MOST_WRAPPERS = 8


def check_is_module(model: object) -> None:
    """Raises UnsupportedModelError unless a model is a module."""
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(f"expected a model of transformers, got {type(model).__name__}")


def attention_modules(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module]]:
    """(layer index, module) of the attention modules to patch; raises UnsupportedModelError, which says why not."""
    check_is_module(model)
    inner, name = _inner(model), type(model).__name__
    if inner is None:
        why = f"{name} is not a model of transformers; load it with AutoModelForCausalLM.from_pretrained"
    elif getattr(inner.config, "is_encoder_decoder", False):
        why = f"{name} is an encoder-decoder; only decoders with causal self-attention can be patched"
    elif not (routed := _routed(inner)):
        why = (
            f"the attention of {name} does not go through transformers' AttentionInterface, so it cannot be replaced; "
            "use a Llama-, Mistral-, Qwen- or Gemma-style model"
        )
    elif not (causal := [m for m in inner.modules() if type(m) in routed and _is_causal(m)]):
        why = f"{name} has no causal attention; only decoders can be patched. Where a config has is_decoder, set it."
    elif not mask_builders(inner):
        why = (
            f"{name} does not build its masks through transformers' mask interface, so that causality and padding "
            "would be lost. Use the model as it is."
        )
    elif "shared_kv_states" in inspect.signature(type(inner).forward).parameters:
        why = f"{name} drafts for another model and attends that model's keys, not its own. Patch the other model."
    else:
        # Where the model has other parts too, those of the text decoder, which hold another class of config.
        text = type(inner.config.get_text_config(decoder=True))
        causal = [m for m in causal if type(getattr(m, "config", None)) is text] or causal
        for module in causal:
            _check_module(module, name)
        return [(_layer(module, place), module) for place, module in enumerate(causal)]
    raise UnsupportedModelError(why)


def mask_builders(model: torch.nn.Module) -> list[PreTrainedModel]:
    """The parts of a model that build their masks by functions named as ``create_causal_mask`` is."""
    creates = re.compile(r"create_\w*mask\w*").fullmatch
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return [m for m in models if any(map(creates, _used_names(type(m))))]


def left_dense(model: torch.nn.Module, patched: list[torch.nn.Module]) -> list[dict[str, Any]]:
    """What of a model stays as it is when ``patched`` are the attention modules that are patched.

    Of modules or layers that are alike: their ``names``, their ``kind``, which is a class or a type of layer, and the
    ``reason``.
    """
    inner = _inner(model)
    if inner is None:
        return []
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    routed, chosen = _routed(model), set(patched)
    for name, module in model.named_modules():
        if type(module) in routed:
            reason = "is not of the text decoder" if _is_causal(module) else "is cross-attention, or not causal"
        elif _is_other_attention(module, routed):
            reason = "does not go through AttentionInterface"
        else:
            continue
        if module not in chosen:
            groups[type(module).__name__, reason].append(name)
    # Layers that attend no keys, such as linear attention and convolutions, by the types in the config.
    config = inner.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    layers = [_layer(module, place) for place, module in enumerate(patched)]
    if max(layers, default=0) < len(types):
        attending = {types[layer] for layer in layers}  # where layers share one module, it names one of them
        for layer, kind in enumerate(types):
            if kind not in attending:
                groups[f"{kind} layer", "has no attention over keys to patch"].append(f"layer {layer}")
    return [{"names": tuple(names), "kind": kind, "reason": reason} for (kind, reason), names in groups.items()]


def _inner(model: torch.nn.Module) -> PreTrainedModel | None:
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def _layer(module: torch.nn.Module, place: int) -> int:
    """The layer that a module says it belongs to, or its place among the attention modules."""
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) and layer >= 0 else place


def _check_module(module: torch.nn.Module, name: str) -> None:
    """Refuses an attention module of the model ``name`` that cannot be patched."""
    cls: Any = type(module)
    kind, nodes, own = cls.__name__, _source(cls), vars(module).get("forward")
    sparse = next((attribute for attribute in _ALREADY_SPARSE if hasattr(module, attribute)), None)
    argument = next((n.arg for n in nodes if isinstance(n, ast.keyword) and n.arg in _REFUSED_ARGUMENTS), None)
    masks = (n for n in nodes if isinstance(n, ast.Assign) and any(map(_names_mask, n.targets)))
    change = next((n for n in masks if _computes_on_mask(n.value)), None)
    if sparse is not None:
        why = f"the attention of {name} is already sparse: {kind} selects keys by its {sparse}"
    elif own is not None and not _reaches_interface(own):
        why = (
            f"another library has put {getattr(own, '__qualname__', own)} in the place of forward of {kind}, which "
            f"does not go through transformers' AttentionInterface. Load {name} without that library"
        )
    elif argument is not None:
        what = _REFUSED_ARGUMENTS[argument]
        why = f"{kind} of {name} passes {argument}: it {what}, which sparse attention cannot do"
    elif change is not None:
        line = ast.unparse(change).splitlines()[0]
        why = (
            f"{kind} of {name} makes a mask of its own ({line}), and sparse attention needs each query to see one run "
            "of keys"
        )
    elif not hasattr(module, "config"):
        why = f"{kind} of {name} does not hold its config, so it cannot be switched"
    else:
        return
    raise UnsupportedModelError(f"{why}. Use the model as it is.")


def _routed(model: torch.nn.Module) -> set[type]:
    """Classes of a model's modules of which a method looks its attention function up."""
    kinds = {type(m) for m in model.modules() if not isinstance(m, PreTrainedModel)}  # that lists what may be chosen
    return {kind for kind in kinds if _INTERFACE in _used_names(kind)}


def _reaches_interface(function: Any, depth: int = 0) -> bool:
    """Whether a function, or one that it wraps, uses ``ALL_ATTENTION_FUNCTIONS``; True where that cannot be seen."""
    if isinstance(function, functools.partial):
        return any(_reaches_interface(part, depth) for part in (function.func, *function.args) if callable(part))
    code = getattr(function, "__code__", None)
    if not inspect.iscode(code) or depth > _MOST_WRAPPERS:
        return True
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    wrapped = [part for part in (getattr(function, "__wrapped__", None), *cells) if callable(part)]
    return _INTERFACE in code.co_names or any(_reaches_interface(part, depth + 1) for part in wrapped)


def _used_names(kind: type) -> set[str]:
    """Global names and attributes that the methods of a class use, its bases included."""
    used: set[str] = set()
    for base in kind.__mro__:
        if base in (torch.nn.Module, PreTrainedModel):
            break
        for attribute in vars(base).values():
            function = inspect.unwrap(attribute) if callable(attribute) else None
            pending = [getattr(function, "__code__", None)]
            while pending:  # functions within functions too: masks are often built in a lambda
                code = pending.pop()
                used.update(getattr(code, "co_names", ()))
                pending.extend(constant for constant in getattr(code, "co_consts", ()) if inspect.iscode(constant))
    return used


def _is_causal(module: torch.nn.Module) -> bool:
    cross = getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__
    causal = bool(getattr(module, "is_causal", True)) and not cross
    return causal and bool(getattr(getattr(module, "config", None), "is_causal", True))


def _is_other_attention(module: torch.nn.Module, routed: set[type]) -> bool:
    """Whether a module is named as attention, without any below it that is too, or is ``routed``."""
    if "Attention" not in type(module).__name__ or isinstance(module, PreTrainedModel):
        return False
    below = [type(m) for m in module.modules() if m is not module]
    return not any(kind in routed or "Attention" in kind.__name__ for kind in below)


@functools.lru_cache(maxsize=1024)
def _source(kind: Any) -> tuple[ast.AST, ...]:
    """The syntax tree of a class, node by node."""
    try:
        return tuple(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))))
    except (OSError, TypeError, SyntaxError):  # no source at hand: the attention function checks each call
        return ()


def _names_mask(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("attention_mask", "attn_mask", "causal_mask", "mask")


def _computes_on_mask(value: ast.AST) -> bool:
    """Whether an expression makes a mask out of a mask, rather than choosing, slicing or handing on one."""
    if isinstance(value, ast.IfExp):
        return _computes_on_mask(value.body) or _computes_on_mask(value.orelse)
    if isinstance(value, ast.Subscript):
        return _computes_on_mask(value.value)
    return isinstance(value, (ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare)) and any(map(_names_mask, ast.walk(value)))


def say_unpatched(name: str) -> None:
    """Says once a class that its modules run dense, though their config says otherwise."""
    say_once(
        f"{name} runs dense: its config names the attention of patched models, from one of which it came, but "
        "the module is not patched. Call patch_model for sparse attention, or set_attn_implementation for another."
    )


def refuse_unsupported(module: torch.nn.Module, kwargs: dict[str, Any], crosses: bool) -> None:
    """Refuses what the model asks for and sparse attention cannot do; where it ``crosses``, it need not be causal."""
    why = None
    if kwargs.get("is_causal") is False and not crosses:
        why = "asks for attention that is not causal, which sparse attention cannot do."
    if kwargs.get("dropout"):
        why = (
            f"asks for attention dropout {kwargs['dropout']}, which sparse attention has not. Set attention_dropout to "
            "0 or use model.eval()."
        )
    if kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        why = (
            "asks for attention weights (output_attentions), which are never formed. Leave it out, or unpatch the "
            "model."
        )
    for argument, what in _REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            why = f"passes {argument}: it {what}, which sparse attention cannot do. Unpatch it."
    if why is not None:
        raise UnsupportedModelError(f"{type(module).__name__} {why}")


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

    The wrapper that ``kvpress`` puts around every attention function when it is imported gives those keys no weight,
    by which ``dense`` attention is right, and choosing among keys is not. ``function`` is what this library registered
    as ``implementation``.
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


def refuse_indexes(module: torch.nn.Module, held: KeyIndexMixin | None) -> None:
    """Refuses a compiled call that cannot keep the key indexes of its layer, and cannot drop them in a graph either."""
    if torch.compiler.is_compiling() and held is not None and held.nc_indexes:
        raise UnsupportedMaskError(
            f"{type(module).__name__}: the mask has holes that it had not when the cache was filled, and a compiled "
            "call cannot drop the key index, which knows nothing of them. Make this call without torch.compile."
        )

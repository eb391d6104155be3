"""``patch_model`` and its kin: sparse attention into and out of a model, in place."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from nc_patch.attention import (
    IMPLEMENTATION,
    PATCH_ATTRIBUTE,
    LayerPatch,
    Observed,
    hand_on_cache,
    refuse_switched,
)
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C, NCConfig
from nc_patch.errors import UnsupportedModelError
from nc_patch.stats import summary, total

if TYPE_CHECKING:
    from nc_patch.profile import Profile

Model = TypeVar("Model", bound=torch.nn.Module)

# Attributes that mark an attention module which selects keys by itself.
_ALREADY_SPARSE = ("indexer", "block_indexer")
# Patched modules alive in this process: a config object that several models share keeps its implementation while one
# needs it.
_PATCHED: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
# Held while models are patched and unpatched, which threads may do at once.
_LOCK = threading.RLock()


def patch_model(
    model: Model,
    alpha: Any = None,
    C: Any = None,
    *,
    config: NCConfig | None = None,
    profile: "Profile | None" = None,
    **options: Any,
) -> Model:
    """Turns a model's attention into attention over ``k(n) = alpha * n**C`` of the n keys each query may see.

    The model is changed in place and returned. Nothing is written to ``model.config``; ``save_pretrained`` writes the
    same files as before. Patching a patched model replaces its settings. ``deepcopy`` and pickle keep the patch.

    Args:
        model: a causal language model of ``transformers`` whose attention goes through ``AttentionInterface``; one
            wrapped by PEFT works too.
        alpha: factor of the budget; a number, a list per layer, or a list per layer and query head. With neither
            alpha nor C they are ``DEFAULT_ALPHA`` and ``DEFAULT_C`` of ``nc_patch.config``.
        C: exponent of the budget in [0, 1], in the same forms.
        config: all settings as an ``NCConfig``, instead of alpha, C and options.
        profile: what ``calibrate`` measured on this model, instead of alpha and C: budgets for every layer and head.
        options: fields of ``NCConfig``, and ``selection``, which sets ``prefill`` and ``decode``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model cannot be patched; it is left as it was.
        ValueError, TypeError: a setting is wrong; the model is left as it was. ``ProfileError``, a ValueError, where
            the profile is of a model of another shape; of one with other weights it is only warned.
    """
    if profile is not None:
        config = _config_of_profile(model, profile, alpha, C, config, options)
    elif config is None:
        if alpha is None and C is None:
            alpha, C = DEFAULT_ALPHA, DEFAULT_C
        if alpha is None or C is None:
            raise TypeError(
                "give alpha and C, for example patch_model(model, alpha=2.0, C=0.7), or neither of them, or "
                "config=NCConfig(...)"
            )
        config = NCConfig.create(alpha, C, **options)
    elif alpha is not None or C is not None or options:
        extra = [name for name, value in (("alpha", alpha), ("C", C)) if value is not None] + sorted(options)
        raise TypeError(f"config holds every setting; leave out {', '.join(extra)}")
    elif not isinstance(config, NCConfig):
        raise TypeError(f"config must be an NCConfig, got {type(config).__name__}")
    modules = _attention_modules(model)
    _check_shape(config, modules)
    with _LOCK:
        for layer, module in modules:
            before = _patch_of(module)
            setattr(module, PATCH_ATTRIBUTE, LayerPatch(config, layer, _original_of(module, before)))
            if before is None:
                module.register_forward_pre_hook(refuse_switched)
            if before is None and _takes_more_arguments(module):
                module.register_forward_pre_hook(hand_on_cache, with_kwargs=True)
            _PATCHED.add(module)
        for module_config in _configs(modules):
            module_config._attn_implementation_internal = IMPLEMENTATION
    return model


def unpatch_model(model: Model) -> Model:
    """Gives a model its own attention back; its outputs are bit for bit what they were. Returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    modules = _patched_modules(model)
    with _LOCK:
        for module, patch in modules:
            delattr(module, PATCH_ATTRIBUTE)
            _remove_hooks(module)
            _PATCHED.discard(module)
            # What the user has set since stays.
            switched = _config_of(module)._attn_implementation != IMPLEMENTATION
            if not switched and not any(other.config is module.config for other in _PATCHED):
                _config_of(module)._attn_implementation_internal = patch.original_implementation
    return model


@contextmanager
def patched(
    model: Model,
    alpha: Any = None,
    C: Any = None,
    *,
    config: NCConfig | None = None,
    profile: "Profile | None" = None,
    **options: Any,
) -> Iterator[Model]:
    """``with patched(model, alpha, C):`` patches for the block, and afterwards restores what the model was before.

    Arguments and errors as in ``patch_model``.
    """
    before = [(module, patch) for module in model.modules() if (patch := _patch_of(module)) is not None]
    patch_model(model, alpha, C, config=config, profile=profile, **options)
    try:
        yield model
    finally:
        if before:
            for module, patch in before:
                setattr(module, PATCH_ATTRIBUTE, patch)
        elif is_patched(model):
            unpatch_model(model)


@contextmanager
def observed(model: Model, observe: Callable[[Observed], None]) -> Iterator[Model]:
    """``with observed(model, observe):`` runs the model densely and shows ``observe`` every attention call.

    Afterwards the model is what it was before, patched or not.

    Args:
        model: as in ``patch_model``.
        observe: called after each layer's attention, before its output goes on.

    Raises:
        UnsupportedModelError: the model cannot be patched; it is left as it was.
    """
    with patched(model, config=NCConfig(1.0, 1.0)):
        for module, patch in _patched_modules(model):
            setattr(module, PATCH_ATTRIBUTE, replace(patch, observe=observe))
        yield model


def model_shape(model: torch.nn.Module) -> tuple[int, int]:
    """How many layers and query heads the settings of a model are for; errors as in ``patch_model``."""
    modules = _attention_modules(model)
    config = _config_of(modules[0][1])
    return getattr(config, "num_hidden_layers", len(modules)), getattr(config, "num_attention_heads", 0)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether any attention module of the model is patched."""
    return any(_patch_of(module) is not None for module in model.modules())


def nc_stats(model: torch.nn.Module) -> dict[str, Any]:
    """What a patched model did since it was patched or ``reset_stats`` was called.

    Calls inside a compiled graph are not counted. Gradient checkpointing runs, and counts, a layer twice.

    Returns:
        ``attended_fraction`` (attended keys / visible keys), ``mean_keys`` (attended keys per query and head),
        ``tail_attended_fraction`` and ``tail_mean_keys`` (the same over the last queries of each call, where
        ``reset_stats`` was told how many), each None where nothing was counted; and ``layers``, a list with the same
        for each layer, beside ``layer``, ``name``, ``calls`` and ``dense_calls`` (how many calls ran dense, by reason).
        With ``track`` each layer's ``dropped_mass`` says what block prefill is estimated to have dropped: ``mean`` and
        its ``standard_error`` over rows and heads, both also ``_by_head``; ``rows``, the number of sampled rows; and
        with ``min_mass`` the ``enlarged_fraction`` of query blocks that took more than their budget. None without.

    Raises:
        ValueError: the model is not patched.
    """
    names = {module: name for name, module in model.named_modules()}
    modules = _patched_modules(model)
    layers = [{"layer": patch.layer, "name": names[module], **summary(patch.counters)} for module, patch in modules]
    return {**total([patch.counters for _, patch in modules]), "layers": layers}


def reset_stats(model: torch.nn.Module, tail: int | None = None) -> None:
    """Sets the counts of a patched model to zero; from now on the last ``tail`` queries of each call are counted apart.

    Raises:
        ValueError: the model is not patched, or ``tail`` is not positive.
    """
    if tail is not None and (isinstance(tail, bool) or not isinstance(tail, int) or tail < 1):
        raise ValueError(f"tail must be a positive number of queries or None, got {tail!r}")
    for _, patch in _patched_modules(model):
        patch.counters.reset()
        patch.counters.tail = tail


def _config_of_profile(
    model: torch.nn.Module, profile: Any, alpha: Any, C: Any, config: NCConfig | None, options: dict[str, Any]
) -> NCConfig:
    from nc_patch.profile import Profile

    given = [name for name, value in (("alpha", alpha), ("C", C), ("config", config)) if value is not None]
    if given:
        raise TypeError(f"profile brings alpha and C of its own; leave out {', '.join(given)}")
    if not isinstance(profile, Profile):
        raise TypeError(f"profile must be a Profile, for example Profile.load(path), got {type(profile).__name__}")
    profile.check_model(model)
    return profile.config(**options)


def _patch_of(module: torch.nn.Module) -> LayerPatch | None:
    patch: LayerPatch | None = module.__dict__.get(PATCH_ATTRIBUTE)
    return patch


def _patched_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, LayerPatch]]:
    modules = [(module, patch) for module in model.modules() if (patch := _patch_of(module)) is not None]
    if not modules:
        raise ValueError(f"{type(model).__name__} is not patched; call patch_model first")
    return modules


def _takes_more_arguments(module: torch.nn.Module) -> bool:
    """Whether a module hands keyword arguments that it does not know on to its attention function."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _remove_hooks(module: torch.nn.Module) -> None:
    hooks = module._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook in (hand_on_cache, refuse_switched)]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def _config_of(module: torch.nn.Module) -> Any:
    return module.config


def _configs(modules: list[tuple[int, torch.nn.Module]]) -> list[Any]:
    return list({id(_config_of(module)): _config_of(module) for _, module in modules}.values())


def _original_of(module: torch.nn.Module, before: LayerPatch | None) -> str:
    """The implementation that unpatching a module gives back."""
    implementation: str = _config_of(module)._attn_implementation
    if implementation != IMPLEMENTATION:
        return implementation
    if before is not None:
        return before.original_implementation
    for other in _PATCHED:  # another model that shares this config object is patched
        patch = _patch_of(other)
        if other is not module and patch is not None and other.config is module.config:
            return patch.original_implementation
    return "sdpa"


def _attention_modules(model: torch.nn.Module) -> list[tuple[int, torch.nn.Module]]:
    """(layer index, module) of the attention modules to patch; raises UnsupportedModelError where there are none."""
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(f"expected a model of transformers, got {type(model).__name__}")
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    name = type(model).__name__
    if inner is None:
        raise UnsupportedModelError(
            f"{name} is not a model of transformers; load it with AutoModelForCausalLM.from_pretrained"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; only decoders with causal self-attention can be patched"
        )
    routed = [m for m in inner.modules() if _routes_attention(type(m))]
    if not routed:
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' AttentionInterface, so it cannot be replaced; "
            "use a Llama-, Mistral-, Qwen- or Gemma-style model"
        )
    causal = [m for m in routed if _is_causal(m)]
    if not causal:
        raise UnsupportedModelError(f"{name} has no causal attention; only decoders can be patched")
    for module in causal:
        sparse = next((attribute for attribute in _ALREADY_SPARSE if hasattr(module, attribute)), None)
        if sparse is not None:
            raise UnsupportedModelError(
                f"the attention of {name} is already sparse: {type(module).__name__} selects keys by its {sparse}"
            )
        if not hasattr(module, "config"):
            raise UnsupportedModelError(
                f"{type(module).__name__} of {name} does not hold its config, so it cannot be switched"
            )
    index = lambda module, place: place if getattr(module, "layer_idx", None) is None else int(module.layer_idx)  # noqa: E731
    return [(index(module, place), module) for place, module in enumerate(causal)]


def _routes_attention(kind: type) -> bool:
    """Whether a method of the class looks its attention function up in ``ALL_ATTENTION_FUNCTIONS``."""
    if issubclass(kind, PreTrainedModel):  # the base class names it too, to list what may be chosen
        return False
    for base in kind.__mro__:
        if base is torch.nn.Module:
            break
        for attribute in vars(base).values():
            function = inspect.unwrap(attribute) if callable(attribute) else None
            if "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(function, "__code__", None), "co_names", ()):
                return True
    return False


def _is_causal(module: torch.nn.Module) -> bool:
    causal = bool(getattr(module, "is_causal", True)) and not getattr(module, "is_cross_attention", False)
    return causal and bool(getattr(getattr(module, "config", None), "is_causal", True))


def _check_shape(config: NCConfig, modules: list[tuple[int, torch.nn.Module]]) -> None:
    for module_config in _configs(modules):
        layers = getattr(module_config, "num_hidden_layers", len(modules))
        config.check_model(layers, getattr(module_config, "num_attention_heads", 0))

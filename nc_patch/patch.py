"""``patch_model`` and its kin: sparse attention into and out of a model, in place."""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from nc_patch.attention import PATCH_ATTRIBUTE, LayerPatch, Observed
from nc_patch.common import as_integer
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C, NCConfig, check_option_names
from nc_patch.families import attention_modules, check_is_module, left_dense, mask_builders, say_left_dense
from nc_patch.hooks import (
    IMPLEMENTATION,
    forget_boundaries,
    hand_on_cache,
    hand_on_mask,
    note_boundaries,
    refuse_switched,
)
from nc_patch.stats import PatchStats, summary, total

Model = TypeVar("Model", bound=torch.nn.Module)

# Patched modules alive in this process: a config object that several models share keeps its implementation while one
# needs it.
_PATCHED: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
_HOOKS = (hand_on_cache, hand_on_mask, refuse_switched, note_boundaries, forget_boundaries)
# Held while models are patched and unpatched, which threads may do at once.
_LOCK = threading.RLock()


@runtime_checkable
class HasBudgets(Protocol):
    """What ``patch_model`` takes as a profile: ``nc_patch.Profile``, or what else brings budgets for a model."""

    def check_model(self, model: torch.nn.Module) -> None:
        """Raises ValueError where the budgets are not for this model."""

    def config(self, **options: Any) -> NCConfig:
        """The settings with these budgets; ``options`` are those of ``NCConfig`` but for alpha and C."""


def patch_model(
    model: Model,
    alpha: Any = None,
    C: Any = None,
    *,
    config: NCConfig | None = None,
    profile: HasBudgets | None = None,
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
        check_option_names(options)
        if isinstance(alpha, NCConfig):
            raise TypeError("settings go by name: patch_model(model, config=NCConfig(...))")
        if alpha is None and C is None:
            alpha, C = DEFAULT_ALPHA, DEFAULT_C
        if alpha is None or C is None:
            raise TypeError(
                "give alpha and C, for example patch_model(model, alpha=2.0, C=0.7), or neither of them, or "
                "config=NCConfig(...)"
            )
        config = NCConfig(alpha, C, **options)
    elif alpha is not None or C is not None or options:
        extra = [name for name, value in (("alpha", alpha), ("C", C)) if value is not None] + sorted(options)
        raise TypeError(f"config holds every setting; leave out {', '.join(extra)}")
    elif not isinstance(config, NCConfig):
        raise TypeError(f"config must be an NCConfig, got {type(config).__name__}")
    modules = attention_modules(model)
    _check_shape(config, modules)
    with _LOCK:
        for layer, module in modules:
            _attach(module, LayerPatch(config, layer, _original_of(module, _patch_of(module))))
        for module_config in _configs(modules):
            module_config._attn_implementation_internal = IMPLEMENTATION
        for part in mask_builders(model):
            if note_boundaries not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(note_boundaries, with_kwargs=True)
                part.register_forward_hook(forget_boundaries, always_call=True)
        for holder in _holders(model):
            if "_hf_hook" in vars(holder) and hand_on_mask not in holder._forward_pre_hooks.values():
                holder.register_forward_pre_hook(hand_on_mask, with_kwargs=True)
    say_left_dense(model, [module for _, module in modules])
    return model


def unpatch_model(model: Model) -> Model:
    """Gives a model its own attention back; its outputs are bit for bit what they were. Returns the same model.

    Raises:
        ValueError: the model is not patched; ``is_patched`` says whether it is.
    """
    modules, holders = _patched_modules(model), _holders(model)
    with _LOCK:
        for module, _ in modules:
            delattr(module, PATCH_ATTRIBUTE)
            _remove_hooks(module)
            _PATCHED.discard(module)
        for part in (*mask_builders(model), *holders):
            _remove_hooks(part)
        for module, patch in modules:
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
    profile: HasBudgets | None = None,
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
            with _LOCK:
                for module, patch in before:
                    if not _attach(module, patch):  # the block has unpatched it
                        _config_of(module)._attn_implementation_internal = IMPLEMENTATION
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
    modules = attention_modules(model)
    config = _config_of(modules[0][1])
    return getattr(config, "num_hidden_layers", len(modules)), getattr(config, "num_attention_heads", 0)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether any attention module of the model is patched."""
    return any(_patch_of(module) is not None for module in _modules(model))


def nc_stats(model: torch.nn.Module) -> PatchStats:
    """What a patched model did since it was patched or ``reset_stats`` was called; ``print`` shows it as a table.

    Calls inside a compiled graph are not counted. Gradient checkpointing runs, and counts, a layer twice.

    Returns:
        ``attended_fraction`` (attended keys / visible keys), ``mean_keys`` (attended keys per query and head),
        ``tail_attended_fraction`` and ``tail_mean_keys`` (the same over the last queries of each call, where
        ``reset_stats`` was told how many), each None where nothing was counted; and ``layers``, a list with the same
        for each layer, beside ``layer``, ``name``, ``calls``, ``dense_calls`` (how many calls ran dense, by reason) and
        ``exceeded_calls`` (how many dropped more than ``max_dropped_mass``, where ``on_drop`` looked).

        ``kept_mass``, of all layers and of each, says under ``"prefill"`` and ``"decode"`` how much of the dense
        softmax mass the attended keys held, over the rows (queries and heads) of those calls; None where nothing was
        measured, as without ``track`` and ``on_drop``. ``mean`` lies between ``lower`` and ``upper``: for certain if
        ``certified``, which figures from every score and bounds from codes are, and calls that attended every key;
        otherwise, in prefill by ``"block"``, it is an estimate with a 95 % interval, from ``audited_rows`` drawn at
        random. ``least`` is the lowest limit of any certified row, ``below`` how many of them fall short of ``1 -
        max_dropped_mass``; ``rows`` counts all. Of a layer also ``calls`` by what the figures rest on (``"exact"``,
        ``"bounds"``, ``"estimate"``, ``"dense"``); ``mean``, ``lower``, ``upper`` and ``least`` ``_by_head``; and with
        ``min_mass`` the ``enlarged_fraction`` of query blocks that took more than their budget.
        docs/certificates.md says what these figures mean and cost.

        ``left_dense`` lists what patching left as it was, such as vision towers, cross-attention and layers without
        attention: ``kind``, ``names`` and ``reason``.

    Raises:
        ValueError: the model is not patched.
    """
    modules = _patched_modules(model)
    names = {module: name for name, module in model.named_modules()}
    layers = [{"layer": patch.layer, "name": names[module], **summary(patch.counters)} for module, patch in modules]
    parts = [part._asdict() for part in left_dense(model, [module for module, _ in modules])]
    return PatchStats(total([patch.counters for _, patch in modules]), layers=layers, left_dense=parts)


def reset_stats(model: torch.nn.Module, tail: int | None = None) -> None:
    """Sets the counts of a patched model to zero; from now on the last ``tail`` queries of each call are counted apart.

    Raises:
        ValueError: the model is not patched, or ``tail`` is not positive.
    """
    queries = as_integer(tail)
    if tail is not None and (queries is None or queries < 1):
        raise ValueError(f"tail must be a positive number of queries or None, got {tail!r}")
    for _, patch in _patched_modules(model):
        patch.counters.reset()
        patch.counters.tail = queries


def _config_of_profile(
    model: torch.nn.Module, profile: Any, alpha: Any, C: Any, config: NCConfig | None, options: dict[str, Any]
) -> NCConfig:
    given = [name for name, value in (("alpha", alpha), ("C", C), ("config", config)) if value is not None]
    if given:
        raise TypeError(f"profile brings alpha and C of its own; leave out {', '.join(given)}")
    if not isinstance(profile, HasBudgets):
        raise TypeError(f"profile must be a Profile, for example Profile.load(path), got {type(profile).__name__}")
    profile.check_model(model)
    return profile.config(**options)


def _patch_of(module: torch.nn.Module) -> LayerPatch | None:
    patch: LayerPatch | None = module.__dict__.get(PATCH_ATTRIBUTE)
    return patch


def _modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    check_is_module(model)
    return model.modules()


def _patched_modules(model: torch.nn.Module) -> list[tuple[torch.nn.Module, LayerPatch]]:
    modules = [(module, patch) for module in _modules(model) if (patch := _patch_of(module)) is not None]
    if not modules:
        raise ValueError(f"{type(model).__name__} is not patched; call patch_model first")
    return modules


def _holders(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that hold a model's patched attention modules."""
    return [module for module in model.modules() if any(_patch_of(child) is not None for child in module.children())]


def _takes_more_arguments(module: torch.nn.Module) -> bool:
    """Whether a module hands keyword arguments that it does not know on to its attention function."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _remove_hooks(module: torch.nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in _HOOKS]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)


def _config_of(module: torch.nn.Module) -> Any:
    return module.config


def _configs(modules: list[tuple[int, torch.nn.Module]]) -> list[Any]:
    return list({id(_config_of(module)): _config_of(module) for _, module in modules}.values())


def _attach(module: torch.nn.Module, patch: LayerPatch) -> bool:
    """Gives an attention module its settings, and the hooks where it has none; returns whether it was patched."""
    was_patched = _patch_of(module) is not None
    setattr(module, PATCH_ATTRIBUTE, patch)
    if not was_patched:
        module.register_forward_pre_hook(refuse_switched)
        if _takes_more_arguments(module):
            module.register_forward_pre_hook(hand_on_cache, with_kwargs=True)
    _PATCHED.add(module)
    return was_patched


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


def _check_shape(config: NCConfig, modules: list[tuple[int, torch.nn.Module]]) -> None:
    for module_config in _configs(modules):
        # Some families have two attention modules a layer, and count those.
        last = max(layer for layer, module in modules if _config_of(module) is module_config)
        layers = max(getattr(module_config, "num_hidden_layers", len(modules)), last + 1)
        config.check_model(layers, getattr(module_config, "num_attention_heads", 0))

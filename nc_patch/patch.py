"""``patch_model`` and its kin: sparse attention into and out of a model, in place."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from nc_patch import attention  # noqa: F401  registers what transformers calls
from nc_patch.common import as_integer, say_once
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C, NCConfig, check_option_names
from nc_patch.continuous import serve
from nc_patch.families import attention_modules, left_dense
from nc_patch.layers import IMPLEMENTATION, PATCH_ATTRIBUTE, LayerPatch, Observed, add_hooks, patches_of, remove_hooks
from nc_patch.stats import PatchStats, summary, total

Model = TypeVar("Model", bound=torch.nn.Module)

# Patched modules that are alive: a config object that several models share keeps its implementation while one needs it.
_PATCHED: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()
# Held while models are patched and unpatched, which threads may do at once.
_LOCK = threading.RLock()


def patch_model(
    model: Model, alpha: Any = None, C: Any = None, *, config: NCConfig | None = None, profile: Any = None,
    **options: Any,
) -> Model:  # fmt: skip
    """Turns a model's attention into attention over ``k(n) = alpha * n**C`` of the n keys each query may see.

    The model is changed in place and returned. Nothing is written to ``model.config``; ``save_pretrained`` writes the
    same files as before. Patching a patched model replaces its settings. ``deepcopy`` and pickle keep the patch.

    Args:
        model: a causal language model of ``transformers`` whose attention goes through ``AttentionInterface``; one
            wrapped by PEFT works too.
        alpha, C: factor of the budget, and its exponent in [0, 1]; numbers, lists per layer, or lists per layer and
            query head. Without both they are ``DEFAULT_ALPHA`` and ``DEFAULT_C`` of ``nc_patch.config``.
        config: all settings as an ``NCConfig``, instead of alpha, C and options.
        profile: a ``Profile``, which ``calibrate`` measures on this model, instead of alpha and C: budgets for every
            layer and head.
        options: fields of ``NCConfig``, and ``selection``, which sets ``prefill`` and ``decode``.

    Raises:
        UnsupportedModelError: the model cannot be patched; it is left as it was.
        ValueError, TypeError: a setting is wrong; the model is left as it was. ``ProfileError``, a ValueError, where
            the profile is of a model of another shape; of one with other weights it is only warned.
    """
    settings = _settings(model, alpha, C, config, profile, options)
    modules = attention_modules(model)
    _check_shape(settings, modules)
    with _LOCK:
        patches: dict[Any, LayerPatch] = {m: LayerPatch(settings, layer, _original_of(m)) for layer, m in modules}
        _attach(model, patches)
    serve(model, sparse=True)
    parts = [f"{len(part['names'])} x {part['kind']}: {part['reason']}" for part in left_dense(model, [*patches])]
    if parts:
        say_once(f"{type(model).__name__}: left as it was: {'; '.join(parts)}")
    return model


def unpatch_model(model: Model) -> Model:
    """Gives a model its own attention back; its outputs are bit for bit what they were. Returns the same model.

    Raises:
        ValueError: the model is not patched; ``is_patched`` says whether it is.
    """
    patches = _need_patches(model)
    serve(model, sparse=False)
    with _LOCK:
        for module in patches:
            delattr(module, PATCH_ATTRIBUTE)
            _PATCHED.discard(module)
        remove_hooks(model)
        for module, patch in patches.items():
            # What the user has set since stays.
            switched = module.config._attn_implementation != IMPLEMENTATION
            if not switched and not any(other.config is module.config for other in _PATCHED):
                module.config._attn_implementation_internal = patch.original_implementation
    return model


@contextmanager
def patched(model: Model, *budget: Any, **options: Any) -> Iterator[Model]:
    """``with patched(model, alpha, C):`` patches for the block, and afterwards restores what the model was before.

    Arguments and errors as in ``patch_model``.
    """
    before = patches_of(model)
    patch_model(model, *budget, **options)
    try:
        yield model
    finally:
        if before:
            with _LOCK:
                _attach(model, before)
            serve(model, sparse=True)
        elif is_patched(model):
            unpatch_model(model)


@contextmanager
def observed(model: Model, observe: Callable[[Observed], None]) -> Iterator[Model]:
    """``with observed(model, observe):`` runs the model densely and shows ``observe`` every attention call.

    It is called after each layer's attention, before the output goes on. Afterwards the model is what it was before,
    patched or not. Errors as in ``patch_model``.
    """
    with patched(model, config=NCConfig(1.0, 1.0)):
        for module, patch in _need_patches(model).items():
            setattr(module, PATCH_ATTRIBUTE, replace(patch, observe=observe))
        yield model


def model_shape(model: torch.nn.Module) -> tuple[int, int]:
    """How many layers and query heads the settings of a model are for; errors as in ``patch_model``."""
    modules = attention_modules(model)
    config = modules[0][1].config
    return getattr(config, "num_hidden_layers", len(modules)), getattr(config, "num_attention_heads", 0)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether any attention module of the model is patched."""
    return bool(patches_of(model))


def nc_stats(model: torch.nn.Module) -> PatchStats:
    """What a patched model did since it was patched or ``reset_stats`` was called; ``print`` shows it as a table.

    Calls inside a compiled graph are not counted. Gradient checkpointing runs, and counts, a layer twice.

    Returns:
        A dictionary, whose figures are None where nothing was counted:

        - ``attended_fraction`` (attended keys / visible keys) and ``mean_keys`` (attended keys per query and head);
          ``tail_attended_fraction`` and ``tail_mean_keys``, the same over the last queries of each call, where
          ``reset_stats`` was told how many.
        - ``kept_mass``, under ``"prefill"`` and ``"decode"``, with ``track`` or ``on_drop``: how much of the dense
          softmax mass the attended keys held; docs/certificates.md says what its figures mean and cost. ``mean`` lies
          between ``lower`` and ``upper``: for certain if ``certified``, otherwise with 95 %, estimated from
          ``audited_rows``. ``least`` is the lowest limit of any certified row; ``below`` of ``rows`` fall short of
          ``1 - max_dropped_mass``. Of a layer also ``calls`` by what the figures rest on (``"exact"``, ``"bounds"``,
          ``"estimate"``, ``"dense"``), and the figures ``_by_head``.
        - ``layers``: a list with the same for each, beside ``layer``, ``name``, ``calls``, ``dense_calls`` (by reason)
          and ``exceeded_calls``, which dropped more than ``max_dropped_mass``.
        - ``left_dense``: what patching left as it was, such as vision towers: ``kind``, ``names`` and ``reason``.

    Raises:
        ValueError: the model is not patched.
    """
    patches, names = _need_patches(model), {module: name for name, module in model.named_modules()}
    layers = [{"layer": p.layer, "name": names[module], **summary(p.counters)} for module, p in patches.items()]
    every = total([patch.counters for patch in patches.values()])
    return PatchStats(every, layers=layers, left_dense=left_dense(model, [*patches]))


def reset_stats(model: torch.nn.Module, tail: int | None = None) -> None:
    """Sets the counts of a patched model to zero; from now on the last ``tail`` queries of each call are counted apart.

    Raises:
        ValueError: the model is not patched, or ``tail`` is not positive.
    """
    queries = as_integer(tail)
    if tail is not None and (queries is None or queries < 1):
        raise ValueError(f"tail must be a positive number of queries or None, got {tail!r}")
    for patch in _need_patches(model).values():
        patch.counters.reset()
        patch.counters.tail = queries


def _settings(
    model: torch.nn.Module, alpha: Any, C: Any, config: NCConfig | None, profile: Any, options: dict[str, Any]
) -> NCConfig:
    """The settings that the arguments of ``patch_model`` give."""
    given = [name for name, value in (("alpha", alpha), ("C", C)) if value is not None]
    if profile is not None:
        given += ["config"] * (config is not None)
        if given:
            raise TypeError(f"profile brings alpha and C of its own; leave out {', '.join(given)}")
        if not hasattr(profile, "check_model"):
            raise TypeError(f"profile must be a Profile, for example Profile.load(path), got {type(profile).__name__}")
        profile.check_model(model)
        with_budgets: NCConfig = profile.config(**options)
        return with_budgets
    if config is not None:
        if given or options:
            raise TypeError(f"config holds every setting; leave out {', '.join([*given, *sorted(options)])}")
        if not isinstance(config, NCConfig):
            raise TypeError(f"config must be an NCConfig, got {type(config).__name__}")
        return config
    check_option_names(options)
    if isinstance(alpha, NCConfig):
        raise TypeError("settings go by name: patch_model(model, config=NCConfig(...))")
    if len(given) == 1:
        raise TypeError(
            "give alpha and C, for example patch_model(model, alpha=2.0, C=0.7), or neither of them, or "
            "config=NCConfig(...)"
        )
    return NCConfig(alpha, C, **options) if given else NCConfig(DEFAULT_ALPHA, DEFAULT_C, **options)


def _need_patches(model: torch.nn.Module) -> dict[Any, LayerPatch]:
    patches = patches_of(model)
    if not patches:
        raise ValueError(f"{type(model).__name__} is not patched; call patch_model first")
    return patches


def _attach(model: torch.nn.Module, patches: dict[Any, LayerPatch]) -> None:
    """Gives the attention modules of a model their settings, and the model its hooks anew."""
    for module, patch in patches.items():
        setattr(module, PATCH_ATTRIBUTE, patch)
        _PATCHED.add(module)
        module.config._attn_implementation_internal = IMPLEMENTATION  # without the checks of set_attn_implementation
    add_hooks(model, patches)


def _original_of(module: Any) -> str:
    """The implementation that unpatching a module gives back."""
    implementation: str = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        return implementation
    # Where another model that shares this config object is patched, what that had.
    sharing = [module, *(other for other in _PATCHED if other.config is module.config)]
    patches = (each.__dict__.get(PATCH_ATTRIBUTE) for each in sharing)
    return next((patch.original_implementation for patch in patches if patch is not None), "sdpa")


def _check_shape(settings: NCConfig, modules: list[tuple[int, Any]]) -> None:
    for config in {id(module.config): module.config for _, module in modules}.values():
        # Some families have two attention modules a layer, and count those.
        last = max(layer for layer, module in modules if module.config is config)
        layers = max(getattr(config, "num_hidden_layers", len(modules)), last + 1)
        settings.check_model(layers, getattr(config, "num_attention_heads", 0))

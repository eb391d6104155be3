"""The attention function that ``transformers`` calls in place of its own, and its registration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from nc_patch.cache import LayerCache, layer_cache
from nc_patch.certificates import Call, record, refuse_graphs
from nc_patch.config import NCConfig
from nc_patch.errors import BrokenCacheError, UnsupportedMaskError, UnsupportedModelError
from nc_patch.functional import attend, budgets_of, check_scale, check_tensors, needs_gradient
from nc_patch.index import KIND_OF, IndexKind, KeyIndex
from nc_patch.observed import Observed
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.decode_ops import MAX_DECODE_QUERIES
from nc_patch.ops.reference import AttentionResult
from nc_patch.stats import LayerCounters, tally
from nc_patch.support import REFUSED_ARGUMENTS
from nc_patch.visibility import Visibility, interval_mask, is_bidirectional, is_packed, is_plain_causal, made_for

# The name must not contain "flash", "sdpa", "flex_attention" or "/": transformers looks for them in it.
IMPLEMENTATION = "nc_sparse"
# The attribute of an attention module that holds its LayerPatch.
PATCH_ATTRIBUTE = "_nc_patch"


@dataclass(frozen=True)
class LayerPatch:
    """What one attention module needs to know: its settings, its place, what ran before, its counters, and who else
    wants to see its calls.
    """

    config: NCConfig
    layer: int
    original_implementation: str
    counters: LayerCounters = field(default_factory=LayerCounters, compare=False)
    observe: Callable[[Observed], None] | None = field(default=None, compare=False)

    @property
    def audit_seed(self) -> int:
        """Seed of the rows that an audit of the next call draws: another for each layer and call."""
        return self.counters.calls * 4096 + self.layer


def nc_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    nc_layer_cache: LayerCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as ``transformers`` asks for it: ``[B, H, L, D]`` in, ``([B, Lq, Hq, Dv], None)`` out.

    A module that carries no ``LayerPatch`` shares its config object with a patched model: it runs dense.
    ``nc_layer_cache`` comes from ``hand_on_cache``.

    Raises:
        UnsupportedMaskError: the mask is not one interval of keys per query.
        UnsupportedModelError: the model asks for what sparse attention cannot do.
    """
    patch: LayerPatch | None = getattr(module, PATCH_ATTRIBUTE, None)
    crosses = patch is None and (is_bidirectional(attention_mask) or getattr(module, "is_causal", True) is False)
    _refuse_unsupported(module, dropout, None if crosses else is_causal, kwargs)
    B, _, Lq, Lk = check_tensors(query, key, value, s_aux)
    scale = check_scale(scaling, softcap, query.shape[-1])
    config = NCConfig(1.0, 1.0) if patch is None else patch.config
    layer = 0 if patch is None else patch.layer
    started = nc_layer_cache is not None and nc_layer_cache.started
    if nc_layer_cache is not None and nc_layer_cache.layer is not None and not torch.compiler.is_compiling():
        nc_layer_cache.layer.nc_compare(key, value)
    # A prompt in pieces, whose last may be short, chooses blocks as if it were whole.
    several_decode = started and Lq <= MAX_DECODE_QUERIES and not config.prefill == config.decode == "block"
    decoding = Lq == 1 or several_decode
    selection = config.decode if decoding else config.prefill
    dense_reason = _dense_reason(patch, config, layer, selection)
    reading_allowed = not torch.compiler.is_compiling() and not _capturing(query)
    measures = patch is not None and (config.track or config.on_drop != "ignore") and reading_allowed
    if config.on_drop != "ignore" and dense_reason is None and not reading_allowed:
        refuse_graphs(config.on_drop, layer)

    if not is_packed(attention_mask):
        if dense_reason is None or (attention_mask is None and not crosses):
            raise UnsupportedMaskError(_mask_problem(module, attention_mask))
        output = _sdpa(query, key, value, attention_mask, scale, softcap, s_aux, module, causal=not crosses)
        return output.transpose(1, 2).contiguous(), None
    assert attention_mask is not None
    if patch is not None and is_bidirectional(attention_mask):
        raise UnsupportedMaskError(
            f"{type(module).__name__} got a bidirectional mask, and sparse attention is causal. Unpatch the model, or "
            "use it as a decoder."
        )
    _refuse_missing_keys(module, layer, attention_mask, Lk)
    visible, origin = _once(attention_mask, ("visibility",), lambda: Visibility.unpack(attention_mask))
    if visible.shape[0] != B:
        visible, origin = visible.expand(B, -1, -1), origin.expand(B, -1)

    if dense_reason is not None:
        selection, budget = "dense", None
    else:
        _check_heads(module, config.laws(layer), query.shape[1])
        key_of_law = (config.laws(layer), config.min_keys, config.law)
        budget = _once(attention_mask, ("budget", *key_of_law, Lk), lambda: budgets_of(config, layer, visible, Lk))
    index = means = None
    # Top-k has a gradient where it decodes without an index; decoding by pages has none, and says so in backward.
    by_index = KIND_OF.get(config.decode) == "pages" or not needs_gradient(query, key, value, s_aux)
    if patch is not None and not config.is_dense(layer) and by_index:
        keys = (key.detach(), value.detach())
        index = _key_index(config, *keys, visible, origin, nc_layer_cache, decoding)
        means = _key_means(config, *keys, visible, origin, nc_layer_cache)
    by_codes = decoding and index is not None and index.kind == "codes"

    def run(selection: str) -> AttentionResult:
        plain = selection == "dense" and softcap is None and s_aux is None and Lq in (1, Lk) and reading_allowed
        if plain and is_plain_causal(attention_mask, Lk):
            return AttentionResult(_sdpa(query, key, value, None, scale, None, None, module))
        estimated = selection == "block" and not decoding
        return attend(
            query,
            key,
            value,
            visible=visible,
            origin=origin,
            budget=visible.new_empty(0) if budget is None else budget,
            selection=selection,
            config=config,
            scale=scale,
            softcap=softcap,
            sinks=s_aux,
            index=index if decoding else None,
            means=means if decoding else None,
            max_budget=config.largest_budget(Lk, layer) if index is not None else 0,
            want_stats=measures and selection != "dense" and not by_codes and not estimated,
            want_bounds=measures and by_codes,
            audit_seed=patch.audit_seed if measures and patch is not None and estimated else -1,
        )

    result = run(selection)
    if nc_layer_cache is not None and nc_layer_cache.layer is not None and not torch.compiler.is_compiling():
        nc_layer_cache.layer.nc_done()
    if measures and patch is not None:
        phase = "decode" if decoding else "prefill"
        call = Call(layer, phase, query, key, visible, origin, scale, softcap)
        if record(patch.counters, config, call, selection, result):
            result, selection, budget = run("dense"), "dense", None
            dense_reason = f'it dropped more than max_dropped_mass={config.max_dropped_mass:g}, with on_drop="dense"'
            record(patch.counters, config, call, selection, result)
    output, attended = result.output, result.attended if selection == "block" else None
    if patch is not None and patch.observe is not None:
        patch.observe(Observed(layer, query, key, value, visible, scale, softcap, s_aux, output))
    if patch is not None and not torch.compiler.is_compiling():
        _count(
            patch, attention_mask, visible, budget if attended is None else attended, dense_reason, attended is not None
        )
    return output.transpose(1, 2).contiguous(), None


def refuse_switched(module: torch.nn.Module, *_: Any) -> None:
    """Forward pre-hook of a patched attention module: what was switched to another implementation does not run dense.

    Continuous batching switches to flash attention by itself where that is installed.
    """
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(module).__name__} is patched, but its attention implementation has been set to {implementation!r} "
            "since, by set_attn_implementation or by continuous batching: it would run dense. Call unpatch_model to "
            "run it so, or patch_model again for sparse attention."
        )


# What attention modules call their cache; transformers 5.24 has renamed it.
_CACHE_ARGUMENTS = ("past_key_values", "cache")


def hand_on_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a patched attention module: hands the layer of the cache on to the attention function."""
    cache = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    # A module that several layers share is told which of them it stands for.
    layer = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
    found = None if cache is None else layer_cache(cache, layer)
    return None if found is None else (args, {**kwargs, "nc_layer_cache": found})


def _key_index(
    config: NCConfig,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
    decoding: bool,
) -> KeyIndex | None:
    """The index of a layer's keys, brought up to date, or None where it does not decode by one."""
    kind = KIND_OF.get(config.decode)
    if kind is None or not visible.numel():
        return None
    backend, _ = choose_backend(config.backend, kind, key.device)
    use = config.key_index == "always" or not config.refine or (config.key_index == "auto" and _pays(kind, backend))
    kept = _kept_index(config, kind, key, value, visible, origin, cache) if use else None
    if kept is None and decoding and (kind == "pages" or not config.refine):
        # The same choice as with an index that is kept, from one that is not.
        start, end = origin[:, -1].clamp(min=0), visible[..., 1].amax(-1)
        return KeyIndex.build(key, kind, start=start, end=end, block_size=config.block_size, backend=config.backend)
    return kept


def _key_means(
    config: NCConfig,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
) -> KeyIndex | None:
    """The means of a layer's pages, brought up to date, where decoding approximates what it leaves out by them."""
    if config.tail != "mean" or config.decode != "topk" or config.key_index == "never" or not visible.numel():
        return None
    return _kept_index(config, "means", key, value, visible, origin, cache)


def _kept_index(
    config: NCConfig,
    kind: IndexKind,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
) -> KeyIndex | None:
    """The index of a kind that a cache layer keeps, brought up to date; None where the cache can keep none."""
    layer = None if cache is None else cache.layer
    if layer is None or not layer.nc_keeps(kind):
        return None
    if torch.compiler.is_compiling() and layer.nc_unstarted(kind):
        return None  # what would have to be built waits for a call outside the graph
    return layer.nc_update(key, value, visible, origin, kind, config.block_size, config.backend)


def _pays(kind: str, backend: str) -> bool:
    """Whether keeping an index saves time: reading a byte an element does only where reading is what takes the time."""
    return kind == "pages" or backend == "triton"


def _dense_reason(patch: LayerPatch | None, config: NCConfig, layer: int, selection: str) -> str | None:
    """Why a call attends every key, or None when it does not."""
    if patch is None:
        return "the module is not patched"
    if layer in config.dense_layers:
        return "the layer is in dense_layers"
    if selection == "dense":
        return 'the selection is "dense"'
    if config.is_dense(layer):
        return "alpha >= 1 with C = 1 attends every key"
    return None


def _refuse_unsupported(
    module: torch.nn.Module, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
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


def _refuse_missing_keys(module: torch.nn.Module, layer: int, mask: torch.Tensor, key_length: int) -> None:
    """A layer that has fewer keys than the first, by whose keys masks are made, was missed by a call that failed."""
    expected = None if torch.compiler.is_compiling() else made_for(mask)
    if expected is not None and key_length < expected:
        raise BrokenCacheError(
            f"{type(module).__name__} of layer {layer} has {key_length} keys, and its mask is for {expected}: a call "
            "that failed has left the cache half-updated. Start with a new cache, cache.reset() this one, or crop all "
            "layers to the n tokens there were: layer.crop(n - layer.get_seq_length())."
        )


def _check_heads(module: torch.nn.Module, laws: tuple[Any, ...], heads: int) -> None:
    if len(laws) not in (1, heads):
        raise UnsupportedModelError(
            f"alpha and C are given for {len(laws)} heads, {type(module).__name__} has {heads} in this process (tensor "
            "parallelism spreads them). Give one value per layer."
        )


def _mask_problem(module: torch.nn.Module, mask: Any) -> str:
    name = type(module).__name__
    if mask is None:
        return (
            f"{name} passed no mask, so that causality and padding would be lost: its model does not build masks "
            "through transformers' mask interface. It cannot be patched."
        )
    shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
    return (
        f"{name} got a custom attention mask ({shape}). Sparse attention needs each query to see one run of keys: pass "
        "a 2-D padding mask [batch, positions], or leave the layer dense with dense_layers=..."
    )


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    module: torch.nn.Module,
    causal: bool = True,
) -> torch.Tensor:
    """PyTorch's dense attention; without a mask plain causal, for which Lq must be 1 or Lk, or of all keys."""
    if softcap is not None or sinks is not None:
        raise UnsupportedMaskError(
            f"{_mask_problem(module, mask)} This layer cannot be left dense: SDPA has no soft-cap and no sinks."
        )
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.device.type == "cpu":
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        group = 1
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        is_causal=causal and mask is None and query.shape[2] > 1,
        enable_gqa=group > 1,
    )


def _count(
    patch: LayerPatch,
    mask: torch.Tensor,
    visible: torch.Tensor,
    attended: torch.Tensor | None,
    dense_reason: str | None,
    own: bool,
) -> None:
    """Counts one call; what follows from the mask and the settings alone is worked out once for all layers."""
    tail = patch.counters.tail
    if own and attended is not None and attended.shape[-1] <= MAX_DECODE_QUERIES and dense_reason is None:
        patch.counters.add_later(attended, visible)
        return
    if own and attended is not None:
        counts = tally(attended, visible, tail)
    elif attended is None:
        n = (visible[..., 1] - visible[..., 0]).clamp(min=0)[:, None]
        counts = _once(mask, ("tally", "dense", tail), lambda: tally(n, visible, tail))
    else:
        law = (patch.config.laws(patch.layer), patch.config.min_keys, patch.config.law)
        counts = _once(mask, ("tally", *law, tail), lambda: tally(attended, visible, tail))
    patch.counters.add(counts, dense_reason)


def _once(mask: torch.Tensor, key: tuple[Any, ...], make: Any) -> Any:
    """``make()``, remembered on the mask tensor that all layers of one forward pass share."""
    if torch.compiler.is_compiling():
        return make()
    made: dict[tuple[Any, ...], Any] | None = getattr(mask, "_nc_once", None)
    if made is None:
        made = {}
        mask._nc_once = made  # type: ignore[attr-defined]
    if key not in made:
        made[key] = make()
    return made[key]


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


AttentionInterface.register(IMPLEMENTATION, nc_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, interval_mask)

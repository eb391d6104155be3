"""The attention function that ``transformers`` calls in place of its own, and its registration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from nc_patch.cache import LayerCache
from nc_patch.certificates import Call, record, refuse_graphs
from nc_patch.common import UnsupportedMaskError, autocast_off, lowered, say_once
from nc_patch.config import NCConfig
from nc_patch.families import (
    check_heads,
    no_mask,
    refuse_indexes,
    refuse_masked_keys,
    refuse_missing_keys,
    refuse_unsupported,
    say_unpatched,
)
from nc_patch.functional import attend, budgets_of, check_scale, check_tensors, needs_gradient
from nc_patch.hooks import IMPLEMENTATION, told_boundaries
from nc_patch.layer_index import key_index_of, key_means_of
from nc_patch.masks import interval_mask
from nc_patch.observed import Observed
from nc_patch.ops.derivatives import in_transform, refuse_mapped
from nc_patch.ops.limits import MAX_DECODE_QUERIES
from nc_patch.ops.reference import AttentionResult
from nc_patch.selections.index import KIND_OF
from nc_patch.stats import LayerCounters, tally
from nc_patch.visibility import (
    BOUNDARIES,
    Visibility,
    is_bidirectional,
    is_packed,
    is_plain_causal,
    once,
    seen_keys,
    split_sequences,
    visibility_of,
)

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

    A module that carries no ``LayerPatch`` has its config from a patched model: it runs dense, and the log says so.
    ``nc_layer_cache`` comes from ``hooks.hand_on_cache``.

    Raises:
        UnsupportedMaskError: the mask lets a query see several runs of keys, or is not there.
        UnsupportedModelError: the model asks for what sparse attention cannot do.
    """
    patch: LayerPatch | None = getattr(module, PATCH_ATTRIBUTE, None)
    crosses = patch is None and (is_bidirectional(attention_mask) or getattr(module, "is_causal", True) is False)
    refuse_unsupported(module, dropout, None if crosses else is_causal, kwargs)
    if patch is None and not crosses and not torch.compiler.is_compiling():
        say_unpatched(type(module).__name__)
    if nc_layer_cache is not None and nc_layer_cache.layer is not None and not torch.compiler.is_compiling():
        nc_layer_cache.layer.nc_compare(key, value)
    query, key, value = lowered(query, key, value)
    if isinstance(attention_mask, torch.Tensor):
        (attention_mask,) = lowered(attention_mask)
    told = told_boundaries()
    boundaries = {name: kwargs[name] if kwargs.get(name) is not None else told.get(name) for name in BOUNDARIES}
    with autocast_off(query):
        return _attention(
            *(module, query, key, value, attention_mask, scaling, softcap, s_aux, patch, nc_layer_cache),
            boundaries=boundaries,
            crosses=crosses,
        )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    patch: LayerPatch | None,
    nc_layer_cache: LayerCache | None,
    *,
    boundaries: dict[str, torch.Tensor | None],
    crosses: bool,
) -> tuple[torch.Tensor, None]:
    """``nc_attention_forward`` of what it has checked.

    ``boundaries`` say where packed sequences begin; ``crosses``: every query may see every key.
    """
    B, _, Lq, Lk = check_tensors(query, key, value, s_aux)
    scale = check_scale(scaling, softcap, query.shape[-1])
    compiling = torch.compiler.is_compiling()
    cached = None if nc_layer_cache is None or compiling else nc_layer_cache.layer
    plan = _plan(patch, query, nc_layer_cache)
    if Lq != Lk:
        refuse_masked_keys(module, IMPLEMENTATION, nc_attention_forward, plan.dense_reason is not None)
    config, decoding, selection = plan.config, plan.decoding, plan.selection
    plain = softcap is None and s_aux is None
    if attention_mask is None and not (crosses and plain):
        raise UnsupportedMaskError(no_mask(module))
    observes = patch is not None and patch.observe is not None
    if not is_packed(attention_mask) and plan.dense_reason is not None and not observes:
        if plain:
            output = _sdpa(query, key, value, attention_mask, scale, causal=not crosses)
        else:
            assert attention_mask is not None
            output = _eager(query, key, value, attention_mask, scale, softcap, s_aux)
        if patch is not None and attention_mask is not None and not compiling and not in_transform():
            n = seen_keys(attention_mask).sum(-1).expand(B, -1, Lq)
            visible = torch.stack((torch.zeros_like(n[:, 0]), n.amax(1)), -1)
            patch.counters.add(tally(n, visible, patch.counters.tail), plan.dense_reason)
        return output.transpose(1, 2).contiguous(), None
    assert attention_mask is not None
    visibility, in_place, several = _visible_keys(module, patch, plan.layer, attention_mask, boundaries, (B, Lq, Lk))
    if several and decoding and Lq > 1:
        # An index is of one sequence a row.
        plan = _plan(patch, query, None)
        config, decoding, selection = plan.config, plan.decoding, plan.selection
    visible, origin = visibility.visible, visibility.origin
    if visibility.order is not None:
        if not compiling:
            say_once(
                "The mask of a call has holes, for example padding between tokens: the keys that it leaves are copied "
                "together in each layer, and no key index is kept, which takes more time."
            )
        key, value = visibility.take(key), visibility.take(value)
    if not in_place:
        refuse_indexes(module, nc_layer_cache)
    indexed = nc_layer_cache if in_place else None

    if plan.dense_reason is not None:
        selection, budget = "dense", None
    else:
        laws = config.laws(plan.layer)
        check_heads(module, laws, query.shape[1])
        find = lambda: budgets_of(config, plan.layer, visible, Lk)  # noqa: E731
        law = ("budget", laws, config.min_keys, config.law, Lk)
        # Budgets by head are large, and as a rule of one layer alone.
        budget = once(visible, law, find) if len(laws) == 1 else find()
    index = means = None
    # Top-k has a gradient where it decodes without an index; decoding by pages has none, and says so in backward.
    by_index = KIND_OF.get(config.decode) == "pages" or not needs_gradient(query, key, value, s_aux)
    if patch is not None and not config.is_dense(plan.layer) and by_index:
        keys = (key.detach(), value.detach())
        index = key_index_of(config, *keys, visible, origin, indexed, decoding)
        means = key_means_of(config, *keys, visible, origin, indexed)
    by_codes = decoding and index is not None and index.kind == "codes"
    audit_seed = patch.audit_seed if patch is not None and plan.measures else -1

    def run(selection: str) -> AttentionResult:
        if selection == "dense" and plain and in_place and Lq in (1, Lk) and plan.host_reads:
            causal = once(visible, ("plain causal", Lk), lambda: is_plain_causal(visible, Lk))
            if causal:
                return AttentionResult(_sdpa(query, key, value, None, scale))
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
            max_budget=config.largest_budget(Lk, plan.layer) if index is not None else 0,
            want_stats=plan.measures and selection != "dense" and not by_codes and not estimated,
            want_bounds=plan.measures and by_codes,
            audit_seed=audit_seed if estimated else -1,
        )

    result, dense_reason = run(selection), plan.dense_reason
    if cached is not None:
        cached.nc_done()
    if plan.measures and patch is not None:
        call = Call(plan.layer, "decode" if decoding else "prefill", query, key, visible, origin, scale, softcap)
        if record(patch.counters, config, call, selection, result):
            result, selection, budget = run("dense"), "dense", None
            dense_reason = f'it dropped more than max_dropped_mass={config.max_dropped_mass:g}, with on_drop="dense"'
            record(patch.counters, config, call, selection, result)
    if patch is not None and patch.observe is not None:
        patch.observe(Observed(plan.layer, query, key, value, visible, scale, softcap, s_aux, result.output))
    if patch is not None and not compiling and not in_transform():
        own = result.attended if selection == "block" else None
        _count(patch, visible, budget if own is None else own, dense_reason, own is not None)
    return result.output.transpose(1, 2).contiguous(), None


class _Plan(NamedTuple):
    """What a call does, as far as that follows from the settings, the cache and the number of queries.

    ``host_reads``: whether a value may be read on the host. ``measures``: whether kept mass is.
    """

    config: NCConfig
    layer: int
    decoding: bool
    selection: str
    dense_reason: str | None
    host_reads: bool
    measures: bool


def _plan(patch: LayerPatch | None, query: torch.Tensor, cache: LayerCache | None) -> _Plan:
    config = NCConfig(1.0, 1.0) if patch is None else patch.config
    layer = 0 if patch is None else patch.layer
    Lq = query.shape[2]
    started = cache is not None and cache.started
    # A prompt in pieces, whose last may be short, chooses blocks as if it were whole.
    several_decode = started and Lq <= MAX_DECODE_QUERIES and not config.prefill == config.decode == "block"
    decoding = Lq == 1 or several_decode
    selection = config.decode if decoding else config.prefill
    dense_reason = _dense_reason(patch, config, layer, selection)
    host_reads = not torch.compiler.is_compiling() and not _capturing(query)
    # Inside torch.func's transforms a value of the computation may stand for many.
    readable = host_reads and not in_transform()
    if config.on_drop != "ignore" and dense_reason is None and not readable:
        refuse_graphs(config.on_drop, layer)
    measures = patch is not None and (config.track or config.on_drop != "ignore") and readable
    return _Plan(config, layer, decoding, selection, dense_reason, host_reads, measures)


class _Seen(NamedTuple):
    """What the queries of a call see, whether that counts in the keys of the cache, and whether in several sequences.

    It does not where keys have been left out or sequences were cut apart, of which the cache knows nothing.
    """

    visibility: Visibility
    in_place: bool
    several: bool


def _visible_keys(
    module: torch.nn.Module,
    patch: LayerPatch | None,
    layer: int,
    mask: torch.Tensor,
    boundaries: dict[str, torch.Tensor | None],
    lengths: tuple[int, int, int],
) -> _Seen:
    """What the queries of a call of B, Lq and Lk in ``lengths`` see."""
    if patch is not None and is_bidirectional(mask):
        raise UnsupportedMaskError(
            f"{type(module).__name__} got a bidirectional mask, and sparse attention is causal. Unpatch the model, or "
            "use it as a decoder."
        )
    refuse_mapped(attention_mask=mask)
    name = type(module).__name__
    if not is_packed(mask):  # the caller may write to it between calls
        found = visibility_of(mask, *lengths, name)
        return _Seen(split_sequences(found, **{**boundaries, "position_ids": None}), False, True)
    refuse_missing_keys(module, layer, mask, lengths[2])
    found = once(mask, ("visibility", lengths), lambda: visibility_of(mask, *lengths, name))
    if is_bidirectional(mask):
        return _Seen(found, False, False)

    def split() -> _Seen:
        cut = split_sequences(found, **boundaries)
        several = cut is not found and not torch.compiler.is_compiling()
        if several and getattr(module.config, "attention_chunk_size", None):
            raise UnsupportedMaskError(
                f"{name} attends by chunks, which begin anew with each packed sequence, and a mask that is made for a "
                "cache has them elsewhere. Pass use_cache=False."
            )
        return _Seen(cut, cut.order is None and not several, several)

    return once(found.visible, ("split", *boundaries.values()), split)


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


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """PyTorch's dense attention; without a mask plain causal, for which Lq must be 1 or Lk, or of all keys."""
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


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention by any mask with what SDPA has not, a soft-cap and sinks; Lq * Lk memory, as the mask itself."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value.float()).to(query.dtype)


def _count(
    patch: LayerPatch,
    visible: torch.Tensor,
    attended: torch.Tensor | None,
    dense_reason: str | None,
    own: bool,
) -> None:
    """Counts one call; what follows from the intervals and the settings alone is worked out once for all layers."""
    tail = patch.counters.tail
    if own and attended is not None and attended.shape[-1] <= MAX_DECODE_QUERIES and dense_reason is None:
        patch.counters.add_later(attended, visible)
        return
    if own and attended is not None:
        counts = tally(attended, visible, tail)
    elif attended is None:
        n = (visible[..., 1] - visible[..., 0]).clamp(min=0)[:, None]
        counts = once(visible, ("tally", "dense", tail), lambda: tally(n, visible, tail))
    else:
        law = (patch.config.laws(patch.layer), patch.config.min_keys, patch.config.law)
        counts = once(visible, ("tally", *law, tail), lambda: tally(attended, visible, tail))
    patch.counters.add(counts, dense_reason)


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


AttentionInterface.register(IMPLEMENTATION, nc_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, interval_mask)

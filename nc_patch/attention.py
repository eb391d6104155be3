"""The attention function that ``transformers`` calls in place of its own, and its registration."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from nc_patch import families, steps
from nc_patch.cache import NO_CACHE, Indexes, KeyIndexMixin, indexes_of
from nc_patch.certificates import record, record_dense
from nc_patch.common import UnsupportedMaskError, autocast_off, cast_for_autocast, once, say_once, share
from nc_patch.config import NCConfig
from nc_patch.functional import attend, backend_of, by_index, check_scale
from nc_patch.layers import IMPLEMENTATION, PATCH_ATTRIBUTE, LayerPatch, Observed, told_boundaries
from nc_patch.masks import interval_mask
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.derivatives import is_capturing, needs_gradient, refuse_transforms
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import MAX_DECODE_QUERIES, AttentionResult, Problem, check_tensors
from nc_patch.selections import Dense, Selection
from nc_patch.visibility import (
    BOUNDARIES,
    Visibility,
    begins_by,
    is_bidirectional,
    is_packed,
    is_plain_causal,
    made_for,
    seen_keys,
    split_sequences,
    visibility_of,
)

_DENSE = Dense()
# What a module that is not patched counts as carrying.
_UNPATCHED = LayerPatch(NCConfig(1.0, 1.0), 0, "")
# Steps of as many keys, rounded up, have buffers of one size.
_LENGTHS = 1024


def nc_attention_forward(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, **arguments: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as ``transformers`` asks for it: ``[B, H, L, D]`` in, ``([B, Lq, Hq, Dv], None)`` out.

    A module that carries no ``LayerPatch`` has its config from a patched model: it runs dense, and the log says so.
    Of the other arguments ``scaling``, ``softcap`` and ``s_aux`` (sinks) count, ``nc_layer_cache`` comes from
    ``layers.hand_on_cache``, ``BOUNDARIES`` say where packed sequences begin, and those that ask for what sparse
    attention cannot do are refused.

    Raises:
        UnsupportedMaskError: the mask lets a query see several runs of keys, or is not there.
        UnsupportedModelError: the model asks for what sparse attention cannot do.
    """
    patch: LayerPatch = getattr(module, PATCH_ATTRIBUTE, _UNPATCHED)
    arguments["dropout"] = dropout
    if patch is not _UNPATCHED and patch.observe is None:
        repeated = steps.repeat(module, (query, key, value), attention_mask, patch, arguments)
        if repeated is not None:
            return repeated.transpose(1, 2).contiguous(), None
    compiling = torch.compiler.is_compiling()
    crosses = patch is _UNPATCHED and (is_bidirectional(attention_mask) or getattr(module, "is_causal", True) is False)
    families.refuse_unsupported(module, arguments, crosses)
    held = arguments.get("nc_layer_cache", NO_CACHE).layer
    if patch is _UNPATCHED and not crosses and not compiling:
        families.say_unpatched(type(module).__name__)
    if held is not None and not compiling:
        held.nc_compare(key, value)
    query, key, value = cast_for_autocast(query, key, value)
    if isinstance(attention_mask, torch.Tensor):
        (attention_mask,) = cast_for_autocast(attention_mask)
    scaling, softcap, sinks = (arguments.get(name) for name in ("scaling", "softcap", "s_aux"))
    with autocast_off(query):
        unseen = query.new_empty(query.shape[0], 1, 0, dtype=torch.int32)
        scale = check_scale(scaling, softcap, query.shape[-1])
        problem = Problem(query, key, value, unseen, unseen, unseen, scale, float(softcap or 0.0), sinks)
        check_tensors(query, key, value, sinks)
        refuse_transforms(query, key, value)
        output = _attention(module, problem, attention_mask, patch, arguments, crosses)
    return output.transpose(1, 2).contiguous(), None


def _attention(
    module: torch.nn.Module, problem: Problem, mask: torch.Tensor | None, patch: LayerPatch,
    arguments: dict[str, Any], crosses: bool,
) -> torch.Tensor:  # fmt: skip
    """Attention ``[B, Hq, Lq, Dv]`` of a problem that lacks what its queries may see, and its budgets.

    ``arguments`` are what else was given; ``crosses``: every query may see every key.
    """
    held, started = arguments.get("nc_layer_cache", NO_CACHE)
    query, key, value = problem.query, problem.key, problem.value
    Lq, Lk = query.shape[2], key.shape[2]
    compiling = torch.compiler.is_compiling()
    plan = _plan(patch, query, Lk, started)
    if Lq != Lk:
        families.refuse_masked_keys(module, IMPLEMENTATION, nc_attention_forward, plan.dense_reason is not None)
    if mask is None and (not crosses or problem.softcap or problem.sinks is not None):
        raise UnsupportedMaskError(families.no_mask(module))
    counts = patch is not _UNPATCHED and not compiling
    if plan.dense_reason is not None and not is_packed(mask) and patch.observe is None:
        if counts and mask is not None:
            n = seen_keys(mask).sum(-1).expand(len(query), -1, Lq)
            visible = torch.stack((torch.zeros_like(n[:, 0]), n.amax(1)), -1)
            patch.counters.add(n, visible, plan.dense_reason)
        return _dense_by_mask(problem, mask, crosses)
    assert mask is not None
    visibility, several = _visible_keys(module, patch, problem, mask, arguments)
    in_place = visibility.order is None and not several  # as the keys lie in a cache
    if several and plan.decoding and Lq > 1:
        plan = _plan(patch, query, Lk, False)  # an index is of one sequence a row
    config, layer, decoding, selection = patch.config, patch.layer, plan.decoding, plan.selection
    visible = visibility.visible
    problem = problem._replace(visible=visible, origin=visibility.origin)
    if visibility.order is not None:
        if not compiling:
            say_once(
                "The mask of a call has holes, for example padding between tokens: the keys that it leaves are copied "
                "together in each layer, and no key index is kept, which takes more time."
            )
        problem = problem._replace(key=visibility.take(key), value=visibility.take(value))
    if not in_place:
        families.refuse_indexes(module, held)
    budgets: tuple[torch.Tensor, ...] = ()
    if plan.dense_reason is None:
        families.check_heads(module, config.laws(layer), query.shape[1])
        budget, budgets = _budgets(patch, visible, Lk, decoding)
        problem = problem._replace(budget=budget)
    kept, begins = Indexes(), begins_by(mask)
    if held is not None and not compiling:
        held.nc_begin(begins)
    if patch is not _UNPATCHED and not config.is_short(Lk) and not config.is_dense(layer):
        # An index is kept from where it is known that sequences begin; a capture cannot ask.
        keeps = in_place and (begins is not None or not plan.host_reads)
        problem, kept = _with_indexes(plan, patch, problem, held if keeps else None)
    result, dense_reason = _run(plan, patch, problem, selection, in_place), plan.dense_reason
    if held is not None and not compiling:
        held.nc_done()
    if plan.measures:
        phase = "decode" if decoding else "prefill"
        if selection is _DENSE:
            record_dense(patch, problem, phase)
        elif record(patch, problem, result, phase):
            result, selection = _run(plan, patch, problem, _DENSE, in_place), _DENSE
            dense_reason = f'it dropped more than max_dropped_mass={config.max_dropped_mass:g}, with on_drop="dense"'
            record_dense(patch, problem, phase)
    if patch.observe is not None:
        patch.observe(Observed(layer, problem, result.output))
    if counts:
        attended = result.attended if selection.counts_attended else problem.budget
        if dense_reason is not None:
            attended = once(visible, ("seen",), lambda: (visible[..., 1] - visible[..., 0]).clamp(min=0)[:, None])
        counted: tuple[Any, ...] = (attended, visible, dense_reason)
        patch.counters.add(*counted)
        alike = problem.sinks is None and not plan.measures and patch.observe is None and steps.is_plain(problem[:3])
        if decoding and in_place and held is not None and alike:
            plain = selection is _DENSE and _is_plain(plan, problem, in_place)
            run = _attend_all if plain else selection.bound(problem, backend_of(problem, selection, config.backend)[0])
            fields = {"config": config, "run": run, "budgets": budgets, "begins": begins}
            fields |= {"layer": layer, "counted": counted if selection is _DENSE else ()}
            steps.remember(mask, module, problem, arguments, kept, **fields)
    return result.output


class _Plan(NamedTuple):
    """What a call does, as far as that follows from the settings, the cache and the number of queries.

    ``host_reads``: whether a value may be read on the host. ``measures``: whether kept mass is.
    """

    decoding: bool
    selection: Selection
    dense_reason: str | None
    host_reads: bool
    measures: bool


def _plan(patch: LayerPatch, query: torch.Tensor, key_length: int, started: bool) -> _Plan:
    config, layer = patch.config, patch.layer
    # A prompt in pieces, whose last may be short, chooses as if it were whole.
    together = config.prefill.chooses_together and config.decode.chooses_together
    continues = started and query.shape[2] <= MAX_DECODE_QUERIES and not together
    decoding = query.shape[2] == 1 or continues
    selection = config.decode if decoding else config.prefill
    reason = config.dense_reason(layer, selection, key_length)
    if patch is _UNPATCHED:
        reason = "the module is not patched"
    host_reads = not torch.compiler.is_compiling() and not is_capturing(query)
    if config.on_drop != "ignore" and reason is None and not host_reads:
        raise RuntimeError(
            f'on_drop="{config.on_drop}" reads in layer {layer} how much was dropped, which neither '
            "torch.compile(fullgraph=True) nor a CUDA graph can: set "
            'on_drop="ignore" (track=True has no effect there), or run without them'
        )
    measures = (config.track or config.on_drop != "ignore") and host_reads
    return _Plan(decoding, selection if reason is None else _DENSE, reason, host_reads, measures)


def _visible_keys(
    module: torch.nn.Module, patch: LayerPatch, problem: Problem, mask: torch.Tensor, arguments: dict[str, Any]
) -> tuple[Visibility, bool]:
    """What the queries of a problem see, by its mask and by the ``BOUNDARIES`` that were given or told; and whether
    they may be of several sequences, of which a cache knows nothing.
    """
    told, name = told_boundaries(), type(module).__name__
    boundaries = {each: arguments[each] if arguments.get(each) is not None else told.get(each) for each in BOUNDARIES}
    lengths = (len(problem.query), problem.query.shape[2], problem.key.shape[2])
    if patch is not _UNPATCHED and is_bidirectional(mask):
        raise UnsupportedMaskError(
            f"{name} got a bidirectional mask, and sparse attention is causal. Unpatch the model, or use it as a "
            "decoder."
        )
    if not is_packed(mask):  # the caller may write to it between calls
        found = visibility_of(mask, *lengths, name)
        return split_sequences(found, **{**boundaries, "position_ids": None}), True
    families.refuse_missing_keys(module, patch.layer, mask, lengths[2])
    if not torch.compiler.is_compiling() and made_for(mask) is None and "_hf_hook" in vars(module):
        say_once(
            "accelerate copies the mask for each layer, which works out again what follows from it, because the model "
            "was patched before it was dispatched. To save that time call patch_model again."
        )

    def look() -> tuple[Visibility, bool]:
        found = visibility_of(mask, *lengths, name)
        cut = found if is_bidirectional(mask) else split_sequences(found, **boundaries)
        several = cut is not found and not torch.compiler.is_compiling()
        if several and getattr(module.config, "attention_chunk_size", None):
            raise UnsupportedMaskError(
                f"{name} attends by chunks, which begin anew with each packed sequence, and a mask that is made for a "
                "cache has them elsewhere. Pass use_cache=False."
            )
        return cut._replace(visible=share(cut.visible)), several

    compiling = torch.compiler.is_compiling()
    if compiling and module.training:  # a checkpointed layer is traced apart, and may leave nothing behind
        return look()
    # In a graph lengths may be symbols, and a mask has those of one call.
    key = ("seen", *boundaries.values()) if compiling else ("seen", lengths, *boundaries.values())
    seen: tuple[Visibility, bool] = once(mask, key, look)
    return seen


def _budgets(
    patch: LayerPatch, visible: torch.Tensor, key_length: int, decoding: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The budgets of a layer's queries; and those of all layers, where they differ and were found at once."""
    config = patch.config
    if config.layers is not None and decoding:
        find_all = lambda: config.budgets_by_layer(visible, key_length)  # noqa: E731
        budgets: tuple[torch.Tensor, ...] = once(visible, ("budgets", config), find_all)
        return budgets[patch.layer], budgets
    return config.row_budgets(visible, key_length, patch.layer), ()


def _with_indexes(
    plan: _Plan, patch: LayerPatch, problem: Problem, held: KeyIndexMixin | None
) -> tuple[Problem, Indexes]:
    """The problem with what a layer decodes by, and that, brought up to date."""
    config, key, value = patch.config, problem.key, problem.value
    # Without an index decoding has a gradient; what cannot do without has none, and says so in backward.
    if not config.decode.needs_index and needs_gradient(*problem[:3], problem.sinks):
        return problem, Indexes()
    detached = problem
    if key.requires_grad or value.requires_grad:
        detached = problem._replace(key=key.detach(), value=value.detach())
    decodes = plan.decoding and plan.dense_reason is None
    kept = indexes_of(config, detached, held, plan.decoding, decodes)
    if plan.decoding and kept.means is not None:
        problem = problem._replace(means=PageMeans(*kept.means.tensors()), new=kept.new)
    if decodes and kept.choosing is not None:
        Lk = key.shape[2]
        most = config.largest_budget(Lk, patch.layer) if torch.compiler.is_compiling() else _most(config, Lk)
        problem = by_index(problem, kept.choosing, most)._replace(new=kept.new)
    return problem, kept


@lru_cache(maxsize=64)
def _most(config: NCConfig, key_length: int) -> int:
    """What no budget of a step exceeds."""
    return config.largest_budget(-(-key_length // _LENGTHS) * _LENGTHS)


def _run(plan: _Plan, patch: LayerPatch, problem: Problem, selection: Selection, in_place: bool) -> AttentionResult:
    """Attention of a problem by a selection, which may be that of all keys whatever the plan's is."""
    backend, query = patch.config.backend, problem.query
    if selection is _DENSE:
        problem = problem._replace(key_index=(), means=None, new=0)
        by_kernel = False
        prompt = patch is not _UNPATCHED and query.shape[2] > 1
        if prompt and backend in ("auto", "cpu") and not needs_gradient(*problem[:3]):
            # The kernel for CPUs is faster than PyTorch's for a prompt, and PyTorch's for a single query.
            implemented = _DENSE.backends("prefill")
            chosen, _ = choose_backend("auto", query.device, head_dims=problem.head_dims, implemented=implemented)
            by_kernel = chosen == "cpu"
        if not by_kernel and _is_plain(plan, problem, in_place):
            return _attend_all(problem)
    elif plan.measures:
        bounded = problem.phase == "decode" and selection.bounds_kept_mass
        estimated = problem.phase != "decode" and selection.estimates
        seed = patch.audit_seed if estimated else -1
        problem = problem._replace(stats=not bounded and not estimated, bounds=bounded, audit_seed=seed)
    return attend(problem, selection, backend)


def _is_plain(plan: _Plan, problem: Problem, in_place: bool) -> bool:
    """Whether PyTorch's dense attention, without a mask, is what a problem asks for; reads the device."""
    visible, Lq, Lk = problem.visible, problem.query.shape[2], problem.key.shape[2]
    if problem.softcap or problem.sinks is not None or not in_place or Lq not in (1, Lk) or not plan.host_reads:
        return False
    found: bool = once(visible, ("plain causal", Lk), lambda: is_plain_causal(visible, Lk))
    return found


def _attend_all(problem: Problem) -> AttentionResult:
    return AttentionResult(_sdpa(problem, None))


def _dense_by_mask(problem: Problem, mask: torch.Tensor | None, crosses: bool) -> torch.Tensor:
    """Dense attention by a mask of any form, or over all keys without one."""
    if not problem.softcap and problem.sinks is None:
        return _sdpa(problem, mask, causal=not crosses)
    assert mask is not None
    # What PyTorch's has not, a soft-cap and sinks, takes Lq * Lk memory, as the mask itself.
    key, value = (t.float().repeat_interleave(problem.group, 1) for t in (problem.key, problem.value))
    scores = (problem.query.float() @ key.transpose(-1, -2)) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    if problem.sinks is not None:
        scores = torch.cat((scores, problem.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value).to(problem.query.dtype)


def _sdpa(problem: Problem, mask: torch.Tensor | None, causal: bool = True) -> torch.Tensor:
    """PyTorch's dense attention; without a mask plain causal, for which Lq must be 1 or Lk, or of all keys."""
    query, key, value = problem.query, problem.key, problem.value
    attend_all = torch.nn.functional.scaled_dot_product_attention
    if query.device.type == "cpu" and query.shape[2] == 1 and mask is None:
        # As rows of their key/value head the queries of a group share the reading of its keys.
        rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return attend_all(rows, key, value, scale=problem.scale).reshape(*query.shape[:3], -1)
    causal = causal and mask is None and query.shape[2] > 1
    return attend_all(query, key, value, mask, 0.0, causal, scale=problem.scale, enable_gqa=problem.group > 1)


AttentionInterface.register(IMPLEMENTATION, nc_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, interval_mask)

"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Six launches, whatever is asked for. Nothing is read back from the device and all sizes follow from shapes, so that a
step can be captured in a graph:

1. ``prepare_kernel``: approximate scores of sampled keys; new keys are taken into the codes and the means of pages.
2. ``guess_kernel``: from the sample a score that the k-th best key should reach.
3. ``scan_kernel``: reads all codes once; lists the keys whose score may reach the guess of any row of a block, and the
   forced ones, and counts those whose score certainly does.
4. ``score_kernel``: scores the listed keys exactly, each read once for all rows of the block, and collects what reaches
   each row's guess. A block whose list overflowed, or for which too few keys certainly reach a guess, takes all keys.
5. ``choose_kernel``: the exact k-th largest of these scores.
6. ``gather_kernel``: softmax times value over the chosen keys, and over the means of the other keys' pages, in parts,
   which the last program joins. A value is read once for all rows of a block that attend its key.

Means add n / 16 * (D + Dv) elements for a key/value head with n keys, and n / 16 * 4 bytes for each row. What is held
between the launches takes at most ``SCRATCH_BYTES``: several queries of several sequences go after each other where
they would take more.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nc_patch.ops.means import PageMeans, slot_count, touched_slots
from nc_patch.ops.problem import MAX_DECODE_QUERIES, AttentionResult, Problem
from nc_patch.ops.triton.launch import Launches, architecture_of, compiled_kernels, prepared, settings_of
from nc_patch.ops.triton.structs import Heads, RowInputs
from nc_patch.selections.topk.choose import choose_kernel, score_kernel
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.encode import key_shape
from nc_patch.selections.topk.gather import Results, gather_kernel
from nc_patch.selections.topk.plan import Plan, Scratch, Sizes, options_of, plan_for
from nc_patch.selections.topk.prepare import guess_kernel, prepare_kernel
from nc_patch.selections.topk.scan import scan_kernel

# What the kernels hand on to each other takes at most this much, unless one query of one sequence takes more.
SCRATCH_BYTES = 256 * 2**20


# What runs problems that are alike: those of all layers of a step of generation, and of many steps.
_STEPS: dict[tuple[Any, ...], Callable[[Problem], AttentionResult]] = {}
_MOST_STEPS = 256
# Steps with as many of these runs of keys share a plan.
_KEYS = 128


def bound_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> Callable[[Problem], AttentionResult]:
    """Attention of problems like this one over the best keys of each query, chosen by codes; see ``Selection.bound``.

    Args:
        problem: of at most ``MAX_DECODE_QUERIES`` queries. ``key_index`` are ``KeyCodes`` for at least Lk positions;
            what lies beyond the intervals is not looked at. A budget larger than ``most`` is right, but slow. The codes
            and the ``means``, which stand for the keys that are not attended, take in the ``new`` keys first.
        sink_keys, recent_keys: keys attended always.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take.
    """
    query, keys, values, *others = problem.tensors()
    key = (
        *(sink_keys, recent_keys, problem.scale, problem.softcap, problem.most, problem.new, problem.bounds),
        *(problem.sinks is None, problem.means is None, problem.stats, architecture_of(query.device)),
        *(_planned_keys(problem), keys.shape[2] == values.shape[2]),
        *((t.shape[:2], t.shape[3:], t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in (keys, values)),
        *((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in (query, *others)),
    )
    run = _STEPS.get(key)
    if run is None:
        if len(_STEPS) >= _MOST_STEPS:
            _STEPS.clear()
        run = _STEPS[key] = _bound(problem, key, sink_keys, recent_keys)
    return run


def _decode_in_parts(at_once: tuple[int, int], sink_keys: int, recent_keys: int, problem: Problem) -> AttentionResult:
    """Decodes so many sequences and queries at a time."""
    B, Lq = problem.visible.shape[:2]
    whole, (sequences, queries) = _empty_result(problem), at_once
    for b, q in itertools.product(range(0, B, sequences), range(0, Lq, queries)):
        of, at = slice(b, b + sequences), slice(q, q + queries)
        part = problem._replace(
            query=problem.query[of, :, at], key=problem.key[of], value=problem.value[of],
            visible=problem.visible[of, at], origin=problem.origin[of, at], budget=problem.budget[of, :, at],
            key_index=tuple(t[of] for t in problem.key_index),
            means=None if problem.means is None else PageMeans(*(t[of] for t in problem.means)),
        )  # fmt: skip
        for into, some in zip(whole, bound_topk_decode(part, sink_keys, recent_keys)(part), strict=True):
            if into is not None and some is not None:
                into[of, :, at] = some
    return whole


def _planned_keys(problem: Problem) -> int:
    """For how many keys a problem is planned: a few more, where its indexes have room, so that steps share a plan."""
    Lk, means = problem.key.shape[2], problem.means
    more = -(-Lk // _KEYS) * _KEYS
    fits = more <= problem.key_index[0].shape[2] and (means is None or slot_count(more) <= means.key.shape[2])
    return more if fits else Lk


def _bound(
    problem: Problem, key: tuple[Any, ...], sink_keys: int, recent_keys: int
) -> Callable[[Problem], AttentionResult]:
    """What decodes problems like this one, which it checks; ``key`` is all that they have in common."""
    as_given, problem = problem, prepared(problem)
    assert problem.query.shape[2] <= MAX_DECODE_QUERIES
    assert problem.key_index[0].shape[2] >= problem.key.shape[2]
    if any(mine is not theirs for mine, theirs in zip(as_given.tensors(), problem.tensors(), strict=True)):

        def decode_copies(like: Problem) -> AttentionResult:
            like = prepared(like)
            return bound_topk_decode(like, sink_keys, recent_keys)(like)

        return decode_copies
    (B, _, Lq, D), (_, Hkv, _, DV) = problem.query.shape, problem.value.shape
    keys, dtype, architecture = _planned_keys(problem), problem.query.dtype, architecture_of(problem.query.device)
    has_tail, most = problem.means is not None, max(1, min(problem.most, keys))
    sequences, queries = B, Lq
    while True:
        sizes = Sizes(sequences, Hkv, problem.group, queries, keys, D, DV)
        plan = plan_for(sizes, most, dtype, architecture, problem.bounds, has_tail)
        if sequences * queries <= 1 or 4 * plan.numbers <= SCRATCH_BYTES:
            break
        sequences, queries = (-(-sequences // 2), queries) if sequences > 1 else (1, -(-queries // 2))
    if (sequences, queries) != (B, Lq):
        return partial(_decode_in_parts, (sequences, queries), sink_keys, recent_keys)
    variant, splits, options = plan.variant, plan.splits, options_of(plan.variant)
    blocks, touched = plan.blocks, touched_slots(problem.new, plan.slots)
    upkeep = -(-problem.new // key_shape(D).BLOCK_N) + touched
    arguments = {
        "budget_heads": problem.budget.shape[1], "num_kv_heads": Hkv, "group": problem.group, "Lq": Lq,
        "sink_keys": sink_keys, "recent_keys": recent_keys, "length": problem.key_index[0].shape[2],
        "new": problem.new, "touched": touched, "splits": splits, "segment": plan.segment, "stride": plan.stride,
        "parts": plan.parts, "slots": plan.slots, "settings": settings_of(problem), "mean_key": None,
        "mean_value": None, "sinks": None,
    }  # fmt: skip
    kernels = (
        (prepare_kernel, (blocks, variant.samplers + upkeep, 1), options["prepare"]),
        (guess_kernel, (plan.rows, 1, 1), options["guess"]),
        (scan_kernel, (blocks, splits, 1), options["scan"]),
        (score_kernel, (blocks, splits, 1), options["score"]),
        (choose_kernel, (plan.rows, 1, 1), options["choose"]),
        (gather_kernel, (blocks, plan.parts, 1), options["gather"]),
    )
    # All that the kernels are compiled for is in the variant or among what the tensors of a step have in common.
    compiled = compiled_kernels(
        *(variant, problem.softcap != 0, problem.sinks is None, problem.means is None),
        *(problem.stats or problem.bounds, *(of_tensor[-4:] for of_tensor in key[-len(problem.tensors()) :])),
    )
    as_heads = (problem.query, problem.key, problem.value, *(problem.means or ()))
    strides = tuple(t.stride()[:3] for t in as_heads)
    return partial(_decode_at_once, plan, strides, Launches(kernels, arguments, compiled))


def _empty_result(problem: Problem) -> AttentionResult:
    """Memory for the output, its log-sum-exp and the bounds."""
    rows, device = problem.query.shape[:3], problem.query.device
    lse = torch.empty(rows, dtype=torch.float32, device=device) if problem.stats or problem.bounds else None
    bounds = torch.empty((*rows, 2), dtype=torch.float32, device=device) if problem.bounds else None
    output = problem.query.new_empty(*rows, problem.value.shape[-1])
    return AttentionResult(output, lse, kept_mass_bounds=bounds)


def _decode_at_once(
    plan: Plan, strides: tuple[tuple[int, ...], ...], launches: Launches, problem: Problem
) -> AttentionResult:
    """Decodes a problem all at once; ``strides`` are of query, key, value and means, as in ``Heads``."""
    result, means = _empty_result(problem), problem.means
    if result.output.numel() == 0:
        return result
    query, key, value, visible, origin, budget, *_ = problem
    scratch = torch.empty(plan.numbers, dtype=torch.float32, device=query.device)
    changing: dict[str, Any] = {
        "query": Heads(query, *strides[0]), "key": Heads(key, *strides[1]), "value": Heads(value, *strides[2]),
        "codes": KeyCodes(*problem.key_index), "scratch": Scratch(scratch, *plan.offsets),
        "inputs": RowInputs(visible, budget, None if means is None else origin),
        "results": Results(result.output, result.lse, result.kept_mass_bounds), "Lk": key.shape[2],
    }  # fmt: skip
    if problem.sinks is not None:
        changing["sinks"] = problem.sinks
    if means is not None:
        changing |= {"mean_key": Heads(means.key, *strides[3]), "mean_value": Heads(means.value, *strides[4])}
    launches(query.device, changing)
    return result

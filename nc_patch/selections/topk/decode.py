"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Nothing is read back from the device and all sizes follow from shapes, so that a step can be captured in a graph:

1. ``prepare_kernel``: approximate scores of sampled keys; new keys are taken into the codes and the means of pages.
2. ``guess_kernel``: from the sample a score that the k-th best key should reach.
3. ``scan_kernel``: reads all codes once; lists the keys whose score may reach the guess of any row of a block, and the
   forced ones, and counts those whose score certainly does.
4. ``score_kernel``: reads the listed keys once for all rows of the block and scores them exactly. Collects, for each
   row, what reaches its guess. A block whose list overflowed, or for which too few keys certainly reach a guess, takes
   all keys from here on.
5. ``choose_kernel``: the exact k-th largest of these scores.
6. ``gather_kernel``: softmax times value over the chosen keys, and over the means of the other keys' pages, in parts,
   which the last program joins. A value is read once for all rows of a block that attend its key.

Six launches, whatever is asked for. ``scripts/predict_decode.py`` counts bytes and predicts times; means add n / 16 *
(D + Dv) elements for a key/value head with n keys, and n / 16 * 4 bytes for each row. What is held between the launches
takes at most ``SCRATCH_BYTES``: where several queries of several sequences would take more, some of them go after the
others, in as many launches again.
"""

import itertools
from typing import Any

import torch

from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import MAX_DECODE_QUERIES, AttentionResult, Problem
from nc_patch.ops.triton.launch import (
    alignment,
    architecture_of,
    compiled_kernels,
    heads_of,
    on_device,
    prepared,
    run_kernel,
    settings_of,
)
from nc_patch.ops.triton.structs import RowInputs, heads
from nc_patch.selections.topk.choose import choose_kernel, score_kernel
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.gather import Results, gather_kernel
from nc_patch.selections.topk.plan import Plan, Scratch, Sizes, plan_for, tail_tiles
from nc_patch.selections.topk.scan import guess_kernel, prepare_kernel, scan_kernel

# What the kernels hand on to each other takes at most this much, unless one query of one sequence takes more.
SCRATCH_BYTES = 256 * 2**20


def triton_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention over the best keys of each query, chosen by codes; the set is the definition's.

    Args:
        problem: of at most ``MAX_DECODE_QUERIES`` queries. ``key_index`` are ``KeyCodes`` for at least Lk positions;
            what lies beyond the intervals is not looked at. A budget larger than ``most`` is right, but slow. ``means``
            stand for the keys that are not attended. Both take in the ``new`` keys first.
        sink_keys, recent_keys: keys attended always.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take.
    """
    problem = prepared(problem)
    _check_codes(problem)
    sizes, plan = _plan_of(problem)
    B, queries, taken = sizes.batch, sizes.queries, sizes
    while problem.query.numel() and B * queries > 1 and 4 * plan.numbers > SCRATCH_BYTES:
        B, queries = (-(-B // 2), queries) if B > 1 else (1, -(-queries // 2))
        taken, plan = _plan_of(_part(problem, slice(0, B), slice(0, queries)))
    if taken == sizes:
        return _decode_at_once(problem, sizes, plan, sink_keys, recent_keys)
    whole = _empty_result(problem)
    for b, q in itertools.product(range(0, sizes.batch, B), range(0, sizes.queries, queries)):
        of, at = slice(b, b + B), slice(q, q + queries)
        part = _part(problem, of, at)
        found = _decode_at_once(part, *_plan_of(part), sink_keys, recent_keys)
        for into, some in zip(whole, found, strict=True):
            if into is not None and some is not None:
                into[of, :, at] = some
    return whole


def _plan_of(problem: Problem) -> tuple[Sizes, Plan]:
    B, _, Lq, D = problem.query.shape
    Hkv, Lk, DV = problem.value.shape[1:]
    sizes = Sizes(B, Hkv, problem.group, Lq, Lk, D, DV)
    most, architecture = max(1, min(problem.most, Lk)), architecture_of(problem.query.device)
    return sizes, plan_for(sizes, most, problem.query.dtype, architecture, problem.bounds, problem.means is not None)


def _part(problem: Problem, of: slice, at: slice) -> Problem:
    """Some of the sequences and of their queries."""
    return problem._replace(
        query=problem.query[of, :, at], key=problem.key[of], value=problem.value[of], visible=problem.visible[of, at],
        origin=problem.origin[of, at], budget=problem.budget[of, :, at],
        key_index=tuple(t[of] for t in problem.key_index),
        means=None if problem.means is None else PageMeans(*(t[of] for t in problem.means)),
    )  # fmt: skip


def _empty_result(problem: Problem) -> AttentionResult:
    """Memory for the output, its log-sum-exp and the bounds."""
    rows, device = problem.query.shape[:3], problem.query.device
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    bounds = torch.empty((*rows, 2), dtype=torch.float32, device=device) if problem.bounds else None
    output = problem.query.new_empty(*rows, problem.value.shape[-1])
    return AttentionResult(output, lse, kept_mass_bounds=bounds)


def _decode_at_once(problem: Problem, sizes: Sizes, plan: Plan, sink_keys: int, recent_keys: int) -> AttentionResult:
    """``triton_topk_decode`` of what it has checked, by one plan."""
    query, key, value = problem.query, problem.key, problem.value
    visible, origin, budget = problem.visible.contiguous(), problem.origin.contiguous(), problem.budget.contiguous()
    result, device, means, sinks = _empty_result(problem), query.device, problem.means, problem.sinks
    if sizes.rows == 0:
        return result
    memory = torch.empty(plan.numbers, dtype=torch.float32, device=device)
    codes = KeyCodes(*problem.key_index)
    mean_key = mean_value = None
    if means is not None:
        tiles = tail_tiles(architecture_of(device), query.dtype, sizes.head_dim, sizes.value_dim)
        mean_key, mean_value = (heads_of(tensor, tiles) for tensor in means)
    arguments: dict[str, Any] = {
        "query": heads(query), "key": heads(key), "value": heads(value), "codes": codes, "mean_key": mean_key,
        "mean_value": mean_value, "inputs": RowInputs(visible, budget, None if means is None else origin),
        "scratch": Scratch(memory, *plan.offsets), "sinks": sinks,
        "results": Results(result.output, result.lse, result.kept_mass_bounds),
        "budget_heads": budget.shape[1], "num_kv_heads": sizes.kv_heads, "group": sizes.group, "Lq": sizes.queries,
        "Lk": sizes.keys, "sink_keys": sink_keys, "recent_keys": recent_keys, "length": codes.scale.shape[2],
        "new": problem.new, "splits": plan.splits, "segment": plan.segment, "stride": plan.stride,
        "parts": plan.parts, "slots": plan.slots, "groups": plan.groups, "settings": settings_of(problem),
    }  # fmt: skip
    of_means = () if means is None else (means[0].stride(), means[1].stride())
    compiled = compiled_kernels(
        *("topk", device, plan.constants, query.stride(), key.stride(), value.stride(), *of_means),
        *(None if sinks is None else sinks.dtype, problem.softcap != 0),
        alignment(query, key, value, visible, budget, origin, sinks, *problem.kept()),
    )
    blocks, rows = sizes.blocks(plan.rows), sizes.rows
    sampled = plan.samples // plan.keys
    upkeep = 0
    if problem.new:
        per_program = plan.options["prepare"]["new_keys"].BLOCK_N.value
        touched = 0 if means is None else min((problem.new + 14) // 16 + 1, plan.slots)
        upkeep = -(-problem.new // per_program) + touched
    with on_device(device):
        for kernel, name, grid in (
            (prepare_kernel, "prepare", (blocks, sampled + upkeep, 1)),
            (guess_kernel, "guess", (rows, 1, 1)),
            (scan_kernel, "scan", (blocks, plan.splits, 1)),
            (score_kernel, "score", (blocks, plan.splits, 1)),
            (choose_kernel, "choose", (rows, 1, 1)),
            (gather_kernel, "gather", (blocks, plan.parts, 1)),
        ):
            run_kernel(kernel, grid, arguments, plan.options[name], compiled)
    return result


def _check_codes(problem: Problem) -> None:
    """Raises unless the codes fit the keys and the kernels."""
    (B, Hkv, Lk, D), queries, codes = problem.key.shape, problem.query.shape[2], KeyCodes(*problem.key_index)
    if queries > MAX_DECODE_QUERIES:
        raise ValueError(f"at most {MAX_DECODE_QUERIES} queries are decoded at once, got {queries}: use topk attention")
    length = codes.codes.shape[2]
    shapes = ((B, Hkv, length, D), *((B, Hkv, length),) * 2, *((B, Hkv, D),) * 2)
    if tuple(tuple(t.shape) for t in codes) != shapes or length < Lk:
        got = ", ".join(str(list(t.shape)) for t in codes)
        raise ValueError(f"codes must be those of keys [{B}, {Hkv}, at least {Lk}, {D}], got {got}")
    if tuple(t.dtype for t in codes) != (torch.int8, *(torch.float32,) * 4):
        got = ", ".join(str(t.dtype) for t in codes)
        raise TypeError(f"codes must be int8 and the rest float32, got {got}")

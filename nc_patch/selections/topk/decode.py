"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Nothing is read back from the device and all sizes follow from shapes, so that a step can be captured in a graph:

1. ``sample_kernel`` and ``guess_kernel``: approximate scores of evenly spaced keys, and from them a score that the k-th
   best key should reach.
2. ``scan_kernel``: reads the high halves of all codes, and the low halves where those leave a doubt; lists the keys
   whose score may reach the guess of any row of a block, and the forced ones.
3. ``score_kernel``: reads the listed keys once for all rows of the block and scores them exactly. Collects, for each
   row, what reaches its guess.
4. ``choose_kernel``: the exact k-th largest of these scores, and the proof that no other key reaches it.
5. ``gather_kernel``: softmax times value over the chosen keys, in parts. A value is read once for all rows of a block
   that attend its key.
6. ``score_flagged_kernel``, ``choose_flagged_kernel`` and ``gather_kernel`` again: the rows whose list overflowed or
   whose guess was too high, if any, choose among all keys. No other row costs them anything.
7. ``tail_kernel``, where there is a tail: the means of all pages as further parts of each row's softmax.
8. ``combine_kernel``: the sum of all parts.
9. ``bounds_kernel``, where bounds are wanted.

Ten launches, one more with bounds and one more with a tail. ``scripts/predict_decode.py`` counts bytes and launches and
predicts times; a tail reads n / 16 * (D + Dv) elements for a key/value head with n keys besides, and n / 16 * 4 bytes
for each row. What is held between the launches takes at most ``SCRATCH_BYTES``: where several queries of several
sequences would take more, some of them go after the others, in as many launches again.
"""

import itertools
from typing import NamedTuple

import torch

from nc_patch.ops.means import PageMeans, slot_count
from nc_patch.ops.problem import MAX_DECODE_QUERIES, AttentionResult, Problem
from nc_patch.ops.triton.launch import architecture_of, heads_of, on_device, prepared, settings_of
from nc_patch.ops.triton.split import combine_splits
from nc_patch.ops.triton.structs import RowInputs, heads
from nc_patch.selections.topk.candidates import (
    choose_flagged_kernel,
    choose_kernel,
    guess_kernel,
    score_flagged_kernel,
    score_kernel,
)
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.gather import bounds_kernel, gather_kernel, tail_kernel
from nc_patch.selections.topk.plan import Plan, Sizes, launch_options, plan_for, tail_tiles
from nc_patch.selections.topk.scan import sample_kernel, scan_kernel

# What the kernels hand on to each other takes at most this much, unless one query of one sequence takes more.
SCRATCH_BYTES = 256 * 2**20


class Segments(NamedTuple):
    """What each split of a block lists: int32 positions ``[blocks, splits, segment]``, counts ``[blocks, splits]``."""

    positions: torch.Tensor
    counts: torch.Tensor


class Candidates(NamedTuple):
    """The list of a block: int32 positions ``[blocks, capacity]``, and float32 exact scores and their errors.

    ``scores`` and, where bounds are wanted, ``errors`` are ``[row, capacity]`` and, of flagged rows, ``[row, Lk]``.
    """

    positions: torch.Tensor
    scores: torch.Tensor
    errors: torch.Tensor | None


class Reached(NamedTuple):
    """The rivals that reach a row's guess: int32 counts ``[rows]``, positions and float32 scores ``[rows, room]``."""

    counts: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor


class Choice(NamedTuple):
    """What a row attends of its list, ``[rows]`` each.

    Attributes:
        listed: int32, the length of its list. threshold, ties_end: float32 and int32, its ``Limits``.
        flags: int32, 1 where the list is no proof and the row chooses among all keys.
    """

    listed: torch.Tensor
    threshold: torch.Tensor
    ties_end: torch.Tensor
    flags: torch.Tensor


class Partial(NamedTuple):
    """Parts of each row's softmax, as ``combine_splits`` takes them.

    ``kept``, float32 ``[rows, chunks, 8]`` or None, is the ``Mass`` of the lower and of the upper logits of the keys
    attended, then of those that are listed alone.
    """

    acc: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor
    kept: torch.Tensor | None


class Scratch(NamedTuple):
    """What the kernels of one call hand on to each other; rows are those of ``[B, Hq, Lq]``.

    Attributes:
        samples: float32 ``[rows, samples]``. guess: float32 ``[rows]``. outside: float32 ``[rows, splits, 4]`` or None.
        attended: int32 ``[rows]``, budgets. page_counts: int32 ``[rows, slots]``, or None without a tail.
    """

    samples: torch.Tensor
    guess: torch.Tensor
    segments: Segments
    outside: torch.Tensor | None
    candidates: Candidates
    reached: Reached
    choice: Choice
    attended: torch.Tensor
    partial: Partial
    page_counts: torch.Tensor | None

    @classmethod
    def of(cls, plan: Plan, sizes: Sizes, want_bounds: bool, device: torch.device) -> "Scratch":
        """Memory for a plan, uninitialised."""
        rows, blocks = sizes.rows, sizes.blocks(plan.rows)

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        entries = max(plan.capacity, sizes.keys)
        return cls(
            floats(rows, plan.samples),
            floats(rows),
            Segments(integers(blocks, plan.splits, plan.segment), integers(blocks, plan.splits)),
            floats(rows, plan.splits, 4) if want_bounds else None,
            Candidates(
                integers(blocks, plan.capacity), floats(rows, entries), floats(rows, entries) if want_bounds else None
            ),
            Reached(integers(rows), integers(rows, plan.room), floats(rows, plan.room)),
            Choice(integers(rows), floats(rows), integers(rows), integers(rows)),
            integers(rows),
            Partial(
                floats(rows, plan.parts, sizes.value_dim),
                floats(rows, plan.parts),
                floats(rows, plan.parts),
                floats(rows, plan.chunks, 8) if want_bounds else None,
            ),
            integers(rows, slot_count(sizes.keys)) if plan.tail_parts else None,
        )


def triton_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention over the best keys of each query, chosen by codes; the set is the definition's.

    Args:
        problem: of at most ``MAX_DECODE_QUERIES`` queries. ``key_index`` are ``KeyCodes`` for at least Lk positions;
            what lies beyond the intervals is not looked at. A budget larger than ``most`` is right, but slow. ``means``
            stand for the keys that are not attended.
        sink_keys, recent_keys: keys attended always.

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take.
    """
    problem = prepared(problem)
    _check_codes(problem)
    query, want_bounds = problem.query, problem.bounds
    sizes, architecture = _sizes(problem), architecture_of(query.device)
    B, queries = sizes.batch, sizes.queries
    most = max(1, min(problem.most, sizes.keys))

    def plan_of(sizes: Sizes) -> Plan:
        options = {"want_bounds": want_bounds, "has_tail": problem.means is not None}
        return plan_for(sizes, most, query.dtype, architecture, **options)

    plan = plan_of(sizes)
    taken = sizes
    while query.numel() and B * queries > 1 and plan.scratch_bytes(taken, want_bounds) > SCRATCH_BYTES:
        B, queries = (-(-B // 2), queries) if B > 1 else (1, -(-queries // 2))
        taken = sizes._replace(batch=B, queries=queries)
        plan = plan_of(taken)
    if taken == sizes:
        return _decode_at_once(problem, plan, sink_keys, recent_keys)
    whole = _empty_result(problem)
    for b, q in itertools.product(range(0, sizes.batch, B), range(0, sizes.queries, queries)):
        of, at = slice(b, b + B), slice(q, q + queries)
        part = _part(problem, of, at)
        found = _decode_at_once(part, plan_of(_sizes(part)), sink_keys, recent_keys)
        for into, some in zip(whole, found, strict=True):
            if into is not None and some is not None:
                into[of, :, at] = some
    return whole


def _sizes(problem: Problem) -> Sizes:
    B, _, Lq, D = problem.query.shape
    Hkv, Lk, DV = problem.value.shape[1:]
    return Sizes(B, Hkv, problem.group, Lq, Lk, D, DV)


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


def _decode_at_once(problem: Problem, plan: Plan, sink_keys: int, recent_keys: int) -> AttentionResult:
    """``triton_topk_decode`` of what it has checked, by one plan."""
    sizes, device, want_bounds, tail = _sizes(problem), problem.query.device, problem.bounds, problem.means
    result = _empty_result(problem)
    if sizes.rows == 0:
        return result
    scratch, blocks = Scratch.of(plan, sizes, want_bounds, device), sizes.blocks(plan.rows)
    samples, guess, segments, outside, candidates, reached, choice, attended, partial, page_counts = scratch
    rows, slots = sizes.rows, 0 if page_counts is None else page_counts.shape[1]
    architecture = architecture_of(device)
    options = launch_options(plan, sizes, problem.query.dtype, architecture, want_bounds)
    settings, codes = settings_of(problem), KeyCodes(*problem.key_index)
    inputs = RowInputs(problem.visible.contiguous(), problem.budget.contiguous())
    query, key = heads(problem.query), heads(problem.key)
    seen = {
        "inputs": inputs, "budget_heads": problem.budget.shape[1], "num_kv_heads": sizes.kv_heads,
        "group": sizes.group, "Lq": sizes.queries, "Lk": sizes.keys,
    }  # fmt: skip
    ranked = {**seen, "sink_keys": sink_keys, "recent_keys": recent_keys}
    coded = {**ranked, "query": query, "codes": codes, "length": codes.scale.shape[2]}
    room = {"splits": plan.splits, "segment": plan.segment, "capacity": plan.capacity, "room": plan.room}
    gathered = {
        **ranked, "value": heads(problem.value), "candidates": candidates, "choice": choice, "partial": partial,
        "page_counts": page_counts, "slots": slots, "chunks": plan.chunks, "parts": plan.parts, "settings": settings,
    }  # fmt: skip
    if tail is not None:
        gathered["inputs"] = inputs._replace(origin=problem.origin.contiguous())
    with on_device(device):
        sample_kernel[(blocks, plan.samples // plan.keys)](samples=samples, **coded, **options["sample"])
        guess_kernel[(rows,)](
            samples=samples, guess=guess, reached=reached, page_counts=page_counts, slots=slots, **ranked,
            **options["guess"],
        )  # fmt: skip
        scan_kernel[(blocks, plan.splits)](
            guess=guess, segments=segments, outside=outside, settings=settings, splits=plan.splits,
            segment=plan.segment, **coded, **options["scan"],
        )  # fmt: skip
        score_kernel[(blocks, plan.scorers)](
            query=query, key=key, guess=guess, segments=segments, candidates=candidates, reached=reached,
            chunks=plan.scorers, **ranked, **room, **options["score"],
        )  # fmt: skip
        choose_kernel[(rows,)](
            segments=segments, guess=guess, reached=reached, choice=choice, attended=attended, **ranked, **room,
            **options["choose"],
        )  # fmt: skip
        gather_kernel[(blocks, plan.chunks)](capacity=plan.capacity, **gathered, **options["gather"])
        score_flagged_kernel[(blocks, plan.splits)](
            query=query, key=key, choice=choice, candidates=candidates, **seen, **options["score_flagged"]
        )
        choose_flagged_kernel[(rows,)](choice=choice, candidates=candidates, **ranked, **options["choose_flagged"])
        gather_kernel[(blocks, plan.chunks)](capacity=sizes.keys, **gathered, **options["gather_flagged"])
        if tail is not None:
            tiles = tail_tiles(architecture, problem.query.dtype, sizes.head_dim, sizes.value_dim)
            mean_key, mean_value = (heads_of(means, tiles) for means in tail)
            tail_kernel[(sizes.blocks(tiles.rows), plan.tail_parts)](
                query=query, mean_key=mean_key, mean_value=mean_value, page_counts=page_counts, partial=partial,
                slots=slots, parts=plan.parts, first_part=plan.chunks, settings=settings,
                **{**seen, "inputs": gathered["inputs"]}, **options["tail"],
            )  # fmt: skip
        combine_splits(
            *(partial.acc, partial.peak, partial.total, problem.sinks, attended),
            *(result.output, result.lse, torch.empty_like(guess)),
        )
        if want_bounds:
            bounds_kernel[(rows,)](
                choice=choice, outside=outside, partial=partial, bounds=result.kept_mass_bounds, splits=plan.splits,
                chunks=plan.chunks, **seen, **options["bounds"],
            )  # fmt: skip
    return result


def _check_codes(problem: Problem) -> None:
    """Raises unless the codes fit the keys and the kernels."""
    (B, Hkv, Lk, D), queries, codes = problem.key.shape, problem.query.shape[2], KeyCodes(*problem.key_index)
    if queries > MAX_DECODE_QUERIES:
        raise ValueError(f"at most {MAX_DECODE_QUERIES} queries are decoded at once, got {queries}: use topk attention")
    length, half = codes.high.shape[2], (D + 1) // 2
    shapes = (*((B, Hkv, length, half),) * 2, *((B, Hkv, length),) * 3, *((B, Hkv, D),) * 2)
    if tuple(tuple(t.shape) for t in codes) != shapes or length < Lk:
        got = ", ".join(str(list(t.shape)) for t in codes)
        raise ValueError(f"codes must be those of keys [{B}, {Hkv}, at least {Lk}, {D}], got {got}")
    types = (*(torch.int8,) * 2, torch.float32, *(torch.bfloat16,) * 2, *(torch.float32,) * 2)
    if tuple(t.dtype for t in codes) != types:
        got = ", ".join(str(t.dtype) for t in codes)
        raise TypeError(f"codes must be int8, their residuals bfloat16 and the rest float32, got {got}")

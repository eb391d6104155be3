"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Six launches, whatever is asked for. Nothing is read back from the device and all sizes follow from shapes, so that a
step can be captured in a graph:

1. ``prepare_kernel``: approximate scores of sampled keys; new keys are taken into the codes and the means of pages.
2. ``guess_kernel``: from the sample a score that the k-th best key should reach.
3. ``scan_kernel``: reads all codes once; lists the keys whose score may reach the guess of any row of a block, and the
   forced ones. Each listed key is read once, scored exactly for all rows, and collected where it reaches a row's guess.
4. ``scan_kernel`` again, which ends at once but for blocks with a row that has collected too few: they list all keys.
5. ``choose_kernel``: the exact k-th largest of the collected scores.
6. ``gather_kernel``: softmax times value over the chosen keys, and over the means of the other keys' pages, in parts,
   which the last program joins. A value is read once for all rows of a block that attend its key.

Means add n / 16 * (D + Dv) elements for a key/value head with n keys, and n / 16 * 4 bytes for each row. What is held
between the launches takes at most ``SCRATCH_BYTES``: several queries of several sequences go after each other where
they would take more.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nc_patch.ops.means import PageMeans, slot_count, touched_slots
from nc_patch.ops.problem import MAX_DECODE_QUERIES, AttentionResult, Problem
from nc_patch.ops.triton.decoding import Decoder, Launches, bound_decoder
from nc_patch.ops.triton.launch import architecture_of
from nc_patch.ops.triton.structs import RowInputs, heads
from nc_patch.selections.index import extend
from nc_patch.selections.topk.choose import choose_kernel
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.encode import key_shape
from nc_patch.selections.topk.gather import gather_kernel
from nc_patch.selections.topk.plan import options_of, plan_for, scratch_of
from nc_patch.selections.topk.prepare import guess_kernel, prepare_kernel
from nc_patch.selections.topk.scan import scan_kernel

# What the kernels hand on to each other takes at most this much, unless one query of one sequence takes more.
SCRATCH_BYTES = 256 * 2**20
# Steps with as many of these runs of keys share a plan.
_KEYS = 128
# Relative width given to bounds of sums of exponentials, for their rounding in float32, and what underflow may lose.
_SUM_SLACK, _SMALLEST_MASS = 1e-4, 1e-30


def bound_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> Callable[[Problem], AttentionResult]:
    """Attention of problems like this one over the best keys of each query, chosen by codes; see ``Selection.bound``.

    Args:
        problem: of at most ``MAX_DECODE_QUERIES`` queries. ``key_index`` are ``KeyCodes`` for at least Lk positions;
            what lies beyond the intervals is not looked at. A budget larger than ``most`` is right, but slow. The codes
            and the ``means``, which stand for the keys that are not attended, take in the ``new`` keys first.
        sink_keys, recent_keys: keys attended always.
    """
    take_in, keys = partial(extend, kind="codes", backend="triton"), _planned_keys(problem)
    return bound_decoder(_decoder, take_in, problem, keys, problem.most, sink_keys, recent_keys)


def _decode_halves(sink_keys: int, recent_keys: int, _: Any, problem: Problem) -> AttentionResult:
    """Decodes one half of the sequences, or of the queries of one, and then the other."""
    several = len(problem.visible) > 1
    # The axis along which each tensor is divided, if at all.
    axes: list[int | None] = [0] * 6 if several else [2, None, None, 1, 1, 2]
    axes.extend([None] * (problem.sinks is not None))
    axes.extend([axes[1]] * len(problem.kept()))
    whole, numbers = zip(problem.tensors(), axes, strict=True), [problem.scale, problem.softcap]
    results = []
    for tensors in zip(*((t, t) if axis is None else t.chunk(2, axis) for t, axis in whole), strict=True):
        half = Problem.unflatten([*tensors], numbers, problem.flags(), problem.most)
        results.append(bound_topk_decode(half, sink_keys, recent_keys)(half))
    joined = (None if each[0] is None else torch.cat(each, 0 if several else 2) for each in zip(*results, strict=True))
    return AttentionResult._make(joined)


def _planned_keys(problem: Problem) -> int:
    """For how many keys a problem is planned: a few more, where its indexes have room, so that steps share a plan."""
    Lk, means = problem.key.shape[2], problem.means
    more = -(-Lk // _KEYS) * _KEYS
    fits = more <= problem.key_index[0].shape[2] and (means is None or slot_count(more) <= means.key.shape[2])
    return more if fits else Lk


def _decoder(problem: Problem, sink_keys: int, recent_keys: int) -> Decoder:
    """What decodes problems like this one, of which no tensor is copied."""
    assert problem.query.shape[2] <= MAX_DECODE_QUERIES
    assert problem.key_index[0].shape[2] >= problem.key.shape[2]
    architecture = architecture_of(problem.query.device)
    plan = plan_for(problem, _planned_keys(problem), architecture)
    options, blocks, splits = options_of(plan, problem, architecture), plan.blocks, plan.splits
    touched = touched_slots(problem.new, plan.slots)
    upkeep = -(-problem.new // key_shape(*problem.head_dims).BLOCK_N.value) + touched
    kernels = (
        (prepare_kernel, (blocks, plan.samplers + upkeep, 1), options["prepare"]),
        (guess_kernel, (plan.rows, 1, 1), options["guess"]),
        *((scan_kernel, (blocks, splits, 1), {**options["scan"], "again": again}) for again in (0, 1)),
        (choose_kernel, (plan.rows, 1, 1), options["choose"]),
        (gather_kernel, (blocks, plan.parts, 1), options["gather"]),
    )
    arguments = {
        "sink_keys": sink_keys, "recent_keys": recent_keys, "length": problem.key_index[0].shape[2],
        "new": problem.new, "touched": touched, "splits": splits, "segment": plan.segment, "parts": plan.parts,
        "slots": plan.slots,
    }  # fmt: skip
    launches = Launches(problem, kernels, arguments, scratch_of(plan, problem))
    if problem.visible[..., 0].numel() > 1 and 4 * launches.scratch_size > SCRATCH_BYTES:
        return partial(_decode_halves, sink_keys, recent_keys)
    return partial(_decode_at_once, launches, splits)


def _decode_at_once(launches: Launches, splits: int, kept: dict[int, Any], problem: Problem) -> AttentionResult:
    """Decodes a problem all at once."""
    query, _, _, visible, origin, budget = problem[:6]
    means, lse, bounds = None, None, None
    if problem.stats or problem.bounds:
        lse = query.new_empty(launches.rows, dtype=torch.float32)
    if problem.means is not None:
        means = PageMeans(*map(heads, problem.means))  # type: ignore[arg-type]
    inputs = RowInputs(visible, budget, None if means is None else origin)
    arguments: dict[str, Any] = {"codes": KeyCodes(*problem.key_index), "means": means, "inputs": inputs, "lse": lse}
    output = launches(kept, problem, arguments)
    if problem.bounds:
        scratch = arguments["scratch"]
        masses = scratch.floats[scratch.masses :][: math.prod(launches.rows) * splits * 9]
        bounds = _kept_mass_bounds(masses.view(*launches.rows, splits, 3, 3), visible)
    return AttentionResult(output, lse, kept_mass_bounds=bounds)


def _kept_mass_bounds(masses: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Bounds ``[B, Hq, Lq, 2]`` of the kept mass from ``[B, Hq, Lq, splits, 3, 3]``, ``Masses`` of three kinds."""
    peak, least, most = masses.double().unbind(-1)
    totals = torch.stack((least.masked_fill(peak == math.inf, 0), most), -1)
    unlisted, kept, others = (math.log(2) * (peak[..., None] + totals.log2())).logsumexp(3).unbind(3)
    # At least so much is kept of what the others are at most, and the other way round.
    share = torch.sigmoid(kept - torch.logaddexp(unlisted, others).flip(-1))
    lower = share[..., 0].nan_to_num(nan=0.0) * (1 - _SUM_SLACK) - _SMALLEST_MASS
    upper = share[..., 1].nan_to_num(nan=1.0) * (1 + _SUM_SLACK) + _SMALLEST_MASS
    empty = visible[..., 1] <= visible[..., 0]
    return torch.stack((lower, upper), -1).clamp(0, 1).float().masked_fill(empty[:, None, :, None], 1.0)

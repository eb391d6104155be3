"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Nothing is read back from the device and all sizes follow from shapes, so that a step can be captured in a graph:

1. ``sample_kernel`` and ``guess_kernel``: approximate scores of evenly spaced keys, and from them a score that the k-th
   best key should reach.
2. ``scan_kernel``: reads the high halves of all codes, and the low halves where those leave a doubt; lists the keys
   whose score may reach the guess of any row of a block, and the forced ones.
3. ``score_kernel``: reads the listed keys once for all rows of the block and scores them exactly; without ``refine`` it
   only copies. Collects, for each row, what reaches its guess.
4. ``choose_kernel``: the exact k-th largest of these scores, and the proof that no other key reaches it.
5. ``gather_kernel``: softmax times value over the chosen keys, in parts. A value is read once for all rows of a block
   that attend its key.
6. ``score_flagged_kernel``, ``choose_flagged_kernel`` and ``gather_kernel`` again: the rows whose list overflowed or
   whose guess was too high, if any, choose among all keys (``flagged``). No other row costs them anything.
7. ``combine_kernel``: the sum of all parts.
8. ``bounds_kernel``, where bounds are wanted.

Ten launches, one more with bounds and one more with a tail: the pages' parts of the softmax before the sum of all
parts (``tail_kernel``). ``scripts/predict_decode.py`` counts bytes and launches and predicts times. What is held
between them takes at most ``SCRATCH_BYTES``: where several queries of several sequences would take more, some of them
go after the others, in as many launches again.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.limits import MAX_DECODE_QUERIES
from nc_patch.ops.means import PageMeans, slot_count
from nc_patch.ops.triton.launch import architecture_of, check_inputs, check_tail, dense_last, padded_dim
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton.split import MAX_SPLITS, combine_splits, padded_splits, planned_length, share
from nc_patch.selections.topk.candidates import choose_kernel, guess_kernel, score_kernel
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.encode import code_strides
from nc_patch.selections.topk.flagged import choose_flagged_kernel, score_flagged_kernel
from nc_patch.selections.topk.gather import bounds_kernel, gather_kernel
from nc_patch.selections.topk.scan import sample_kernel, scan_kernel
from nc_patch.selections.topk.tail import launch_tail, tail_splits

# What the kernels hand on to each other takes at most this much, unless one query of one sequence takes more.
SCRATCH_BYTES = 256 * 2**20
# Keys that a guess is taken from: fewer up to so many keys, and more beyond, where a closer guess saves more keys.
_SAMPLES, _FEW_KEYS, _MOST_SAMPLES = 4096, 1 << 18, 8192
# Room in a block's list, per key of the largest budget: for so many rows, each with twice its budget; and besides.
_LEAST_SHARES, _MOST_SHARES, _ROOM_BESIDES = 4, 8, 4096
# Room for what reaches a row's guess, per key of the largest budget; besides, the same.
_REACHED_PER_KEY = 3
# Room that a segment has beyond its even share of the list.
_SEGMENT_SLACK = 64
# Scores that a program of ``choose_kernel`` holds in registers.
_MOST_HELD = 16384
# Work is divided among programs as if this many keys, if not more, were chosen.
_FEWEST_CHOSEN = 1024
# Values of a tile: the least that a matrix instruction takes. More need more registers than three such programs have.
_GATHERED = 16
# The least that a matrix instruction takes: of 8-bit numbers to be summed, and of rows.
_LEAST_CHANNELS, _MATRIX_ROWS = 32, 16


@dataclass(frozen=True)
class Plan:
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        rows, keys: shape of a tile of codes; ``rows`` make a block. splits: programs that share a block's codes.
        samples: keys that the guess is taken from, a multiple of ``keys``.
        segment: list entries that one split may fill. capacity: entries of a block's whole list.
        room: of these, how many may reach the guess of one row.
        scored, gathered: list entries of a tile of keys and of values.
        scorers, chunks: programs that share a block's list when it is scored, and when values are gathered.
        tail_parts: programs that share the pages of a tail; none without one.
        held: scores that choosing holds in registers.
    """

    rows: int
    keys: int
    splits: int
    samples: int
    segment: int
    capacity: int
    room: int
    scored: int
    gathered: int
    scorers: int
    chunks: int
    tail_parts: int
    held: int

    @property
    def parts(self) -> int:
        """Parts of a row's softmax that are joined in the end, at most ``MAX_SPLITS``."""
        return self.chunks + self.tail_parts

    def scratch_bytes(
        self, heads: int, rows: int, keys: int, value_dim: int, slots: int, refine: bool, want_bounds: bool
    ) -> int:
        """What ``_decode_at_once`` allocates but for its results: for ``rows`` of each of ``heads`` of keys."""
        of_block = self.splits * (self.segment + 1) + self.capacity
        if not refine:
            of_block += self.splits * self.rows * self.segment * (1 + want_bounds)
        of_row = self.samples + 2 * self.room + max(self.capacity, keys) * (1 + want_bounds)
        of_row += self.parts * (value_dim + 2) + slots + 8
        if want_bounds:
            of_row += 4 * self.splits + 8 * self.chunks
        return 4 * heads * (-(-rows // self.rows) * of_block + rows * of_row)


class Resident(NamedTuple):
    """How many programs of each kernel a multiprocessor holds at once, by their registers."""

    scan: int = 3
    score: int = 4
    gather: int = 3


def resident_programs(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> Resident:
    """Of the registers that ``decode_options`` leaves; ``head_dim`` is the larger one of keys and values."""
    if _is_slim(dtype, head_dim, want_bounds):
        return Resident()
    return Resident(1 if head_dim > 128 else 2, 3, 1 if dtype == torch.float32 else 2)


def _is_slim(dtype: torch.dtype, head_dim: int, want_bounds: bool) -> bool:
    """Whether programs are held to so few registers that three or four fit a multiprocessor."""
    return dtype != torch.float32 and head_dim <= 128 and not want_bounds


def plan_for(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    budget: int,
    architecture: str = "sm_90",
    tail_parts: int = 0,
    resident: Resident = Resident(),  # noqa: B008
) -> Plan:
    """The one place where tiles, splits and capacities are chosen; ``budget`` is the largest.

    ``tail_parts``, from ``tail_splits``, come first: the attended keys share what is left of ``MAX_SPLITS``. What
    kernels are compiled for follows from the ``planned_length``, so that few steps of a generation take others.
    """
    head_dim = padded_dim(head_dim)
    rows = 8 if group * queries <= 8 else 16
    tile = 128 if head_dim <= 128 and rows == 8 else 32 if architecture.startswith("gfx") else 64
    blocks = triton.cdiv(group * queries, rows) * batch * kv_heads
    tiles = triton.cdiv(keys, tile) + 1
    planned = planned_length(keys)
    splits = share(resident.scan, blocks, planned // tile, MAX_SPLITS)
    samples = _SAMPLES if keys <= _FEW_KEYS else _MOST_SAMPLES
    shares = min(_MOST_SHARES, max(_LEAST_SHARES, group * queries))
    capacity = max(1, min(keys, 2 * shares * budget + _ROOM_BESIDES))
    room = max(1, min(keys, _REACHED_PER_KEY * budget + _ROOM_BESIDES))
    whole = triton.cdiv(tiles, splits) * tile
    segment = whole if capacity >= keys else min(whole, 2 * triton.cdiv(capacity, splits) + _SEGMENT_SLACK)
    scored, gathered = max(16, min(32, 4096 // head_dim)), _GATHERED
    chosen = max(_FEWEST_CHOSEN, triton.next_power_of_2(budget))
    likely = min(planned, 2 * chosen * min(group * queries, rows))
    return Plan(
        rows=rows,
        keys=tile,
        splits=splits,
        samples=samples,
        segment=segment,
        capacity=capacity,
        room=room,
        scored=scored,
        gathered=gathered,
        scorers=share(resident.score, blocks, triton.cdiv(likely, scored), MAX_SPLITS),
        chunks=share(resident.gather, blocks, triton.cdiv(likely, gathered), MAX_SPLITS - tail_parts),
        tail_parts=tail_parts,
        held=min(_MOST_HELD, triton.next_power_of_2(min(planned, _REACHED_PER_KEY * budget + _ROOM_BESIDES))),
    )


def triton_topk_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    codes: KeyCodes,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    refine: bool,
    max_budget: int,
    want_bounds: bool,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the ``budget`` best keys of each query, chosen by codes; the set is ``reference_attention``'s.

    Args:
        query: ``[B, Hq, Lq, D]``, Lq at most 32. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``. Any strides;
            what has no dense last axis is copied.
        visible: int32 ``[B, Lq, 2]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]`` or None.
        codes: of the keys, for at least Lk positions; what lies beyond the intervals is not looked at.
        scale: factor of the scores. softcap: 0 for none. sink_keys, recent_keys: keys attended always.
        refine: read the keys that may be among the best and score them exactly. Without, the codes' scores choose and
            weigh, no key is read unless a row's list overflows, and the result is approximate.
        max_budget: no budget is larger; lists are made for it. A larger budget is right, but slow.
        want_bounds: whether bounds of the kept mass are wanted.
        tail: the means by which keys that are not attended enter, with the ``origin`` int32 ``[B, Lq]`` of each query's
            sequence; None to drop them.

    Returns:
        (output ``[B, Hq, Lq, Dv]``, lse float32 ``[B, Hq, Lq]``, kept mass from below and above float32 ``[B, Hq, Lq,
        2]`` or empty).

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take.
    """
    check_inputs(query, key, value, visible, budget, sinks)
    check_tail(tail, origin, key, value, visible)
    _check_codes(query, key, codes)
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    architecture = architecture_of(query.device)
    resident = resident_programs(query.dtype, max(D, DV), want_bounds)
    query, key, value, visible = (dense_last(x) for x in (query, key, value, visible))
    settings: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "sink_keys": sink_keys, "recent_keys": recent_keys, "refine": refine,
        "want_bounds": want_bounds,
    }  # fmt: skip

    def plan_of(sequences: int, queries: int) -> Plan:
        sizes = (sequences, Hkv, Hq // Hkv, queries, Lk, D)
        tail_parts = 0 if tail is None else tail_splits(*sizes, DV, query.dtype, architecture)
        return plan_for(*sizes, max(1, min(max_budget, Lk)), architecture, tail_parts, resident)

    def scratch_of(sequences: int, queries: int) -> int:
        sizes = (sequences * Hkv, Hq // Hkv * queries, Lk, DV, 0 if tail is None else slot_count(Lk))
        return plan_of(sequences, queries).scratch_bytes(*sizes, refine, want_bounds)

    sequences, queries = B, Lq
    while B * Hq * Lq and sequences * queries > 1 and scratch_of(sequences, queries) > SCRATCH_BYTES:
        sequences, queries = (-(-sequences // 2), queries) if sequences > 1 else (1, -(-queries // 2))
    if (sequences, queries) == (B, Lq):
        return _decode_at_once(
            query, key, value, visible, budget, sinks, codes, tail, origin, plan_of(B, Lq), **settings
        )
    output = query.new_empty(B, Hq, Lq, DV)
    lse = torch.empty((B, Hq, Lq), dtype=torch.float32, device=query.device)
    bounds = torch.empty((B, Hq, Lq, 2) if want_bounds else (0,), dtype=torch.float32, device=query.device)
    for b, q in itertools.product(range(0, B, sequences), range(0, Lq, queries)):
        of, at = slice(b, b + sequences), slice(q, q + queries)
        here = query[of, :, at]
        found = _decode_at_once(
            *(here, key[of], value[of], visible[of, at], budget[of, :, at], sinks, KeyCodes(*(t[of] for t in codes))),
            *(None if tail is None else PageMeans(*(t[of] for t in tail)), None if origin is None else origin[of, at]),
            plan_of(here.shape[0], here.shape[2]),
            **settings,
        )
        for whole, part in zip((output, lse, bounds)[: 3 if want_bounds else 2], found, strict=False):
            whole[of, :, at] = part
    return output, lse, bounds


def _decode_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    codes: KeyCodes,
    tail: PageMeans | None,
    origin: torch.Tensor | None,
    plan: Plan,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    refine: bool,
    want_bounds: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``triton_topk_decode`` of what it has checked, by one plan."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group, rows = Hq // Hkv, B * Hq * Lq
    device = query.device
    architecture = architecture_of(device)
    output = query.new_empty(B, Hq, Lq, DV)
    lse = torch.empty((B, Hq, Lq), dtype=torch.float32, device=device)
    bounds = torch.empty((B, Hq, Lq, 2) if want_bounds else (0,), dtype=torch.float32, device=device)
    if rows == 0:
        return output, lse, bounds
    center, spread = codes.center.contiguous(), codes.spread.contiguous()

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    programs = triton.cdiv(group * Lq, plan.rows) * B * Hkv
    samples, guess = floats(rows, plan.samples), floats(rows)
    found, counts = integers(programs, plan.splits, plan.segment), integers(programs, plan.splits)
    rough_shape = (0,) if refine else (programs, plan.splits, plan.rows, plan.segment)
    rough, rough_errors = floats(*rough_shape), floats(*(rough_shape if want_bounds else (0,)))
    outside = floats(rows, plan.splits, 4) if want_bounds else floats(0)
    # Of the listed keys, and later of all keys for the flagged rows.
    positions, scores = integers(programs, plan.capacity), floats(rows, max(plan.capacity, Lk))
    errors = floats(*scores.shape) if want_bounds else floats(0)
    reached, reached_positions, reached_scores = integers(rows), integers(rows, plan.room), floats(rows, plan.room)
    listed, threshold, ties_end = integers(rows), floats(rows), integers(rows)
    attended, flags = integers(B, Hq, Lq), integers(B, Hq, Lq)
    acc, peak, total = (floats(rows, plan.parts, *last) for last in ((DV,), (), ()))
    slots = 0 if tail is None else slot_count(Lk)
    page_counts = integers(rows, slots)
    begins = visible[..., 0] if origin is None else origin
    kept = floats(rows, plan.chunks, 8) if want_bounds else floats(0)

    q = query.stride()[:3]
    codes_at = code_strides(codes)
    limits = (*visible.stride()[:2], budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1))
    limits = (*limits, budget.stride(2))
    by_head = (Hkv, group, Lq, Lk, sink_keys, recent_keys)
    constants = decode_constants(plan, query.dtype, D, DV, refine, want_bounds, softcap > 0, tail is not None)
    options = decode_options(plan, architecture, query.dtype, max(D, DV), want_bounds)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sample_kernel[(programs, plan.samples // plan.keys)](
            *(query, visible, budget, codes.high, codes.low, codes.scale, center, spread, samples, *q, *codes_at),
            *(*limits, *by_head),
            **constants["sample"],
            **options["sample"],
        )
        guess_kernel[(rows,)](
            *(visible, budget, samples, guess, reached, page_counts, *limits, Hq, Lq, Lk, sink_keys, recent_keys),
            slots,
            **constants["guess"],
            **options["guess"],
        )
        scan_kernel[(programs, plan.splits)](
            *(query, visible, budget, *codes[:5], center, spread, guess, found, rough, rough_errors, counts, outside),
            *(*q, *codes_at, *limits, *by_head, plan.splits, plan.segment, scale, softcap),
            **constants["scan"],
            **options["scan"],
        )
        score_kernel[(programs, plan.scorers)](
            *(query, key, visible, budget, guess, counts, found, rough, rough_errors, positions, scores, errors),
            *(reached, reached_positions, reached_scores, *q, *key.stride()[:3], *limits, *by_head),
            *(plan.splits, plan.segment, plan.capacity, plan.room, plan.scorers),
            **constants["score"],
            **options["score"],
        )
        choose_kernel[(rows,)](
            *(visible, budget, counts, guess, reached, reached_positions, reached_scores, listed, threshold, ties_end),
            *(attended, flags, *limits, Hq, group, Lq, Lk, sink_keys, recent_keys),
            *(plan.splits, plan.segment, plan.capacity, plan.room),
            **constants["choose"],
            **options["choose"],
        )
        of_lists = (listed, flags, threshold, ties_end, acc, peak, total, kept, begins, page_counts)
        of_values = (*value.stride()[:3], *limits, *by_head)
        divided = (plan.chunks, plan.parts, slots, *begins.stride(), scale, softcap)
        gather_kernel[(programs, plan.chunks)](
            *(value, visible, budget, positions, scores, errors, *of_lists, *of_values, plan.capacity, *divided),
            **constants["gather"],
            **options["gather"],
        )
        score_flagged_kernel[(programs, plan.splits)](
            *(query, key, visible, budget, flags, scores, errors, *q, *key.stride()[:3], *limits, *by_head[:4]),
            **constants["score_flagged"],
            **options["score_flagged"],
        )
        choose_flagged_kernel[(rows,)](
            *(visible, budget, flags, scores, listed, threshold, ties_end, *limits, Hq, Lq, Lk, sink_keys, recent_keys),
            **constants["choose_flagged"],
            **options["choose_flagged"],
        )
        gather_kernel[(programs, plan.chunks)](
            *(value, visible, budget, positions, scores, errors, *of_lists, *of_values, Lk, *divided),
            **constants["gather_flagged"],
            **options["gather_flagged"],
        )
        if tail is not None:
            launch_tail(
                *(query, tail, visible, begins, budget, page_counts, acc, peak, total),
                key_length=Lk,
                first_part=plan.chunks,
                scale=scale,
                softcap=softcap,
            )
        combine_splits(acc, peak, total, sinks, attended, output, lse, torch.empty_like(lse))
        if want_bounds:
            bounds_kernel[(rows,)](
                *(visible, flags, outside, kept, bounds, *limits[:2], Hq, Lq, Lk, plan.splits, plan.chunks),
                **constants["bounds"],
                **options["bounds"],
            )
    return output, lse, bounds


def decode_constants(
    plan: Plan,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    refine: bool,
    want_bounds: bool,
    has_softcap: bool,
    has_tail: bool = False,
) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel."""
    padded = padded_dim(head_dim)
    half = max(_LEAST_CHANNELS, padded // 2)
    tile = {"D": head_dim, "BLOCK_M": plan.rows, "BLOCK_N": plan.keys, "BLOCK_H": half}
    splits = {"BLOCK_S": padded_splits(plan.splits)}
    flags = {"REFINE": refine, "WANT_BOUNDS": want_bounds}
    exact = {
        "D": head_dim,
        "BLOCK_M": _MATRIX_ROWS,
        "BLOCK_E": plan.scored,
        "BLOCK_D": padded,
        # float32 multiplies on the plain floating point units, where a sum at once takes too many registers.
        "CHUNK_D": min(padded, 32) if dtype == torch.float32 else padded,
    }
    gather = {
        "DV": value_dim,
        "BLOCK_M": _MATRIX_ROWS,
        "BLOCK_E": plan.gathered,
        "BLOCK_DV": padded_dim(value_dim),
        "HAS_SOFTCAP": has_softcap,
        "WANT_BOUNDS": want_bounds,
        "COUNT_PAGES": has_tail,
    }
    return {
        "sample": {**tile, "SAMPLES": plan.samples},
        "guess": {"SAMPLES": plan.samples},
        "scan": {**tile, **flags, "HAS_SOFTCAP": has_softcap},
        "score": {**splits, **flags, **exact, "ROWS": plan.rows},
        "choose": {**splits, "ROWS": plan.rows, "BLOCK_E": plan.held},
        "gather": {**gather, "FLAGGED": False},
        "score_flagged": {**exact, "WANT_BOUNDS": want_bounds},
        "choose_flagged": {"BLOCK_E": plan.held},
        "gather_flagged": {**gather, "FLAGGED": True},
        "bounds": {**splits, "BLOCK_C": padded_splits(plan.chunks)},
    }


def decode_options(
    plan: Plan, architecture: str, dtype: torch.dtype, head_dim: int, want_bounds: bool
) -> dict[str, dict[str, Any]]:
    """Options of the compiler for each kernel; ``head_dim`` is the larger one of keys and values.

    AMD's warps are twice as wide, and eight leave too few registers.
    """
    amd = architecture.startswith("gfx")
    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    slim = _is_slim(dtype, head_dim, want_bounds)
    # So many programs fit a multiprocessor as the plan counts on; and otherwise, as in ``compile_options``, all
    # registers, lest NVIDIA's assembler spills some.
    fourth, third = ({} if amd else {"maxnreg": count if slim else 255} for count in (128, 168))
    gathering = {**plain, "num_warps": 4 if amd or dtype != torch.float32 else 8}
    scoring = {**plain, "num_stages": 2, **fourth}
    choosing = {**plain, "num_warps": 16 if plan.held > 8192 else 8 if plan.held > 2048 else 4}
    return {
        **dict.fromkeys(("sample", "bounds"), plain),
        "scan": {**plain, "num_stages": 3, "num_warps": 8 if head_dim > 128 and not amd else 4, **third},
        "score": scoring,
        "score_flagged": scoring,
        # Two tiles on their way: positions come first, and one tile of so few values would leave the memory idle.
        "gather": {**gathering, "num_stages": 5, **third},
        # There no positions come first, and more stages would spill registers.
        "gather_flagged": {**gathering, "num_stages": 2, **({} if amd else {"maxnreg": 255})},
        "guess": {**plain, "num_warps": 16 if plan.samples > 4096 else 8 if plan.samples >= 2048 else 4},
        "choose": choosing,
        "choose_flagged": choosing,
    }


def _check_codes(query: torch.Tensor, key: torch.Tensor, codes: KeyCodes) -> None:
    """Raises unless the codes fit the keys and the kernels."""
    B, Hkv, Lk, D = key.shape
    if query.shape[2] > MAX_DECODE_QUERIES:
        raise ValueError(
            f"at most {MAX_DECODE_QUERIES} queries are decoded at once, got {query.shape[2]}: use topk attention"
        )
    for name, tensor in zip(codes._fields, codes, strict=True):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last axis of {name} must be dense, got stride {tensor.stride(-1)}")
    length, half = codes.high.shape[2], (D + 1) // 2
    shapes = (*((B, Hkv, length, half),) * 2, *((B, Hkv, length),) * 3, *((B, Hkv, D),) * 2)
    if tuple(tuple(t.shape) for t in codes) != shapes or length < Lk:
        got = ", ".join(str(list(t.shape)) for t in codes)
        raise ValueError(f"codes must be those of keys [{B}, {Hkv}, at least {Lk}, {D}], got {got}")
    types = (*(torch.int8,) * 2, torch.float32, *(torch.bfloat16,) * 2, *(torch.float32,) * 2)
    if tuple(t.dtype for t in codes) != types:
        got = ", ".join(str(t.dtype) for t in codes)
        raise TypeError(f"codes must be int8, their residuals bfloat16 and the rest float32, got {got}")


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernels of a step at Llama-3-8B's geometry and 131,072 keys, for small and large heads, with all options."""
    for dtype, head_dim, queries, refine, want_bounds in (
        (torch.bfloat16, 64, 1, True, True),
        (torch.bfloat16, 128, 1, True, False),
        (torch.bfloat16, 128, 16, True, True),
        (torch.bfloat16, 256, 16, False, True),
        (torch.float32, 128, 1, True, True),
    ):
        resident = resident_programs(dtype, head_dim, want_bounds)
        plan = plan_for(1, 8, 4, queries, 131072, head_dim, 2354, target, 0, resident)
        constants = decode_constants(plan, dtype, head_dim, head_dim, refine, want_bounds, want_bounds)
        options = decode_options(plan, target, dtype, head_dim, want_bounds)
        types = {
            **dict.fromkeys(("query", "key", "value", "mean_key", "mean_value", "output"), pointer_to(dtype)),
            **dict.fromkeys(_INTEGERS, "*i32"),
            **dict.fromkeys(_FLOATS, "*fp32"),
            **dict.fromkeys(("high", "low"), "*i8"),
            **dict.fromkeys(("coarse", "residual"), "*bf16"),
            # Long caches need 64 bits between sequences.
            **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb", "stride_cb", "stride_sb"), "i64"),
        }
        flags = [f"q{queries}", *(["refine"] if refine else []), *(["bounds"] if want_bounds else [])]
        suffix = "-".join([DTYPE_NAMES[dtype], f"d{head_dim}", *flags])
        for name, kernel in _KERNELS.items():
            yield Specialisation(
                f"codes_{name}-{suffix}", kernel, constants[name], types, options[name], data_strides(kernel, "qkvc")
            )
        aligned = data_strides(gather_kernel)
        for name, more in (
            ("gather", {**constants["gather"], "COUNT_PAGES": True}),
            ("gather_flagged", {**constants["gather_flagged"], "COUNT_PAGES": True}),
        ):
            yield Specialisation(f"codes_{name}-{suffix}-tail", gather_kernel, more, types, options[name], aligned)


_KERNELS = {
    "sample": sample_kernel,
    "guess": guess_kernel,
    "scan": scan_kernel,
    "score": score_kernel,
    "choose": choose_kernel,
    "gather": gather_kernel,
    "score_flagged": score_flagged_kernel,
    "choose_flagged": choose_flagged_kernel,
    "bounds": bounds_kernel,
}
_INTEGERS = (
    *("visible", "origin", "budget", "flags", "positions", "segment_positions", "counts", "page_counts", "listed"),
    *("ties_end", "attended", "reached", "reached_positions"),
)
_FLOATS = (
    *("code_scale", "center", "spread", "samples", "guess", "scores", "errors", "outside", "segment_scores"),
    *("segment_errors", "reached_scores", "threshold", "acc", "peak", "total", "kept", "kept_mass", "bounds"),
)

"""Exact ``topk`` while decoding, from int8 codes of the keys; equal to the set of ``reference_attention``.

Nothing is read back from the device and all sizes follow from shapes, so that a step can be captured in a graph:

1. ``sample_kernel`` and ``guess_kernel``: approximate scores of evenly spaced keys, and from them a score that the k-th
   best key should reach.
2. ``scan_kernel``: reads all codes; lists the keys whose score may reach the guess, and the forced ones.
3. ``score_kernel``: reads the listed keys and scores them exactly; without ``refine`` it only copies.
4. ``choose_kernel``: the exact k-th largest score of the list, and the proof that no other key reaches it.
5. ``gather_kernel`` and ``combine_kernel``: softmax times value over the chosen keys, in parts, and their sum.
6. ``threshold_kernel`` and ``attend_kernel``: the rows whose list overflowed or whose guess was too high, if any, are
   searched over all keys. No other row costs them anything.
7. ``bounds_kernel``, where bounds are wanted.

Nine launches, one more with bounds and two more with a tail (``triton_decode_tail``): a count of the attended keys of
each page, which the gathering fills, and the pages' parts of the softmax before the sum of all parts.

Bytes, for a key/value head with n keys and G rows of budget k, of which c * k are listed (c about 2: 1.2 for the width
of the bounds times 1.6 for the safe side of the guess): codes n * (D + 8); keys at most G * c * k * D * 2 and values
G * k * Dv * 2 in bfloat16; a list entry is written and read back three times, 8 bytes each. With 8 heads, D = 128, G =
4, k = 4 n^0.6: predicted, not measured, for an H200 (4.3 TB/s, 1.2 us a launch, 10 us for the latency of the small
kernels)

======= ======== ======= ========= ======= ======= =========
n       codes    keys    values    lists   time    dense
======= ======== ======= ========= ======= ======= =========
32,768  36 MB    34 MB   17 MB     8 MB    43 us   31 us
131,072 143 MB   77 MB   39 MB     20 MB   86 us   125 us
524,288 570 MB   177 MB  89 MB     42 MB   225 us  499 us
======= ======== ======= ========= ======= ======= =========

where keys and values count as read once for every row; rows of a group that want the same keys find them in the cache.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from nc_patch.ops.codes import KeyCodes
from nc_patch.ops.tail import PageMeans, slot_count
from nc_patch.ops.triton_attend import attend_kernel
from nc_patch.ops.triton_candidates import choose_kernel, guess_kernel, score_kernel
from nc_patch.ops.triton_codes import sample_kernel, scan_kernel
from nc_patch.ops.triton_decode_tail import launch_tail, tail_splits
from nc_patch.ops.triton_gather import bounds_kernel, gather_kernel
from nc_patch.ops.triton_launch import (
    architecture_of,
    attend_constants,
    check_inputs,
    check_tail,
    compile_options,
    launch_rows,
    padded_dim,
    tail_constants,
    threshold_constants,
    tiles_for,
)
from nc_patch.ops.triton_specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton_split import combine_splits, split_count
from nc_patch.ops.triton_tail import attend_tail_kernel
from nc_patch.ops.triton_threshold import threshold_kernel

# Queries that one call takes; more are a prefill.
MAX_QUERIES = 32
# Keys that a guess is taken from, and room in a row's list: per key of the largest budget, and besides.
_MOST_SAMPLES = 4096
_ROOM_PER_KEY = 8
_ROOM_BESIDES = 4096
# Room that a segment has beyond its even share of the list.
_SEGMENT_SLACK = 64
# List entries that a program of ``choose_kernel`` holds in registers.
_MOST_HELD = 16384


@dataclass(frozen=True)
class Plan:
    """How a call is divided, from shapes and host integers alone.

    Attributes:
        rows, keys: shape of a tile of codes. splits: programs that share a row's codes.
        samples: keys that the guess is taken from, a multiple of ``keys``.
        segment: list entries that one split may fill. capacity: entries of a row's whole list.
        scored, gathered: list entries of a tile of keys and of values. chunks: programs that share a row's list.
        held: list entries that choosing holds in registers.
    """

    rows: int
    keys: int
    splits: int
    samples: int
    segment: int
    capacity: int
    scored: int
    gathered: int
    chunks: int
    held: int


def plan_for(
    batch: int, kv_heads: int, group: int, queries: int, keys: int, dims: tuple[int, int], budget: int
) -> Plan:
    """The one place where tiles, splits and capacities are chosen; ``dims`` are D and Dv, ``budget`` the largest."""
    head_dim, value_dim = (padded_dim(d) for d in dims)
    rows = 8 if group * queries <= 8 else 16
    tile = 128 if head_dim <= 128 and rows == 8 else 64
    blocks = triton.cdiv(group * queries, rows) * batch * kv_heads
    tiles = triton.cdiv(keys, tile) + 1
    splits = split_count(blocks, tiles)
    samples = min(_MOST_SAMPLES, max(tile, triton.next_power_of_2(keys)))
    capacity = max(1, min(keys, _ROOM_PER_KEY * budget + _ROOM_BESIDES))
    whole = triton.cdiv(tiles, splits) * tile
    segment = whole if capacity >= keys else min(whole, 2 * triton.cdiv(capacity, splits) + _SEGMENT_SLACK)
    gathered = max(8, min(32, 4096 // value_dim))
    return Plan(
        rows=rows,
        keys=tile,
        splits=splits,
        samples=samples,
        segment=segment,
        capacity=capacity,
        scored=max(8, min(32, 4096 // head_dim)),
        gathered=gathered,
        chunks=split_count(batch * kv_heads * group * queries, triton.cdiv(min(keys, 2 * budget), gathered)),
        held=min(_MOST_HELD, triton.next_power_of_2(capacity)),
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
        query: ``[B, Hq, Lq, D]``, Lq at most 32. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``. Any strides
            with a dense last axis.
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
    _check_codes(query, key, value, codes)
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group, rows = Hq // Hkv, B * Hq * Lq
    device = query.device
    output = query.new_empty(B, Hq, Lq, DV)
    lse = torch.empty((B, Hq, Lq), dtype=torch.float32, device=device)
    bounds = torch.empty((B, Hq, Lq, 2) if want_bounds else (0,), dtype=torch.float32, device=device)
    if rows == 0:
        return output, lse, bounds
    plan = plan_for(B, Hkv, group, Lq, Lk, (D, DV), max(1, min(max_budget, Lk)))
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    center, spread = codes.center.contiguous(), codes.spread.contiguous()

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    samples, guess = floats(rows, plan.samples), floats(rows)
    segment = (rows, plan.splits, plan.segment)
    found, rough, counts = integers(*segment), floats(*segment), integers(rows, plan.splits)
    rough_errors = floats(*segment) if want_bounds and not refine else floats(0)
    outside = floats(rows, plan.splits, 4) if want_bounds else floats(0)
    positions, scores = integers(rows, plan.capacity), floats(rows, plan.capacity)
    errors = floats(rows, plan.capacity) if want_bounds else floats(0)
    listed, threshold, ties_end = integers(rows), floats(rows), integers(rows)
    attended, flags = integers(B, Hq, Lq), integers(B, Hq, Lq)
    parts = plan.chunks + (0 if tail is None else tail_splits(query, key, value))
    acc, peak, total = floats(rows, parts, DV), floats(rows, parts), floats(rows, parts)
    slots = 0 if tail is None else slot_count(Lk)
    page_counts = torch.zeros((rows, slots), dtype=torch.int32, device=device)
    begins = visible[..., 0] if origin is None else origin
    kept = floats(rows, plan.chunks, 8) if want_bounds else floats(0)
    kept_mass = floats(B, Hq, Lq)

    q, c = query.stride()[:3], codes.codes.stride()[:3]
    s, r = codes.scale.stride()[:2], codes.residual.stride()[:2]
    limits = (*visible.stride()[:2], budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1))
    limits = (*limits, budget.stride(2))
    by_head = (Hkv, group, Lq, Lk, sink_keys, recent_keys)
    by_row = (Hq, Lq, Lk, sink_keys, recent_keys)
    programs = triton.cdiv(group * Lq, plan.rows) * B * Hkv
    constants = decode_constants(plan, D, DV, refine, want_bounds, softcap > 0, tail is not None)
    options = decode_options(plan, architecture_of(query.device), tail is not None)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sample_kernel[(programs, plan.samples // plan.keys)](
            *(query, visible, budget, codes.codes, codes.scale, center, spread, samples, *q, *c, *s, *limits, *by_head),
            **constants["sample"],
            **options["sample"],
        )
        guess_kernel[(rows,)](
            *(visible, budget, samples, guess, *limits, *by_row), **constants["guess"], **options["guess"]
        )
        scan_kernel[(programs, plan.splits)](
            *(query, visible, budget, codes.codes, codes.scale, codes.residual, center, spread, guess, found, rough),
            *(rough_errors, counts, outside, *q, *c, *s, *r, *limits, *by_head, plan.splits, plan.segment),
            *(scale, softcap),
            **constants["scan"],
            **options["scan"],
        )
        score_kernel[(rows, plan.splits)](
            *(query, key, counts, found, rough, rough_errors, positions, scores, errors, *q, *key.stride()[:3]),
            *(group, Hq, Lq, plan.splits, plan.segment, plan.capacity),
            **constants["score"],
            **options["score"],
        )
        choose_kernel[(rows,)](
            *(visible, budget, counts, guess, positions, scores, listed, threshold, ties_end, attended, flags),
            *(*limits, *by_row, plan.splits, plan.segment, plan.capacity),
            **constants["choose"],
            **options["choose"],
        )
        gather_kernel[(rows, plan.chunks)](
            *(value, visible, budget, positions, scores, errors, listed, threshold, ties_end, acc, peak, total, kept),
            *(begins, page_counts, *value.stride()[:3], *limits, Hq, group, Lq, Lk, sink_keys, recent_keys),
            *(plan.capacity, plan.chunks, parts, slots, *begins.stride(), scale, softcap),
            **constants["gather"],
            **options["gather"],
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
        launch_rows(
            *(query, key, value, visible, budget, sinks, flags, output, lse, kept_mass),
            by_score=True,
            scale=scale,
            softcap=softcap,
            sink_keys=sink_keys,
            recent_keys=recent_keys,
            tail=tail,
            origin=origin,
        )
        if want_bounds:
            bounds_kernel[(rows,)](
                *(query, visible, budget, codes.scale, codes.residual, center, spread, flags, outside, kept, kept_mass),
                *(bounds, *q, *s, *r, *limits, Hq, group, Lq, Lk, sink_keys, recent_keys, plan.splits, plan.chunks),
                scale,
                **constants["bounds"],
                **options["bounds"],
            )
    return output, lse, bounds


def decode_constants(
    plan: Plan,
    head_dim: int,
    value_dim: int,
    refine: bool,
    want_bounds: bool,
    has_softcap: bool,
    has_tail: bool = False,
) -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel."""
    padded = padded_dim(head_dim)
    tile = {"D": head_dim, "BLOCK_M": plan.rows, "BLOCK_N": plan.keys, "BLOCK_D": padded}
    splits = {"BLOCK_S": triton.next_power_of_2(plan.splits)}
    flags = {"REFINE": refine, "WANT_BOUNDS": want_bounds}
    return {
        "sample": {**tile, "SAMPLES": plan.samples},
        "guess": {"SAMPLES": plan.samples},
        "scan": {**tile, **flags, "HAS_SOFTCAP": has_softcap},
        "score": {**splits, **flags, "D": head_dim, "BLOCK_E": plan.scored, "BLOCK_D": padded},
        "choose": {**splits, "BLOCK_E": plan.held},
        "gather": {
            "DV": value_dim,
            "BLOCK_E": plan.gathered,
            "BLOCK_DV": padded_dim(value_dim),
            "HAS_SOFTCAP": has_softcap,
            "WANT_BOUNDS": want_bounds,
            "COUNT_PAGES": has_tail,
        },
        "bounds": {
            **splits,
            "D": head_dim,
            "BLOCK_C": triton.next_power_of_2(plan.chunks),
            "BLOCK_D": padded,
            "BLOCK_N": 1024,
        },
    }


def decode_options(plan: Plan, architecture: str, has_tail: bool = False) -> dict[str, dict[str, Any]]:
    """Options of the compiler for each kernel. AMD's warps are twice as wide, and eight leave too few registers."""
    plain = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    # As in ``compile_options``: otherwise NVIDIA's assembler spills some.
    all_registers = {"maxnreg": 255} if has_tail and not architecture.startswith("gfx") else {}
    return {
        **dict.fromkeys(("sample", "score", "bounds"), plain),
        "gather": {**plain, **all_registers},
        "scan": {**plain, "num_warps": 4 if architecture.startswith("gfx") else 8, "num_stages": 2},
        "guess": {**plain, "num_warps": 8 if plan.samples >= 2048 else 4},
        "choose": {**plain, "num_warps": 16 if plan.held > 8192 else 8 if plan.held > 2048 else 4},
    }


def _check_codes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, codes: KeyCodes) -> None:
    """Raises unless the codes fit the keys and the layouts fit the kernels."""
    B, Hkv, Lk, D = key.shape
    if query.shape[2] > MAX_QUERIES:
        raise ValueError(f"at most {MAX_QUERIES} queries are decoded at once, got {query.shape[2]}: use topk attention")
    for name, tensor in (("query", query), ("key", key), ("value", value), *zip(codes._fields, codes, strict=True)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"the last axis of {name} must be dense, got stride {tensor.stride(-1)}")
    length = codes.codes.shape[2]
    shapes = ((B, Hkv, length, D), (B, Hkv, length), (B, Hkv, length), (B, Hkv, D), (B, Hkv, D))
    if tuple(tuple(t.shape) for t in codes) != shapes or length < Lk:
        got = ", ".join(str(list(t.shape)) for t in codes)
        raise ValueError(f"codes must be those of keys [{B}, {Hkv}, at least {Lk}, {D}], got {got}")
    types = (torch.int8, *(torch.float32,) * 4)
    if tuple(t.dtype for t in codes) != types:
        raise TypeError(f"codes must be int8 and the rest float32, got {', '.join(str(t.dtype) for t in codes)}")


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernels of this file at Llama-3-8B's geometry and 131,072 keys, for small and large heads, with all options.

    The search of flagged rows is in its kernels' list; here are its flagged variants.
    """
    for dtype, head_dim, queries, refine, want_bounds in (
        (torch.bfloat16, 64, 1, True, True),
        (torch.bfloat16, 128, 1, True, False),
        (torch.bfloat16, 128, 16, True, True),
        (torch.bfloat16, 256, 16, False, True),
        (torch.float32, 128, 1, True, True),
    ):
        plan = plan_for(1, 8, 4, queries, 131072, (head_dim, head_dim), 2354)
        constants = decode_constants(plan, head_dim, head_dim, refine, want_bounds, want_bounds)
        options = decode_options(plan, target)
        types = {
            **dict.fromkeys(("query", "key", "value", "mean_key", "mean_value", "output"), pointer_to(dtype)),
            **dict.fromkeys(_INTEGERS, "*i32"),
            **dict.fromkeys(_FLOATS, "*fp32"),
            "codes": "*i8",
            # Long caches need 64 bits between sequences.
            **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb", "stride_cb", "stride_sb", "stride_rb"), "i64"),
        }
        flags = [f"q{queries}", *(["refine"] if refine else []), *(["bounds"] if want_bounds else [])]
        suffix = "-".join([DTYPE_NAMES[dtype], f"d{head_dim}", *flags])
        for name, kernel in _KERNELS.items():
            yield Specialisation(
                f"codes_{name}-{suffix}", kernel, constants[name], types, options[name], data_strides(kernel, "qkvc")
            )
        counting = {**constants["gather"], "COUNT_PAGES": True}
        counting_options = decode_options(plan, target, True)["gather"]
        aligned = data_strides(gather_kernel)
        yield Specialisation(f"codes_gather-{suffix}-tail", gather_kernel, counting, types, counting_options, aligned)
        if queries > 1 or not refine or not want_bounds:
            continue
        tiles = tiles_for(target, dtype, head_dim, head_dim, 1)
        compiler = compile_options(tiles, target)
        for kernel, name, more in (
            (threshold_kernel, "threshold", threshold_constants(head_dim, tiles, True)),
            (attend_kernel, "topk", attend_constants(head_dim, head_dim, tiles, True, True, True, True, True)),
            (attend_tail_kernel, "topk_tail", tail_constants(head_dim, head_dim, tiles, True, True, True, True)),
        ):
            aligned = data_strides(kernel, "qkvmw")
            yield Specialisation(f"{name}_flagged-{suffix}", kernel, more, types, compiler, aligned)


_KERNELS = {
    "sample": sample_kernel,
    "guess": guess_kernel,
    "scan": scan_kernel,
    "score": score_kernel,
    "choose": choose_kernel,
    "gather": gather_kernel,
    "bounds": bounds_kernel,
}
_INTEGERS = (
    *("visible", "origin", "budget", "flags", "positions", "segment_positions", "counts", "page_counts", "listed"),
    *("ties_end", "attended"),
)
_FLOATS = (
    *("code_scale", "code_residual", "center", "spread", "samples", "guess", "scores", "errors", "outside"),
    *("segment_scores", "segment_errors", "threshold", "acc", "peak", "total", "kept", "kept_mass", "bounds"),
    *("sinks", "lse"),
)

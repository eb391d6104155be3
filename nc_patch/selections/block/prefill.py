"""``block`` over many rows, in three kernels; ``reference.block_mask`` defines what is attended.

1. Score: sampled rows of several query blocks fill a tile of matrix rows and run over all visible keys; a log-sum-exp
   for each key block is written, for a chunk of query blocks at a time: as many as ``SCORE_BYTES`` hold or, if more,
   as fill the GPU, within ``MOST_SCORE_BYTES``.
2. Choose: one program for a query block and key/value head turns them into masses and picks blocks by bisection.
3. Attend: flash attention over the chosen blocks, whose lists are what remains of the choice:
   ``4 * N * Hkv * M`` bytes for N query blocks of at most M key blocks.

Nothing of size Lq * Lk is stored. The device is read twice, for the number of query blocks and for what sizes memory
and grids.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from nc_patch.ops.triton.launch import (
    Tiles,
    architecture_of,
    check_inputs,
    compile_options,
    dense_last,
    launch_attention,
    multiprocessors,
    padded_dim,
)
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.selections.block.attend import attend_blocks_kernel, blank_rows_kernel
from nc_patch.selections.block.audit import BlockAudit
from nc_patch.selections.block.blocks import BlockChoice, Mark, no_mark, query_block_table
from nc_patch.selections.block.choose import choose_blocks_kernel
from nc_patch.selections.block.plan import BlockPlan, chunks_of, make_plan
from nc_patch.selections.block.score import score_blocks_kernel

# Scores of a chunk of query blocks: about what the second level cache of a large GPU holds. A chunk that gives the
# multiprocessors too few programs, of long prompts, takes more: half of what keys and values of 524,288 tokens take.
SCORE_BYTES, MOST_SCORE_BYTES = 64 * 2**20, 2**30
_CHOOSING = 4  # programs for each multiprocessor
# Keys that one program scores, about: enough to use what it loads of its queries, few enough to have programs.
_SEGMENT = 4096
_ROWS_AT_ONCE = 16
_BLOCKS_AT_ONCE = 256
_RANKS_AT_ONCE = 1024
_BLANK_ROWS = 32
_BLANK = Tiles(_BLANK_ROWS, 1, 4, 1)


@dataclass(frozen=True)
class BlockTiles:
    """Tile sizes of the kernels that score and that attend, and keys of a tile there that masks are applied to.

    Masks cost registers, and at the edges a tile is rarely full: so few keys.
    """

    score: Tiles
    attend: Tiles
    edge_keys: int


# float32 multiplies on the plain floating point units of NVIDIA GPUs and is summed in chunks of head_dim.
_FLOAT32 = {64: Tiles(32, 32, 4, 1, 32), 128: Tiles(32, 32, 8, 1, 32), 256: Tiles(16, 32, 8, 1, 32)}
_SCORE = {
    "sm_80": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
    "sm_90": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    "sm_100": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    "gfx942": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}
_ATTEND = {
    "sm_80": {64: Tiles(128, 64, 8, 3), 128: Tiles(64, 32, 8, 3), 256: Tiles(32, 32, 8, 1)},
    "sm_90": {64: Tiles(128, 64, 8, 4), 128: Tiles(128, 64, 8, 4), 256: Tiles(32, 32, 8, 1)},
    "sm_100": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 2)},
    "gfx942": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 32, 4, 2), 256: Tiles(64, 32, 4, 2)},
}


def block_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, block_size: int) -> BlockTiles:
    """The one place where tile sizes of block-sparse prefill are chosen; a tile that is scored holds whole blocks."""
    padded = max(64, padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        score = attend = _FLOAT32[padded]
    else:
        score, attend = _SCORE[architecture][max(64, padded_dim(head_dim))], _ATTEND[architecture][padded]
    if score.keys < block_size and padded == 256:
        # A wide block of wide keys leaves shared memory for one stage, and registers for fewer rows.
        score = replace(score, rows=32 if architecture == "sm_80" else 64, stages=1)
    # As many as fit the registers.
    edge_keys = 32 if dtype == torch.float32 or (padded <= 128 and architecture in ("sm_90", "gfx942")) else 16
    return BlockTiles(replace(score, keys=max(score.keys, block_size)), attend, edge_keys)


def triton_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    block_size: int,
    query_block_size: int,
    sample_stride: int,
    min_mass: float,
    max_factor: float,
    want_stats: bool,
    audit: BlockAudit | None = None,
    mark: Mark = no_mark,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over key blocks that a query block chooses by the dense softmax mass of its sampled rows.

    Args:
        query: ``[B, Hq, Lq, D]`` in bfloat16, float16 or float32. key: ``[B, Hkv, Lk, D]``. value:
            ``[B, Hkv, Lk, Dv]``. One dtype, D and Dv at most 256, any strides.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``, where each query's sequence begins; may be negative.
        budget: int32 ``[B, Hq or 1, Lq]``.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator, or None.
        scale: factor of the scores, positive. softcap: 0 for none.
        block_size: keys per block, 16, 32, 64 or 128. query_block_size, sample_stride: see ``BlockSettings``.
        min_mass: estimated kept mass up to which a query block takes more blocks than its budget has; 0 for never.
        max_factor: by which factor it may exceed the budget's count for it.
        want_stats: whether lse and kept mass are wanted; the kept mass costs as much as dense attention.
        audit: is made, where there is one.
        mark: for timing the steps, see ``blocks.Mark``; may be called several times for one.

    Returns:
        (output ``[B, Hq, Lq, Dv]``; lse and kept mass float32 ``[B, Hq, Lq]`` or empty; attended int32 ``[B, Hq,
        Lq]``; estimate float32 ``[Hq, 5]``, see ``blocks.ESTIMATE_COLUMNS``).

    Raises:
        TypeError, ValueError: a dtype or a shape that the kernels do not take.
        RuntimeError: a CUDA graph is being captured.
    """
    check_inputs(query, key, value, visible, budget, sinks)
    _check_settings(origin, visible, block_size)
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    device = query.device
    query, key, value = (dense_last(x) for x in (query, key, value))
    visible = dense_last(visible)
    sinks = None if sinks is None else sinks.contiguous()
    output = torch.empty(B, Hq, Lq, DV, dtype=query.dtype, device=device)
    lse = torch.empty((B, Hq, Lq) if want_stats else (0,), dtype=torch.float32, device=device)
    lse_keys, kept_mass = torch.empty_like(lse), torch.empty_like(lse)
    attended = torch.empty(B, Hq, Lq, dtype=torch.int32, device=device)
    plan = make_plan(
        visible, origin, budget, Hkv, block_size=block_size, query_block_size=query_block_size,
        sample_stride=sample_stride, min_mass=min_mass, max_factor=max_factor,
    )  # fmt: skip
    mark("plan")
    tiles = block_tiles(architecture_of(device), query.dtype, D, DV, block_size)
    expected = None if audit is None else torch.empty(len(plan.table), Hq, dtype=torch.float32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        block_indices, block_counts, estimate = choose_blocks(
            query, key, visible, plan, tiles.score, scale=scale, softcap=softcap, block_size=block_size,
            min_mass=min_mass, expected=expected, mark=mark,
        )  # fmt: skip
        if audit is not None and expected is not None:
            audit.make(
                query, key, visible, origin, query_block_table(visible, origin, query_block_size),
                BlockChoice(block_indices, block_counts), expected, block_size=block_size, scale=scale, softcap=softcap,
            )  # fmt: skip
            mark("choose")
        attend_blocks(
            query, key, value, visible, sinks, plan, block_indices, block_counts, tiles, output, lse, lse_keys,
            attended, scale=scale, softcap=softcap, block_size=block_size,
        )  # fmt: skip
    mark("attend")
    if want_stats:
        seen = (visible[..., 1].clamp(max=Lk) - visible[..., 0].clamp(min=0)).clamp(min=0).to(torch.int32)[:, None]
        _, dense, _ = launch_attention(
            *(query, key, value, visible, seen.contiguous(), None),
            by_score=False, scale=scale, softcap=softcap, sink_keys=0, recent_keys=0, want_stats=True,
        )  # fmt: skip
        kept_mass = torch.where(seen > 0, torch.exp(lse_keys - dense), 1.0)
    return output, lse, kept_mass, attended, estimate


def choose_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    plan: BlockPlan,
    tiles: Tiles,
    *,
    scale: float,
    softcap: float,
    block_size: int,
    min_mass: float,
    expected: torch.Tensor | None = None,
    mark: Mark = no_mark,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks that each query block attends, and what its sampled rows keep of their mass on them.

    Args:
        expected: float32 ``[N, Hq]``, is given the mean kept mass of each query block's sampled rows.

    Returns:
        (block_indices int32 ``[N, Hkv, M]`` and block_counts int32 ``[N, Hkv]``, see ``BlockChoice``; estimate
        ``[Hq, 5]``).
    """
    Hq, (Hkv, Lk) = query.shape[1], key.shape[1:3]
    device, group, (N, slots) = query.device, Hq // Hkv, plan.samples.shape
    architecture = architecture_of(device)
    block_indices = torch.full((N, Hkv, plan.capacity), -1, dtype=torch.int32, device=device)
    block_counts = torch.empty(N, Hkv, dtype=torch.int32, device=device)
    enlarged = torch.zeros(N, Hkv, dtype=torch.int32, device=device)
    kept = torch.empty(N, Hkv, slots, group, dtype=torch.float32, device=device)
    chunks = score_chunks(plan.widths, Hkv, slots * group, multiprocessors(device))
    most_scores = max((width * (last - first) for first, last, width in chunks), default=0)
    scores = torch.empty(most_scores * Hkv * slots * group, dtype=torch.float32, device=device)
    weights = torch.empty(most_scores * Hkv, dtype=torch.float32, device=device)
    masses = torch.empty_like(weights) if min_mass else weights
    most_blocks = max((last - first for first, last, _ in chunks), default=0)
    row_lse = torch.empty(most_blocks * Hkv * slots * group, dtype=torch.float32, device=device)
    strides = (*query.stride()[:3], *key.stride()[:3], *visible.stride()[:2])
    for first, last, width in chunks:
        row_count = (last - first) * slots * group
        segments = triton.cdiv(width * block_size, _SEGMENT)
        score_blocks_kernel[(triton.cdiv(row_count, tiles.rows), Hkv, segments)](
            *(query, key, visible, plan.table, plan.samples, scores, *strides),
            *(Hkv, group, Lk, slots, first, row_count, width, scale, softcap),
            **score_constants(query.shape[3], block_size, tiles, softcap > 0),
            **score_options(query.shape[3], tiles, architecture),
        )
        mark("score")
        choose_blocks_kernel[(last - first, Hkv)](
            *(plan.table, plan.samples, scores, plan.law, plan.limit, weights, masses, row_lse),
            *(block_indices, block_counts),
            *(kept, enlarged, Hkv, group, slots, first, row_count, width, plan.capacity, min_mass),
            **choose_constants(min_mass > 0),
            **choose_options(architecture),
        )
        mark("choose")
    estimate = _estimate(plan, kept, enlarged)
    if expected is not None:
        rows_of = (plan.samples >= 0).sum(-1)[:, None]
        expected.copy_(kept.sum(2).view(len(rows_of), -1) / rows_of)
    mark("choose")
    return block_indices, block_counts, estimate


def score_chunks(widths: list[int], kv_heads: int, rows: int, multiprocessors: int) -> list[tuple[int, int, int]]:
    """The query blocks that are scored and chosen for at once, see ``chunks_of``; ``rows`` are sampled, of one head.

    Their scores take at most ``MOST_SCORE_BYTES``, unless one query block's alone take more.
    """
    fewest = triton.cdiv(_CHOOSING * multiprocessors, kv_heads)
    return chunks_of(widths, 4 * kv_heads * rows, SCORE_BYTES, fewest, MOST_SCORE_BYTES)


def _estimate(plan: BlockPlan, kept: torch.Tensor, enlarged: torch.Tensor) -> torch.Tensor:
    """The estimate ``[Hq, 5]``; sums in a fixed order, so that it is the same every time."""
    N, Hkv, _, group = kept.shape
    rows = (plan.samples >= 0).sum()
    masses = kept.transpose(1, 2).reshape(-1, Hkv * group)
    estimate = masses.new_empty(Hkv * group, 5)
    estimate[:, 0] = rows
    estimate[:, 1] = masses.sum(0)
    estimate[:, 2] = masses.square().sum(0)
    estimate[:, 3] = N
    estimate[:, 4] = enlarged.sum(0).repeat_interleave(group)
    return estimate


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: BlockPlan,
    block_indices: torch.Tensor,
    block_counts: torch.Tensor,
    tiles: BlockTiles,
    output: torch.Tensor,
    lse: torch.Tensor,
    lse_keys: torch.Tensor,
    attended: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    block_size: int,
) -> None:
    """Attends the chosen blocks and writes the results, which are contiguous; both lse may be empty."""
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group, N = Hq // Hkv, plan.table.shape[0]
    architecture = architecture_of(query.device)
    if B * Lq * Hq * DV == 0:
        return
    logits = lse if sinks is None else sinks
    flags = {"HAS_SINKS": sinks is not None, "WANT_STATS": lse.numel() > 0}
    if N:
        row_tiles = triton.cdiv(plan.longest * group, tiles.attend.rows)
        attend_blocks_kernel[(N * Hkv * row_tiles,)](
            *(query, key, value, visible, plan.table, block_indices, block_counts, logits, output, lse, lse_keys),
            *(attended, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *visible.stride()[:2]),
            *(N, Hkv, group, Lq, Lk, block_indices.shape[2], row_tiles, scale, softcap),
            **attend_constants(D, DV, block_size, tiles, softcap > 0),
            **flags,
            **compile_options(tiles.attend, architecture),
        )
    blank_rows_kernel[(triton.cdiv(B * Lq, _BLANK_ROWS),)](
        *(visible, logits, output, lse, lse_keys, attended, *visible.stride()[:2], Hq, Lq, B * Lq),
        **blank_constants(DV),
        **flags,
        **compile_options(_BLANK, architecture),
    )


def score_constants(head_dim: int, block_size: int, tiles: Tiles, has_softcap: bool) -> dict[str, Any]:
    """The compile-time arguments of ``score_blocks_kernel``."""
    padded = padded_dim(head_dim)
    return {
        "D": head_dim,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": padded,
        "CHUNK_D": min(padded, tiles.chunk or padded),
        "BLOCK_SIZE": block_size,
        "HAS_SOFTCAP": has_softcap,
    }


def score_options(head_dim: int, tiles: Tiles, architecture: str) -> dict[str, Any]:
    """Options of the compiler for ``score_blocks_kernel``: on Hopper registers for two programs, where they suffice."""
    options = compile_options(tiles, architecture)
    if architecture == "sm_90" and tiles.keys <= 64 and padded_dim(head_dim) <= 128:
        options["maxnreg"] = 65536 // (2 * 32 * tiles.warps)
    return options


def choose_constants(has_min_mass: bool) -> dict[str, Any]:
    """The compile-time arguments of ``choose_blocks_kernel``."""
    sizes = {"BLOCK_R": _ROWS_AT_ONCE, "BLOCK_C": _BLOCKS_AT_ONCE, "BLOCK_P": _RANKS_AT_ONCE}
    return {**sizes, "HAS_MIN_MASS": has_min_mass}


def choose_options(architecture: str) -> dict[str, Any]:
    """Options of the compiler for ``choose_blocks_kernel``."""
    return compile_options(Tiles(_ROWS_AT_ONCE, _BLOCKS_AT_ONCE, 4, 1), architecture)


def attend_constants(
    head_dim: int, value_dim: int, block_size: int, tiles: BlockTiles, has_softcap: bool
) -> dict[str, Any]:
    """The compile-time arguments of ``attend_blocks_kernel``, but for ``HAS_SINKS`` and ``WANT_STATS``."""
    return {
        **score_constants(head_dim, block_size, tiles.attend, has_softcap),
        "DV": value_dim,
        "BLOCK_DV": padded_dim(value_dim),
        "EDGE_N": tiles.edge_keys,
    }


def blank_constants(value_dim: int) -> dict[str, Any]:
    """The compile-time arguments of ``blank_rows_kernel``, but for the same."""
    return {"DV": value_dim, "BLOCK_DV": padded_dim(value_dim), "BLOCK_R": _BLANK_ROWS}


def _check_settings(origin: torch.Tensor, visible: torch.Tensor, block_size: int) -> None:
    if origin.dtype != torch.int32 or origin.shape != visible.shape[:2]:
        raise ValueError(f"origin must be int32 {list(visible.shape[:2])}, got {origin.dtype} {list(origin.shape)}")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size must be 16, 32, 64 or 128, got {block_size}")


def specialisations(target: str) -> Iterator[Specialisation]:
    """Head dimensions, dtypes, block sizes and options of the kernels that score and attend; the others once each."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    everything = ("sinks", "softcap", "stats")
    for dtype, D, DV, block_size, options in (
        (bfloat16, 64, 64, 32, ()),
        (bfloat16, 64, 64, 16, everything),
        (bfloat16, 80, 80, 32, ()),
        (bfloat16, 128, 128, 16, ()),
        (bfloat16, 128, 128, 32, ()),
        (bfloat16, 128, 128, 64, ()),
        (bfloat16, 128, 128, 128, ()),
        (bfloat16, 128, 128, 32, everything),
        (bfloat16, 192, 128, 32, ()),
        (bfloat16, 256, 256, 32, everything),
        (bfloat16, 256, 256, 128, ()),
        (float16, 128, 128, 32, ()),
        (float32, 64, 64, 32, ()),
        (float32, 128, 128, 32, everything),
        (float32, 256, 256, 32, ()),
    ):
        tiles = block_tiles(target, dtype, D, DV, block_size)
        dims = f"d{D}" + ("" if DV == D else f"v{DV}")
        suffix = "-".join([DTYPE_NAMES[dtype], dims, f"k{block_size}", *options])
        softcap = "softcap" in options
        flags = {"HAS_SINKS": "sinks" in options, "WANT_STATS": "stats" in options}
        types = {
            **dict.fromkeys(("query", "key", "value", "output"), pointer_to(dtype)),
            **dict.fromkeys(("sinks", "scores", "lse", "lse_keys"), "*fp32"),
            **dict.fromkeys(("visible", "plan", "samples", "block_indices", "block_counts", "attended"), "*i32"),
            # Long caches need 64 bits between sequences.
            **dict.fromkeys(("stride_qb", "stride_kb", "stride_vb"), "i64"),
        }
        score = score_constants(D, block_size, tiles.score, softcap)
        attend = {**attend_constants(D, DV, block_size, tiles, softcap), **flags}
        for name, kernel, constants, compiler in (
            ("score_blocks", score_blocks_kernel, score, score_options(D, tiles.score, target)),
            ("attend_blocks", attend_blocks_kernel, attend, compile_options(tiles.attend, target)),
        ):
            yield Specialisation(f"{name}-{suffix}", kernel, constants, types, compiler, data_strides(kernel))
    types = {
        **dict.fromkeys(("scores", "weights", "masses", "row_lse", "kept"), "*fp32"),
        **dict.fromkeys(("plan", "samples", "law", "limit", "block_indices", "block_counts", "enlarged"), "*i32"),
        "min_mass": "fp32",
    }
    for has_min_mass in (False, True):
        name = "choose_blocks" + ("-min_mass" if has_min_mass else "")
        constants = choose_constants(has_min_mass)
        yield Specialisation(name, choose_blocks_kernel, constants, types, choose_options(target))
    types = {
        **dict.fromkeys(("visible", "attended"), "*i32"),
        **dict.fromkeys(("sinks", "lse", "lse_keys"), "*fp32"),
        "output": pointer_to(bfloat16),
    }
    constants = {**blank_constants(128), "HAS_SINKS": True, "WANT_STATS": True}
    yield Specialisation("blank_rows-bf16-d128", blank_rows_kernel, constants, types, compile_options(_BLANK, target))

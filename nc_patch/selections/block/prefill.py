"""``block`` over many rows, in three kernels; ``definition`` says what is attended.

1. Score: sampled rows of several query blocks fill a tile of matrix rows and run over all visible keys; a logit for
   each key block is written, for a chunk of query blocks at a time: see ``score_chunks``.
2. Choose: one program for a query block and key/value head turns them into shares and picks blocks by bisection.
3. Attend: flash attention over the chosen blocks, whose lists, int32, are what remains of the choice.

Nothing of size Lq * Lk is stored. The plan reads the device three times, once for all layers of a forward pass.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton import launch
from nc_patch.ops.triton.launch import Tiles
from nc_patch.ops.triton.structs import heads
from nc_patch.selections.block.audit import judged
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, BlockPlan, plan_of
from nc_patch.selections.block.prefill_kernels import (
    Plan,
    attend_blocks_kernel,
    choose_blocks_kernel,
    score_blocks_kernel,
)

# Scores of a chunk of query blocks: about what the second level cache of a large GPU holds. A chunk that gives the
# multiprocessors too few programs, of long prompts, takes more: half of what keys and values of 524,288 tokens take.
SCORE_BYTES, MOST_SCORE_BYTES = 64 * 2**20, 2**30
_CHOOSING = 4  # programs for each multiprocessor
# Keys that one program scores, about: enough to use what it loads of its queries, few enough to have programs.
_SEGMENT = 4096
_ROWS_AT_ONCE = 16
_BLOCKS_AT_ONCE = 128
_RANKS_AT_ONCE = 1024


class BlockTiles(NamedTuple):
    """Tile sizes of the kernels that score and that attend, and of the masked edges there: masks cost registers."""

    score: Tiles
    attend: Tiles
    edge_keys: int


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
    padded = max(64, launch.padded_dim(head_dim), launch.padded_dim(value_dim))
    if dtype == torch.float32:
        score = attend = launch.tiles_for(architecture, dtype, head_dim, value_dim, 1 << 20)
    else:
        score, attend = _SCORE[architecture][max(64, launch.padded_dim(head_dim))], _ATTEND[architecture][padded]
    if score.keys < block_size and padded == 256:
        # A wide block of wide keys leaves shared memory for one stage, and registers for fewer rows.
        score = replace(score, rows=32 if architecture in ("sm_80", "gfx942") else 64, stages=1)
    # As many as fit the registers.
    edge_keys = 32 if dtype == torch.float32 or (padded <= 128 and architecture in ("sm_90", "gfx942")) else 16
    return BlockTiles(replace(score, keys=max(score.keys, block_size)), attend, edge_keys)


def triton_block_attention(problem: Problem, options: BlockOptions) -> AttentionResult:
    """Attention over key blocks that a query block chooses by the dense softmax mass of its sampled rows.

    The kept mass costs as much as dense attention.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    problem = launch.prepared(problem)
    plan, device = plan_of(problem, options), problem.query.device
    tiles = block_tiles(launch.architecture_of(device), problem.query.dtype, *problem.head_dims, options.size)
    with launch.on_device(device):
        choice, expected = choose_blocks(problem, plan, tiles.score, options)
        result = attend_blocks(problem, plan, choice, tiles, options.size)
    return judged(result, problem, plan, options, choice, expected)


def choose_blocks(
    problem: Problem, plan: BlockPlan, tiles: Tiles, options: BlockOptions
) -> tuple[BlockChoice, torch.Tensor | None]:
    """The blocks that each query block attends, and what an audit compares with, None where there is to be none.

    That is the mean kept mass of each query block's sampled rows, float32 ``[N, Hq]``, 1 without any.
    """
    query, device, D = problem.query, problem.query.device, problem.query.shape[3]
    Hkv, group, S = problem.key.shape[1], problem.group, plan.samples.shape[0]
    architecture, indices = launch.architecture_of(device), plan.law.new_full((*plan.law.shape, plan.capacity), -1)
    choice = BlockChoice(indices, torch.empty_like(plan.law))
    chunks = score_chunks(plan, Hkv, group, launch.multiprocessors(device))
    segments = [max(1, triton.cdiv(chunk.width * options.size, _SEGMENT)) for chunk in chunks]
    blocks = max((chunk.width * (chunk.last - chunk.first) for chunk in chunks), default=0)
    scores = max((chunk.width * chunk.samples for chunk in chunks), default=0)
    sums = max((chunk.samples * of for chunk, of in zip(chunks, segments, strict=True)), default=0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    kept, aims = None if problem.audit_seed < 0 else floats(Hkv, S, group), options.min_mass is not None
    both = {
        "plan": Plan(plan.table, plan.samples, plan.sample_owner, plan.recent, plan.law, plan.limit),
        "scores": floats(scores * group * Hkv), "row_lse": floats(sums * group * Hkv), "group": group,
    }  # fmt: skip
    scored = {
        "query": heads(query), "key": heads(problem.key), "visible": problem.visible, "Lq": query.shape[2],
        "Lk": problem.key.shape[2], "settings": launch.settings_of(problem), "shape": launch.shape_of(D, D, tiles),
        "BLOCK_SIZE": options.size, "MASS": aims, **both, **score_options(D, tiles, architecture),
    }  # fmt: skip
    chosen = {
        "all_weights": floats(blocks * Hkv), "all_masses": floats(blocks * Hkv) if aims else None,
        "choice": choice, "kept": kept, "num_kv_heads": Hkv, "sample_count": S, "capacity": plan.capacity,
        "min_mass": options.min_mass, "BLOCK_R": _ROWS_AT_ONCE, "BLOCK_C": _BLOCKS_AT_ONCE, "BLOCK_P": _RANKS_AT_ONCE,
        **both, **launch.compile_options(Tiles(_ROWS_AT_ONCE, _BLOCKS_AT_ONCE, 4, 1), architecture),
    }  # fmt: skip
    for chunk, of in zip(chunks, segments, strict=True):
        rows = chunk.samples * group
        changing = {"first_sample": chunk.first_sample, "row_count": rows, "width": chunk.width}
        if rows:
            score_blocks_kernel[(triton.cdiv(rows, tiles.rows), Hkv, of)](**changing, **scored)
        pairs = (chunk.last - chunk.first, Hkv)
        choose_blocks_kernel[pairs](first_number=chunk.first, segments=of, **changing, **chosen)
    if kept is None:
        return choice, None
    lengths = plan.table[:, 9].long()
    kept.nan_to_num_(nan=0.0).clamp_(max=1.0)  # a row whose scores are not numbers counts as keeping nothing
    total = torch.segment_reduce(kept.transpose(0, 1).flatten(1), "sum", lengths=lengths, axis=0, unsafe=True)
    return choice, (total / lengths[:, None]).masked_fill_(lengths[:, None] == 0, 1.0)


class Chunk(NamedTuple):
    """Query blocks ``first:last`` whose scores are in memory together, and the key blocks of the one with most."""

    first: int
    last: int
    width: int
    first_sample: int
    samples: int


def score_chunks(plan: BlockPlan, kv_heads: int, group: int, multiprocessors: int) -> list[Chunk]:
    """The query blocks that are scored and chosen for at once.

    Their scores take at most ``SCORE_BYTES``, or ``MOST_SCORE_BYTES`` while there are too few query blocks to fill the
    GPU; one query block's alone may take more.
    """
    fewest = triton.cdiv(_CHOOSING * multiprocessors, kv_heads)
    chunks: list[Chunk] = []
    for number, block in enumerate(plan.listed):
        if chunks:
            chunk = chunks[-1]
            wider, more = max(chunk.width, block.width), chunk.samples + block.samples
            allowed = SCORE_BYTES if number + 1 - chunk.first > fewest else MOST_SCORE_BYTES
            if wider * more * group * kv_heads * 4 <= allowed:
                chunks[-1] = chunk._replace(last=number + 1, width=wider, samples=more)
                continue
        chunks.append(Chunk(number, number + 1, block.width, block.first_sample, block.samples))
    return chunks


def score_options(head_dim: int, tiles: Tiles, architecture: str) -> dict[str, Any]:
    """Options of the compiler for ``score_blocks_kernel``: on Hopper registers for two programs, where they suffice."""
    options = launch.compile_options(tiles, architecture)
    if architecture == "sm_90" and tiles.keys <= 64 and launch.padded_dim(head_dim) <= 128:
        options["maxnreg"] = 65536 // (2 * 32 * tiles.warps)
    return options


def attend_blocks(
    problem: Problem, plan: BlockPlan, choice: BlockChoice, tiles: BlockTiles, block_size: int
) -> AttentionResult:
    """Attention over the chosen blocks."""
    query, value = problem.query, problem.value
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    output, attended = query.new_empty(B, Hq, Lq, DV), problem.visible.new_empty(B, Hq, Lq)
    lse = lse_keys = None
    if problem.stats:
        lse, lse_keys = (torch.empty_like(attended, dtype=torch.float32) for _ in range(2))
    N, sizes = len(plan.listed), [block.last - block.first for block in plan.listed]
    if sum(sizes) < B * Lq:  # some rows see no key
        output.zero_()
        attended.zero_()
        if lse is not None and lse_keys is not None:
            lse_keys.fill_(-torch.inf)
            lse.copy_(lse_keys if problem.sinks is None else problem.sinks[:, None])
    if N and output.numel():
        row_tiles = triton.cdiv(max(sizes) * problem.group, tiles.attend.rows)
        attend_blocks_kernel[(N * Hkv * row_tiles,)](
            query=heads(query), key=heads(problem.key), value=heads(value), visible=problem.visible, table=plan.table,
            choice=choice, sinks=problem.sinks, output=output, lse=lse, lse_keys=lse_keys, attended=attended,
            query_blocks=N, num_kv_heads=Hkv, group=problem.group, Lq=Lq, Lk=Lk, row_tiles=row_tiles,
            capacity=choice.block_indices.shape[2], settings=launch.settings_of(problem), EDGE_N=tiles.edge_keys,
            BLOCK_SIZE=block_size, shape=launch.shape_of(D, DV, tiles.attend),
            **launch.compile_options(tiles.attend, launch.architecture_of(query.device)),
        )  # fmt: skip
    kept_mass = None if lse_keys is None else launch.kept_mass_of(problem, lse_keys)
    return AttentionResult(output, lse, kept_mass, attended)

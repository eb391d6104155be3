"""What the kernels of block-sparse prefill are told: query blocks, their sampled rows, and counts of key blocks."""

from typing import NamedTuple

import torch

from nc_patch.ops.problem import Problem
from nc_patch.selections.block.blocks import (
    BlockSettings,
    QueryBlocks,
    always_attended,
    block_of_rows,
    law_counts,
    query_block_table,
    sampled_rows,
)
from nc_patch.selections.block.prefill_choice import PLAN_COLUMNS


class BlockPlan(NamedTuple):
    """The query blocks of a call, N in all, as the kernels read them, and the sizes that the host needs.

    Attributes:
        table: int32 ``[N, 8]``; ``prefill_choice.QueryBlock`` names the columns.
        samples: int32 ``[N, slots]``, the sampled rows of Lq, ascending; -1 beyond a query block's last.
        law: int32 ``[N, Hkv]``, the blocks that the budget has. limit: int32 ``[N, Hkv]``, the most that may be taken.
        widths: visible key blocks of each query block.
        longest: the most rows that a query block has.
        capacity: the most blocks that a query block may attend.
        blocks: the query blocks themselves.
    """

    table: torch.Tensor
    samples: torch.Tensor
    law: torch.Tensor
    limit: torch.Tensor
    widths: list[int]
    longest: int
    capacity: int
    blocks: QueryBlocks


def make_plan(problem: Problem, settings: BlockSettings) -> BlockPlan:
    """The plan of a problem.

    Reads the device twice: for the number of query blocks, and for what it takes to size memory and grids.
    """
    visible, origin, num_kv_heads = problem.visible, problem.origin, problem.key.shape[1]
    B, Lq = visible.shape[:2]
    blocks = query_block_table(visible, origin, settings.query_block_size)
    N = blocks.first.shape[0]
    if N == 0:
        nothing = torch.zeros(0, int(PLAN_COLUMNS), dtype=torch.int32, device=visible.device)
        none = nothing.new_zeros(0, num_kv_heads)
        return BlockPlan(nothing, nothing.new_zeros(0, 1), none, none, [], 0, 1, blocks)
    owner = block_of_rows(blocks, B, Lq)
    law = law_counts(problem, blocks, owner, settings.block_size).contiguous()
    lowest, diagonal, highest = always_attended(blocks, visible, settings.block_size)
    width, before_diagonal = highest - lowest + 1, diagonal - lowest
    table = torch.zeros(N, int(PLAN_COLUMNS), dtype=torch.int32, device=visible.device)
    columns = (blocks.batch, blocks.first, blocks.last, blocks.begin, lowest, width, before_diagonal)
    for column, values in enumerate(columns):
        table[:, column] = values
    limit = law
    if settings.min_mass > 0.0:
        limit = (law.double() * settings.max_factor).ceil_().clamp_(max=2**31 - 1).to(torch.int32)

    sampled = sampled_rows(blocks, visible, origin, settings.sample_stride).flatten()
    so_far = sampled.cumsum(0)
    first = blocks.batch.long() * Lq + blocks.first
    missed = so_far[first] - sampled[first].long()
    counts = so_far[first + blocks.last - blocks.first - 1] - missed
    # The first block and those of the diagonal are taken whatever the budget has.
    always = (before_diagonal > 0).int() + width - before_diagonal
    most = torch.minimum(torch.maximum(limit, always[:, None]), width[:, None])
    sizes = torch.stack((counts.max(), (blocks.last - blocks.first).max().long(), most.max().long()))
    slots, longest, capacity, *widths = torch.cat((sizes, width.long())).tolist()

    owner = owner.flatten()
    place = owner * slots + so_far - 1 - missed[owner.clamp(min=0)]
    place = torch.where(sampled & (owner >= 0), place, N * slots)
    row = torch.arange(Lq, dtype=torch.int32, device=visible.device).repeat(B)
    samples = torch.full((N * slots + 1,), -1, dtype=torch.int32, device=visible.device)
    samples = samples.scatter_(0, place, row)[:-1].view(N, slots)
    return BlockPlan(table, samples, law, limit, widths, longest, capacity, blocks)


def chunks_of(
    widths: list[int], bytes_per_block: int, usual_bytes: int, fewest: int = 1, most_bytes: int = 0
) -> list[tuple[int, int, int]]:
    """Runs of query blocks whose scores are in memory together: (first, last, width of the widest).

    A query block's scores take ``bytes_per_block`` times the width of its run's widest. A run takes at most
    ``usual_bytes``, or ``most_bytes`` while it has no more than ``fewest`` query blocks; one alone may take more.
    """
    chunks = []
    first, widest = 0, 0
    for number, width in enumerate(widths):
        wider = max(widest, width)
        count = number + 1 - first
        allowed = usual_bytes if count > fewest else max(usual_bytes, most_bytes)
        if count > 1 and count * wider * bytes_per_block > allowed:
            chunks.append((first, number, widest))
            first, wider = number, width
        widest = wider
    if widths:
        chunks.append((first, len(widths), widest))
    return chunks

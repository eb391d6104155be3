"""What block-sparse prefill is made of, whatever computes it: query blocks, their sampled rows, and the chosen blocks.

Rows are queries. A query block is a run of rows of one sequence with the same ``position // query_block_size``, where a
row's position is ``end - 1 - origin``, its distance from the sequence's first token. Key blocks are counted from there
too: block ``j`` of a sequence that begins at ``begin`` holds the keys ``begin + j * block_size`` and the
``block_size - 1`` after it. So nothing depends on where a sequence lies in the buffer, nor on its neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nc_patch.ops.problem import Problem

BLOCK_SIZES = (16, 32, 64, 128)
# Columns of the estimate, float32 [Hq, 5], that every backend returns.
ESTIMATE_COLUMNS = ("rows", "kept_mass", "kept_mass_squared", "query_blocks", "enlarged")

# Is told the name of each step when it has been done, or on a GPU launched: "plan", "score", "choose" or "attend".
Mark = Callable[[str], None]


def no_mark(_: str) -> None:
    """The mark of who does not time the steps."""


@dataclass(frozen=True)
class BlockSettings:
    """How blocks are cut and chosen.

    Args:
        block_size: keys per block, 16, 32, 64 or 128.
        query_block_size: positions per query block, 64 or 128.
        sample_stride: every how many positions a row is scored, 4 to 64.
        min_mass: kept mass in (0, 1) below which a query block takes more blocks than its budget has; 0 for never.
        max_factor: by which factor it may exceed the budget's count for it, at least 1.
    """

    block_size: int = 32
    query_block_size: int = 64
    sample_stride: int = 16
    min_mass: float = 0.0
    max_factor: float = 4.0


class QueryBlocks(NamedTuple):
    """The query blocks of a call, N in all, in order of sequence and row; int32 ``[N]`` on the inputs' device.

    Attributes:
        batch: the sequence of the batch.
        first, last: its rows, ``first:last`` of Lq; each of them sees a key.
        low, high: the keys ``low:high`` that any of its rows sees.
        begin: key position of the sequence's first token; negative where a cache has dropped it.
    """

    batch: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    begin: torch.Tensor


class BlockChoice(NamedTuple):
    """The key blocks that each query block attends.

    Attributes:
        block_indices: int32 ``[N, Hkv, M]``, numbers of blocks counted from ``begin``, ascending; -1 beyond the count.
        block_counts: int32 ``[N, Hkv]``.
    """

    block_indices: torch.Tensor
    block_counts: torch.Tensor


def query_block_table(visible: torch.Tensor, origin: torch.Tensor, query_block_size: int) -> QueryBlocks:
    """The query blocks of rows with intervals ``visible`` int32 ``[B, Lq, 2]`` and ``origin`` int32 ``[B, Lq]``.

    Rows that see no key are in none. Reads the device once, for N.

    Raises:
        RuntimeError: a CUDA graph is being captured, which a read of the device would break.
    """
    if visible.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "block attention counts its query blocks on the host, which a CUDA graph cannot capture: capture decoding "
            'steps only, or prefill with selection "topk", "window" or "dense"'
        )
    Lq = visible.shape[1]
    start, end = visible[..., 0], visible[..., 1]
    number = torch.div(end - 1 - origin, query_block_size, rounding_mode="floor")
    occupied = end > start
    opens = occupied.clone()
    same = (number[:, 1:] == number[:, :-1]) & (origin[:, 1:] == origin[:, :-1])
    opens[:, 1:] &= ~(same & occupied[:, :-1])
    row = opens.flatten().nonzero()[:, 0]
    if row.shape[0] == 0:
        return QueryBlocks(*(torch.zeros(0, dtype=torch.int32, device=visible.device) for _ in range(6)))
    owner = (opens.flatten().cumsum(0) - 1).clamp_(min=0)
    flat = occupied.flatten()
    reduced = torch.zeros(3, row.shape[0], dtype=torch.int32, device=visible.device)
    reduced[0].scatter_add_(0, owner, flat.int())
    reduced[1].fill_(torch.iinfo(torch.int32).max)
    reduced[1].scatter_reduce_(0, owner, start.flatten().masked_fill(~flat, torch.iinfo(torch.int32).max), "amin")
    reduced[2].scatter_reduce_(0, owner, end.flatten().masked_fill(~flat, 0), "amax")
    first = (row % Lq).int()
    return QueryBlocks(
        (row // Lq).int(), first, first + reduced[0], reduced[1], reduced[2], origin.flatten()[row].int()
    )


def block_of_rows(table: QueryBlocks, batch_size: int, query_length: int) -> torch.Tensor:
    """Which query block each row belongs to, int64 ``[B, Lq]``; -1 for rows in none."""
    opens = torch.zeros(batch_size * query_length, dtype=torch.int64, device=table.first.device)
    opens[table.batch.long() * query_length + table.first] = 1
    owner = (opens.cumsum(0) - 1).view(batch_size, query_length)
    if table.first.shape[0] == 0:
        return owner
    row = torch.arange(query_length, device=owner.device)
    of = owner.clamp(min=0)
    batch = torch.arange(batch_size, device=owner.device)[:, None]
    inside = (owner >= 0) & (table.batch[of] == batch) & (row < table.last[of])
    return owner.masked_fill(~inside, -1)


def sampled_rows(table: QueryBlocks, visible: torch.Tensor, origin: torch.Tensor, sample_stride: int) -> torch.Tensor:
    """Which rows are scored, bool ``[B, Lq]``: of each query block the last row of every stride, and its last row."""
    position = visible[..., 1] - 1 - origin
    sampled = (position % sample_stride == sample_stride - 1) & (visible[..., 1] > visible[..., 0])
    sampled[table.batch.long(), table.last.long() - 1] = True
    return sampled


def law_counts(problem: Problem, table: QueryBlocks, owner: torch.Tensor, block_size: int) -> torch.Tensor:
    """How many blocks the budget has, int32 ``[N, Hkv]``: that of the largest among the block's rows and group's heads.

    Every block that any row sees, where all rows may attend all their keys: intervals begin and end within blocks.
    ``owner`` is as from ``block_of_rows``.
    """
    visible, budget, num_kv_heads = problem.visible, problem.budget, problem.key.shape[1]
    B, heads, Lq = budget.shape
    of_group = budget if heads == 1 else budget.reshape(B, num_kv_heads, -1, Lq).amax(2)
    N = table.first.shape[0]
    by_row = of_group.movedim(1, 2).reshape(B * Lq, -1)
    left_out = owner.view(-1, 1) < 0
    short = (by_row < (visible[..., 1] - visible[..., 0]).view(-1, 1)).int().masked_fill(left_out, 0)
    largest, fall_short = (torch.zeros(N, by_row.shape[1], dtype=torch.int32, device=budget.device) for _ in range(2))
    if N:
        at = owner.view(-1, 1).clamp(min=0).expand_as(by_row)
        largest.scatter_reduce_(0, at, by_row.masked_fill(left_out, 0), "amax")
        fall_short.scatter_reduce_(0, at, short, "amax")
        largest = torch.where(fall_short == 0, (table.high - table.low + 2 * block_size)[:, None], largest)
    return ((largest + block_size - 1) // block_size).expand(N, num_kv_heads)


def always_attended(
    table: QueryBlocks, visible: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of the blocks that need no choosing: (lowest, diagonal, highest), int32 ``[N]`` each, from ``begin``.

    Attended always are ``lowest``, the first block that holds a key some row sees, and ``diagonal`` to ``highest``, the
    blocks that hold the query block's own positions; ``diagonal`` may be ``lowest``.
    """
    floor = lambda x: torch.div(x - table.begin, block_size, rounding_mode="floor")  # noqa: E731
    lowest, highest = floor(table.low), floor(table.high - 1)
    own = floor(visible[table.batch.long(), table.first.long(), 1] - 1)
    return lowest, torch.maximum(own, lowest), highest

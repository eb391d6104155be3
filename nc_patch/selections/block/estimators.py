"""How key blocks are scored: for some rows of each query block, the share of their softmax that every key block holds.

Three estimators behind one signature. ``sampled`` scores real rows against every key, so that its shares are exact for
those rows. ``antidiagonal`` (XAttention, arXiv 2503.16428, section 2.1) scores strides of rows against strides of keys
by the sum of one antidiagonal, at the same cost. ``pooled`` scores the mean of a query block's rows against the mean of
each block's keys, at next to none.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nc_patch.ops.rows import Buffers, final_scores_, scores_of, split_scale
from nc_patch.selections.block.blocks import BlockSettings


class Chunk(NamedTuple):
    """Query blocks of one sequence that are scored together: R rows, K key blocks.

    Attributes:
        query: ``[Hq, R, D]``.
        key: float32 ``[Hkv, K * block_size, D]`` from the first key block on; zero where the buffer has no key.
        seen: int32 ``[R, 2]``, the rows' intervals, counted from the first column of ``key``.
        position: int32 ``[R]``, the rows' distance from the sequence's first token.
        owner: int64 ``[R]``, the row's query block, counted from the chunk's first; negative for rows in none.
        sampled: bool ``[R]``, as from ``blocks.sampled_rows``.
        query_blocks: how many they are.
    """

    query: torch.Tensor
    key: torch.Tensor
    seen: torch.Tensor
    position: torch.Tensor
    owner: torch.Tensor
    sampled: torch.Tensor
    query_blocks: int


class RowMass(NamedTuple):
    """Shares of S scored rows: mass float32 ``[Hq, S, K]``, and the query block of each row, owner int64 ``[S]``."""

    mass: torch.Tensor
    owner: torch.Tensor


Estimator = Callable[[Chunk, BlockSettings, float, float, Buffers], RowMass]


def sampled(chunk: Chunk, settings: BlockSettings, scale: float, softcap: float, buffers: Buffers) -> RowMass:
    """The true shares of the sampled rows."""
    rows = chunk.sampled.nonzero()[:, 0]
    before, after = split_scale(scale)
    scores = scores_of(chunk.query[:, rows].float() * before, chunk.key, buffers, "sampled")
    final_scores_(scores, after, softcap)
    return RowMass(_shares(scores, chunk.seen[rows], settings.block_size), chunk.owner[rows])


def antidiagonal(chunk: Chunk, settings: BlockSettings, scale: float, softcap: float, buffers: Buffers) -> RowMass:
    """Shares of strides of rows among strides of keys, by the mean of one antidiagonal of their scores."""
    stride, width = settings.sample_stride, chunk.key.shape[-1]
    rows = (chunk.owner >= 0).nonzero()[:, 0]
    owner, position = chunk.owner[rows], chunk.position[rows].long()
    # A stride of a query block: blocks need not follow each other where rows see arbitrary intervals.
    strides = settings.query_block_size // stride
    place = owner * strides + torch.div(position, stride, rounding_mode="floor") % strides
    grouped = chunk.query.new_zeros(
        chunk.query.shape[0], chunk.query_blocks * strides, stride, width, dtype=torch.float32
    )
    grouped[:, place, stride - 1 - position % stride] = chunk.query[:, rows].float()
    seen = chunk.seen[rows]
    limit = torch.iinfo(seen.dtype).max
    start = seen.new_full((grouped.shape[1],), limit).scatter_reduce(0, place, seen[:, 0], "amin")
    end = seen.new_zeros(grouped.shape[1]).scatter_reduce(0, place, seen[:, 1], "amax")
    used = (end > 0).nonzero()[:, 0]
    keys = chunk.key.unflatten(1, (-1, stride)).flatten(2)
    scores = scores_of(grouped[:, used].flatten(2), keys, buffers, "sampled")
    final_scores_(scores, scale / stride, softcap)
    touched = torch.stack((start[used] // stride, (end[used] + stride - 1) // stride), -1)
    return RowMass(_shares(scores, touched, settings.block_size // stride), used // strides)


def pooled(chunk: Chunk, settings: BlockSettings, scale: float, softcap: float, buffers: Buffers) -> RowMass:
    """Shares of the mean row of each query block among the blocks' mean keys."""
    rows = (chunk.owner >= 0).nonzero()[:, 0]
    owner, seen, n = chunk.owner[rows], chunk.seen[rows], chunk.query_blocks
    mean = chunk.query.new_zeros(chunk.query.shape[0], n, chunk.query.shape[-1], dtype=torch.float32)
    mean.index_add_(1, owner, chunk.query[:, rows].float())
    mean /= torch.bincount(owner, minlength=n)[:, None]
    limit = torch.iinfo(seen.dtype).max
    start = seen.new_full((n,), limit).scatter_reduce(0, owner, seen[:, 0], "amin")
    end = seen.new_zeros(n).scatter_reduce(0, owner, seen[:, 1], "amax")
    size = settings.block_size
    keys = chunk.key.unflatten(1, (-1, size)).mean(2)
    scores = final_scores_(scores_of(mean, keys, buffers, "sampled"), scale, softcap)
    first = torch.arange(keys.shape[1], device=seen.device) * size
    # How many keys of a block any row sees; of one that none sees the log is -inf.
    number = torch.minimum(end[:, None], first + size) - torch.maximum(start[:, None], first)
    shares = torch.softmax(scores.add_(number.clamp(min=0).float().log()), -1)
    return RowMass(shares, torch.arange(n, device=seen.device))


ESTIMATORS: dict[str, Estimator] = {"sampled": sampled, "antidiagonal": antidiagonal, "pooled": pooled}


def _shares(scores: torch.Tensor, seen: torch.Tensor, block_size: int) -> torch.Tensor:
    """Softmax of ``scores [H, S, N]`` within the intervals ``seen [S, 2]``, summed over blocks of columns.

    Overwrites the scores.
    """
    clear_from, clear_to = int(seen[:, 0].max()), int(seen[:, 1].min())
    columns = torch.arange(scores.shape[-1], device=scores.device)
    # Most columns are seen by every row: only the two ends need a mask.
    ends = ((0, clear_from), (clear_to, scores.shape[-1])) if clear_from < clear_to else ((0, scores.shape[-1]),)
    for first, last in ends:
        if first < last:
            column = columns[first:last]
            hidden = (column < seen[:, :1]) | (column >= seen[:, 1:])
            scores[..., first:last].masked_fill_(hidden, -torch.inf)
    torch.softmax(scores, -1, out=scores)
    ones = scores.new_ones(block_size, 1)
    return (scores.view(-1, block_size) @ ones).view(*scores.shape[:2], -1)

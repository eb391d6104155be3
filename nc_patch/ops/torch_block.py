"""``block`` attention in PyTorch: sampled query rows choose the key blocks that a whole query block attends."""

import itertools
from typing import NamedTuple

import torch

from nc_patch.ops.torch_rows import (
    Buffers,
    RowBlock,
    RowStats,
    final_scores_,
    hide_unseen_,
    scores_of,
    softmax_,
    split_scale,
    weighted_values,
)

QUERY_BLOCK_SIZE = 64
SAMPLE_STRIDE = 16


class _Chosen(NamedTuple):
    """Key positions int64 ``[Hkv, C]`` of the chosen blocks, and which of them exist, bool ``[Hkv, C]``."""

    position: torch.Tensor
    exists: torch.Tensor


def torch_block_attention(
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
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over key blocks that a query block shares, as ``reference_attention`` defines ``"block"``.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]``.
        scale: factor of the scores. softcap: 0 for none. block_size: keys per block.
        want_stats: whether lse and kept mass are wanted; the kept mass costs as much as dense attention.

    Returns:
        (output ``[B, Hq, Lq, Dv]``, lse and kept mass float32 ``[B, Hq, Lq]`` or empty, attended int32 ``[B, Hq,
        Lq]``).
    """
    B, Hq, Lq, _ = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    attended_keys = torch.zeros(B, Hq, Lq, dtype=torch.int32, device=query.device)
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    before, after = split_scale(scale)
    buffers = Buffers(Hq * min(QUERY_BLOCK_SIZE, Lq) * (Lk + 2 * block_size), query.device)
    loaded = -1
    for block in query_blocks(visible, origin):
        b = block.batch
        if b != loaded:
            keys, values, loaded = key[b].float(), value[b].float(), b
        seen = visible[b, block.rows]
        begin = int(origin[b, block.first])
        rows_query = query[b, :, block.rows].float() * before

        sampled = sampled_rows(seen, begin)
        mass = scores_of(rows_query[:, sampled], keys[:, block.low : block.high], buffers)
        chosen = _choose(
            final_scores_(mass, after, softcap), seen, sampled, budget[b, :, block.rows], block, begin, block_size, Hkv
        )

        position = chosen.position.clamp(0, Lk - 1)
        index = torch.arange(Hkv, device=query.device)[:, None]
        scores = final_scores_(scores_of(rows_query, keys[index, position], buffers), after, softcap)
        attends = (chosen.position[:, None] >= seen[:, :1]) & (chosen.position[:, None] < seen[:, 1:])
        attends &= chosen.exists[:, None]
        grouped = scores.view(Hkv, -1, len(seen), scores.shape[-1])
        for columns in _partly_hidden(attends):
            grouped[..., columns].masked_fill_(~attends[:, None, :, columns], -torch.inf)
        attended_keys[b, :, block.rows] = attends.sum(-1, dtype=torch.int32).repeat_interleave(Hq // Hkv, 0)
        if want_stats:
            kept = torch.logsumexp(scores, -1)
            every = scores_of(rows_query, keys[:, block.low : block.high], buffers, "dense")
            every = hide_unseen_(
                final_scores_(every, after, softcap), seen, torch.arange(block.low, block.high, device=seen.device)
            )
            stats.record(block, kept, torch.logsumexp(every, -1), seen[:, 1] <= seen[:, 0])
        weights = softmax_(scores, None if logits is None else logits[:, None])
        output[b, :, block.rows] = weighted_values(weights, values[index, position]).to(output.dtype)
    return output, stats.lse, stats.kept_mass, attended_keys


def query_blocks(visible: torch.Tensor, origin: torch.Tensor) -> list[RowBlock]:
    """Runs of rows that share a query block: same sequence, same ``position // QUERY_BLOCK_SIZE``, none empty."""
    start, end = visible[..., 0].long(), visible[..., 1].long()
    number = torch.div(end - 1 - origin, QUERY_BLOCK_SIZE, rounding_mode="floor")
    changes = torch.ones_like(start, dtype=torch.bool)
    empty = end <= start
    changes[:, 1:] = (
        (number[:, 1:] != number[:, :-1]) | (origin[:, 1:] != origin[:, :-1]) | (empty[:, 1:] != empty[:, :-1])
    )
    blocks = []
    for b, (changed, is_empty) in enumerate(zip(changes, empty, strict=True)):
        edges = [*changed.nonzero()[:, 0].tolist(), changes.shape[1]]
        nothing = is_empty.tolist()
        for first, last in itertools.pairwise(edges):
            if not nothing[first]:
                low, high = int(start[b, first:last].min()), int(end[b, first:last].max())
                blocks.append(RowBlock(b, first, last, low, high))
    return blocks


def sampled_rows(seen: torch.Tensor, begin: int) -> torch.Tensor:
    """Which rows of a query block are scored, bool ``[R]``: the last of each ``SAMPLE_STRIDE`` and the block's last."""
    sampled = (seen[:, 1].long() - 1 - begin) % SAMPLE_STRIDE == SAMPLE_STRIDE - 1
    sampled[-1] = True
    return sampled


def keep_blocks_(
    raw: torch.Tensor,
    seen: torch.Tensor,
    budget: torch.Tensor,
    begin: int,
    block: RowBlock,
    num_kv_heads: int,
    *,
    factor: float,
    softcap: float,
    block_size: int,
) -> torch.Tensor:
    """Makes the scores of keys outside the chosen blocks -inf, in place; returns the shift of the others, zero.

    Arguments as in ``keep_topk_``; ``begin`` is the key position of the sequence's first token.
    """
    sampled = sampled_rows(seen, begin)
    scores = final_scores_(raw[:, sampled].clone(), factor, softcap)
    chosen = _choose(scores, seen, sampled, budget, block, begin, block_size, num_kv_heads)
    inside = chosen.exists & (chosen.position >= block.low) & (chosen.position < block.high)
    attended = torch.zeros(num_kv_heads, raw.shape[-1] + 1, dtype=torch.bool, device=raw.device)
    attended.scatter_(1, torch.where(inside, chosen.position - block.low, raw.shape[-1]), True)
    hidden = ~attended[:, None, None, :-1]
    raw.view(num_kv_heads, -1, *raw.shape[1:]).masked_fill_(hidden, -torch.inf)
    hide_unseen_(raw, seen, torch.arange(block.low, block.high, device=raw.device))
    return raw.new_zeros(1, raw.shape[1])


def _choose(
    scores: torch.Tensor,
    seen: torch.Tensor,
    sampled: torch.Tensor,
    budget: torch.Tensor,
    block: RowBlock,
    begin: int,
    block_size: int,
    num_kv_heads: int,
) -> _Chosen:
    """The first block, the blocks that hold the query block, and the heaviest of the others, as many as the budget has.

    Args:
        scores: final scores float32 ``[Hq, S, N]`` of the sampled rows against ``block.low:block.high``; overwritten.
        seen: int32 ``[R, 2]``. sampled: bool ``[R]`` with S true. budget: int32 ``[Hq or 1, R]``.
        begin: key position of the sequence's first token.
    """
    mass = softmax_(
        hide_unseen_(scores, seen[sampled], torch.arange(block.low, block.high, device=scores.device)), None
    )
    mass = mass.view(num_kv_heads, -1, mass.shape[-1]).sum(1)
    count = -(-budget.expand(scores.shape[0], -1).reshape(num_kv_heads, -1).amax(-1) // block_size)
    first_offset = int(seen[0, 1]) - 1 - begin
    lowest, highest = (block.low - begin) // block_size, (block.high - 1 - begin) // block_size
    blocks = highest - lowest + 1
    lead = block.low - (begin + lowest * block_size)
    padded = mass.new_zeros(mass.shape[0], blocks * block_size)
    padded[:, lead : lead + mass.shape[1]] = mass
    per_block = padded.view(-1, blocks, block_size).sum(-1).nan_to_num_(nan=torch.inf)
    diagonal = max(first_offset // block_size - lowest, 0)
    per_block[:, 0] = torch.inf
    per_block[:, diagonal:] = torch.inf
    always = len({0, *range(diagonal, blocks)})
    most = min(blocks, max(always, int(count.max())))
    order = torch.sort(per_block, dim=-1, descending=True, stable=True).indices[:, :most]
    rank = torch.arange(most, device=mass.device)
    exists = rank < count.clamp(min=always)[:, None]
    # In order of position, what does not exist last: hidden columns then lie at the two ends.
    order, place = torch.where(exists, order, blocks).sort(-1)
    exists = exists.gather(-1, place)
    within = torch.arange(block_size, device=mass.device)
    position = (begin + (lowest + order)[..., None] * block_size + within).flatten(1)
    return _Chosen(position, exists.repeat_interleave(block_size, -1))


def _partly_hidden(attends: torch.Tensor) -> tuple[slice, slice]:
    """The columns of bool ``[Hkv, R, C]`` before and after the run that every row attends."""
    clear = attends.all(1).all(0)
    last = clear.shape[0]
    if not bool(clear.any()):
        return slice(0, last), slice(last, last)
    first = int(clear.int().argmax())
    after = clear[first:].logical_not()
    stop = first + int(after.int().argmax()) if bool(after.any()) else last
    return slice(0, first), slice(stop, last)

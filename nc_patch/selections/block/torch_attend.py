"""Attention of query blocks over the key blocks chosen for them, in PyTorch.

A query block and a key/value head are a unit: G * rows queries against one run of gathered keys. Units with like
numbers of key blocks are attended together, so that matrix products are large and hardly any of them is padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from nc_patch.ops import rows as torch_rows
from nc_patch.ops.problem import Problem
from nc_patch.ops.rows import final_scores_, softmax_, split_scale, weighted_values
from nc_patch.selections.block import blocks
from nc_patch.selections.block.blocks import BlockChoice, BlockPlan


class BlockOutput(NamedTuple):
    """What the chosen blocks give.

    Attributes:
        output: ``[B, Hq, Lq, Dv]`` in query's dtype, zero for rows that see no key.
        lse: float32 ``[B, Hq, Lq]``, log-sum-exp over the attended keys without the sinks, -inf where there are none;
            or empty.
        attended: int32 ``[B, Hq, Lq]``, the number of keys attended.
    """

    output: torch.Tensor
    lse: torch.Tensor
    attended: torch.Tensor


class _Units(NamedTuple):
    """U units attended together; all int64. Rows and keys beyond a unit's own repeat its last or point anywhere.

    Attributes:
        batch, head: ``[U]``, sequence and key/value head.
        row: ``[U, R]``. real_row: bool ``[U, R]``.
        start: key position of each block, ``[U, M]``. exists: bool ``[U, M]``.
        seen: ``[U, R, 2]``, intervals of the rows.
    """

    batch: torch.Tensor
    head: torch.Tensor
    row: torch.Tensor
    real_row: torch.Tensor
    start: torch.Tensor
    exists: torch.Tensor
    seen: torch.Tensor


def attend_blocks(problem: Problem, plan: BlockPlan, choice: BlockChoice, block_size: int) -> BlockOutput:
    """Every row attends the keys it sees among the blocks chosen for its query block."""
    query, key, value, sinks = problem.query, problem.key, problem.value, problem.sinks
    want_lse, (B, Hq, Lq, D) = problem.stats, query.shape
    Hkv, Lk, Dv = key.shape[1], key.shape[2], value.shape[-1]
    group = problem.group
    output = query.new_zeros(B * Hq * Lq, Dv)
    lse = torch.full((B * Hq * Lq if want_lse else 0,), -torch.inf, dtype=torch.float32, device=query.device)
    attended = torch.zeros(B * Hq * Lq, dtype=torch.int32, device=query.device)
    before, after = split_scale(problem.scale)
    queries = (query.float() * before).reshape(-1, D)
    keys, values = key.float().reshape(-1, D), value.float().reshape(-1, Dv)
    logits = None if sinks is None else sinks.float().view(Hkv, group)
    buffers = torch_rows.Buffers(0, query.device)
    head_of_group, within = torch.arange(group, device=query.device), torch.arange(block_size, device=query.device)
    left = torch.ones(len(plan.listed), dtype=torch.bool, device=query.device)
    if not (want_lse or problem.softcap or sinks is not None):
        for b, numbers, rows in _causal_runs(problem, plan):
            low = plan.listed[numbers.start].low
            run = slice(low, low + rows.stop - rows.start)
            queries_here, keys_here, values_here = (
                tensor[b : b + 1, :, seen].float() for tensor, seen in ((query, rows), (key, run), (value, run))
            )
            found = torch.nn.functional.scaled_dot_product_attention(
                queries_here, keys_here, values_here, scale=problem.scale, is_causal=True, enable_gqa=True
            )
            if bool(found.isfinite().all()):  # else what is not finite has to stay where it is attended
                output.view(B, Hq, Lq, Dv)[b, :, rows] = found[0].to(output.dtype)
                attended.view(B, Hq, Lq)[b, :, rows] = torch.arange(1, found.shape[2] + 1, device=query.device).int()
                left[numbers] = False
    for units in _units(plan, choice, problem.visible, block_size, group, left):
        (U, R), M = units.row.shape, units.start.shape[1]
        head = units.head[:, None] * group + head_of_group
        place = ((units.batch[:, None] * Hq + head)[..., None] * Lq + units.row[:, None]).flatten()
        position = (units.start[..., None] + within).clamp(0, Lk - 1).flatten(1)
        source = ((units.batch * Hkv + units.head)[:, None] * Lk + position).flatten()
        scores = torch.bmm(
            queries.index_select(0, place).view(U, group * R, D),
            keys.index_select(0, source).view(U, -1, D).transpose(1, 2),
            out=buffers.get("scores", (U, group * R, M * block_size)),
        )
        scores = final_scores_(scores, after, problem.softcap).view(U, group, R, -1)
        _hide_unseen_(scores, units, block_size)
        if want_lse:
            of_units = torch.logsumexp(scores, -1)
        sink = None if logits is None else logits[units.head].flatten()[:, None].expand(-1, R)
        weights = softmax_(scores.view(U * group, R, -1), sink)
        found = weighted_values(weights, values.index_select(0, source).view(U, -1, Dv)).view(-1, Dv)
        count = _attended(units, block_size)[:, None].expand(-1, group, -1).flatten()
        # A row whose interval ends before the others' may find none of its keys among the chosen blocks.
        found.masked_fill_((count == 0)[:, None], 0.0)
        real = units.real_row[:, None].expand(-1, group, -1).flatten()
        if not bool(real.all()):
            place, found, count = place[real], found[real], count[real]
        output.index_copy_(0, place, found.to(output.dtype))
        attended.index_copy_(0, place, count)
        if want_lse:
            lse.index_copy_(0, place, of_units.flatten() if place.shape == real.shape else of_units.flatten()[real])
    shape = (B, Hq, Lq)
    return BlockOutput(output.view(*shape, Dv), lse.view(shape) if want_lse else lse, attended.view(shape))


def _causal_runs(problem: Problem, plan: BlockPlan) -> Iterator[tuple[int, slice, slice]]:
    """Where a sequence begins with query blocks that attend all keys: (its row of the batch, which blocks, which rows).

    In such a run every query sees one key more than the one before it, as PyTorch's own causal attention has it.
    """
    listed, first = plan.listed, 0
    while first < len(listed):
        block, stop = listed[first], first
        run = (block.batch, block.begin, 0)
        while stop < len(listed) and (listed[stop].batch, listed[stop].begin, listed[stop].samples) == run:
            stop += 1
        if stop > first and block.low == block.begin:
            rows = slice(block.first, listed[stop - 1].last)
            seen = problem.visible[block.batch, rows]
            ends = torch.arange(block.low + 1, block.low + 1 + len(seen), device=seen.device)
            if bool(((seen[:, 0] == block.low) & (seen[:, 1] == ends)).all()):
                yield block.batch, slice(first, stop), rows
        first = max(stop, first + 1)


def _units(
    plan: BlockPlan, choice: BlockChoice, visible: torch.Tensor, block_size: int, group: int, left: torch.Tensor
) -> Iterator[_Units]:
    """The units of the query blocks that are ``left``, in batches of like counts, within a block's memory."""
    table, (N, Hkv) = plan.blocks, choice.block_counts.shape
    counts = choice.block_counts.flatten()
    rows = (table.last - table.first).repeat_interleave(Hkv)
    order = torch.sort(counts.long() * (int(rows.max()) + 1 if N else 1) + rows, stable=True).indices
    order = order[left[order // Hkv]]
    counts, rows = counts[order], rows[order]
    listed_counts, listed_rows = counts.tolist(), rows.tolist()
    first = 0
    while first < len(listed_counts):
        most_rows, last = listed_rows[first], first + 1
        while last < len(listed_counts):
            most_rows = max(most_rows, listed_rows[last])
            elements = (last + 1 - first) * group * most_rows * listed_counts[last] * block_size
            if elements > blocks.SCORES_AT_ONCE:
                break
            last += 1
        most_rows = max(listed_rows[first:last])
        unit = order[first:last]
        block, head = unit // Hkv, unit % Hkv
        batch, lengths = table.batch[block].long(), rows[first:last, None]
        offset = torch.arange(most_rows, device=unit.device)
        row = table.first[block].long()[:, None] + torch.minimum(offset, lengths - 1)
        indices = choice.block_indices[block, head, : listed_counts[last - 1]].long()
        exists = torch.arange(indices.shape[1], device=unit.device) < counts[first:last, None]
        start = table.begin[block].long()[:, None] + indices * block_size
        seen = visible[batch[:, None], row].long()
        yield _Units(batch, head, row, offset < lengths, start, exists, seen)
        first = last


def _hide_unseen_(scores: torch.Tensor, units: _Units, block_size: int) -> None:
    """Makes scores ``[U, G, R, M * block_size]`` of padding and of keys that a row does not see -inf, in place."""
    start, seen = units.start, units.seen
    clear = units.exists & (start >= seen[..., 0].amax(1)[:, None])
    clear &= start + block_size <= seen[..., 1].amin(1)[:, None]
    # Blocks ascend, so that those which every row sees whole are one run; only the two ends need a mask.
    whole = clear.all(0).tolist()
    first = whole.index(True) if True in whole else len(whole)
    last = len(whole) - whole[::-1].index(True) if True in whole else first
    within = torch.arange(block_size, device=scores.device)
    for ends in (slice(0, first), slice(last, len(whole))):
        if ends.start == ends.stop:
            continue
        position = (start[:, ends, None] + within).flatten(1)[:, None]
        hidden = (position < seen[..., :1]) | (position >= seen[..., 1:])
        hidden |= ~units.exists[:, ends].repeat_interleave(block_size, 1)[:, None]
        columns = slice(ends.start * block_size, ends.stop * block_size)
        scores[..., columns].masked_fill_(hidden[:, None], -torch.inf)


def _attended(units: _Units, block_size: int) -> torch.Tensor:
    """How many keys each row attends, int32 ``[U, R]``."""
    start = units.start[:, None]
    overlap = torch.minimum(start + block_size, units.seen[..., 1:]) - torch.maximum(start, units.seen[..., :1])
    return (overlap.clamp_(min=0) * units.exists[:, None]).sum(-1, dtype=torch.int32)

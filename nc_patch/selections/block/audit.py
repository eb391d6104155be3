"""An audit of prefill by blocks: some rows, drawn at random, whose kept mass is computed from all of their scores.

The rows that chose the blocks keep more of their mass than the others, so that their mean is too high. Audited rows
have had no say (but by chance), each row of a sequence is as likely to be one as any other, and so what they keep tells
without bias by how much the mean of those that chose is off. In the words of survey sampling this is a difference
estimator under stratified sampling: from each of ``a`` equal runs of a sequence's rows one is drawn, and what it keeps
is compared with what the scored rows of its query block keep on average, which is known for all blocks.
"""

import torch

from nc_patch.ops.problem import Problem
from nc_patch.ops.rows import final_scores_, hide_unseen_, rows_per_block, scores_of
from nc_patch.selections.block.blocks import BlockChoice, BlockPlan

# Columns of an audit, float32 [Hq + 1, 5]: how many rows there are, an estimate of the sum of their kept mass with its
# variance and degrees of freedom, and how many were audited. The last line is of all heads together, whose estimates
# come from the same rows, and err together.
AUDIT_COLUMNS = ("rows", "kept_mass", "variance", "freedom", "audited")

# One row of so many is audited, within limits: few rows say little, and more than enough cost for nothing.
_ROWS_PER_AUDITED = 256
_FEWEST, _MOST = 8, 16


def audited_rows(query_length: int) -> int:
    """How many rows of a sequence are audited; of a few rows some more than once."""
    return min(max(query_length // _ROWS_PER_AUDITED, _FEWEST), _MOST)


def expected_of(problem: Problem, query_blocks: int) -> torch.Tensor | None:
    """Memory for what an audit compares with, float32 ``[N, Hq]``; None where there is to be none."""
    if problem.audit_seed < 0:
        return None
    return problem.query.new_empty(query_blocks, problem.query.shape[1], dtype=torch.float32)


def enlarged_of(added: torch.Tensor, group: int) -> torch.Tensor:
    """How many query blocks each head has, and in how many blocks were ``added`` int32 ``[N, Hkv]``: ``[Hq, 2]``."""
    more = (added > 0).sum(0).repeat_interleave(group)
    return torch.stack((torch.full_like(more, len(added)), more), -1).float()


def audit(
    problem: Problem, plan: BlockPlan, choice: BlockChoice, expected: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The audit of a choice for N query blocks, float32 ``[Hq + 1, 5]``, columns ``AUDIT_COLUMNS``.

    Its rows are drawn by ``problem.audit_seed``; the global random state is left alone. Does not read the device.

    Args:
        expected: float32 ``[N, Hq]``, the mean kept mass of each query block's scored rows.
    """
    query, key, visible, origin = problem.query, problem.key, problem.visible, problem.origin
    B, Hq, Lq, _ = query.shape
    count, device = audited_rows(Lq), query.device
    result = torch.zeros(Hq + 1, len(AUDIT_COLUMNS), dtype=torch.float32, device=device)
    if expected.shape[0] == 0:
        return result
    owner = plan.owner
    occupied = owner >= 0
    rows = occupied.sum(-1)
    drawn = _draw(occupied, rows, count, problem.audit_seed)
    number = owner.gather(1, drawn).clamp(min=0)
    kept = torch.empty(B, Hq, count, dtype=torch.float32, device=device)
    step = rows_per_block(Hq, key.shape[2])
    for b in range(B):
        keys = key[b].float()
        for some in (slice(first, first + step) for first in range(0, count, step)):
            row, chosen = drawn[b, some], BlockChoice(*(each[number[b, some]] for each in choice))
            weights = _weights(problem, query[b, :, row], keys, visible[b, row])
            kept[b, :, some] = _kept_mass(weights, origin[b, row], chosen, block_size)
    difference = kept - expected.T[:, number].transpose(0, 1)  # [B, Hq, count]
    spread = difference.var(-1)
    # Of a head that rarely drops much, few rows may show none of it: half of what other heads show counts too.
    spread = torch.maximum(spread, (spread + spread.mean(1, keepdim=True)) / 2)
    spread = torch.cat((spread, difference.sum(1).var(-1)[:, None]), 1)  # [B, Hq + 1]
    known = (expected.T[:, owner.clamp(min=0).flatten()] * occupied.flatten()).sum(-1)
    estimate = known + (rows[:, None] * difference.mean(-1)).sum(0)
    drawn_of = (rows > 0).sum() * count
    result[:, 0], result[:, 4] = rows.sum(), drawn_of
    result[-1, ::4] *= Hq
    result[:-1, 1], result[-1, 1] = estimate, estimate.sum()
    result[:, 2] = (rows[:, None].float().square() * spread / count).sum(0)
    result[:, 3] = drawn_of - (rows > 0).sum()
    return result


def _draw(occupied: torch.Tensor, rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """One row from each of ``count`` equal runs of the ``rows [B]`` rows that see a key, int64 ``[B, count]``."""
    device, generator = occupied.device, torch.Generator().manual_seed(seed)
    # Pinned, so that the host does not wait for the copy; PyTorch keeps such memory until the copy is done.
    share = torch.rand(
        occupied.shape[0], count, dtype=torch.float32, generator=generator, pin_memory=device.type == "cuda"
    )
    share = share.to(device, non_blocking=True)
    wanted = (torch.arange(count, device=device) + share) / count * rows[:, None]
    wanted = torch.minimum(wanted.long(), (rows[:, None] - 1).clamp(min=0)) + 1
    found = torch.searchsorted(occupied.long().cumsum(-1), wanted)
    return found.clamp(max=occupied.shape[1] - 1)


def _weights(problem: Problem, query: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The softmax ``[Hq, a, Lk]`` of the rows ``query [Hq, a, D]`` of a sequence over its ``keys``, in float32."""
    scores = final_scores_(scores_of(query.float(), keys), problem.scale, problem.softcap)
    position = torch.arange(keys.shape[1], device=keys.device, dtype=torch.int32)
    return torch.softmax(hide_unseen_(scores, seen, position), -1, out=scores)


def _kept_mass(weights: torch.Tensor, begin: torch.Tensor, choice: BlockChoice, block_size: int) -> torch.Tensor:
    """What rows of ``weights [Hq, a, Lk]`` keep of the blocks chosen for each, counted from ``begin [a]``."""
    Hq, a, Lk = weights.shape
    (indices, counts), width = choice, -(-Lk // block_size) + 1
    position = torch.arange(Lk, device=weights.device, dtype=torch.int32)
    # Blocks are counted here from the one that holds the first of the buffer's keys.
    of_key = torch.div(position - begin[:, None], block_size, rounding_mode="floor")
    exists = torch.arange(indices.shape[-1], device=weights.device) < counts[..., None]
    place = torch.where(exists, indices - of_key[:, None, :1], width).clamp(0, width).long()
    chosen = weights.new_zeros(*counts.shape, width + 1).scatter_(-1, place, 1.0)
    attended = chosen.gather(-1, (of_key - of_key[:, :1]).long()[:, None].expand(-1, counts.shape[1], -1))
    shares = weights.view(counts.shape[1], -1, a, Lk) * attended.transpose(0, 1)[:, None]
    # A row whose scores are not numbers counts as keeping nothing, as among those that choose.
    return shares.sum(-1).nan_to_num(nan=0.0).clamp(max=1.0).view(Hq, a)

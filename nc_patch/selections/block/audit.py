"""An audit of prefill by blocks: some rows, drawn at random, whose kept mass is computed from all of their scores.

The rows that chose the blocks keep more of their mass than the others, so that their mean is too high. Audited rows
have had no say (but by chance), and so what they keep tells without bias by how much that mean is off: in survey
sampling, a difference estimator under stratified sampling. From each of ``a`` equal runs of a sequence's rows one is
drawn, and what it keeps is compared with what the scored rows of its query block keep on average.
"""

import torch

from nc_patch.ops.problem import AUDIT_COLUMNS, AttentionResult, Problem
from nc_patch.ops.rows import final_scores_, hide_unseen_, rows_per_block, scores_of
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, BlockPlan

# One row of so many is audited, within limits: few rows say little, and more than enough cost for nothing.
_ROWS_PER_AUDITED = 256
_FEWEST, _MOST = 8, 16


def audited_rows(query_length: int) -> int:
    """How many rows of a sequence are audited; of a few rows some more than once."""
    return min(max(query_length // _ROWS_PER_AUDITED, _FEWEST), _MOST)


def judged(
    result: AttentionResult, problem: Problem, plan: BlockPlan, options: BlockOptions, choice: BlockChoice,
    expected: torch.Tensor | None,
) -> AttentionResult:  # fmt: skip
    """A result with the audit of a choice for N query blocks, float32 ``[Hq + 1, 5]``, columns ``AUDIT_COLUMNS``.

    Its rows are drawn by ``problem.audit_seed``; the global random state is left alone. Does not read the device.
    ``expected``, float32 ``[N, Hq]``, is the mean kept mass of each query block's scored rows, None for no audit.
    """
    if expected is None:
        return result
    B, Hq, Lq, _ = problem.query.shape
    count, owner = audited_rows(Lq), plan.owner
    if len(expected) == 0:
        return result._replace(audit=expected.new_zeros(Hq + 1, len(AUDIT_COLUMNS)))
    occupied = owner >= 0
    rows = occupied.sum(-1)
    drawn = _draw(occupied, rows, count, problem.audit_seed)
    number = owner.gather(1, drawn).clamp(min=0)
    kept = expected.new_empty(B, Hq, count)
    step = rows_per_block(Hq, problem.key.shape[2])
    for b in range(B):
        keys = problem.key[b].float()
        for some in (slice(first, first + step) for first in range(0, count, step)):
            chosen = BlockChoice(*(each[number[b, some]] for each in choice))
            kept[b, :, some] = _kept_mass(problem, b, drawn[b, some], keys, chosen, options.size)
    difference = kept - expected.T[:, number].transpose(0, 1)  # [B, Hq, count]
    spread = difference.var(-1)
    # Of a head that rarely drops much, few rows may show none of it: half of what other heads show counts too.
    spread = torch.maximum(spread, (spread + spread.mean(1, keepdim=True)) / 2)
    spread = torch.cat((spread, difference.sum(1).var(-1)[:, None]), 1)  # [B, Hq + 1]
    known = (expected.T[:, owner.clamp(min=0).flatten()] * occupied.flatten()).sum(-1)
    estimate = known + (rows[:, None] * difference.mean(-1)).sum(0)
    variance = (rows[:, None].float().square() * spread / count).sum(0)
    sequences, heads = (rows > 0).sum(), expected.new_ones(Hq + 1)
    heads[-1] = Hq
    kept_mass, audited = torch.cat((estimate, estimate.sum()[None])), sequences * count
    freedom = (audited - sequences).expand_as(heads)
    return result._replace(audit=torch.stack((rows.sum() * heads, kept_mass, variance, freedom, audited * heads), -1))


def _draw(occupied: torch.Tensor, rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """One row from each of ``count`` equal runs of the ``rows [B]`` rows that see a key, int64 ``[B, count]``."""
    device, generator = occupied.device, torch.Generator().manual_seed(seed)
    # Pinned, so that the host does not wait for the copy; PyTorch keeps such memory until the copy is done.
    shape, pinned = (occupied.shape[0], count), device.type == "cuda"
    share = torch.rand(shape, dtype=torch.float32, generator=generator, device="cpu", pin_memory=pinned)
    share = share.to(device, non_blocking=True)
    wanted = (torch.arange(count, device=device) + share) / count * rows[:, None]
    wanted = torch.minimum(wanted.long(), (rows[:, None] - 1).clamp(min=0)) + 1
    found = torch.searchsorted(occupied.long().cumsum(-1), wanted)
    return found.clamp(max=occupied.shape[1] - 1)


def _kept_mass(
    problem: Problem, b: int, rows: torch.Tensor, keys: torch.Tensor, choice: BlockChoice, block_size: int
) -> torch.Tensor:
    """What the ``rows [a]`` of a sequence keep, ``[Hq, a]``, of its ``keys``, float32, by the choice for each."""
    (Hkv, Lk, _), width = keys.shape, -(-keys.shape[1] // block_size) + 1
    scores = final_scores_(scores_of(problem.query[b, :, rows].float(), keys), problem.scale, problem.softcap)
    position = torch.arange(Lk, device=keys.device, dtype=torch.int32)
    weights = torch.softmax(hide_unseen_(scores, problem.visible[b, rows], position), -1, out=scores)
    # Blocks are counted here from the one that holds the first of the buffer's keys.
    of_key = torch.div(position - problem.origin[b, rows, None], block_size, rounding_mode="floor")
    indices, counts = choice
    exists = torch.arange(indices.shape[-1], device=keys.device) < counts[..., None]
    place = torch.where(exists, indices - of_key[:, None, :1], width).clamp(0, width).long()
    chosen = weights.new_zeros(*counts.shape, width + 1).scatter_(-1, place, 1.0)
    attended = chosen.gather(-1, (of_key - of_key[:, :1]).long()[:, None].expand(-1, Hkv, -1))
    shares = weights.unflatten(0, (Hkv, -1)) * attended.transpose(0, 1)[:, None]
    # A row whose scores are not numbers counts as keeping nothing, as among those that choose.
    return shares.sum(-1).nan_to_num(nan=0.0).clamp(max=1.0).flatten(0, 1)

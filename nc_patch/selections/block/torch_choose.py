"""Which key blocks each query block attends, in PyTorch: some rows are scored, and choose the heaviest blocks."""

import torch

from nc_patch.ops.problem import Problem
from nc_patch.ops.rows import final_scores_, hide_unseen_, scores_of
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, BlockPlan, PlannedBlock


def choose_blocks(
    problem: Problem, plan: BlockPlan, options: BlockOptions, expected: torch.Tensor | None = None
) -> tuple[BlockChoice, torch.Tensor]:
    """The blocks that each query block attends, as ``definition.block_choice`` defines them.

    Args:
        expected: float32 ``[N, Hq]``, is given the mean kept mass of each query block's scored rows, 1 where there are
            none; a row whose shares are not numbers counts as keeping nothing.

    Returns:
        The choice, and int32 ``[N, Hkv]``, how many blocks ``min_mass`` has added.
    """
    most = max((block.width for block in plan.listed), default=0)
    indices, counts = plan.law.new_full((*plan.law.shape, most), -1), plan.law.clone()
    for number, block in enumerate(plan.listed):
        shares = _shares(problem, plan, block, options)
        order, count = _heaviest(shares, plan.recent[number], plan.law[number], plan.limit[number], options.min_mass)
        ranked = torch.arange(block.width, device=order.device).expand_as(order)
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, ranked < count[:, None])
        found = torch.where(chosen, ranked, most).sort(-1).values  # ascending, behind them what is not chosen
        indices[number, :, : block.width] = torch.where(found < most, found + block.lowest, -1).int()
        counts[number] = count
        if expected is not None:
            kept = (shares * chosen[:, None, None]).sum(-1).nan_to_num(nan=0.0).clamp(max=1.0).flatten(0, 1)
            expected[number] = kept.mean(-1) if block.samples else 1.0
    return BlockChoice(indices[..., : int(counts.max()) if len(counts) else 0], counts), counts - plan.law


def _shares(problem: Problem, plan: BlockPlan, block: PlannedBlock, options: BlockOptions) -> torch.Tensor:
    """The share of every key block for the S scored rows, as the definition says, float32 ``[Hkv, G, S, width]``."""
    b, rows = block.batch, plan.samples[block.first_sample : block.first_sample + block.samples].long()
    query, key = problem.query[b, :, rows].float(), problem.key[b, :, block.low : block.high].float()
    scores = scores_of(query, key)
    final_scores_(scores, problem.scale, problem.softcap)
    position = torch.arange(block.low, block.high, device=query.device)
    hide_unseen_(scores, problem.visible[b, rows], position)
    start = block.begin + block.lowest * options.size
    missing = (block.low - start, start + block.width * options.size - block.high)
    by_block = torch.nn.functional.pad(scores, missing, value=-torch.inf).unflatten(-1, (block.width, options.size))
    logits = by_block.amax(-1) if options.min_mass is None else torch.logsumexp(by_block, -1)
    return torch.softmax(logits, -1).unflatten(0, (key.shape[0], problem.group))


def _heaviest(
    shares: torch.Tensor, recent: torch.Tensor, law: torch.Tensor, limit: torch.Tensor, min_mass: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks from the first to be attended to the last, int64 ``[Hkv, width]``, and how many are, ``[Hkv]``.

    ``recent``, ``law`` and ``limit``: int32 ``[Hkv]``, see ``BlockPlan``.
    """
    rows = shares.flatten(1, 2)
    if rows.shape[1] == 0:  # every block is attended
        return torch.arange(rows.shape[-1], device=law.device).expand(len(law), -1), law
    # The largest share, not their sum: one row that needs a block for itself alone would not be heard among many.
    weight = rows.amax(1).nan_to_num_(nan=torch.finfo(torch.float32).max)
    block = torch.arange(rows.shape[-1], device=law.device)
    weight.masked_fill_((block == 0) | (block >= recent[:, None]), torch.inf)  # attended always
    order = torch.sort(weight, dim=-1, descending=True, stable=True).indices
    if min_mass is None:
        return order, law
    kept = rows.nan_to_num(nan=0.0).sum(1).gather(-1, order).cumsum(-1)
    needed = (kept < min_mass * rows.shape[1]).sum(-1, dtype=torch.int32) + 1
    return order, torch.maximum(law, needed.minimum(limit))

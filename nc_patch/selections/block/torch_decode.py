"""``block`` while decoding, in PyTorch: each query chooses pages by their statistics and attends them."""

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import RowBlock, RowStats, final_scores_, softmax_, weighted_values
from nc_patch.selections.block.pages import PageStatistics, page_logits


def torch_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. The kept mass costs
    as much as dense attention.
    """
    if problem.table is not None:
        problem = _gathered(problem)
    query, value, visible, budget = problem.query, problem.value, problem.visible, problem.budget
    (B, Hq, Lq, _), N = query.shape, problem.key.shape[2]
    Hkv, group = problem.key.shape[1], problem.group
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    attended = torch.zeros(B, Hq, Lq, dtype=torch.int32, device=query.device)
    stats = RowStats(query, None if problem.sinks is None else problem.sinks.float(), problem.stats)
    of_group = (B, Hkv, group, Lq) if budget.shape[1] > 1 else (B, 1, 1, Lq)
    budgets = budget.view(of_group).amax(2).expand(B, Hkv, Lq).tolist()
    intervals, origins = visible.tolist(), problem.origin.tolist()
    for b in range(B):
        for i in range(Lq):
            (start, end), begin = intervals[b][i], origins[b][i]
            start, end = max(start, begin, 0), min(end, N)
            if end > start:
                seen = (start, end, begin)
                found, count = _attend(problem, b, i, seen, [heads[i] for heads in budgets[b]], stats)
                output[b, :, i], attended[b, :, i] = found.to(output.dtype), count.repeat_interleave(group)
    return AttentionResult(output, *stats.results(), attended)


def _gathered(problem: Problem) -> Problem:
    """The problem with the keys that its table names, side by side: as many for each sequence as the longest has."""
    ends, N = problem.visible.clamp(0, problem.key_length), problem.key.shape[2]
    assert problem.table is not None
    # What follows a sequence's own blocks may be any number, and is not read.
    blocks = problem.table[:, : -(-int(ends.max()) // N) if ends.numel() else 0].clamp(0, len(problem.key) - 1)
    memory = (problem.key, problem.value, *problem.key_index)
    key, value, codes, scales = (t[blocks].transpose(1, 2).flatten(2, 3) for t in memory)
    starts = torch.zeros_like(ends)
    visible = torch.stack((starts, ends), -1)
    return problem._replace(key=key, value=value, visible=visible, origin=starts, key_index=(codes, scales), table=None)


def _attend(
    problem: Problem, b: int, i: int, seen: tuple[int, int, int], budgets: list[int], stats: RowStats
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[Hq, Dv]`` of one query that sees the keys ``seen[0]:seen[1]``, and how many each kv head attends."""
    (start, end, begin), size = seen, problem.page_size
    key, value, scale, softcap = problem.key[b], problem.value[b], problem.scale, problem.softcap
    Hkv, device = key.shape[0], key.device
    rows = problem.query[b, :, i].view(Hkv, problem.group, -1).float()
    low, own = (start - begin) // size, (end - 1 - begin) // size
    pages = own + 1 - low
    counts = [pages if k >= end - start else min(-(-k // size), pages) for k in budgets]
    most = max(2 if own > low else 1, *counts)
    if most == pages and min(counts) == pages:
        order = torch.arange(pages, device=device).expand(Hkv, -1)
    else:
        last = slice(max(begin + own * size, start), end)
        own_scores = final_scores_(rows @ key[:, last].float().transpose(1, 2), scale, softcap)
        weight = _page_weights(problem, b, rows, own_scores, (low, own), begin + (low + 1) * size - start)
        order = torch.sort(weight, dim=-1, descending=True, stable=True).indices[:, :most]
    position = begin + (low + order[..., None]) * size + torch.arange(size, device=device)
    taken = torch.arange(most, device=device) < torch.tensor(counts, device=device).clamp(min=min(2, pages))[:, None]
    exists = (taken[..., None] & (position >= start) & (position < end)).flatten(1)
    at = position.flatten(1).clamp(start, end - 1)[..., None]
    keys, values = (t.gather(1, at.expand(-1, -1, t.shape[-1])).float() for t in (key, value))
    scores = final_scores_(rows @ keys.transpose(1, 2), scale, softcap).masked_fill_(~exists[:, None], -torch.inf)
    if problem.stats:
        dense = final_scores_(rows @ key[:, start:end].float().transpose(1, 2), scale, softcap)
        kept, whole = (torch.logsumexp(t, -1).view(-1, 1) for t in (scores, dense))
        stats.record(RowBlock(b, i, i + 1, start, end), kept, whole, torch.zeros(1, dtype=torch.bool, device=device))
    sinks = None if problem.sinks is None else problem.sinks.float()[:, None]
    weights = softmax_(scores.view(rows.shape[0] * rows.shape[1], 1, -1), sinks)
    return weighted_values(weights, values)[:, 0], exists.sum(-1, dtype=torch.int32)


def _page_weights(
    problem: Problem, b: int, rows: torch.Tensor, own_scores: torch.Tensor, pages: tuple[int, int], in_first: int
) -> torch.Tensor:
    """Weights float32 ``[Hkv, P]`` of the pages from the first visible one to the query's own; infinite for both.

    Args:
        rows: float32 ``[Hkv, G, D]``. own_scores: final scores of the visible keys of the query's own page.
        in_first: how many keys of the first page are visible, if it is not the query's own.
    """
    low, own = pages
    statistics = PageStatistics(*(t[b, :, low:own] for t in problem.key_index))
    count = torch.full((own - low,), problem.page_size, device=rows.device)
    count[:1] = in_first
    estimates = page_logits(rows, statistics, count, problem.scale, problem.softcap)
    logits = torch.cat((estimates, torch.logsumexp(own_scores, -1, keepdim=True)), -1)
    overwhelming = logits.isnan() | (logits == torch.inf)
    weight = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num_(nan=0.0)
    # Beyond every number, but after the two pages that are attended always.
    weight = weight.sum(1).masked_fill_(overwhelming.any(1), torch.finfo(torch.float32).max)
    weight[:, 0] = weight[:, -1] = torch.inf
    return weight

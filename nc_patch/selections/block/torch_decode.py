"""``block`` while decoding, in PyTorch: each query chooses pages by their statistics and attends them."""

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import RowBlock, final_scores_
from nc_patch.selections.block.pages import PageStatistics, page_logits
from nc_patch.selections.block.torch import Chosen


def torch_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. The kept mass costs
    as much as dense attention.
    """
    return ChosenPages(problem if problem.table is None else _gathered(problem)).attend()


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


class ChosenPages(Chosen):
    """The pages that each query chooses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.page_size)
        (B, Hkv, N, _), Lq, budget = problem.key.shape, problem.query.shape[2], problem.budget
        of_group = (B, Hkv, problem.group, Lq) if budget.shape[1] > 1 else (B, 1, 1, Lq)
        self._budgets = budget.view(of_group).amax(2).expand(B, Hkv, Lq).transpose(1, 2).tolist()
        self._origins = problem.origin.tolist()
        start = torch.maximum(problem.visible[..., 0], problem.origin).clamp(min=0).tolist()
        end = problem.visible[..., 1].clamp(max=N).tolist()
        queries = [RowBlock(b, i, i + 1, start[b][i], end[b][i]) for b in range(B) for i in range(Lq)]
        self.blocks = [query for query in queries if query.high > query.low]

    def chosen(self, block: RowBlock) -> tuple[int, torch.Tensor, torch.Tensor]:
        """See ``Chosen``."""
        size, device = self._size, self.attended.device
        begin, budgets = self._origins[block.batch][block.first], self._budgets[block.batch][block.first]
        low, own = (block.low - begin) // size, (block.high - 1 - begin) // size
        pages = own + 1 - low
        counts = [
            pages if k >= block.high - block.low else max(min(2, pages), min(-(-k // size), pages)) for k in budgets
        ]
        if min(counts) == pages:
            order = torch.arange(pages, device=device).expand(len(counts), -1)
        else:
            weight = self._page_weights(block, begin, low, own)
            order = torch.sort(weight, dim=-1, descending=True, stable=True).indices[:, : max(counts)]
        exists = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]
        return begin, low + order, exists

    def _page_weights(self, block: RowBlock, begin: int, low: int, own: int) -> torch.Tensor:
        """Weights float32 ``[Hkv, P]`` of the pages from ``low`` to the query's ``own``; infinite for both."""
        problem, size, b = self._problem, self._size, block.batch
        key = problem.key[b, :, max(begin + own * size, block.low) : block.high].float()
        rows = problem.query[b, :, block.first].view(len(key), problem.group, -1).float()
        own_scores = final_scores_(rows @ key.transpose(1, 2), problem.scale, problem.softcap)
        statistics = PageStatistics(*(t[b, :, low:own] for t in problem.key_index))
        count = torch.full((own - low,), size, device=rows.device)
        count[:1] = begin + (low + 1) * size - block.low
        estimates = page_logits(rows, statistics, count, problem.scale, problem.softcap)
        logits = torch.cat((estimates, torch.logsumexp(own_scores, -1, keepdim=True)), -1)
        overwhelming = logits.isnan() | (logits == torch.inf)
        weight = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num_(nan=0.0)
        # Beyond every number, but after the two pages that are attended always.
        weight = weight.sum(1).masked_fill_(overwhelming.any(1), torch.finfo(torch.float32).max)
        weight[:, 0] = weight[:, -1] = torch.inf
        return weight

"""The float64 definition of ``block``: slow, in loops, O(Lq * Lk) memory; all else is tested against it."""

import math
from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

from nc_patch.ops.problem import Problem, visible_mask
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, stride_by_law
from nc_patch.selections.block.pages import page_logits, summarize


def block_choice(problem: Problem, scores: torch.Tensor, options: BlockOptions) -> BlockChoice:
    """The key blocks that each query block attends, by final scores (scaled, soft-capped), float64 ``[B, Hq, Lq, Lk]``.

    Queries and keys are cut into blocks by their position within the sequence, that is their distance from ``origin``.
    A query block that sees n keys in all has ``ceil(k / size)`` key blocks for each key/value head, where k is the
    largest budget among its rows and the G heads of the group; where every row may attend all its keys, every visible
    block. Attended are the first visible block, the blocks that hold the query block's own positions, those that hold
    the ``local_keys`` before them, the most recent first, and the heaviest of the others, ties to the lower position,
    until there are as many.

    In each query block every ``sample_stride``-th row (the last of each stride, and the block's last row) is scored
    against all keys; without a number the stride is that of ``stride_by_law`` for n / 2k, k the mean over key/value
    heads of what those key blocks hold. Each key block has a logit for each such row, its highest score; with
    ``min_mass`` the log-sum-exp of its scores, so that shares are of softmax mass. The softmax over blocks is the row's
    share for each; a block's weight is the largest share of any sampled row of any of the G heads, and infinite where
    one is not a number.

    With ``min_mass`` it goes on in that order until the mean mass that the sampled rows and heads put on what is chosen
    reaches ``min_mass``, but not beyond ``ceil(max_factor * ceil(k / size))`` blocks.
    """
    visible, group, Hkv, size = problem.visible, problem.group, problem.key.shape[1], options.size
    scores = scores.detach().masked_fill(~visible_mask(visible, scores.shape[-1]), -torch.inf)
    budget = problem.budget.expand(scores.shape[:3]).unflatten(1, (Hkv, group)).amax(2)  # [B, Hkv, Lq]
    found = []
    for b, rows in query_blocks(problem, options):
        begin, (start, end) = int(problem.origin[b, rows[0]]), visible[b, rows].unbind(-1)
        position, n = end - 1 - begin, int(end.max() - start.min())
        low, high = (int(start.min()) - begin) // size, (int(end.max()) - 1 - begin) // size
        width, own = high + 1 - low, int(position[0]) // size
        local = (int(position[0]) - options.local_keys) // size
        largest, every = budget[b, :, rows].amax(1).tolist(), (budget[b, :, rows] >= end - start).all(1).tolist()
        counts = [width if every[h] else min(-(-largest[h] // size), width) for h in range(Hkv)]
        ratio = torch.tensor(n / (2 * size * sum(counts) / Hkv), dtype=torch.float64)
        stride = options.sample_stride or int(stride_by_law(ratio))
        sampled = rows[(position % stride == stride - 1) | (rows == rows[-1])]
        for h, count in enumerate(counts):
            logits = []
            for j in range(low, high + 1):
                keys = slice(max(begin + j * size, 0), max(begin + (j + 1) * size, 0))
                of_block = scores[b, h * group : (h + 1) * group, sampled, keys]
                logits.append(torch.logsumexp(of_block, -1) if options.min_mass else of_block.amax(-1))
            shares = torch.softmax(torch.stack(logits), 0).flatten(1)
            weight, mass = shares.amax(1).nan_to_num(nan=math.inf).tolist(), shares.nan_to_num(nan=0.0).sum(1).tolist()
            recent = max(min(max(local, high + 2 - count), own), low)
            always = {0, *range(recent - low, width)}
            order = [*always, *sorted({*range(width)} - always, key=weight.__getitem__, reverse=True)]
            taken = max(count, len(always))
            if options.min_mass is not None:
                missing, most = (
                    options.min_mass * len(sampled) * group,
                    min(math.ceil(options.max_factor * count), width),
                )
                while taken < most and sum(mass[j] for j in order[:taken]) < missing:
                    taken += 1
            found.append(torch.tensor(sorted(order[:taken]), dtype=torch.int32) + low)
    shape = (len(found) // Hkv, Hkv)
    padded = pad_sequence([*found, torch.empty(0, dtype=torch.int32)], batch_first=True, padding_value=-1)[:-1]
    counted = torch.tensor([len(chosen) for chosen in found], dtype=torch.int32)
    return BlockChoice(padded.view(*shape, padded.shape[1]), counted.view(shape))


def chosen_mask(problem: Problem, choice: BlockChoice, options: BlockOptions) -> torch.Tensor:
    """Keys that rows attend once their query blocks' key blocks are chosen, bool ``[B, Hq, Lq, Lk]``."""
    (B, Hkv, Lk, _), Lq, size = problem.key.shape, problem.query.shape[2], options.size
    attended = torch.zeros(B, Hkv, Lq, Lk, dtype=torch.bool, device=problem.visible.device)
    for (b, rows), *of_heads in zip(query_blocks(problem, options), *choice, strict=True):
        for h, (indices, count) in enumerate(zip(*of_heads, strict=True)):
            for j in indices[:count].tolist():
                first = int(problem.origin[b, rows[0]]) + j * size
                attended[b, h, rows, max(first, 0) : max(first + size, 0)] = True
    return attended.repeat_interleave(problem.group, 1) & visible_mask(problem.visible, Lk)


def page_mask(problem: Problem, scores: torch.Tensor, block_size: int) -> torch.Tensor:
    """Keys attended while decoding, bool ``[B, Hq, Lq, Lk]``: pages that each query chooses for itself.

    Keys are cut into pages of ``block_size`` from the sequence's ``origin``. For a query and a head the logit of a page
    is ``pages.page_logits`` of what ``pages.summarize`` keeps of its keys and of how many of them are visible; that of
    the page that holds the query's own position is exact, the log-sum-exp of its visible scores. A page's weight is the
    softmax of the logits over the visible pages, summed over the G query heads of a key/value head; a logit that is NaN
    or +inf gives an infinite weight and stays out of the softmax. Attended are the first visible page and the query's
    own, then the heaviest of the others, ties to the lower position, until ``ceil(k / block_size)`` are chosen, where k
    is the group's largest budget; all, where that is of all visible keys.

    ``scores`` are final ones (scaled, soft-capped), float64 ``[B, Hq, Lq, Lk]``.
    """
    query, key, group = problem.query.double(), problem.key.double(), problem.group
    budget = problem.budget.expand(scores.shape[:3])
    attended = torch.zeros_like(scores, dtype=torch.bool)
    for b, i in (problem.visible[..., 1] > problem.visible[..., 0]).nonzero().tolist():
        (start, end), begin = problem.visible[b, i].tolist(), int(problem.origin[b, i])
        low, own = (start - begin) // block_size, (end - 1 - begin) // block_size
        pages = [(begin + j * block_size, begin + (j + 1) * block_size) for j in range(low, own + 1)]
        for h in range(key.shape[1]):
            heads, logits = slice(h * group, (h + 1) * group), []
            for first, last in pages[:-1]:
                statistics = summarize(key[b, h, max(first, 0) : last][None])
                seen = torch.tensor([last - max(first, start)], device=key.device)
                logits.append(page_logits(query[b, heads, i], statistics, seen, problem.scale, problem.softcap)[:, 0])
            logits.append(torch.logsumexp(scores[b, heads, i, max(pages[-1][0], start) : end], -1))
            of_pages = torch.stack(logits)
            overwhelming = of_pages.isnan() | (of_pages == torch.inf)
            weights = torch.softmax(of_pages.masked_fill(overwhelming, -torch.inf), 0).nan_to_num(nan=0.0)
            weight = weights.masked_fill(overwhelming, torch.inf).sum(1).tolist()
            largest = int(budget[b, heads, i].max())
            count = -(-largest // block_size) if largest < end - start else len(pages)
            others = sorted(range(1, len(pages) - 1), key=weight.__getitem__, reverse=True)
            for j in {0, len(pages) - 1, *others[: max(0, count - 2)]}:
                attended[b, heads, i, max(pages[j][0], start) : min(pages[j][1], end)] = True
    return attended


def query_blocks(problem: Problem, options: BlockOptions) -> Iterator[tuple[int, torch.Tensor]]:
    """The sequence of each query block, and its rows: consecutive ones that see keys, of one ``origin``."""
    for b, (visible, origin) in enumerate(zip(problem.visible, problem.origin, strict=True)):
        number = (visible[:, 1] - 1 - origin).div(options.query_block_size, rounding_mode="floor")
        sees = visible[:, 1] > visible[:, 0]
        alike = torch.unique_consecutive(torch.stack((origin, number, sees), -1), return_counts=True, dim=0)[1]
        for rows in torch.arange(len(visible), device=visible.device).split(alike.tolist()):
            if sees[rows[0]]:
                yield b, rows

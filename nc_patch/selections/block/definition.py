"""The float64 definition of ``block``: slow, in loops, O(Lq * Lk) memory; all else is tested against it."""

import math

import torch

from nc_patch.ops.problem import Problem, visible_mask
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, stride_by_law
from nc_patch.selections.block.pages import page_logits, summarize


def block_choice(problem: Problem, scores: torch.Tensor, options: BlockOptions) -> BlockChoice:
    """The key blocks that each query block attends under ``block``.

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

    ``scores`` are final ones (scaled, soft-capped), float64 ``[B, Hq, Lq, Lk]``.
    """
    B, Hq, Lq, Lk = scores.shape
    visible, origin, budget = problem.visible, problem.origin, problem.budget
    group, num_kv_heads = problem.group, problem.key.shape[1]
    size, min_mass = options.size, options.min_mass
    seen_scores = scores.detach().masked_fill(~visible_mask(visible, Lk), -torch.inf)
    budget = budget.expand(B, Hq, Lq)
    found: list[list[list[int]]] = []
    for b in range(B):
        for rows in query_blocks(visible[b], origin[b], options.query_block_size):
            first, last = rows[0], rows[-1]
            start = int(origin[b, first])
            offset = visible[b, rows, 1] - 1 - start
            least, most_seen = int(visible[b, rows, 0].min()), int(visible[b, rows, 1].max())
            low, high = (least - start) // size, (most_seen - 1 - start) // size
            position = int(offset[0])
            diagonal, local = position // size, (position - options.local_keys) // size
            counts_of_heads = []
            for h in range(num_kv_heads):
                of_group = budget[b, h * group : (h + 1) * group][:, rows]
                every = bool((of_group.amax(0) >= visible[b, rows, 1] - visible[b, rows, 0]).all())
                width = high - low + 1
                counts_of_heads.append(width if every else min(-(-int(of_group.max()) // size), width))
            stride = options.sample_stride
            if stride is None:
                keys = 2 * size * sum(counts_of_heads) / num_kv_heads
                stride = int(stride_by_law(torch.tensor((most_seen - least) / keys, dtype=torch.float64)))
            sampled = rows[((offset % stride) == stride - 1) | (rows == last)]
            found.append([])
            for h, count in enumerate(counts_of_heads):
                heads = slice(h * group, (h + 1) * group)
                of_rows = seen_scores[b, heads][:, sampled]
                logits = []
                for j in range(low, high + 1):
                    block = of_rows[..., max(start + j * size, 0) : max(start + (j + 1) * size, 0)]
                    logits.append(torch.logsumexp(block, -1) if min_mass else block.amax(-1))
                shares = dict(zip(range(low, high + 1), torch.softmax(torch.stack(logits), 0), strict=True))
                weight = {j: float(share.max()) for j, share in shares.items()}
                mass = {j: float(share.nan_to_num(nan=0.0).sum()) for j, share in shares.items()}
                recent = max(min(max(local, high + 2 - count), diagonal), low)
                always = {low, *range(recent, high + 1)}
                others = sorted(weight.keys() - always)
                others.sort(key=lambda j, w=weight: -torch.inf if math.isnan(w[j]) else -w[j])  # type: ignore[misc]
                taken = min(max(0, count - len(always)), len(others))
                while min_mass and taken < len(others) and len(always) + taken < math.ceil(options.max_factor * count):
                    kept = sum(mass[j] for j in (*always, *others[:taken]))
                    if kept >= min_mass * len(sampled) * group:
                        break
                    taken += 1
                found[-1].append(sorted(always | set(others[:taken])))
    most = max((len(chosen) for heads_of in found for chosen in heads_of), default=0)
    filled = [[chosen + [-1] * (most - len(chosen)) for chosen in heads_of] for heads_of in found]
    counts = [[len(chosen) for chosen in heads_of] for heads_of in found]
    shape = (len(found), num_kv_heads)
    return BlockChoice(
        torch.tensor(filled, dtype=torch.int32, device=scores.device).view(*shape, most),
        torch.tensor(counts, dtype=torch.int32, device=scores.device).view(shape),
    )


def chosen_mask(problem: Problem, choice: BlockChoice, options: BlockOptions) -> torch.Tensor:
    """Keys that rows attend once their query blocks' key blocks are chosen, bool ``[B, Hq, Lq, Lk]``."""
    visible, origin, key_length = problem.visible, problem.origin, problem.key.shape[2]
    B, Lq, _ = visible.shape
    Hkv = choice.block_counts.shape[1]
    attended = torch.zeros(B, Hkv, Lq, key_length, dtype=torch.bool, device=visible.device)
    indices, counts = choice.block_indices.tolist(), choice.block_counts.tolist()
    runs = [(b, rows) for b in range(B) for rows in query_blocks(visible[b], origin[b], options.query_block_size)]
    for number, (b, rows) in enumerate(runs):
        for h in range(Hkv):
            for j in indices[number][h][: counts[number][h]]:
                first = int(origin[b, rows[0]]) + j * options.size
                attended[b, h, rows[0] : rows[-1] + 1, max(first, 0) : max(first + options.size, 0)] = True
    return attended.repeat_interleave(problem.group, 1) & visible_mask(visible, key_length)


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
    B, Hq, Lq, Lk = scores.shape
    visible, origin, budget = problem.visible, problem.origin, problem.budget
    query, key = problem.query.double(), problem.key.double()
    Hkv, group = key.shape[1], problem.group
    attended = torch.zeros(B, Hq, Lq, Lk, dtype=torch.bool, device=scores.device)
    for b, i in ((b, i) for b in range(B) for i in range(Lq)):
        start, end, begin = (int(x) for x in (visible[b, i, 0], visible[b, i, 1], origin[b, i]))
        if end <= start:
            continue
        low, own = (start - begin) // block_size, (end - 1 - begin) // block_size
        for h in range(Hkv):
            heads = slice(h * group, (h + 1) * group)
            logits = torch.empty(group, own + 1 - low, dtype=torch.float64)
            for j in range(low, own + 1):
                first, last = begin + j * block_size, begin + (j + 1) * block_size
                if j == own:
                    logits[:, j - low] = torch.logsumexp(scores[b, heads, i, max(first, start) : end], -1)
                    continue
                keys = key[b, h, max(first, 0) : last]
                seen = min(last, end) - max(first, start)
                estimate = page_logits(query[b, heads, i], summarize(keys[None]), seen, problem.scale, problem.softcap)
                logits[:, j - low] = estimate[:, 0]
            overwhelming = logits.isnan() | (logits == torch.inf)
            weights = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num(nan=0.0)
            weight = weights.masked_fill(overwhelming, torch.inf).sum(0)
            weight[0] = weight[-1] = torch.inf
            largest = int(budget[b].expand(Hq, Lq)[heads, i].max())
            count = -(-largest // block_size) if largest < end - start else own - low + 1
            others = sorted(range(1, own - low), key=lambda j: -float(weight[j]))
            always = {0, own - low}
            for j in always | set(others[: max(0, count - len(always))]):
                first = begin + (low + j) * block_size
                attended[b, heads, i, max(first, start) : min(first + block_size, end)] = True
    return attended


def query_blocks(visible: torch.Tensor, origin: torch.Tensor, query_block_size: int) -> list[torch.Tensor]:
    """Runs of rows of one sequence, ``visible[Lq, 2]``, that share a query block; rows without keys are left out."""
    position = (visible[:, 1] - 1 - origin).tolist()
    sequence, empty = origin.tolist(), (visible[:, 1] <= visible[:, 0]).tolist()
    runs: list[list[int]] = []
    for row in range(len(position)):
        if empty[row]:
            continue
        previous = runs[-1][-1] if runs else -2
        joined = (
            previous == row - 1
            and sequence[row] == sequence[previous]
            and position[row] // query_block_size == position[previous] // query_block_size
        )
        if joined:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [torch.tensor(run) for run in runs]

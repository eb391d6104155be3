"""The float64 definition of every selection. Slow, O(Lq * Lk) memory; all else is tested against it.

Shapes: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Lq queries, Lk keys, D head dimension.
"""

import math
from typing import NamedTuple

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.selections.block.blocks import BlockChoice
from nc_patch.selections.block.pages import page_logits, summarize


class AttentionResult(NamedTuple):
    """What attention returns: the output, and on request what it attended.

    Attributes:
        output: ``[B, Hq, Lq, Dv]``; zero for a query that sees no key.
        lse: float ``[B, Hq, Lq]``, the natural log of the softmax denominator (attended keys, the tail, and the sink
            logit where there is one); ``-inf`` for a query that sees no key and has no sink.
        kept_mass: float ``[B, Hq, Lq]``, the sum of the dense softmax weights, over the keys alone, of the keys that
            were attended; 1 for a query that sees no key.
        attended: int32 ``[B, Hq, Lq]``, the number of keys attended.
        kept_mass_bounds: float ``[B, Hq, Lq, 2]``, two numbers between which the kept mass lies for certain.
        block_estimate: float32 ``[Hq, 5]``, what ``"block"`` expects its choice to keep; columns
            ``blocks.ESTIMATE_COLUMNS``.
        block_audit: float32 ``[Hq + 1, 5]``, an unbiased estimate of what ``"block"`` keeps; columns
            ``audit.AUDIT_COLUMNS``.
    """

    output: torch.Tensor
    lse: torch.Tensor | None = None
    kept_mass: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    kept_mass_bounds: torch.Tensor | None = None
    block_estimate: torch.Tensor | None = None
    block_audit: torch.Tensor | None = None


def forced_counts(
    budget: torch.Tensor, sink_keys: int, recent_keys: int, selection: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many first (sink) and last (recent) visible keys a query attends whatever their scores.

    ``topk``: the recent keys come first in the budget, then the sinks, and the rest goes by score. ``window``: one key
    is always recent, then the sinks, and the rest of the budget is recent.

    Args:
        budget: int tensor of any shape, k(n) of each query.
        sink_keys, recent_keys: the settings.
        selection: ``"topk"`` or ``"window"``.

    Returns:
        (sinks, recents): two tensors of ``budget``'s shape; their sum is at most ``budget``.
    """
    if selection == "window":
        sinks = (budget - 1).clamp(0, sink_keys)
        return sinks, budget - sinks
    recents = budget.clamp(max=recent_keys)
    return (budget - recents).clamp(max=sink_keys), recents


def causal_intervals(batch: int, query_length: int, key_length: int, device: torch.device | str) -> torch.Tensor:
    """Intervals ``int32[B, Lq, 2]`` of plain causal attention, the last query aligned with the last key."""
    end = torch.arange(key_length - query_length + 1, key_length + 1, dtype=torch.int32, device=device).clamp(min=0)
    return torch.stack((torch.zeros_like(end), end), dim=-1).expand(batch, -1, -1)


def visible_mask(visible: torch.Tensor, key_length: int) -> torch.Tensor:
    """The intervals ``int32[B, Lq, 2]`` as a bool mask ``[B, 1, Lq, Lk]``."""
    position = torch.arange(key_length, device=visible.device)
    start, end = visible[:, None, :, :1], visible[:, None, :, 1:]
    return (position >= start) & (position < end)


def topk_mask(
    scores: torch.Tensor, visible: torch.Tensor, budget: torch.Tensor, sink_keys: int, recent_keys: int
) -> torch.Tensor:
    """Keys that ``topk`` attends: sinks, recents, then the highest scores; ties go to the lower position, NaN is first.

    Args:
        scores: ``[B, Hq, Lq, Lk]``.
        visible: int32 ``[B, Lq, 2]``.
        budget: int32 ``[B, Hq or 1, Lq]``.

    Returns:
        bool ``[B, Hq, Lq, Lk]``.
    """
    seen = visible_mask(visible, scores.shape[-1])
    start, end = visible[:, None, :, 0, None], visible[:, None, :, 1, None]
    sinks, recents = forced_counts(budget[..., None], sink_keys, recent_keys, "topk")
    position = torch.arange(scores.shape[-1], device=scores.device)
    forced = seen & ((position < start + sinks) | (position >= end - recents))
    # Order: forced keys, then visible keys by falling score, then the rest; a stable sort keeps ties by position.
    by_score = torch.where(scores.isnan(), torch.inf, scores)
    order = torch.sort(by_score, dim=-1, descending=True, stable=True).indices
    tier = torch.where(forced, 0, torch.where(seen, 1, 2)).expand_as(scores).gather(-1, order)
    order = order.gather(-1, torch.sort(tier, dim=-1, stable=True).indices)
    rank = torch.empty_like(order).scatter_(-1, order, position.expand_as(order))
    return seen & (rank < budget[..., None])


def window_mask(visible: torch.Tensor, budget: torch.Tensor, sink_keys: int, key_length: int) -> torch.Tensor:
    """Keys attended by ``window``, bool ``[B, Hq or 1, Lq, Lk]``: the first ``sink_keys`` and the most recent ones."""
    start, end = visible[:, None, :, 0, None], visible[:, None, :, 1, None]
    sinks, recents = forced_counts(budget[..., None], sink_keys, 0, "window")
    position = torch.arange(key_length, device=visible.device)
    return visible_mask(visible, key_length) & ((position < start + sinks) | (position >= end - recents))


def block_choice(
    scores: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    num_kv_heads: int,
    block_size: int,
    query_block_size: int,
    sample_stride: int,
    min_mass: float = 0.0,
    max_factor: float = 4.0,
) -> BlockChoice:
    """The key blocks that each query block attends under ``block``.

    Queries and keys are cut into blocks by their position within the sequence, that is their distance from ``origin``.
    In each query block every ``sample_stride``-th row (the last of each stride, and the block's last row) is scored
    against all keys; a key block's weight is the largest share of its dense softmax mass that any sampled row of any of
    the G query heads of a key/value head puts on it, and infinite where one is not a number. Attended are the first
    visible block, the blocks that hold the query block's own positions, and the heaviest of the others until
    ``ceil(k / block_size)`` are chosen, ties to the lower position, where k is the largest budget among the block's
    rows and heads of the group. Where every row may attend all its keys by it, every visible block is chosen.

    With ``min_mass`` it goes on in that order until the mean mass that the sampled rows and heads put on what is chosen
    reaches ``min_mass``, but not beyond ``ceil(max_factor * ceil(k / block_size))`` blocks.

    Args:
        scores: final scores (scaled, soft-capped) ``[B, Hq, Lq, Lk]``, float64.
        visible: int32 ``[B, Lq, 2]``.
        origin: int32 ``[B, Lq]``, the key position at which each query's sequence begins.
        budget: int32 ``[B, Hq or 1, Lq]``.
        min_mass: in (0, 1), or 0 for the budget alone.
    """
    B, Hq, Lq, Lk = scores.shape
    group = Hq // num_kv_heads
    weights = torch.softmax(scores.detach().masked_fill(~visible_mask(visible, Lk), -torch.inf), dim=-1)
    budget = budget.expand(B, Hq, Lq)
    found: list[list[list[int]]] = []
    for b in range(B):
        for rows in query_blocks(visible[b], origin[b], query_block_size):
            first, last = rows[0], rows[-1]
            start = int(origin[b, first])
            offset = visible[b, rows, 1] - 1 - start
            sampled = rows[((offset % sample_stride) == sample_stride - 1) | (rows == last)]
            low = (int(visible[b, rows, 0].min()) - start) // block_size
            high = (int(visible[b, rows, 1].max()) - 1 - start) // block_size
            diagonal = (int(visible[b, first, 1]) - 1 - start) // block_size
            found.append([])
            for h in range(num_kv_heads):
                heads = slice(h * group, (h + 1) * group)
                count = -(-int(budget[b, heads][:, rows].max()) // block_size)
                if bool((budget[b, heads][:, rows].amax(0) >= visible[b, rows, 1] - visible[b, rows, 0]).all()):
                    count = high - low + 1
                shares = {
                    j: weights[b, heads][
                        :, sampled, max(start + j * block_size, 0) : max(start + (j + 1) * block_size, 0)
                    ].sum(-1)
                    for j in range(low, high + 1)
                }
                weight = {j: float(share.max()) for j, share in shares.items()}
                mass = {j: float(share.nan_to_num(nan=0.0).sum()) for j, share in shares.items()}
                always = {low, *range(diagonal, high + 1)}
                others = sorted(weight.keys() - always)
                others.sort(key=lambda j, w=weight: -torch.inf if math.isnan(w[j]) else -w[j])  # type: ignore[misc]
                taken = min(max(0, count - len(always)), len(others))
                while min_mass and taken < len(others) and len(always) + taken < math.ceil(max_factor * count):
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


def chosen_mask(
    choice: BlockChoice,
    visible: torch.Tensor,
    origin: torch.Tensor,
    key_length: int,
    block_size: int,
    query_block_size: int,
) -> torch.Tensor:
    """Keys that rows attend once their query blocks' key blocks are chosen, bool ``[B, Hkv, Lq, Lk]``."""
    B, Lq, _ = visible.shape
    Hkv = choice.block_counts.shape[1]
    attended = torch.zeros(B, Hkv, Lq, key_length, dtype=torch.bool, device=visible.device)
    indices, counts = choice.block_indices.tolist(), choice.block_counts.tolist()
    runs = [(b, rows) for b in range(B) for rows in query_blocks(visible[b], origin[b], query_block_size)]
    for number, (b, rows) in enumerate(runs):
        for h in range(Hkv):
            for j in indices[number][h][: counts[number][h]]:
                first = int(origin[b, rows[0]]) + j * block_size
                attended[b, h, rows[0] : rows[-1] + 1, max(first, 0) : max(first + block_size, 0)] = True
    return attended & visible_mask(visible, key_length)


def page_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    scores: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Keys attended by ``pages``, bool ``[B, Hq, Lq, Lk]``: what ``block`` is while decoding, a query at a time.

    Keys are cut into pages of ``block_size`` from the sequence's ``origin``. For a query and a head the logit of a page
    is ``pages.page_logits`` of what ``pages.summarize`` keeps of its keys and of how many of them are visible; that of
    the page that holds the query's own position is exact, the log-sum-exp of its visible scores. A page's weight is the
    softmax of the logits over the visible pages, summed over the G query heads of a key/value head; a logit that is NaN
    or +inf gives an infinite weight and stays out of the softmax. Attended are the first visible page and the query's
    own, then the heaviest of the others, ties to the lower position, until ``ceil(k / block_size)`` are chosen, where k
    is the group's largest budget; all, where that is of all visible keys.

    Args:
        query: ``[B, Hq, Lq, D]``, key: ``[B, Hkv, Lk, D]``, both float64. scores: final scores ``[B, Hq, Lq, Lk]``.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``. budget: int32 ``[B, Hq or 1, Lq]``.
    """
    B, Hq, Lq, Lk = scores.shape
    Hkv = key.shape[1]
    group = Hq // Hkv
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
                estimate = page_logits(query[b, heads, i], summarize(keys[None]), seen, scale, softcap or 0.0)
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


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    visible: torch.Tensor,
    budget: torch.Tensor,
    selection: str,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sink_keys: int = 0,
    recent_keys: int = 0,
    origin: torch.Tensor | None = None,
    block_size: int = 32,
    query_block_size: int = 64,
    sample_stride: int = 16,
    tail: bool = False,
    min_mass: float = 0.0,
    max_factor: float = 4.0,
    choice: BlockChoice | None = None,
) -> AttentionResult:
    """Attention in float64, as the design defines it.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``. Any float dtype.
        visible: int32 ``[B, Lq, 2]``, the half-open interval of keys each query may see.
        budget: int32 ``[B, Hq or 1, Lq]``, keys to attend, between 0 and the interval's length.
        selection: ``"topk"``, ``"block"``, ``"pages"`` (``"block"`` while decoding), ``"window"`` or ``"dense"``.
        scale: factor of the scores q·k, positive.
        softcap: scores become ``softcap * tanh(score / softcap)`` after scaling.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator.
        origin: int32 ``[B, Lq]``, where each query's sequence begins; by default its interval's start. For ``"block"``,
            as are ``block_size`` to ``max_factor``, see ``block_choice``; and for the tail.
        tail: whether the keys that are not attended enter by the means of their pages, see ``ops/means.py``.
        choice: attend these key blocks instead of choosing; ``budget`` is then not looked at.

    Returns:
        All four fields of ``AttentionResult``, in float64 (``attended`` in int32).
    """
    B, Hq, Lq, _ = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    group = Hq // Hkv
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    raw = q @ k.transpose(-1, -2)
    scores = raw * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible_mask(visible, Lk)
    if selection == "topk":
        attended = topk_mask(raw, visible, budget, sink_keys, recent_keys)
    elif selection == "window":
        attended = window_mask(visible, budget, sink_keys, Lk).expand(B, Hq, Lq, Lk)
    elif selection == "block":
        origin = visible[..., 0] if origin is None else origin
        if choice is None:
            settings = (block_size, query_block_size, sample_stride, min_mass, max_factor)
            choice = block_choice(scores, visible, origin, budget, Hkv, *settings)
        attended = chosen_mask(choice, visible, origin, Lk, block_size, query_block_size).repeat_interleave(group, 1)
    elif selection == "pages":
        origin = visible[..., 0] if origin is None else origin
        attended = page_mask(q, key.double(), scores, visible, origin, budget, block_size, scale, softcap)
    elif selection == "dense":
        attended = seen.expand(B, Hq, Lq, Lk)
    else:
        raise ValueError(f"selection must be 'topk', 'block', 'pages', 'window' or 'dense', got {selection!r}")

    kept = scores.masked_fill(~attended, -torch.inf)
    lse_keys = torch.logsumexp(kept, dim=-1)
    lse_dense = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), dim=-1)
    own_keys = attended.sum(-1, dtype=torch.int32)
    if tail:
        origin = visible[..., 0] if origin is None else origin
        logits, means = tail_columns(q, key, value, kept, visible, origin, scale, softcap)
        kept, v = torch.cat((kept, logits), -1), torch.cat((v, means.repeat_interleave(group, 1)), -2)
        attended = torch.cat((attended, logits != -torch.inf), -1)
    lse = torch.logsumexp(kept, -1)
    peak = kept.amax(-1) if kept.shape[-1] else lse
    if sinks is not None:
        sink = sinks.double()[None, :, None].expand_as(lse_keys)
        lse, peak = torch.logaddexp(lse, sink), torch.maximum(peak, sink)
    empty = ~seen.any(-1)
    # Relative to the largest logit, not to lse: next to huge scores the logarithm of the sum is lost.
    base = torch.where(peak.isfinite(), peak, 0.0)
    weights = torch.exp(kept - base[..., None])
    denominator = weights.sum(-1) if sinks is None else weights.sum(-1) + torch.exp(sink - base)
    weights = torch.where(attended, weights / denominator[..., None], 0.0)
    # A key without weight contributes nothing, whatever its value holds.
    finite = v.isfinite()
    output = weights @ torch.where(finite, v, 0.0)
    touched = (weights != 0).double() @ (~finite).double() > 0
    output = torch.where(touched, torch.nan, output).masked_fill(empty[..., None], 0.0)
    kept_mass = torch.where(empty, 1.0, torch.exp(lse_keys - lse_dense))
    return AttentionResult(output, lse, kept_mass, own_keys)


def tail_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tail of each query as more columns of scores, ``[B, Hq, Lq, P]``, and their values ``[B, Hkv, P, Dv]``.

    Means are rounded to the dtype of what they are means of, since that is how they are kept.

    Args:
        query: float64 ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        kept: final scores of the attended keys, -inf elsewhere, ``[B, Hq, Lq, Lk]``.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``.
    """
    B, Hq, Lq, Lk = kept.shape
    group, size = Hq // key.shape[1], TAIL_PAGE_SIZE
    logits, values = [kept.new_empty(B, Hq, Lq, 0)], [value.double()[:, :, :0]]
    for b, begin in [(row, begin) for row in range(B) for begin in sorted(set(origin[row].tolist()))]:
        for j in range(-(min(begin, 0) // size), (Lk - begin) // size):
            first, last = begin + j * size, begin + (j + 1) * size
            own = torch.div(visible[b, :, 1] - 1 - begin, size, rounding_mode="floor")
            counts = (origin[b] == begin) & (visible[b, :, 0] <= first) & (j < own)
            mean_key, mean_value = (
                t[:, :, first:last].double().mean(2, keepdim=True).to(t.dtype) for t in (key, value)
            )
            score = scale * (query[b] @ mean_key[b].double().repeat_interleave(group, 0).transpose(-1, -2))[..., 0]
            score = softcap * torch.tanh(score / softcap) if softcap else score
            missing = (kept[b, :, :, first:last] == -torch.inf).sum(-1)
            logit = torch.full((B, Hq, Lq), -torch.inf, dtype=torch.float64, device=kept.device)
            logit[b] = torch.where(counts & (missing > 0), score + missing.double().log(), -torch.inf)
            logits.append(logit[..., None])
            values.append(mean_value.double())
    return torch.cat(logits, -1), torch.cat(values, 2)

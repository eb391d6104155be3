"""``block`` while decoding, in PyTorch: each query chooses pages by their statistics and attends them."""

import math

import torch

from nc_patch.ops.pages import page_logits
from nc_patch.ops.torch_rows import RowBlock, RowStats, final_scores_, softmax_, weighted_values


def torch_block_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    block_size: int,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the pages that each query chooses, as ``reference_attention`` defines ``"pages"``.

    Args:
        query: ``[B, Hq, Lq, D]``, Lq small. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]``.
        mean, variance: ``[B, Hkv, P, D]``, see ``PageStatistics``; what lies beyond a query's own page is not read.
        scale: factor of the scores. softcap: 0 for none. block_size: keys per page.
        want_stats: whether lse and kept mass are wanted; the kept mass costs as much as dense attention.

    Returns:
        (output ``[B, Hq, Lq, Dv]``, lse and kept mass float32 ``[B, Hq, Lq]`` or empty, attended int32 ``[B, Hq,
        Lq]``).
    """
    B, Hq, Lq, D = query.shape
    Hkv = key.shape[1]
    group = Hq // Hkv
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    attended = torch.zeros(B, Hq, Lq, dtype=torch.int32, device=query.device)
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    counts = -(-budget.expand(B, Hq, Lq).reshape(B, Hkv, group, Lq).amax(2) // block_size)
    intervals, origins = visible.tolist(), origin.tolist()
    for b in range(B):
        for i in range(Lq):
            (start, end), begin = intervals[b][i], origins[b][i]
            if end <= start:
                continue
            rows = query[b, :, i].float().view(Hkv, group, D)
            weight, low = page_weights(
                rows,
                key[b],
                mean[b],
                variance[b],
                start,
                end,
                begin,
                scale=scale,
                softcap=softcap,
                block_size=block_size,
            )
            position, sees = _chosen_positions(
                weight, counts[b, :, i], start, end, begin + low * block_size, block_size
            )
            keys, values = _rows_at(key[b], position), _rows_at(value[b], position)
            scores = final_scores_(rows @ keys.transpose(1, 2), scale, softcap)
            hidden = ~sees[:, None]
            scores.masked_fill_(hidden, -torch.inf)
            attended[b, :, i] = sees.sum(-1, dtype=torch.int32).repeat_interleave(group)
            if want_stats:
                every = final_scores_(rows @ key[b, :, start:end].float().transpose(1, 2), scale, softcap)
                kept, dense = (torch.logsumexp(t, -1).view(Hq, 1) for t in (scores, every))
                empty = torch.zeros(1, dtype=torch.bool, device=query.device)
                stats.record(RowBlock(b, i, i + 1, start, end), kept, dense, empty)
            weights = softmax_(scores.view(Hq, 1, -1), None if logits is None else logits[:, None])
            output[b, :, i] = weighted_values(weights, values)[:, 0].to(output.dtype)
    return output, stats.lse, stats.kept_mass, attended


def page_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    start: int,
    end: int,
    origin: int,
    *,
    scale: float,
    softcap: float,
    block_size: int,
) -> tuple[torch.Tensor, int]:
    """Weights float32 ``[Hkv, P]`` of the visible pages of one query, infinite where always attended, and the first's
    number.

    Args:
        query: float32 ``[Hkv, G, D]``. key: ``[Hkv, Lk, D]``. mean, variance: ``[Hkv, P, D]``.
        start, end: the query's interval. origin: position of the sequence's first key.
    """
    low, own = (start - origin) // block_size, (end - 1 - origin) // block_size
    # All pages between the first and the query's own are whole.
    estimates = page_logits(query, mean[:, low:own].float(), variance[:, low:own].float(), scale, softcap)
    if own > low:
        visible_in_first = block_size - max(start - (origin + low * block_size), 0)
        estimates += math.log(block_size)
        if visible_in_first < block_size:
            estimates[..., 0] += math.log(visible_in_first / block_size)
    last = key[:, max(origin + own * block_size, start) : end].float()
    exact = torch.logsumexp(final_scores_(query @ last.transpose(1, 2), scale, softcap), -1, keepdim=True)
    logits = torch.cat((estimates, exact), -1)
    if bool(logits.sum().isfinite()):
        weight = torch.softmax(logits, -1).sum(1)
    else:
        overwhelming = logits.isnan() | (logits == torch.inf)
        weight = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num_(nan=0.0)
        weight = weight.masked_fill_(overwhelming, torch.inf).sum(1)
    weight[:, 0] = weight[:, -1] = torch.inf
    return weight, low


def _chosen_positions(
    weight: torch.Tensor, count: torch.Tensor, start: int, end: int, begin: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key positions int64 ``[Hkv, C]`` of the ``count [Hkv]`` heaviest pages, ascending, and which of them are seen."""
    pages = weight.shape[-1]
    most = min(pages, max(int(count.max()), min(pages, 2)))
    # Infinite weights tie, and the page of the query must win over any but the first.
    order = torch.sort(weight[:, 1:-1], dim=-1, descending=True, stable=True).indices[:, : max(most - 2, 0)] + 1
    first, own = order.new_zeros(len(order), 1), order.new_full((len(order), 1), pages - 1)
    order = torch.cat((own, order) if pages == 1 else (first, own, order), -1)
    exists = torch.arange(order.shape[-1], device=order.device) < count.clamp(min=2)[:, None]
    order, place = torch.where(exists, order, pages).sort(-1)
    within = torch.arange(block_size, device=weight.device)
    position = (begin + order[..., None] * block_size + within).flatten(1)
    seen = (position >= start) & (position < end) & exists.gather(-1, place).repeat_interleave(block_size, -1)
    return position.clamp_(max(start, 0), end - 1), seen


def _rows_at(tensor: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rows ``position [H, C]`` of ``tensor [H, L, D]`` in float32, ``[H, C, D]``."""
    H, L, D = tensor.shape
    if tensor.stride(2) != 1 or tensor.stride(1) != D or tensor.stride(0) % D:
        return tensor.gather(1, position[..., None].expand(-1, -1, D)).float()
    # One row after another, whatever room there is between the heads.
    heads_apart = tensor.stride(0) // D
    rows = tensor.as_strided(((H - 1) * heads_apart + L, D), (D, 1))
    flat = (position + torch.arange(H, device=position.device)[:, None] * heads_apart).view(-1)
    return rows.index_select(0, flat).view(H, -1, D).float()

"""``window``: the first ``sink_keys`` and the most recent keys, reading no others."""

import torch

from nc_patch.ops.reference import forced_counts
from nc_patch.ops.rows import (
    Buffers,
    RowBlock,
    RowStats,
    final_scores_,
    hide_unseen_,
    row_blocks,
    rows_per_block,
    scores_of,
    softmax_,
    split_scale,
    weighted_values,
)
from nc_patch.ops.triton.launch import launch_attention

# A block of R rows reads up to R - 1 keys more than its budget, so small blocks waste less and large ones call less.
_MOST_ROWS = 128


def torch_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the first ``sink_keys`` and the most recent keys of each interval, ``budget`` in all.

    Arguments and results as in ``torch_topk_attention``; ``recent_keys`` plays no part, since all of the budget but the
    sinks is recent. The kept mass, when wanted, needs the scores of every visible key and costs as much as dense
    attention.
    """
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    before, after = split_scale(scale)
    most_keys = min(Lk, int(budget.max()) + _MOST_ROWS + sink_keys) if budget.numel() and not want_stats else Lk
    rows = rows_per_block(Hq, most_keys, _MOST_ROWS)
    buffers = Buffers(Hq * min(rows, Lq) * most_keys, query.device)
    for block in row_blocks(visible, rows):
        b = block.batch
        seen, allowed = visible[b, block.rows], budget[b, :, block.rows]
        empty = seen[:, 1] <= seen[:, 0]
        first, last = forced_counts(allowed, sink_keys, recent_keys, "window")
        sink_stop, recent_begin = seen[:, 0] + first, seen[:, 1] - last
        occupied = ~empty
        left = min(int(sink_stop[:, occupied].max()), block.high)
        right = max(int(recent_begin[:, occupied].min()), left)
        position = torch.arange(block.low, block.high, device=query.device, dtype=torch.int32)
        position = torch.cat((position[: left - block.low], position[right - block.low :]))
        keys, values = (
            torch.cat((t[b, :, block.low : left], t[b, :, right : block.high]), dim=1).float() for t in (key, value)
        )
        rows_query = query[b, :, block.rows].float() * before
        scores = final_scores_(scores_of(rows_query, keys, buffers), after, softcap)
        unattended = (position < seen[:, :1]) | (position >= seen[:, 1:])
        unattended = unattended | ((position >= sink_stop[..., None]) & (position < recent_begin[..., None]))
        scores.masked_fill_(unattended, -torch.inf)
        if want_stats:
            span = slice(block.low, block.high)
            every = final_scores_(scores_of(rows_query, key[b, :, span].float(), buffers, "dense"), after, softcap)
            place = torch.arange(block.low, block.high, device=query.device, dtype=torch.int32)
            hide_unseen_(every, seen, place)
            stats.record(block, torch.logsumexp(scores, -1), torch.logsumexp(every, -1), empty)
        attended = weighted_values(softmax_(scores, None if logits is None else logits[:, None]), values)
        output[b, :, block.rows] = attended.masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return output, stats.lse, stats.kept_mass


def keep_window_(
    raw: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor, recents: torch.Tensor, block: RowBlock
) -> torch.Tensor:
    """Makes the scores of keys outside the window -inf, in place; returns the shift of the others, zero.

    Args:
        raw: float32 ``[H, R, N]`` against the keys ``block.low:block.high``.
        seen: int32 ``[R, 2]``. sinks, recents: int32 ``[H or 1, R]``, how many first and last keys are attended.
    """
    position = torch.arange(block.low, block.high, device=raw.device, dtype=torch.int32)
    sink_stop, recent_begin = (seen[:, 0] + sinks)[..., None], (seen[:, 1] - recents)[..., None]
    hidden = (
        (position < seen[:, :1]) | (position >= seen[:, 1:]) | ((position >= sink_stop) & (position < recent_begin))
    )
    raw.masked_fill_(hidden, -torch.inf)
    return raw.new_zeros(1, raw.shape[1])


def triton_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of each query over its ``sink_keys`` first and its most recent visible keys, ``budget`` in all.

    Arguments, results and errors are those of ``triton_topk_attention``; ``recent_keys`` changes nothing, since
    whatever the budget leaves after the sinks is recent.
    """
    return launch_attention(
        query,
        key,
        value,
        visible,
        budget,
        sinks,
        by_score=False,
        scale=scale,
        softcap=softcap,
        sink_keys=sink_keys,
        recent_keys=recent_keys,
        want_stats=want_stats,
    )

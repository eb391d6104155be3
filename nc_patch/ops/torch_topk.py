"""Exact token-level ``topk`` attention in PyTorch, in blocks of query rows; with a full budget, dense attention over intervals."""

import torch

from nc_patch.ops.reference import forced_counts
from nc_patch.ops.threshold import kth_largest
from nc_patch.ops.torch_rows import (
    Buffers,
    RowBlock,
    RowStats,
    final_scores_,
    row_blocks,
    rows_per_block,
    scores_of,
    softmax_,
    split_scale,
    weighted_values,
)

# Rows in which scores tie at the threshold are mended in groups of this many elements.
_TIE_ELEMENTS = 1 << 20


def torch_topk_attention(
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
    """Attention over the ``budget`` best keys of each query's interval, as ``reference_attention`` defines ``"topk"``.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]`` or None.
        scale: factor of the scores. softcap: 0 for none. sink_keys, recent_keys: keys attended always.
        want_stats: whether lse and kept mass are wanted.

    Returns:
        (output ``[B, Hq, Lq, Dv]`` in query's dtype, lse float32 ``[B, Hq, Lq]``, kept mass float32 ``[B, Hq, Lq]``); the
        last two are empty unless wanted.
    """
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    before, after = split_scale(scale)
    rows = rows_per_block(Hq, Lk)
    buffers = Buffers(Hq * min(rows, Lq) * Lk, query.device)
    loaded = -1
    for block in row_blocks(visible, rows):
        b = block.batch
        if b != loaded:
            keys, values, loaded = key[b].float(), value[b].float(), b
        seen = visible[b, block.rows]
        raw = scores_of(query[b, :, block.rows].float() * before, keys[:, block.low : block.high], buffers)
        unattended = topk_unattended(raw, seen, budget[b, :, block.rows], block, sink_keys, recent_keys, buffers)
        scores = final_scores_(raw, after, softcap)
        empty = seen[:, 1] <= seen[:, 0]
        if want_stats:
            hidden = ~_seen_columns(seen, block.low, slice(0, block.high - block.low))
            dense = torch.logsumexp(scores.masked_fill(hidden, -torch.inf), -1)
        scores.masked_fill_(unattended, -torch.inf)
        if want_stats:
            stats.record(block, torch.logsumexp(scores, -1), dense, empty)
        attended = weighted_values(softmax_(scores, logits), values[:, block.low : block.high])
        output[b, :, block.rows] = attended.masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return output, stats.lse, stats.kept_mass


def topk_unattended(
    raw: torch.Tensor,
    seen: torch.Tensor,
    budget: torch.Tensor,
    block: RowBlock,
    sink_keys: int,
    recent_keys: int,
    buffers: Buffers,
) -> torch.Tensor:
    """The keys of a row block that ``topk`` leaves out, as a bool mask that broadcasts to ``raw``.

    Args:
        raw: unscaled scores float32 ``[H, R, N]`` against the keys ``block.low:block.high``.
        seen: int32 ``[R, 2]``, the rows' intervals. budget: int32 ``[H or 1, R]``.

    Returns:
        bool ``[H, R, N]``, or ``[1, R, N]`` where every row attends all that it sees.
    """
    N = raw.shape[-1]
    length = (seen[:, 1] - seen[:, 0]).clamp(min=0)
    if bool((budget >= length).all()):
        return ~_seen_columns(seen, block.low, slice(0, N))
    sinks, recents = forced_counts(budget, sink_keys, recent_keys, "topk")
    wanted = budget - sinks - recents
    # Rivals for the rest of the budget are the keys from `begin` to `stop`, int32 [H or 1, R].
    begin, stop = seen[:, 0] + sinks, seen[:, 1] - recents
    inner_low = min(max(int(begin.max()) - block.low, 0), N)
    inner_high = max(min(int(stop.min()) - block.low, N), inner_low)
    edges = (slice(0, inner_low), slice(inner_high, N))

    rivals = buffers.get("rivals", tuple(raw.shape)).copy_(raw)
    for columns in edges:
        rivals[..., columns].masked_fill_(~_rival_columns(begin, stop, block.low, columns), -torch.inf)
    threshold, tied = kth_largest(rivals, wanted)
    unattended = torch.lt(raw, threshold[..., None], out=buffers.get("mask", tuple(raw.shape), torch.bool))
    nothing_wanted = (wanted <= 0).expand(raw.shape[:2])
    if bool(nothing_wanted.any()):
        unattended[nothing_wanted] = True
    _mend_ties_(unattended, raw, threshold, tied, wanted, begin, stop, block.low)
    for columns in edges:
        # Outside the rivals a key is attended exactly where it is seen: it is a sink or recent.
        rival = _rival_columns(begin, stop, block.low, columns)
        hidden = ~_seen_columns(seen, block.low, columns)
        unattended[..., columns] = torch.where(rival, unattended[..., columns], hidden)
    return unattended


def _seen_columns(seen: torch.Tensor, low: int, columns: slice) -> torch.Tensor:
    """bool ``[1, R, C]``: which keys of ``columns``, counted from ``low``, each row sees."""
    position = torch.arange(columns.start + low, columns.stop + low, device=seen.device, dtype=torch.int32)
    return ((position >= seen[:, :1]) & (position < seen[:, 1:]))[None]


def _rival_columns(begin: torch.Tensor, stop: torch.Tensor, low: int, columns: slice) -> torch.Tensor:
    """bool ``[H or 1, R, C]``: which keys of ``columns``, counted from ``low``, lie in [begin, stop)."""
    position = torch.arange(columns.start + low, columns.stop + low, device=begin.device, dtype=torch.int32)
    return (position >= begin[..., None]) & (position < stop[..., None])


def _mend_ties_(
    unattended: torch.Tensor,
    raw: torch.Tensor,
    threshold: torch.Tensor,
    tied: torch.Tensor,
    wanted: torch.Tensor,
    begin: torch.Tensor,
    stop: torch.Tensor,
    low: int,
) -> None:
    """In rows where more keys reach the threshold than are wanted, keeps those above it and the first of those on it."""
    heads, rows = tied.nonzero(as_tuple=True)
    H, _, N = raw.shape
    position = torch.arange(low, low + N, device=raw.device, dtype=torch.int32)
    step = max(1, _TIE_ELEMENTS // N)
    for i in range(0, len(heads), step):
        h, r = heads[i : i + step], rows[i : i + step]
        values, limit = raw[h, r], threshold[h, r][:, None]
        count, first, last = (t.expand(H, -1)[h, r][:, None] for t in (wanted, begin, stop))
        rival = (position >= first) & (position < last)
        above, equal = rival & (values > limit), rival & (values == limit)
        room = count - above.sum(-1, keepdim=True)
        unattended[h, r] = ~(above | (equal & (equal.cumsum(-1) <= room)))

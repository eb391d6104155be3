"""Exact token-level ``topk`` attention in PyTorch, in blocks of query rows; dense where the budget is full."""

import torch

from nc_patch.ops.kth_largest import kth_largest
from nc_patch.ops.means import PageMeans
from nc_patch.ops.reference import forced_counts
from nc_patch.ops.rows import (
    Buffers,
    RowBlock,
    RowStats,
    final_scores_,
    row_blocks,
    rows_per_block,
    scores_of,
    softmax_,
    weighted_values,
)
from nc_patch.ops.torch_tail import join_tail, of_one_origin

# Rows in which scores tie at the threshold are mended in groups of this many elements.
_TIE_ELEMENTS = 1 << 20
# The float32 just below zero: a score that is lower than the threshold at all is dropped, one that equals it is kept.
_BELOW_ZERO = -(2.0**-149)
# Rows whose threshold is further from zero than this are not lowered by it: float32 would lose the scores beside it.
_LARGEST_SHIFT = 8192.0


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
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over the ``budget`` best keys of each query's interval, as ``reference_attention`` defines ``"topk"``.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]`` or None.
        scale: factor of the scores. softcap: 0 for none. sink_keys, recent_keys: keys attended always.
        want_stats: whether lse and kept mass are wanted.
        tail: the means by which keys that are not attended enter, with the ``origin`` int32 ``[B, Lq]`` of each query's
            sequence; None to drop them.

    Returns:
        (output ``[B, Hq, Lq, Dv]`` in query's dtype, lse float32 ``[B, Hq, Lq]``, kept mass float32 ``[B, Hq, Lq]``);
        the last two are empty unless wanted.
    """
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    rows = rows_per_block(Hq, Lk)
    buffers = Buffers(Hq * min(rows, Lq) * Lk, query.device)
    loaded = -1
    blocks = row_blocks(visible, rows)
    for block in blocks if origin is None else of_one_origin(blocks, visible, origin):
        b = block.batch
        if b != loaded:
            keys, values, loaded = key[b].float(), value[b].float(), b
        seen = visible[b, block.rows]
        empty = seen[:, 1] <= seen[:, 0]
        rows_query = query[b, :, block.rows].float()
        scores = scores_of(rows_query, keys[:, block.low : block.high], buffers)
        if want_stats:
            hidden = ~_seen_columns(seen, block.low, slice(0, block.high - block.low))
            dense = torch.logsumexp(final_scores_(scores.clone(), scale, softcap).masked_fill_(hidden, -torch.inf), -1)
        if softcap:
            # A score of -inf is a number once it is soft-capped, and must not look like one that is left out.
            scores.clamp_(min=torch.finfo(torch.float32).min)
        shift = keep_topk_(scores, seen, budget[b, :, block.rows], block, sink_keys, recent_keys, buffers)
        shift = finish_kept_(scores, shift, scale, softcap)
        attended_values = [values[:, block.low : block.high]]
        joined = scores
        if tail is not None and origin is not None:
            begin = int(origin[b, block.first])
            joined, more = join_tail(scores, shift, rows_query, tail, b, begin, seen, block, scale, softcap, buffers)
            attended_values += more
        if want_stats:
            kept = torch.logsumexp(scores, -1) + shift
            every = kept if joined is scores else torch.logsumexp(joined, -1) + shift
            stats.record(block, kept, dense, empty, every)
        weights = softmax_(joined, None if logits is None else logits[:, None] - shift)
        attended = weighted_values(weights, *attended_values)
        output[b, :, block.rows] = attended.masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return output, stats.lse, stats.kept_mass


def finish_kept_(scores: torch.Tensor, shift: torch.Tensor, factor: float, softcap: float) -> torch.Tensor:
    """Scales and soft-caps in place what ``keep_topk_`` left; returns the shift of the final scores."""
    if not softcap:
        scores.mul_(factor)
        return shift * factor
    dropped = scores == -torch.inf
    final_scores_(scores.add_(shift[..., None]), factor, softcap).masked_fill_(dropped, -torch.inf)
    return torch.zeros_like(shift)


def keep_topk_(
    raw: torch.Tensor,
    seen: torch.Tensor,
    budget: torch.Tensor,
    block: RowBlock,
    sink_keys: int,
    recent_keys: int,
    buffers: Buffers,
) -> torch.Tensor:
    """Keeps the scores that ``topk`` attends and makes the others -inf, in place.

    What is kept is lowered by a shift that is constant along a row, which softmax does not see: comparing with the
    threshold is then one vectorised subtraction and one comparison with zero, several times faster than a bool mask on
    a CPU.

    Args:
        raw: unscaled scores float32 ``[H, R, N]`` against the keys ``block.low:block.high``.
        seen: int32 ``[R, 2]``, the rows' intervals. budget: int32 ``[H or 1, R]``.

    Returns:
        The shift, float32 ``[H or 1, R]``.
    """
    H, R, N = raw.shape
    if bool((budget >= (seen[:, 1] - seen[:, 0])).all()):
        inner = _inner_columns(seen[None, :, 0], seen[None, :, 1], block)
        for columns in (slice(0, inner.start), slice(inner.stop, N)):
            raw[..., columns].masked_fill_(~_seen_columns(seen, block.low, columns), -torch.inf)
        return raw.new_zeros(1, R)

    sinks, recents = forced_counts(budget, sink_keys, recent_keys, "topk")
    wanted = budget - sinks - recents
    # Rivals for the rest of the budget are the keys from `begin` to `stop`, int32 [H or 1, R].
    begin, stop = seen[:, 0] + sinks, seen[:, 1] - recents
    inner = _inner_columns(begin, stop, block)
    edges = (slice(0, inner.start), slice(inner.stop, N))
    rivals = buffers.get("rivals", (H, R, N)).copy_(raw)
    for columns in edges:
        rivals[..., columns].masked_fill_(~_columns_between(begin, stop, block.low, columns), -torch.inf)
    threshold, tied = kth_largest(rivals, wanted)

    near = threshold.abs() <= _LARGEST_SHIFT
    shift = torch.where(near, threshold, 0.0)
    # Subtraction cannot tell which of several equal keys come first, nor what lies beside a huge threshold.
    awkward = (tied | (~near & (wanted > 0))).nonzero(as_tuple=True)
    mended = _keep_first_ties(raw, awkward, threshold, shift, wanted, begin, stop, block.low)
    saved = [raw[..., columns].clone() for columns in edges]
    raw.sub_(threshold[..., None])
    torch.threshold_(raw, _BELOW_ZERO, -torch.inf)
    no_rival = wanted <= 0
    if bool(no_rival.any()):
        raw.masked_fill_(no_rival[..., None], -torch.inf)
    raw[awkward] = mended
    for columns, before in zip(edges, saved, strict=True):
        # Outside the rivals a key is attended exactly where it is seen: it is a sink or recent.
        rival = _columns_between(begin, stop, block.low, columns)
        forced = before.sub_(shift[..., None]).masked_fill_(~_seen_columns(seen, block.low, columns), -torch.inf)
        raw[..., columns] = torch.where(rival, raw[..., columns], forced)
    return shift


def _inner_columns(begin: torch.Tensor, stop: torch.Tensor, block: RowBlock) -> slice:
    """The columns that lie in [begin, stop) for every row: only those outside need a mask."""
    N = block.high - block.low
    low = min(max(int(begin.max()) - block.low, 0), N)
    return slice(low, max(min(int(stop.min()) - block.low, N), low))


def _keep_first_ties(
    raw: torch.Tensor,
    at: tuple[torch.Tensor, ...],
    threshold: torch.Tensor,
    shift: torch.Tensor,
    wanted: torch.Tensor,
    begin: torch.Tensor,
    stop: torch.Tensor,
    low: int,
) -> torch.Tensor:
    """Rows ``at`` (heads, rows) of ``raw``, -inf but for rivals above the threshold and the first of those on it."""
    heads, rows = at
    H, _, N = raw.shape
    kept = raw.new_empty(len(heads), N)
    position = torch.arange(low, low + N, device=raw.device, dtype=torch.int32)
    step = max(1, _TIE_ELEMENTS // N)
    for i in range(0, len(heads), step):
        h, r = heads[i : i + step], rows[i : i + step]
        values, limit = raw[h, r], threshold[h, r][:, None]
        count, first, last = (t.expand(H, -1)[h, r][:, None] for t in (wanted, begin, stop))
        rival = (position >= first) & (position < last)
        above, equal = rival & (values > limit), rival & (values == limit)
        room = count - above.sum(-1, keepdim=True)
        attended = above | (equal & (equal.cumsum(-1) <= room)) | (rival & values.isnan())
        kept[i : i + step] = torch.where(attended, values - shift[h, r][:, None], -torch.inf)
    return kept


def _seen_columns(seen: torch.Tensor, low: int, columns: slice) -> torch.Tensor:
    """bool ``[1, R, C]``: which keys of ``columns``, counted from ``low``, each row sees."""
    position = torch.arange(columns.start + low, columns.stop + low, device=seen.device, dtype=torch.int32)
    return ((position >= seen[:, :1]) & (position < seen[:, 1:]))[None]


def _columns_between(begin: torch.Tensor, stop: torch.Tensor, low: int, columns: slice) -> torch.Tensor:
    """bool ``[H or 1, R, C]``: which keys of ``columns``, counted from ``low``, lie in [begin, stop)."""
    position = torch.arange(columns.start + low, columns.stop + low, device=begin.device, dtype=torch.int32)
    return (position >= begin[..., None]) & (position < stop[..., None])

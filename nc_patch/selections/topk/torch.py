"""The scores that ``topk`` keeps of a block of rows, in PyTorch; dense where the budget is full."""

import torch

from nc_patch.ops.kth_largest import kth_largest
from nc_patch.ops.rows import Buffers, Rows

# Rows in which scores tie at the threshold are done again in groups of this many elements.
_TIE_ELEMENTS = 1 << 20
# The float32 just below zero: a score that is lower than the threshold at all is dropped, one that equals it is kept.
_BELOW_ZERO = -(2.0**-149)
# Rows whose threshold is further from zero than this are not lowered by it: float32 would lose the scores beside it.
_LARGEST_SHIFT = 8192.0


def forced_counts(budget: torch.Tensor, sink_keys: int, recent_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many first and how many last visible keys queries with budgets of any shape attend whatever they score.

    Two int tensors of the same shape, together at most the budget. The last keys come first in it.
    """
    recents = budget.clamp(max=recent_keys)
    return (budget - recents).clamp(max=sink_keys), recents


def hide_all_but_best_(
    raw: torch.Tensor, rows: Rows, sinks: torch.Tensor, recents: torch.Tensor, buffers: Buffers
) -> torch.Tensor:
    """Keeps the scores float32 ``[H, R, N]`` of the best keys and makes the others -inf, in place.

    What is kept is lowered by a shift that is constant along a row, which softmax does not see: comparing with the
    threshold is then one vectorised subtraction and one comparison with zero, several times faster than a bool mask on
    a CPU.

    Args:
        sinks, recents: int32 ``[H or 1, R]``, how many first and last keys are attended whatever their scores.

    Returns:
        The shift, float32 ``[H or 1, R]``.
    """
    H, R, N = raw.shape
    seen, budget, low = rows.visible, rows.budget, rows.low
    if bool((budget >= (seen[:, 1] - seen[:, 0])).all()):
        inner = _inner_columns(seen[None, :, 0], seen[None, :, 1], low, N)
        for columns in (slice(0, inner.start), slice(inner.stop, N)):
            raw[..., columns].masked_fill_(~_seen_columns(seen, low, columns), -torch.inf)
        return raw.new_zeros(1, R)

    wanted = budget - sinks - recents
    # Rivals for the rest of the budget are the keys from `begin` to `stop`, int32 [H or 1, R].
    begin, stop = seen[:, 0] + sinks, seen[:, 1] - recents
    inner = _inner_columns(begin, stop, low, N)
    edges = (slice(0, inner.start), slice(inner.stop, N))
    rivals = buffers.get("rivals", (H, R, N)).copy_(raw)
    for columns in edges:
        rivals[..., columns].masked_fill_(~_columns_between(begin, stop, low, columns), -torch.inf)
    threshold, tied = kth_largest(rivals, wanted)

    near = threshold.abs() <= _LARGEST_SHIFT
    shift = torch.where(near, threshold, 0.0)
    # Subtraction cannot tell which of several equal keys come first, nor what lies beside a huge threshold.
    awkward = (tied | (~near & (wanted > 0))).nonzero(as_tuple=True)
    redone = _keep_first_ties(raw, awkward, (threshold, shift, wanted, begin, stop), low)
    saved = [raw[..., columns].clone() for columns in edges]
    raw.sub_(threshold[..., None])
    torch.threshold_(raw, _BELOW_ZERO, -torch.inf)
    no_rival = wanted <= 0
    if bool(no_rival.any()):
        raw.masked_fill_(no_rival[..., None], -torch.inf)
    raw[awkward] = redone
    for columns, before in zip(edges, saved, strict=True):
        # Outside the rivals a key is attended exactly where it is seen: it is a sink or recent.
        rival = _columns_between(begin, stop, low, columns)
        forced = before.sub_(shift[..., None]).masked_fill_(~_seen_columns(seen, low, columns), -torch.inf)
        raw[..., columns] = torch.where(rival, raw[..., columns], forced)
    return shift


def _inner_columns(begin: torch.Tensor, stop: torch.Tensor, low: int, count: int) -> slice:
    """Which of ``count`` columns from ``low`` on lie in [begin, stop) for every row: only those outside need a mask."""
    first = min(max(int(begin.max()) - low, 0), count)
    return slice(first, max(min(int(stop.min()) - low, count), first))


def _keep_first_ties(
    raw: torch.Tensor, at: tuple[torch.Tensor, ...], of_rows: tuple[torch.Tensor, ...], low: int
) -> torch.Tensor:
    """Rows ``at`` (heads, rows) of ``raw``, -inf but for rivals above the threshold and the first of those on it.

    ``of_rows`` are threshold, shift, number wanted, and begin and end of the rivals, ``[H or 1, R]`` each.
    """
    heads, rows = at
    H, _, N = raw.shape
    threshold, shift, wanted, begin, stop = (t.expand(H, -1) for t in of_rows)
    kept = raw.new_empty(len(heads), N)
    position = torch.arange(low, low + N, device=raw.device, dtype=torch.int32)
    step = max(1, _TIE_ELEMENTS // N)
    for i in range(0, len(heads), step):
        h, r = heads[i : i + step], rows[i : i + step]
        values, limit = raw[h, r], threshold[h, r][:, None]
        count, first, last = (t[h, r][:, None] for t in (wanted, begin, stop))
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

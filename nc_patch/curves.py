"""Exact rows of attention as curves: how many keys hold a share of the mass, and what any number of keys keeps.

A row is what one query puts on the keys it sees. Rows are taken a few at a time, so that memory is O(rows * keys),
never Lq * Lk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nc_patch.config import NCConfig
from nc_patch.observed import Observed
from nc_patch.ops.rows import (
    Buffers,
    final_scores_,
    hide_unseen_,
    plain_softmax_,
    rows_per_block,
    scores_of,
    split_scale,
)

# Keys that top-k attends whatever their scores; the curves are of what it would attend by default.
_DEFAULTS = NCConfig(1.0, 1.0)
SMALLEST_KEYS = 8
# A sum that should reach 1 - eps may fall short of it by the rounding of float32 weights.
_ROUNDING = 1e-6


class RowCurves(NamedTuple):
    """What rows of one layer hold; H query heads, R rows, G numbers of keys, E shares of the mass, P probes.

    Attributes:
        visible: int64 ``[R]``, how many keys each row sees.
        support: int32 ``[E, H, R]``, the smallest number of keys that hold the share 1 - eps of the softmax mass.
        kept: float32 ``[G, H, R]``, the mass of the keys that top-k attends with each number of keys.
        error: float32 ``[G, H, R]``, the square of the output's difference from the dense one along the probes, summed
            over them. With standard normal probes its mean is P times the squared norm of the difference.
    """

    visible: torch.Tensor
    support: torch.Tensor
    kept: torch.Tensor
    error: torch.Tensor


def key_grid(longest: int) -> tuple[int, ...]:
    """Numbers of keys at which curves are taken: from ``SMALLEST_KEYS`` in steps of about sqrt(2) up to ``longest``."""
    grid = [SMALLEST_KEYS]
    while grid[-1] < longest:
        grid.append(round(SMALLEST_KEYS * 2 ** (len(grid) / 2)))
    return tuple(grid)


def row_curves(
    call: Observed, rows: torch.Tensor, keys: Sequence[int], eps: Sequence[float], probes: torch.Tensor
) -> RowCurves:
    """The curves of some rows of one attention call, exact but for the rounding of float32 scores.

    The keys of ``kept`` and ``error`` are those of ``"topk"`` with default ``sink_keys`` and ``recent_keys``; those of
    ``support`` are the heaviest ones alone.

    Args:
        call: the call, of one sequence.
        rows: int64 ``[R]``, which queries; each sees at least one key.
        keys: G numbers of keys, ascending, at least ``SMALLEST_KEYS``.
        eps: E shares of the mass that may be missing, in (0, 1).
        probes: float32 ``[P, H, R, Dv]``, directions in which the error of the output is measured.
    """
    Hq, Lk = call.query.shape[1], call.key.shape[2]
    step = rows_per_block(Hq, Lk)
    buffers = Buffers(Hq * min(step, len(rows)) * Lk, call.query.device)
    parts = [
        _curves_of_block(call, rows[first : first + step], keys, eps, probes[:, :, first : first + step], buffers)
        for first in range(0, len(rows), step)
    ]
    return RowCurves(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))


def _curves_of_block(
    call: Observed,
    rows: torch.Tensor,
    keys: Sequence[int],
    eps: Sequence[float],
    probes: torch.Tensor,
    buffers: Buffers,
) -> RowCurves:
    seen = call.visible[0, rows]
    low, high = int(seen[:, 0].min()), int(seen[:, 1].max())
    before, after = split_scale(call.scale)
    position = torch.arange(low, high, device=seen.device, dtype=torch.int32)
    query = call.query[0, :, rows].detach().float() * before
    scores = scores_of(query, call.key[0, :, low:high].detach().float(), buffers)
    scores = hide_unseen_(final_scores_(scores, after, call.softcap or 0.0), seen, position)
    # What a learned sink adds to the denominator, in units of the mass of the keys.
    sink: float | torch.Tensor = 0.0
    if call.sinks is not None:
        sink = torch.exp(call.sinks.detach().float()[:, None] - torch.logsumexp(scores, -1))[None]
    # Stable, so that ties go to the lower position, as in the definition of "topk".
    ordered, order = torch.sort(plain_softmax_(scores), dim=-1, descending=True, stable=True)
    mass = ordered.cumsum(-1, dtype=torch.float64)
    visible = (seen[:, 1] - seen[:, 0]).long()
    support = torch.stack([(mass < 1 - share - _ROUNDING).sum(-1) + 1 for share in eps])

    first, last = seen[:, :1] + _DEFAULTS.sink_keys, seen[:, 1:] - _DEFAULTS.recent_keys
    always = (position < first) | (position >= last)
    forced = always.expand_as(order).gather(-1, order)
    free = ~forced
    count = free.cumsum(-1, dtype=torch.int32)
    number = always.logical_and((position >= seen[:, :1]) & (position < seen[:, 1:])).sum(-1)
    wanted = (torch.tensor(keys, device=seen.device)[None] - number[:, None]).clamp(min=0)  # [R, G]
    place = torch.searchsorted(count, wanted.to(torch.int32).expand(len(order), -1, -1).contiguous())
    place = place.clamp(max=order.shape[-1] - 1)

    def held(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of ordered weights over what each number of keys attends, ``[G, H, R]``, and over all keys."""
        by_rank = (weights * free).cumsum(-1, dtype=torch.float64)
        attended = by_rank.gather(-1, place) + (weights * forced).sum(-1, dtype=torch.float64, keepdim=True)
        return attended.movedim(-1, 0), weights.sum(-1, dtype=torch.float64)[None]

    kept, _ = held(ordered)
    error = torch.zeros_like(kept)
    values = call.value[0, :, low:high].detach().float()
    for probe in probes:
        along = _grouped_product(probe, values).gather(-1, order)
        attended, dense = held(ordered * along)
        error += (attended / (kept + sink) - dense / (1.0 + sink)).square()
    return RowCurves(visible, support.to(torch.int32), kept.clamp(max=1.0).float(), error.float())


def _grouped_product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[Hq, R, D]`` with ``[Hkv, N, D]``, query heads in groups: ``[Hq, R, N]``."""
    Hq, R, D = query.shape
    Hkv = key.shape[0]
    return torch.bmm(query.reshape(Hkv, Hq // Hkv * R, D), key.transpose(1, 2)).view(Hq, R, -1)

"""The tail: keys that ``topk`` does not attend, approximated by means of keys and values instead of dropped.

The keys of a sequence are cut into pages of ``TAIL_PAGE_SIZE``, counted from its origin. For a query a page counts if
it lies within the query's interval and before the page of the query's own position. It enters the softmax as one key,
the mean of the page's keys, with the mean of the page's values, as often as the page has keys that are not attended.

Slot i holds the page that starts at one of the positions ``16 i`` to ``16 i + 15``, of whichever sequence of a row.
"""

from typing import NamedTuple

import torch

TAIL_PAGE_SIZE = 16
# Pages whose keys are copied at once, to bound memory.
_PAGES_AT_ONCE = 4096


class PageMeans(NamedTuple):
    """Means of the keys ``[B, Hkv, S, D]`` and values ``[B, Hkv, S, Dv]`` of whole pages by slot, in their dtypes.

    What a slot without a whole page holds means nothing.
    """

    key: torch.Tensor
    value: torch.Tensor


def slot_count(key_length: int) -> int:
    """How many slots ``key_length`` keys have."""
    return -(-key_length // TAIL_PAGE_SIZE)


def touched_slots(count: int, slots: int) -> int:
    """How many of ``slots`` slots, at most, hold the pages of ``count`` keys side by side."""
    return min((count + TAIL_PAGE_SIZE - 2) // TAIL_PAGE_SIZE + 1, slots) if count > 0 else 0


def page_starts(visible: torch.Tensor, origin: torch.Tensor, key_length: int) -> torch.Tensor:
    """The position at which the page in each slot starts, int64 ``[B, S + 1]``; -1 where there is no whole page.

    The last slot is a spare one: PyTorch takes a size of one for a constant, and a graph of means in one slot would
    serve up to 16 keys only, or more only. Only queries that see a key count. Does not read the device.
    """
    B = visible.shape[0]
    slots = slot_count(key_length) + 1
    nothing = torch.iinfo(torch.int32).min // 2
    begin = torch.where(visible[..., 1] > visible[..., 0], origin, nothing).long()
    padded = slots * TAIL_PAGE_SIZE
    # The sequence that a position belongs to: the last that begins at or before it.
    governing = torch.full((B, padded), nothing, dtype=torch.int64, device=origin.device)
    governing.scatter_reduce_(1, begin.clamp(0, padded - 1), begin, "amax")
    governing = governing.cummax(1).values
    position = torch.arange(padded, device=origin.device)
    starts = (governing > nothing) & ((position - governing) % TAIL_PAGE_SIZE == 0)
    starts[:, max(key_length - TAIL_PAGE_SIZE + 1, 0) :] = False
    last = torch.nn.functional.pad(governing[:, TAIL_PAGE_SIZE - 1 :], (0, TAIL_PAGE_SIZE - 1), value=nothing)
    starts &= governing == last[:, :padded]
    return torch.where(starts, position, -1).view(B, slots, TAIL_PAGE_SIZE).amax(-1)


def page_means(key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> PageMeans:
    """Means over the pages that start at ``starts`` int ``[B, S]``; a negative start gives a mean of other keys."""
    return PageMeans(_mean_of(key, starts), _mean_of(value, starts))


def _mean_of(tensor: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    B, H, N, D = tensor.shape
    means = tensor.new_zeros(B, H, starts.shape[1], D)
    offset = torch.arange(TAIL_PAGE_SIZE, device=tensor.device)
    for first in range(0, starts.shape[1] if N else 0, _PAGES_AT_ONCE):
        pages = slice(first, first + _PAGES_AT_ONCE)
        position = (starts[:, pages].long()[..., None] + offset).clamp_(0, N - 1).flatten(1)
        keys = tensor.gather(2, position[:, None, :, None].expand(-1, H, -1, D)).float()
        # Divided before they are added, so that the sum of finite numbers stays finite.
        means[:, :, pages] = keys.mul_(1 / TAIL_PAGE_SIZE).unflatten(2, (-1, TAIL_PAGE_SIZE)).sum(3)
    return means


def spread_over_pages(grad: torch.Tensor, starts: torch.Tensor, key_length: int) -> torch.Tensor:
    """The gradient ``[B, H, N, D]`` of what ``page_means`` took means of, from that of the means ``[B, H, S, D]``."""
    B, H, _, D = grad.shape
    result = grad.new_zeros(B, H, key_length, D)
    share = torch.where((starts >= 0)[:, None, :, None], grad / TAIL_PAGE_SIZE, 0.0)
    for offset in range(TAIL_PAGE_SIZE if key_length else 0):
        index = (starts.long() + offset).clamp(0, key_length - 1)[:, None, :, None].expand_as(share)
        result.scatter_add_(2, index, share)
    return result

"""The tail: keys that ``topk`` does not attend, approximated by means of keys and values instead of dropped.

The keys of a sequence are cut into pages of ``TAIL_PAGE_SIZE``, counted from its origin. For a query a page counts if
it lies within the query's interval and before the page of the query's own position. It enters the softmax as one key,
the mean of the page's keys, with the mean of the page's values, as often as the page has keys that are not attended.

The means of all pages are kept by slot: slot i holds the page that starts at one of the positions ``16 i`` to
``16 i + 15``. Pages do not overlap, so that several sequences in one row share the slots.
"""

from typing import NamedTuple

import torch

TAIL_PAGE_SIZE = 16


class PageMeans(NamedTuple):
    """Means of the keys ``[B, Hkv, S, D]`` and values ``[B, Hkv, S, Dv]`` of whole pages by slot, in their dtypes.

    What a slot without a whole page holds means nothing.
    """

    key: torch.Tensor
    value: torch.Tensor


def slot_count(key_length: int) -> int:
    """How many slots ``key_length`` keys have."""
    return -(-key_length // TAIL_PAGE_SIZE)


def page_starts(visible: torch.Tensor, origin: torch.Tensor, key_length: int) -> torch.Tensor:
    """The position at which the page in each slot starts, int64 ``[B, S]``; -1 where there is no whole page.

    Args:
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``, where each query's sequence begins. Only queries that
            see a key count.
        key_length: number of keys. Nothing is read back from the device.
    """
    B = visible.shape[0]
    slots = slot_count(key_length)
    nothing = torch.iinfo(torch.int32).min // 2
    begin = torch.where(visible[..., 1] > visible[..., 0], origin, nothing).long()
    padded = slots * TAIL_PAGE_SIZE
    # The sequence that a position belongs to: the last that begins at or before it.
    governing = torch.full((B, padded), nothing, dtype=torch.int64, device=origin.device)
    governing.scatter_reduce_(1, begin.clamp(0, max(padded - 1, 0)), begin, "amax")
    governing = governing.cummax(1).values if padded else governing
    position = torch.arange(padded, device=origin.device)
    starts = (governing > nothing) & ((position - governing) % TAIL_PAGE_SIZE == 0)
    starts[:, max(key_length - TAIL_PAGE_SIZE + 1, 0) :] = False
    last = torch.nn.functional.pad(governing[:, TAIL_PAGE_SIZE - 1 :], (0, TAIL_PAGE_SIZE - 1), value=nothing)
    starts &= governing == last[:, :padded]
    return torch.where(starts, position, -1).view(B, slots, TAIL_PAGE_SIZE).amax(-1)


def page_means(key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> PageMeans:
    """Means of key ``[B, Hkv, N, D]`` and value ``[B, Hkv, N, Dv]`` over the pages that start at int ``[B, S]``.

    A negative start gives a mean of other keys.
    """
    return PageMeans(_mean_of(key, starts), _mean_of(value, starts))


def _mean_of(tensor: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    B, H, N, D = tensor.shape
    sums = torch.zeros(B, H, starts.shape[1], D, dtype=torch.float32, device=tensor.device)
    for offset in range(TAIL_PAGE_SIZE if N else 0):
        index = (starts.long() + offset).clamp(0, N - 1)[:, None, :, None].expand(-1, H, -1, D)
        # Divided before they are added, so that the sum of finite numbers stays finite.
        sums += tensor.gather(2, index).float() / TAIL_PAGE_SIZE
    return sums.to(tensor.dtype)

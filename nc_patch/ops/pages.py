"""Pages: runs of ``block_size`` keys, and the statistics from which decoding chooses among them.

A page's share of a query's softmax is estimated from the mean and the variance of its keys. If they were normal with
independent channels, the mean of ``exp(s * q.k)`` would be ``exp(s * q.mean + s^2 / 2 * sum(q^2 * variance))``.
Pages are counted from the sequence's origin, not from the start of the padded buffer.
"""

from typing import NamedTuple

import torch


class PageStatistics(NamedTuple):
    """Mean and variance of the keys of each page, ``[B, Hkv, P, D]`` in the keys' dtype.

    Page j of a sequence holds the keys at ``origin + j * block_size`` up to ``origin + (j + 1) * block_size``.
    """

    mean: torch.Tensor
    variance: torch.Tensor


def page_count(key_length: int, block_size: int) -> int:
    """How many pages a sequence may have that lies anywhere within ``key_length`` keys."""
    return -(-key_length // block_size)


def summarize_pages(
    key: torch.Tensor, origin: torch.Tensor, end: torch.Tensor, first_page: torch.Tensor, pages: int, block_size: int
) -> PageStatistics:
    """Statistics of ``pages`` pages from ``first_page`` on, over those of their keys that exist.

    Args:
        key: ``[B, Hkv, N, D]``.
        origin: int ``[B]``, where each sequence begins; may be negative, keys before position 0 do not exist.
        end: int ``[B]``, where each sequence ends.
        first_page: int ``[B]``.

    Returns:
        ``[B, Hkv, pages, D]`` twice; zero for a page without keys.
    """
    B, Hkv, N, D = key.shape
    offset = torch.arange(pages * block_size, device=key.device)
    position = (origin.long() + first_page.long() * block_size)[:, None] + offset
    exists = (position >= 0) & (position < end.long().clamp(max=N)[:, None])
    index = position.clamp(0, max(N - 1, 0))[:, None, :, None].expand(-1, Hkv, -1, D)
    weight = exists[:, None, :, None]
    keys = torch.where(weight, key.gather(2, index).float(), 0.0).view(B, Hkv, pages, block_size, D)
    weight = weight.view(B, 1, pages, block_size, 1)
    count = weight.sum(3).clamp(min=1)
    mean = keys.sum(3) / count
    variance = torch.where(weight, keys - mean[:, :, :, None], 0.0).square().sum(3) / count
    return PageStatistics(mean.to(key.dtype), variance.to(key.dtype))


def page_logits(
    query: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Log of the mean of ``exp(score)`` over each page's keys, as estimated: ``[..., R, P]``.

    Args:
        query: ``[..., R, D]``. mean, variance: ``[..., P, D]``. All of one floating dtype.
        scale, softcap: of the scores; a soft-cap is applied to the estimate.
    """
    logits = scale * (query @ mean.transpose(-1, -2))
    logits += (0.5 * scale * scale) * (query.square() @ variance.transpose(-1, -2))
    return softcap * torch.tanh(logits / softcap) if softcap else logits

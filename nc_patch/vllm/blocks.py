"""How a block of vLLM's cache holds keys, values and the statistics of its pages."""

import math

import torch

from nc_patch.paged import PagedKeys
from nc_patch.selections.block.pages import VECTORS


def bytes_per_key(head_size: int, value_size: int, dtype: torch.dtype, page_size: int) -> int:
    """Bytes of a block for each key and head: the key, the value, and a key's share of the statistics of its page.

    These are three vectors of 8-bit codes and three float32 scales, rounded up to whole elements of ``dtype``.
    """
    statistics = VECTORS * (head_size + 4) / page_size
    return (head_size + value_size + math.ceil(statistics / dtype.itemsize)) * dtype.itemsize


def paged_keys(cache: torch.Tensor, head_size: int, value_size: int, page_size: int) -> PagedKeys:
    """Views of a layer's cache ``[blocks, Hkv, N, C]``, C elements for ``bytes_per_key``.

    The memory of a block and head is cut into the keys ``[N, D]``, the values ``[N, Dv]``, and the scales and the codes
    of its N / page_size pages; what is left over at its end stays unused.
    """
    N, pages = cache.shape[2], cache.shape[2] // page_size
    memory = cache.flatten(2)
    key, value, rest = memory.tensor_split([N * head_size, N * (head_size + value_size)], -1)
    scales, codes = rest.view(torch.int8).tensor_split([pages * VECTORS * 4], -1)
    return PagedKeys(
        key.unflatten(-1, (N, head_size)),
        value.unflatten(-1, (N, value_size)),
        codes[..., : pages * VECTORS * head_size].unflatten(-1, (pages, VECTORS, head_size)),
        scales.view(torch.float32).unflatten(-1, (pages, VECTORS)),
        page_size,
    )

"""Floating point operations of prefill, and how many a second the machine's matrix products reach.

A multiplication and an addition are two. Counted are the matrix products alone, over keys that a row sees: what a tile
computes of keys that are masked is not counted, for dense and sparse attention alike.
"""

import statistics

import torch

from nc_patch.bench.inputs import Geometry
from nc_patch.bench.timing import Prepared, seconds_of

_PRODUCTS = 7


def dense_flops(geometry: Geometry, batch: int, length: int) -> int:
    """``4 B Hq D n^2 / 2``: scores and weighted values of half the square."""
    return 2 * batch * geometry.heads * geometry.head_dim * length * length


def attend_flops(geometry: Geometry, attended: int) -> int:
    """Scores and weighted values of ``attended`` pairs of a query and a key, of all heads and rows together."""
    return 4 * geometry.head_dim * attended


def score_flops(geometry: Geometry, batch: int, samples: torch.Tensor) -> int:
    """Scores of the sampled rows of ``"block"``, int32 ``[S]``, against every key that they see."""
    return 2 * batch * geometry.heads * geometry.head_dim * int((samples.long() + 1).sum())


def topk_flops(geometry: Geometry, batch: int, length: int, attended: int) -> int:
    """Scores of half the square, and weighted values of ``attended`` pairs."""
    scores = batch * geometry.heads * length * (length + 1) // 2
    return 2 * geometry.head_dim * (scores + attended)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of the product of two square matrices of ``size``; the median of seven."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right
    prepared = Prepared(lambda: torch.mm(left, right, out=product), 1)
    return 2 * size**3 / statistics.median(seconds_of(prepared, device) for _ in range(_PRODUCTS))

"""The budget law: how many of the n keys that a query may see it attends.

Nothing else evaluates ``alpha * n**C``, for numbers, arrays or tensors. What it is above a whole number by rounding
alone, of which powers differ between devices, is not rounded up.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike

# Tables of one law are of a power of two lengths, so that there are few of them, up to 4 MiB.
_SMALLEST_TABLE, _LARGEST_TABLE = 1024, 1 << 20
# By so much the law in float64 may be too high.
_EXACT = 1 - 2.0**-48


def budget_of(n: int, alpha: float, C: float, min_keys: int = 1, dense_below: int = 0) -> int:
    """Number of keys attended by a query that may see ``n`` keys: ``min(n, max(min_keys, ceil(alpha * n**C)))``.

    All of them where ``n`` is at most ``dense_below``. In float64; arXiv 2404.02690 shows that Ω(n^C) entries suffice.
    Raises ValueError for a negative ``n``.
    """
    if n < 0:
        raise ValueError(f"n must be the number of visible keys, at least 0, got {n}")
    raw = alpha * float(n) ** C * _EXACT
    return n if raw >= n or n <= dense_below else min(n, max(min_keys, math.ceil(raw)))


def budgets(n: ArrayLike, alpha: ArrayLike, C: ArrayLike, min_keys: int = 1, dense_below: int = 0) -> np.ndarray:
    """``budget_of`` of every entry of an array, in its dtype; alpha and C are broadcast against it."""
    n = np.asarray(n)
    found = np.minimum(n, np.maximum(min_keys, np.ceil(law_values(n, alpha, C) * _EXACT)))
    return np.where(n <= dense_below, n, found).astype(n.dtype)


def law_values(n: ArrayLike, alpha: ArrayLike, C: ArrayLike) -> np.ndarray:
    """The law in float64 before it is rounded up and limited; alpha and C are broadcast against n."""
    with np.errstate(over="ignore"):
        return np.asarray(np.multiply(alpha, np.power(np.asarray(n, np.float64), C)))


def is_dense_law(alpha: float, C: float) -> bool:
    """Whether the law gives every query all of its keys at every n (alpha >= 1 with C = 1)."""
    return C == 1.0 and alpha >= 1.0


@torch.library.custom_op("nc_patch::row_budgets", mutates_args=())
def row_budgets(
    visible: torch.Tensor, max_n: int, alphas: list[float], exponents: list[float], min_keys: int, dense_below: int = 0
) -> torch.Tensor:
    """Budgets int32 ``[B, len(alphas), Lq]`` of the queries with intervals ``visible`` int32 ``[B, Lq, 2]``.

    ``max_n`` is the largest number of visible keys. Budgets of one law are read from a table, in two launches on a GPU;
    those of several laws, or for very many keys, are worked out.
    """
    n = visible[..., 1] - visible[..., 0]
    length = max(_SMALLEST_TABLE, 1 << max_n.bit_length())
    if len(alphas) == 1 and length <= _LARGEST_TABLE:
        return _table(length, alphas[0], exponents[0], min_keys, dense_below, visible.device)[n][:, None]
    factors, powers = _laws(tuple(alphas), tuple(exponents), visible.device)
    seen = n.clamp(min=0)[:, None].double()
    found = torch.minimum((factors * seen**powers).ceil_().clamp_(min=min_keys), seen)
    if dense_below:
        found = torch.where(seen <= dense_below, seen, found)
    return found.int()


@row_budgets.register_fake
def _(visible, max_n, alphas, exponents, min_keys, dense_below=0):  # type: ignore[no-untyped-def]
    return visible.new_empty(visible.shape[0], len(alphas), visible.shape[1])


@lru_cache(maxsize=64)
def _table(length: int, alpha: float, C: float, min_keys: int, dense_below: int, device: torch.device) -> torch.Tensor:
    """The budgets of a law by n, int32 ``[length]``."""
    return _to_stay(budgets(np.arange(length), alpha, C, min_keys, dense_below).astype(np.int32), device)


@lru_cache(maxsize=1024)
def _laws(
    alphas: tuple[float, ...], exponents: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors, less what rounding may add, and exponents of several laws, float64 ``[len(alphas), 1]``."""
    factors, powers = np.array(alphas)[:, None] * _EXACT, np.array(exponents)[:, None]
    return _to_stay(factors, device), _to_stay(powers, device)


def _to_stay(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on ``device`` that outlives the call that first needs it, in inference mode and outside.

    It is copied in a thread of its own: inference mode, and the memory pool of a CUDA graph that is being warmed up,
    belong to a thread, and what is allocated in such a pool is overwritten later.
    """
    with torch.inference_mode(False), torch.no_grad():
        host = torch.from_numpy(numbers)
        if device == host.device:
            return host
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(host.to, device).result()

"""The budget law: how many of the n keys that a query may see it attends.

Nothing else evaluates ``alpha * n**C``, for numbers, arrays or tensors.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike

Laws = tuple[tuple[float, float], ...]

# Steps are computed once per law and length class; the next power of two keeps the number of classes small.
_SMALLEST_CLASS = 1024
# The largest n for which the budgets of one law are in a table: 4 MiB.
_LARGEST_TABLE = 1 << 19
# Relative distance to an integer below which the vectorised power is not trusted to round like the scalar one.
_ROUNDING_DOUBT = 1e-9
# Below this exponent the crossing of a law and an integer is computed with too few digits for that.
_SMALL_EXPONENT = 1e-3


def budget_of(n: int, alpha: float, C: float, min_keys: int = 1, dense_below: int = 0) -> int:
    """Number of keys attended by a query that may see ``n`` keys: ``min(n, max(min_keys, ceil(alpha * n**C)))``.

    All of them where ``n`` is at most ``dense_below``. In float64; arXiv 2404.02690 shows that Ω(n^C) entries suffice.
    Raises ValueError for a negative ``n``.
    """
    if n < 0:
        raise ValueError(f"n must be the number of visible keys, at least 0, got {n}")
    raw = alpha * float(n) ** C
    return n if raw >= n or n <= dense_below else min(n, max(min_keys, math.ceil(raw)))


def budgets(n: np.ndarray, alpha: float, C: float, min_keys: int = 1, dense_below: int = 0) -> np.ndarray:
    """``budget_of`` of every entry of an array of integers, int64 of the same shape."""
    found, raw = budgets_for(n, alpha, C, min_keys, dense_below).astype(np.int64).reshape(-1), law_values(n, alpha, C)
    # The vectorised power may differ from the scalar one in the last bit, which matters where it meets an integer.
    for i in np.flatnonzero(_doubtful(np.where(raw < n, raw, 0.5))) if 0.0 < C < 1.0 else ():
        found[i] = budget_of(int(n.flat[i]), alpha, C, min_keys, dense_below)
    return found.reshape(n.shape)


def law_values(n: ArrayLike, alpha: ArrayLike, C: ArrayLike) -> np.ndarray:
    """The law in float64 before it is rounded up and limited; alpha and C are broadcast against n."""
    with np.errstate(over="ignore"):
        return np.asarray(np.multiply(alpha, np.power(np.asarray(n, np.float64), C)))


def budgets_for(n: ArrayLike, alpha: ArrayLike, C: ArrayLike, min_keys: int = 1, dense_below: int = 0) -> np.ndarray:
    """Budgets of an array of n, as whole numbers in float64; alpha and C are broadcast against n.

    They are those of ``budget_of``, but for one key where the law meets an integer to within the rounding of float64.
    """
    found = np.minimum(n, np.maximum(min_keys, np.ceil(law_values(n, alpha, C))))
    return np.where(np.asarray(n) <= dense_below, n, found)


def is_dense_law(alpha: float, C: float) -> bool:
    """Whether the law gives every query all of its keys at every n (alpha >= 1 with C = 1)."""
    return C == 1.0 and alpha >= 1.0


@torch.library.custom_op("nc_patch::row_budgets", mutates_args=())
def row_budgets(
    visible: torch.Tensor, max_n: int, alphas: list[float], exponents: list[float], min_keys: int, dense_below: int = 0
) -> torch.Tensor:
    """Budgets int32 ``[B, len(alphas), Lq]`` of the queries with intervals ``visible`` int32 ``[B, Lq, 2]``.

    ``max_n`` is the largest number of visible keys. Budgets of one law are read from a table, in two launches on a GPU.
    Those of several laws, or for very many keys, are found among the steps of each law, which take less memory.
    """
    n = visible[..., 1] - visible[..., 0]
    laws = tuple(zip(alphas, exponents, strict=True))
    if len(laws) == 1 and max_n < _LARGEST_TABLE:
        return _device_table(_length_class(max_n), laws[0], min_keys, dense_below, visible.device)[n][:, None]
    steps, least = _device_steps(_length_class(max_n), laws, min_keys, visible.device)
    rows = n.reshape(1, -1).expand(len(laws), -1).contiguous()
    counts = torch.searchsorted(steps, rows, right=True, out_int32=True)
    counts = torch.minimum(torch.maximum(counts, least), rows)
    if dense_below:
        counts = torch.where(rows <= dense_below, rows, counts)
    return counts.view(len(laws), *n.shape).transpose(0, 1).contiguous()


@row_budgets.register_fake
def _(visible, max_n, alphas, exponents, min_keys, dense_below=0):  # type: ignore[no-untyped-def]
    return visible.new_empty(visible.shape[0], len(alphas), visible.shape[1])


@lru_cache(maxsize=64)
def _device_table(
    length: int, law: tuple[float, float], min_keys: int, dense_below: int, device: torch.device
) -> torch.Tensor:
    """The budgets of a law by n, int32 ``[length]``."""
    return _to_stay(budgets(np.arange(length), *law, min_keys, dense_below).astype(np.int32), device)


def _length_class(max_n: int) -> int:
    """The length for which steps are computed where ``max_n`` is the largest n: a power of two beyond it."""
    return max(_SMALLEST_CLASS, 1 << max_n.bit_length())


def _doubtful(raw: np.ndarray) -> np.ndarray:
    nearest = np.rint(raw)
    return np.abs(raw - nearest) <= _ROUNDING_DOUBT * np.maximum(nearest, 1.0)


@lru_cache(maxsize=4096)
def _host_steps(length: int, alpha: float, C: float) -> np.ndarray:
    """Where the law without its limits takes one key more: int32 ``[K]``, entry j the smallest n of more than j keys.

    K is what it gives at ``length - 1``, at most ``length``.
    """
    law = lambda n: alpha * float(n) ** C  # noqa: E731
    count = min(math.ceil(law(length - 1)), length)  # no n that is looked up has more keys
    if C == 0.0:
        return np.ones(count, dtype=np.int32)
    with np.errstate(over="ignore"):
        crossing = np.power(np.arange(count, dtype=np.float64) / alpha, 1.0 / C)
    crossing = np.clip(crossing, 0.0, float(length))
    steps = np.maximum(np.floor(crossing) + 1, 1).astype(np.int64)
    # Where the law meets an integer near an integer n, its scalar form decides; so it does where C is so small that
    # the crossing is known to few digits.
    for i in np.flatnonzero(_doubtful(crossing) | (C < _SMALL_EXPONENT)):
        n = int(steps[i])
        while n > 1 and law(n - 1) > i:
            n -= 1
        while n < length and law(n) <= i:
            n += 1
        steps[i] = n
    return steps.astype(np.int32)


@lru_cache(maxsize=1024)
def _device_steps(length: int, laws: Laws, min_keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of several laws, int32 ``[len(laws), K]`` and filled up with a number that no n reaches, and the least
    that each gives, int32 ``[len(laws), 1]``: of a law that gives every key that is all, and it needs no steps.
    """
    unreached = np.iinfo(np.int32).max
    # alpha * n**C / n falls with n: what gives every key at the end does so before.
    whole = [alpha * float(length - 1) ** C >= length - 1 for alpha, C in laws]
    steps = [
        np.empty(0, np.int32) if every else _host_steps(length, alpha, C)
        for (alpha, C), every in zip(laws, whole, strict=True)
    ]
    together = np.full((len(laws), max(1, *map(len, steps))), unreached, dtype=np.int32)
    for line, of_law in zip(together, steps, strict=True):
        line[: len(of_law)] = of_law
    least = np.array([[unreached if every else min_keys] for every in whole], dtype=np.int32)
    return _to_stay(together, device), _to_stay(least, device)


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

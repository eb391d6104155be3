"""The budget law: how many of the n keys that a query may see it attends.

Every other module receives integers from here; nothing else evaluates ``alpha * n**C``.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Law = Literal["power", "log"]
LAWS: tuple[Law, ...] = ("power", "log")
Laws = tuple[tuple[float, float], ...]

# A table is computed once per law and length class; the next power of two keeps the number of tables small.
_SMALLEST_TABLE = 1024
# Relative distance to an integer below which the vectorised power is not trusted to round like the scalar one.
_ROUNDING_DOUBT = 1e-9
# Below this exponent the crossing of a law and an integer is computed with too few digits for that.
_SMALL_EXPONENT = 1e-3


def budget_of(n: int, alpha: float, C: float, min_keys: int = 1, law: Law = "power") -> int:
    """Number of keys attended by a query that may see ``n`` keys.

    ``min(n, max(min_keys, ceil(alpha * n**C)))`` in float64 for ``law="power"`` (arXiv 2404.02690: Ω(n^C) entries
    suffice), and ``ceil(alpha * log2(n))`` in its place for ``law="log"`` (the paper's counter-example, o(log n)).

    Args:
        n: number of visible keys, at least 0.
        alpha: factor, positive.
        C: exponent in [0, 1]; not used by ``law="log"``.
        min_keys: lower limit of the budget, at least 1.
        law: ``"power"`` or ``"log"``.

    Returns:
        The budget, between 0 (only for ``n = 0``) and ``n``.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n must be the number of visible keys, at least 0, got {n}")
    if n == 0:
        return 0
    raw = _law_of(n, alpha, C, law)
    return n if raw >= n else min(n, max(min_keys, math.ceil(raw)))


def _law_of(n: int, alpha: float, C: float, law: Law) -> float:
    """The law without its limits at ``n >= 1``."""
    return alpha * float(n) ** C if law == "power" else alpha * math.log2(n)


def is_dense_law(alpha: float, C: float, law: Law = "power") -> bool:
    """Whether the law gives every query all of its keys at every n (alpha >= 1 with C = 1)."""
    return law == "power" and C == 1.0 and alpha >= 1.0


def _length_class(max_n: int) -> int:
    """The length for which budgets are computed where ``max_n`` is the largest n: a power of two beyond it."""
    return max(_SMALLEST_TABLE, 1 << max_n.bit_length())


@lru_cache(maxsize=4096)
def _host_table(length: int, alpha: float, C: float, min_keys: int, law: Law) -> torch.Tensor:
    """Budgets for n = 0 … length - 1 as int32 ``[length]`` on the host, equal to ``budget_of`` entry by entry."""
    n = np.arange(length, dtype=np.float64)
    with np.errstate(divide="ignore"):
        raw = alpha * np.power(n, C) if law == "power" else alpha * np.log2(n)
    raw = np.clip(raw, 0.0, n)
    table = np.minimum(n, np.maximum(min_keys, np.ceil(raw))).astype(np.int32)
    # The vectorised power may differ from the scalar one in the last bit, which matters where the law meets an integer.
    nearest = np.rint(raw)
    for i in np.flatnonzero(np.abs(raw - nearest) <= _ROUNDING_DOUBT * np.maximum(nearest, 1.0)):
        table[i] = budget_of(int(i), alpha, C, min_keys, law)
    return torch.from_numpy(table)


def _to_stay(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, as one that outlives the call that first needs it.

    It is copied in a thread of its own: inference mode, and the memory pool of a CUDA graph that is being warmed up,
    belong to a thread, and what is allocated in such a pool is overwritten later.
    """
    if device == host.device:
        return host
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(host.to, device).result()


@lru_cache(maxsize=1024)
def _device_table(length: int, laws: Laws, min_keys: int, law: Law, device: torch.device) -> torch.Tensor:
    # Made outside inference mode, so that a table first needed inside it can be used outside.
    with torch.inference_mode(False), torch.no_grad():
        return _to_stay(torch.stack([_host_table(length, alpha, C, min_keys, law) for alpha, C in laws]), device)


def budget_table(
    max_n: int, laws: Laws, min_keys: int = 1, law: Law = "power", device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Budgets for n = 0 … ``max_n`` as int32 ``[len(laws), N]`` on ``device``, N > max_n a power of two; cached.

    Args:
        max_n: the largest n that will be looked up.
        laws: (alpha, C) pairs: one for all heads, or one per query head.
        min_keys, law: as in ``budget_of``.
        device: where the table lies.
    """
    return _device_table(_length_class(max_n), laws, min_keys, law, torch.device(device))


@lru_cache(maxsize=4096)
def _host_steps(length: int, alpha: float, C: float, law: Law) -> np.ndarray:
    """Where the law without its limits takes one key more: int32 ``[K]``, entry j the smallest n of more than j.

    K is what it gives at ``length - 1``, at most ``length``. So as many entries are at most n as the law
    gives n keys, rounded up.
    """
    count = min(math.ceil(_law_of(length - 1, alpha, C, law)), length)  # no n that is looked up has more keys
    j = np.arange(count, dtype=np.float64)
    if law == "power" and C == 0.0:
        return np.ones(count, dtype=np.int32)
    with np.errstate(over="ignore"):
        crossing = np.exp2(j / alpha) if law == "log" else np.power(j / alpha, 1.0 / C)
    crossing = np.clip(crossing, 0.0, float(length))
    steps = np.maximum(np.floor(crossing) + 1, 1).astype(np.int64)
    # Where the law meets an integer near an integer n, its scalar form decides; so it does where C is so small that
    # the crossing is known to few digits.
    nearest = np.rint(crossing)
    doubtful = np.abs(crossing - nearest) <= _ROUNDING_DOUBT * np.maximum(nearest, 1.0)
    if law == "power" and C < _SMALL_EXPONENT:
        doubtful[:] = True
    for i in np.flatnonzero(doubtful):
        n = int(steps[i])
        while n > 1 and _law_of(n - 1, alpha, C, law) > i:
            n -= 1
        while n < length and _law_of(n, alpha, C, law) <= i:
            n += 1
        steps[i] = n
    return steps.astype(np.int32)


@lru_cache(maxsize=1024)
def _device_steps(
    length: int, laws: Laws, min_keys: int, law: Law, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of several laws, int32 ``[len(laws), K]`` and filled up with a number that no n reaches, and the least
    that each gives, int32 ``[len(laws), 1]``: of a law that gives every key that is all, and it needs no steps.
    """
    unreached = np.iinfo(np.int32).max
    # alpha * n**C / n falls with n: what gives every key at the end does so before.
    end = length - 1
    whole = [law == "power" and _law_of(end, alpha, C, law) >= end for alpha, C in laws]
    steps = [
        np.empty(0, np.int32) if every else _host_steps(length, alpha, C, law)
        for (alpha, C), every in zip(laws, whole, strict=True)
    ]
    together = np.full((len(laws), max(1, *map(len, steps))), unreached, dtype=np.int32)
    for line, of_law in zip(together, steps, strict=True):
        line[: len(of_law)] = of_law
    least = np.array([[unreached if every else min_keys] for every in whole], dtype=np.int32)
    with torch.inference_mode(False), torch.no_grad():
        return _to_stay(torch.from_numpy(together), device), _to_stay(torch.from_numpy(least), device)


def row_budgets(visible: torch.Tensor, max_n: int, laws: Laws, min_keys: int = 1, law: Law = "power") -> torch.Tensor:
    """Budgets int32 ``[B, len(laws), Lq]`` of the queries with intervals ``visible`` int32 ``[B, Lq, 2]``.

    One law is looked up in its table. Several, of as many heads, are found among the steps of theirs, which are no more
    than their budgets have keys: tables of a million entries for each of a thousand heads would fill a GPU.
    """
    n = visible[..., 1] - visible[..., 0]
    if len(laws) == 1:
        table = budget_table(max_n, laws, min_keys, law, visible.device)
        return table[:, n.long()].transpose(0, 1).contiguous()
    steps, least = _device_steps(_length_class(max_n), laws, min_keys, law, visible.device)
    rows = n.reshape(1, -1).expand(len(laws), -1).contiguous()
    counts = torch.searchsorted(steps, rows, right=True, out_int32=True)
    return torch.minimum(torch.maximum(counts, least), rows).view(len(laws), *n.shape).transpose(0, 1).contiguous()

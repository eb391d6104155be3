"""The k-th largest value of each row, for a k that differs from row to row.

On the CPU NumPy's vectorised partition is the fastest algorithm, elsewhere ``torch.topk``.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def kth_largest(values: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k``-th largest value of each row, and whether the next one equals it. NaN counts as the largest.

    Args:
        values: float32 ``[H, R, N]``, contiguous. On the CPU its rows are permuted.
        k: int ``[R]`` (shared by all H) or ``[H, R]``, between 0 and N; 0 gives +inf.

    Returns:
        (threshold float32 ``[H, R]``, tied bool ``[H, R]``): where ``tied``, more than k values reach the threshold.
    """
    if values.device.type == "cpu":
        return by_partition_(values, k)
    return by_topk(values, k)


def by_topk(values: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kth_largest`` with ``torch.topk`` over the largest k; leaves ``values`` as they are."""
    H, _, N = values.shape
    k = k.expand(H, -1).long()
    if k.numel() == 0 or N == 0:
        return values.new_full(k.shape, torch.inf), torch.zeros_like(k, dtype=torch.bool)
    best = torch.topk(values, min(N, int(k.max()) + 1), dim=-1).values
    return _around(best, k)


def by_sort(values: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kth_largest`` with a full sort; leaves ``values`` as they are."""
    return _around(torch.sort(values, dim=-1, descending=True).values, k.expand(values.shape[0], -1).long())


def _around(descending: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    last = descending.shape[-1] - 1
    at = torch.gather(descending, -1, (k - 1).clamp(0, last)[..., None])[..., 0]
    after = torch.gather(descending, -1, k.clamp(0, last)[..., None])[..., 0]
    tied = (at == after) & (k > 0) & (k <= last)
    return torch.where(k > 0, at, torch.inf), tied


def by_partition_(values: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kth_largest`` with NumPy's vectorised partition, in place, the heads split over torch's threads."""
    H, R, N = values.shape
    if k.ndim == 2 and k.shape[0] == 1:
        k = k[0]
    at = torch.full((H, R), torch.inf, dtype=torch.float32)
    after = torch.full((H, R), torch.nan, dtype=torch.float32)  # equal to nothing, where there is no next value
    if H == 0 or R == 0 or N == 0:
        return at, torch.zeros(H, R, dtype=torch.bool)
    array, at_array, after_array = values.numpy(), at.numpy(), after.numpy()
    shared = k.ndim == 1
    per_head = [_runs(k.tolist())] * H if shared else [_runs(row) for row in k.tolist()]

    def select(heads: slice) -> None:
        # With one k for all heads, a run of rows is one call over the heads; otherwise it is one call a head.
        for group in [heads] if shared else [slice(h, h + 1) for h in range(heads.start, heads.stop)]:
            for first, last, count in per_head[group.start]:
                if count == 0:
                    continue
                part = array[group, first:last]
                kth = N - count
                # Asking for the next value in the same call would take NumPy's scalar path, eight times slower.
                part.partition(kth, axis=-1)
                at_array[group, first:last] = part[..., kth]
                if kth:
                    after_array[group, first:last] = part[..., :kth].max(axis=-1)

    workers = min(torch.get_num_threads(), H)
    if workers == 1 or values.numel() < (1 << 16):
        select(slice(0, H))
    else:
        bounds = [H * i // workers for i in range(workers + 1)]
        list(_pool(workers).map(select, [slice(a, b) for a, b in itertools.pairwise(bounds)]))
    return at, (at == after) & (k > 0)


def _runs(counts: list[int]) -> list[tuple[int, int, int]]:
    """(first, last, count) for each run of equal neighbours."""
    runs, first = [], 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[first]:
            runs.append((first, i, counts[first]))
            first = i
    return runs


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nc_patch_threshold")

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
    k = k.expand(values.shape[:2]).long()
    if not k.numel() or not values.shape[-1]:
        return values.new_full(k.shape, torch.inf), torch.zeros_like(k, dtype=torch.bool)
    best = torch.topk(values, min(values.shape[-1], int(k.max()) + 1), dim=-1).values
    last = best.shape[-1] - 1
    at, after = (torch.gather(best, -1, rank.clamp(0, last)[..., None])[..., 0] for rank in (k - 1, k))
    tied = (at == after) & (k > 0) & (k <= last)
    return torch.where(k > 0, at, torch.inf), tied


def by_partition_(values: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kth_largest`` with NumPy's vectorised partition, in place, the heads split over torch's threads."""
    H, R, N = values.shape
    if k.ndim == 2 and k.shape[0] == 1:
        k = k[0]
    at = torch.full((H, R), torch.inf, dtype=torch.float32)
    after = torch.full((H, R), torch.nan, dtype=torch.float32)  # equal to nothing, where there is no next value
    if not values.numel():
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
    cuts = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]]
    return [(first, last, counts[first]) for first, last in itertools.pairwise([*cuts, len(counts)])]


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="nc_patch_threshold")

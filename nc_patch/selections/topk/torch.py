"""Which keys of a block of rows score highest, in PyTorch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def forced_counts(budget: torch.Tensor, sink_keys: int, recent_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many first and how many last visible keys queries with budgets of any shape attend whatever they score.

    Two int tensors of the same shape, together at most the budget. The last keys come first in it.
    """
    recents = budget.clamp(max=recent_keys)
    return (budget - recents).clamp(max=sink_keys), recents


def best_rivals(scores: torch.Tensor, rival: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The rivals that score highest, bool ``[H, R, N]``: ties go to the lower position, NaN is as high as +inf.

    Args:
        scores: ``[H, R, N]``. rival: bool ``[H or 1, R, N]``.
        wanted: int ``[H or 1, R]``, how many, at most as many as there are rivals.
    """
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    H, R, N = scores.shape
    wanted = wanted.expand(H, R).long()
    values = scores.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    mixed = (~rival).any(0).any(0).nonzero()[:, 0]  # masks are slow, and most columns need none
    values[..., mixed] = values[..., mixed].masked_fill_(~rival[..., mixed], -torch.inf)
    place, ordered = (N - wanted)[..., None], _ascending(values.clone())
    threshold, below = (ordered.gather(-1, at.clamp(0, N - 1)) for at in (place, place - 1))
    best = values >= threshold.masked_fill_(place == N, torch.nan)  # which nothing reaches
    tied = ((threshold == below) & (place > 0))[..., 0]
    if bool(tied.any()):
        values, threshold, rival = values[tied], threshold[tied], rival.expand_as(best)[tied]
        above, equal = values > threshold, rival & (values == threshold)
        room = wanted[tied][:, None] - above.sum(-1, keepdim=True)
        best[tied] = above | (equal & (equal.cumsum(-1) <= room))
    return best


def _ascending(values: torch.Tensor) -> torch.Tensor:
    """Float values ``[H, R, N]``, sorted along each row, in place; NaN comes last."""
    if values.device.type != "cpu":
        return values.sort(-1).values
    # NumPy's sort takes whole vectors at a time, and is many times faster than PyTorch's.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(np.ndarray.sort, values.numpy()))
    return values

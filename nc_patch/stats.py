"""What a patched model did: calls, attended keys, and what ran dense and why, layer by layer.

Counting never reads the device while the model runs: a call appends small tensors, most of which all layers share, and
the sums are taken when somebody asks.
"""

import functools
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# Pending tensors are folded into one at this number, so that a long generation does not pile them up.
_FOLD_AT = 512


def tally(attended: torch.Tensor, visible: torch.Tensor, tail: int | None) -> torch.Tensor:
    """Counts of a call, float64 ``[6]``: attended keys, visible keys, queries; the same of the last ``tail`` queries.

    Args:
        attended: int32 ``[B, H or 1, Lq]``, averaged over heads.
        visible: int32 ``[B, Lq, 2]``; queries that see nothing are not counted.
        tail: how many of the last queries of the call, or None.
    """
    n = (visible[..., 1] - visible[..., 0]).clamp(min=0).double()
    rows = torch.stack((attended.double().mean(1), n, (n > 0).double()))
    last = rows[..., max(rows.shape[-1] - tail, 0) :] if tail else rows[..., :0]
    return torch.cat((rows.sum((1, 2)), last.sum((1, 2))))


Method = TypeVar("Method", bound=Callable[..., Any])


def _alone(method: Method) -> Method:
    """Makes a method of ``LayerCounters`` wait for the others: threads may run one model at once."""

    @functools.wraps(method)
    def locked(self: "LayerCounters", *arguments: Any, **options: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **options)

    return locked  # type: ignore[return-value]


class LayerCounters:
    """The counters of one attention layer; threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.tail: int | None = None
        self.reset()

    @_alone
    def reset(self) -> None:
        """Sets all counts to zero."""
        self.calls = 0
        self.dense_calls: Counter[str] = Counter()
        self._sums = [0.0] * 6
        self._pending: list[torch.Tensor] = []
        self._untallied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._estimates: list[torch.Tensor] = []
        self._enlarges = False

    @_alone
    def add(self, counts: torch.Tensor, dense_reason: str | None) -> None:
        """Counts one call; ``counts`` as from ``tally``."""
        self._called(dense_reason)
        self._pending.append(counts)
        if len(self._pending) >= _FOLD_AT:
            pending, self._pending = self._pending, []
            self._pending.append(torch.stack(pending).sum(0))

    @_alone
    def add_later(self, attended: torch.Tensor, visible: torch.Tensor) -> None:
        """Counts one call of few queries; ``tally`` is taken of many such calls together. Arguments as there."""
        self._called(None)
        if self._untallied and self._untallied[0][0].shape != attended.shape:
            self._tally()
        self._untallied.append((attended, visible))
        if len(self._untallied) >= _FOLD_AT:
            self._tally()

    @_alone
    def add_estimate(self, estimate: torch.Tensor, enlarges: bool) -> None:
        """Takes what the blocks of a call are estimated to keep.

        Args:
            estimate: float32 ``[Hq, 5]``, columns ``blocks.ESTIMATE_COLUMNS``.
            enlarges: whether a query block may take more than its budget, that is whether there is a ``min_mass``.
        """
        self._enlarges |= enlarges
        self._estimates.append(estimate)
        if len(self._estimates) >= _FOLD_AT:
            self._estimates = [torch.stack(self._estimates).double().sum(0)]

    @_alone
    def estimate(self) -> torch.Tensor | None:
        """The sums of all estimates, float64 ``[Hq, 5]`` on the CPU, None where there were none; reads the device."""
        if not self._estimates:
            return None
        self._estimates = [torch.stack([part.double().cpu() for part in self._estimates]).sum(0)]
        return self._estimates[0]

    @_alone
    def sums(self) -> list[float]:
        """The six sums of ``tally`` over all calls; reads the device."""
        self._tally()
        pending, self._pending = self._pending, []
        for counts in pending:
            self._sums = [a + b for a, b in zip(self._sums, counts.tolist(), strict=True)]
        return list(self._sums)

    def _called(self, dense_reason: str | None) -> None:
        self.calls += 1
        if dense_reason is not None:
            self.dense_calls[dense_reason] += 1

    def _tally(self) -> None:
        untallied, self._untallied = self._untallied, []
        if untallied:
            attended, visible = (torch.cat(tensors) for tensors in zip(*untallied, strict=True))
            self._pending.append(tally(attended, visible, self.tail))

    @_alone
    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold numbers, not tensors of a device or of inference mode.
        self.sums()
        estimate = self.estimate()
        state = self.__dict__ | {"_estimates": [] if estimate is None else estimate.tolist()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state["_estimates"]
        self._lock = threading.RLock()
        self.__dict__.update(state, _estimates=[torch.tensor(rows, dtype=torch.float64)] if rows else [])


def summary(counters: LayerCounters) -> dict[str, Any]:
    """The counts of one layer as a dictionary; fractions are None where nothing was counted."""
    dropped = _dropped_mass(counters.estimate(), counters._enlarges)
    ratios = _ratios(counters.sums())
    return {"calls": counters.calls, **ratios, "dense_calls": dict(counters.dense_calls), "dropped_mass": dropped}


def total(layers: list[LayerCounters]) -> dict[str, Any]:
    """The counts of all layers together."""
    return _ratios([math.fsum(column) for column in zip(*(layer.sums() for layer in layers), strict=True)])


def _dropped_mass(estimate: torch.Tensor | None, enlarges: bool) -> dict[str, Any] | None:
    """The estimated dropped mass of block prefill, with its spread, over all heads and for each.

    The standard error is that of a mean over independent rows; neighbouring rows are alike, and the blocks were chosen
    by these very rows, so that the true figure is a little higher.
    """
    if estimate is None:
        return None
    rows, kept, squares, query_blocks, enlarged = estimate.unbind(-1)

    def mean_and_error(rows: torch.Tensor, kept: torch.Tensor, squares: torch.Tensor) -> tuple[Any, Any]:
        mean = kept / rows
        variance = (squares / rows - mean.square()).clamp(min=0) * rows / (rows - 1)
        return (1 - mean).tolist(), (variance / rows).sqrt().tolist()

    mean, error = mean_and_error(rows.sum(), kept.sum(), squares.sum())
    by_head, error_by_head = mean_and_error(rows, kept, squares)
    return {
        "mean": mean,
        "standard_error": error,
        "mean_by_head": by_head,
        "standard_error_by_head": error_by_head,
        "rows": int(rows[0]),
        "enlarged_fraction": float(enlarged.sum() / query_blocks.sum()) if enlarges else None,
    }


def _ratios(sums: list[float]) -> dict[str, float | None]:
    attended, visible, queries, tail_attended, tail_visible, tail_queries = sums
    ratio = lambda a, b: a / b if b else None  # noqa: E731
    return {
        "attended_fraction": ratio(attended, visible),
        "mean_keys": ratio(attended, queries),
        "tail_attended_fraction": ratio(tail_attended, tail_visible),
        "tail_mean_keys": ratio(tail_attended, tail_queries),
    }

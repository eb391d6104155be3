"""What a patched model did: calls, attended keys, kept mass, and what ran dense and why, layer by layer.

Counting never reads the device while the model runs: a call appends small tensors, most of which all layers share, and
the sums are taken when somebody asks.
"""

import math
from collections import Counter
from typing import Any

import torch

from nc_patch.common import Locked, alone
from nc_patch.mass_counts import PHASES, MassCounts, on_one_device
from nc_patch.mass_counts import total as total_mass

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


class LayerCounters(Locked):
    """The counters of one attention layer; threads may share them."""

    def __init__(self) -> None:
        super().__init__()
        self.tail: int | None = None
        self.warned = False
        self.reset()

    @alone
    def reset(self) -> None:
        """Sets all counts to zero."""
        self.calls = 0
        self.dense_calls: Counter[str] = Counter()
        self._sums = [0.0] * 6
        self._pending: list[torch.Tensor] = []
        self._untallied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mass = {phase: MassCounts() for phase in PHASES}
        self.exceeded_calls = 0

    @alone
    def add(self, counts: torch.Tensor, dense_reason: str | None) -> None:
        """Counts one call; ``counts`` as from ``tally``."""
        self._called(dense_reason)
        self._pending.append(counts)
        if len(self._pending) >= _FOLD_AT:
            pending, self._pending = self._pending, []
            self._pending.append(torch.stack(on_one_device(pending)).sum(0))

    @alone
    def add_later(self, attended: torch.Tensor, visible: torch.Tensor) -> None:
        """Counts one call of few queries; ``tally`` is taken of many such calls together. Arguments as there."""
        self._called(None)
        if self._untallied and self._untallied[0][0].shape != attended.shape:
            self._tally()
        self._untallied.append((attended, visible))
        if len(self._untallied) >= _FOLD_AT:
            self._tally()

    @alone
    def add_exceeded(self) -> None:
        """Counts a call that dropped more than is allowed."""
        self.exceeded_calls += 1

    @alone
    def warn_once(self) -> bool:
        """Whether nobody has asked before: whoever is told so says the warning."""
        first, self.warned = not self.warned, True
        return first

    @alone
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
            attended, visible = (torch.cat(on_one_device(tensors)) for tensors in zip(*untallied, strict=True))
            self._pending.append(tally(attended, visible, self.tail))

    @alone
    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold numbers, not tensors of a device or of inference mode.
        self.sums()
        return super().__getstate__()


def summary(counters: LayerCounters) -> dict[str, Any]:
    """The counts of one layer as a dictionary; fractions are None where nothing was counted."""
    return {
        "calls": counters.calls,
        **_ratios(counters.sums()),
        "dense_calls": dict(counters.dense_calls),
        "exceeded_calls": counters.exceeded_calls,
        "kept_mass": {phase: counts.summary() for phase, counts in counters.mass.items()},
    }


def total(layers: list[LayerCounters]) -> dict[str, Any]:
    """The counts of all layers together."""
    sums = [math.fsum(column) for column in zip(*(layer.sums() for layer in layers), strict=True)]
    mass = {phase: total_mass(layer.mass[phase] for layer in layers) for phase in PHASES}
    return {**_ratios(sums), "kept_mass": mass}


def _ratios(sums: list[float]) -> dict[str, float | None]:
    attended, visible, queries, tail_attended, tail_visible, tail_queries = sums
    ratio = lambda a, b: a / b if b else None  # noqa: E731
    return {
        "attended_fraction": ratio(attended, visible),
        "mean_keys": ratio(attended, queries),
        "tail_attended_fraction": ratio(tail_attended, tail_visible),
        "tail_mean_keys": ratio(tail_attended, tail_queries),
    }

"""The kept mass that calls of a layer are known or estimated to have, summed by head; read when somebody asks.

Two kinds of figure are kept apart until they are reported. *Certified* ones are a lower and an upper limit for every
row; *estimated* ones come from an audit of some rows (``selections/block/audit.py``). Nothing here reads the device
before ``summary``.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nc_patch.common import Locked, alone
from nc_patch.ops.limits import MAX_DECODE_QUERIES
from nc_patch.selections.block.audit import AUDIT_COLUMNS

PHASES = ("prefill", "decode")
# Where a call's figure comes from: computed from every score; bounded by codes; estimated; or all keys were attended.
BASES = ("exact", "bounds", "estimate", "dense")
# Columns of a tally of certified rows: sums over rows, but for the last, which is the least.
_TALLY = ("rows", "lower", "upper", "below", "least")
# Pending tensors are folded into one at this number.
_FOLD_AT = 512
# The normal quantile of two-sided 95 % intervals.
_NORMAL = 1.959964


def tally_bounds(bounds: torch.Tensor, visible: torch.Tensor, limit: float) -> torch.Tensor:
    """Counts of a call, float64 ``[Hq, 5]``, columns ``_TALLY``.

    Args:
        bounds: ``[B, Hq, Lq, 2]``. visible: int32 ``[B, Lq, 2]``; queries that see nothing are not counted.
        limit: kept mass under which a row counts as below.
    """
    seen = (visible[..., 1] > visible[..., 0])[:, None]
    lower, upper = (edge.masked_fill(~seen, 0.0) for edge in bounds.double().unbind(-1))
    below = (lower < limit) & seen
    sums = [t.double().expand_as(lower).sum((0, 2)) for t in (seen, lower, upper, below)]
    return torch.stack((*sums, lower.masked_fill(~seen, 1.0).amin((0, 2))), -1)


class MassCounts(Locked):
    """The kept mass of one layer's calls of prefill, or of decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    @alone
    def reset(self) -> None:
        """Forgets everything."""
        self.calls: Counter[str] = Counter()
        self.limit = 0.0
        self._tallies: list[torch.Tensor] = []
        self._untallied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._audits: list[torch.Tensor] = []
        self._choices: list[torch.Tensor] = []

    @alone
    def add_bounds(self, bounds: torch.Tensor, visible: torch.Tensor, basis: str, limit: float) -> None:
        """Counts a call whose rows' kept mass lies between ``bounds [B, Hq, Lq, 2]``; see ``tally_bounds``."""
        self.calls[basis] += 1
        self.limit = limit
        if bounds.shape[2] > MAX_DECODE_QUERIES:
            self._add_tally(tally_bounds(bounds, visible, limit))
            return
        if self._untallied and self._untallied[0][0].shape != bounds.shape:
            self._tally()
        self._untallied.append((bounds, visible))
        if len(self._untallied) >= _FOLD_AT:
            self._tally()

    @alone
    def add_dense(self, visible: torch.Tensor, num_heads: int) -> None:
        """Counts a call that attends every key: each row keeps all."""
        self.calls["dense"] += 1
        rows = (visible[..., 1] > visible[..., 0]).sum().double()
        whole = torch.ones_like(rows)
        self._add_tally(torch.stack((rows, rows, rows, 0 * rows, whole)).expand(num_heads, -1))

    @alone
    def add_audit(self, audit: torch.Tensor, choice: torch.Tensor | None) -> None:
        """Counts a call of prefill by blocks.

        Args:
            audit: float32 ``[Hq + 1, 5]``, columns ``audit.AUDIT_COLUMNS``.
            choice: ``[query blocks, those that took more than their budget]``, where ``min_mass`` lets them.
        """
        self.calls["estimate"] += 1
        self._audits.append(audit.double())
        self._audits = _folded(self._audits)
        if choice is not None:
            self._choices = _folded([*self._choices, choice.double()])

    @alone
    def certified(self) -> torch.Tensor | None:
        """Counts of all certified rows, float64 ``[Hq, 5]`` on the CPU, or None; reads the device."""
        self._tally()
        if not self._tallies:
            return None
        self._tallies = [_join_tallies([tally.cpu() for tally in self._tallies])]
        return self._tallies[0]

    @alone
    def estimated(self) -> torch.Tensor | None:
        """Sums of all audits, float64 ``[Hq + 1, 5]`` on the CPU, or None; reads the device."""
        if not self._audits:
            return None
        self._audits = [torch.stack([audit.cpu() for audit in self._audits]).sum(0)]
        return self._audits[0]

    @alone
    def summary(self) -> dict[str, Any] | None:
        """What ``nc_stats`` says of these calls, None where there were none; reads the device."""
        overall = _summary([self])
        if overall is None:
            return None
        tally, audit = self.certified(), self.estimated()
        heads = len(tally) if tally is not None else len(audit) - 1  # type: ignore[arg-type]
        by_head = [_interval(*_of_head(tally, audit, head)) for head in range(heads)]
        edges: dict[str, Any] = {
            f"{name}_by_head": [row[name] for row in by_head] for name in ("mean", "lower", "upper")
        }
        least = None if tally is None else tally[:, _TALLY.index("least")].tolist()
        blocks = torch.stack([choice.cpu() for choice in self._choices]).sum(0).tolist() if self._choices else None
        return {
            "calls": dict(self.calls),
            **overall,
            **edges,
            "least_by_head": least,
            "enlarged_fraction": blocks[1] / blocks[0] if blocks and blocks[0] else None,
        }

    def _add_tally(self, tally: torch.Tensor) -> None:
        self._tallies.append(tally)
        if len(self._tallies) >= _FOLD_AT:
            self._tallies = [_join_tallies(self._tallies)]

    def _tally(self) -> None:
        untallied, self._untallied = self._untallied, []
        if untallied:
            bounds, visible = (torch.cat(on_one_device(tensors)) for tensors in zip(*untallied, strict=True))
            self._add_tally(tally_bounds(bounds, visible, self.limit))

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold numbers, not tensors of a device or of inference mode.
        tally, audit = self.certified(), self.estimated()
        lists = {"_tallies": tally, "_audits": audit, "_choices": _sum_of(self._choices)}
        return super().__getstate__() | {name: [] if t is None else t.tolist() for name, t in lists.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {
            name: [torch.tensor(state[name], dtype=torch.float64)] if state[name] else []
            for name in ("_tallies", "_audits", "_choices")
        }
        super().__setstate__(state | tensors)


def total(counts: Iterable[MassCounts]) -> dict[str, Any] | None:
    """The mass of several layers together, every row and head of the same weight; None where nothing was counted."""
    return _summary(list(counts))


def _summary(counts: list[MassCounts]) -> dict[str, Any] | None:
    """Figures over the rows and heads of all ``counts``."""
    sums = [0.0] * 7
    least: float | None = None
    below = 0
    audited = 0
    for one in counts:
        tally, audit = one.certified(), one.estimated()
        if tally is None and audit is None:
            continue
        if tally is not None:
            columns = dict(zip(_TALLY, tally.T.tolist(), strict=True))
            below += int(sum(columns["below"]))
            least = min([*columns["least"], 1.0 if least is None else least])
        if audit is not None:
            audited += int(audit[-1, AUDIT_COLUMNS.index("audited")]) * (len(audit) - 1)
        sums = [a + b for a, b in zip(sums, _of_all_heads(tally, audit), strict=True)]
    if not sums[0] + sums[3]:
        return None
    return {
        **_interval(*sums),
        "certified": sums[3] == 0,
        "rows": int(sums[0] + sums[3]),
        "audited_rows": audited,
        "least": least,
        "below": below,
    }


def _of_all_heads(tally: torch.Tensor | None, audit: torch.Tensor | None) -> list[float]:
    """Arguments of ``_interval``, summed over heads: their estimates come from the same rows, and err together."""
    certified = [0.0] * 3 if tally is None else tally[:, :3].sum(0).tolist()
    if audit is None:
        return [*certified, 0.0, 0.0, 0.0, 0.0]
    rows, kept, variance, freedom, _ = audit[-1].tolist()
    heads = len(audit) - 1
    return [*certified, heads * rows, heads * kept, heads**2 * variance, freedom]


def _of_head(tally: torch.Tensor | None, audit: torch.Tensor | None, head: int) -> list[float]:
    """Arguments of ``_interval`` for one head."""
    certified = [0.0] * 3 if tally is None else tally[head, :3].tolist()
    return [*certified, *([0.0] * 4 if audit is None else audit[head, :4].tolist())]


def _interval(
    rows: float, lower: float, upper: float, estimated_rows: float, kept: float, variance: float, freedom: float
) -> dict[str, float]:
    """Mean kept mass and the interval it lies in: proven, or at 95 % where some of the rows are estimated."""
    total_rows = rows + estimated_rows
    spread = _t_quantile(freedom) * math.sqrt(max(variance, 0.0)) if freedom > 0 else 0.0
    share = lambda mass: min(1.0, max(0.0, mass / total_rows)) if total_rows else 1.0  # noqa: E731
    return {
        "mean": share((lower + upper) / 2 + kept),
        "lower": share(lower + kept - spread),
        "upper": share(upper + kept + spread),
    }


def _t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, within 1 % from three degrees of freedom on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def on_one_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the device of the last: a model may have been moved while it was counted, or be in replicas."""
    return [tensor.to(tensors[-1].device) for tensor in tensors]


def _join_tallies(tallies: list[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(on_one_device(tallies))
    return torch.cat((stacked[..., :-1].sum(0), stacked[..., -1:].amin(0)), -1)


def _folded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack(on_one_device(tensors)).sum(0)] if len(tensors) >= _FOLD_AT else tensors


def _sum_of(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack([tensor.cpu() for tensor in tensors]).sum(0) if tensors else None

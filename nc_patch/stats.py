"""What a patched model did, layer by layer: calls, attended keys, kept mass, and what ran dense and why.

Counting never reads the device while the model runs: a call appends small tensors, which are summed when somebody asks.
"""

import itertools
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nc_patch.common import once, student_quantile
from nc_patch.ops.problem import MAX_DECODE_QUERIES

PHASES = ("prefill", "decode")
# As many pending tensors are folded into one, so that a long generation does not pile them up.
_FOLD_AT = 512
# Held while counts change: threads may share a model.
_LOCK = threading.RLock()
_COLUMNS = ("layer", "calls", "keys", "share", *(f"mass, {phase}" for phase in PHASES), "ran dense")


def tally(attended: torch.Tensor, visible: torch.Tensor, tail: int | None) -> torch.Tensor:
    """Counts of a call, float64 ``[6]``: attended keys, visible keys, queries; the same of the last ``tail`` queries.

    ``attended``, int32 ``[B, H or 1, Lq]``, is averaged over heads. Queries that see nothing, by ``visible`` int32
    ``[B, Lq, 2]``, are not counted.
    """
    n = (visible[..., 1] - visible[..., 0]).clamp(min=0).double()
    rows = torch.stack((attended.double().mean(1), n, (n > 0).double()))
    last = rows[..., max(rows.shape[-1] - tail, 0) :] if tail else rows[..., :0]
    return torch.cat((rows.sum((1, 2)), last.sum((1, 2))))


def tally_bounds(bounds: torch.Tensor, visible: torch.Tensor, limit: float) -> torch.Tensor:
    """The kept mass of a call of certain rows, float64 ``[Hq + 1, 8]``: by head, and of all together.

    Columns: rows; sums of the lower and upper ``bounds``, which are ``[B, Hq, Lq, 2]``; of an estimate its variance,
    degrees of freedom and audited rows; rows below ``limit``; and, the one that is no sum, the least lower bound.
    Queries that see nothing are not counted.
    """
    seen = (visible[..., 1] > visible[..., 0])[:, None].expand(bounds.shape[:3])
    lower, upper = (edge.masked_fill(~seen, 0.0) for edge in bounds.double().unbind(-1))
    rows, lowers, uppers, below = (t.double().sum((0, 2)) for t in (seen, lower, upper, (lower < limit) & seen))
    least = lower.masked_fill(~seen, 1.0).amin((0, 2))
    heads = torch.stack((rows, lowers, uppers, *[torch.zeros_like(rows)] * 3, below, least), -1)
    return torch.cat((heads, _joined(heads)[None]))


def tally_audit(audit: torch.Tensor) -> torch.Tensor:
    """The same of a call whose kept mass is estimated; ``audit`` as in ``AttentionResult``."""
    rows, kept, variance, freedom, audited = audit.double().unbind(-1)
    none = torch.zeros_like(rows)
    return torch.stack((rows, kept, kept, variance, freedom, audited, none, none + math.inf), -1)


def _joined(masses: torch.Tensor) -> torch.Tensor:
    """Lines of kept mass, those along the first dimension in one."""
    return torch.cat((masses[..., :-1].sum(0), masses[..., -1:].amin(0)), -1)


class Sums:
    """A sum of small tensors over calls; adding to it never reads the device."""

    tally: Callable[..., torch.Tensor] = staticmethod(tally)
    join: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda tensors: tensors.sum(0))

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        # Calls of few queries, whose tally is taken together: values, intervals, and the setting of ``tally``.
        self._calls: list[tuple[torch.Tensor, torch.Tensor, Any]] = []

    def add(self, counts: torch.Tensor) -> None:
        """Adds a tensor as ``tally`` makes it."""
        with _LOCK:
            self._counts.append(counts)
            self._fold(_FOLD_AT)

    def add_later(self, values: torch.Tensor, visible: torch.Tensor, setting: Any) -> None:
        """Adds the tally of a call; where it has few queries it is taken of many such calls together.

        Of values for all heads, which many layers have in common, it is taken once.
        """
        if values.shape[2] > MAX_DECODE_QUERIES:
            take = lambda: self.tally(values, visible, setting)  # noqa: E731
            self.add(once(visible, ("tally", values, setting), take) if values.shape[1] == 1 else take())
            return
        with _LOCK:
            self._calls.append((values, visible, setting))
            self._fold(_FOLD_AT)

    def read(self) -> torch.Tensor:
        """The sum, float64 on the CPU; empty where nothing was added. Reads the device."""
        with _LOCK:
            self._fold(1)
            self._counts = [counts.cpu() for counts in self._counts]
            return self._counts[0] if self._counts else torch.empty(0, dtype=torch.float64, device="cpu")

    def _fold(self, least: int) -> None:
        """Makes one tensor of all that waits, where there is as much."""
        if len(self._calls) >= least:
            alike: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for values, visible, setting in self._calls:
                alike[values.shape, setting].append((values, visible))
            self._calls = []
            for (_, setting), calls in alike.items():
                together = (torch.cat(_on_one_device(tensors)) for tensors in zip(*calls, strict=True))
                self._counts.append(self.tally(*together, setting))
        if len(self._counts) >= least:
            self._counts = [self.join(torch.stack(_on_one_device(self._counts)))]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold numbers, not tensors of a device or of inference mode.
        with _LOCK:
            return {**vars(self), "_calls": [], "_counts": [self.read().tolist()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = (numbers for numbers in state["_counts"] if numbers)
        counts = [torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in given]
        vars(self).update(state, _counts=counts)


def _on_one_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the device of the last: a model may have been moved while it was counted, or be in replicas."""
    return [tensor.to(tensors[-1].device) for tensor in tensors]


class MassCounts(Sums):
    """The kept mass of one layer's calls of prefill, or of decoding, as ``tally_bounds`` has it.

    ``calls`` counts them by what their figures rest on: ``"exact"`` where every score was computed, ``"bounds"``,
    ``"estimate"``, or ``"dense"`` where all keys were attended.
    """

    tally = staticmethod(tally_bounds)
    join = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def add_bounds(self, basis: str, bounds: torch.Tensor, visible: torch.Tensor, limit: float) -> None:
        """Counts a call of certain rows; ``basis`` as in ``calls``, the others as in ``tally_bounds``."""
        with _LOCK:
            self.calls[basis] += 1
            self.add_later(bounds, visible, limit)

    def add_audit(self, audit: torch.Tensor) -> None:
        """Counts a call whose kept mass is estimated; ``audit`` as in ``AttentionResult``."""
        with _LOCK:
            self.calls["estimate"] += 1
            self.add(tally_audit(audit))

    def summary(self) -> dict[str, Any] | None:
        """What ``nc_stats`` says of these calls, None where there were none; reads the device."""
        overall = total_mass([self])
        if overall is None:
            return None
        *heads, _ = self.read().tolist()
        names = ("mean", "lower", "upper", "least")
        by_head = {f"{name}_by_head": [_figures(head)[name] for head in heads] for name in names}
        return {"calls": dict(self.calls), **overall, **by_head}


def total_mass(counts: Sequence[MassCounts]) -> dict[str, Any] | None:
    """The mass of several layers together, every row and head of the same weight; None where nothing was counted."""
    lines = [found[-1] for one in counts if len(found := one.read())]
    figures = _figures(_joined(torch.stack(lines)).tolist()) if lines else None
    return figures if figures and figures["rows"] else None


def _figures(line: list[float]) -> dict[str, Any]:
    """Mean kept mass, the interval it lies in, proven or at 95 % where some rows are estimated, and what it is of."""
    rows, lower, upper, variance, freedom, audited, below, least = line
    spread = student_quantile(freedom, 1.959964) * math.sqrt(max(variance, 0.0)) if freedom > 0 else 0.0
    edges = {"mean": (lower + upper) / 2, "lower": lower - spread, "upper": upper + spread}
    return {
        **{name: min(1.0, max(0.0, mass / rows)) if rows else 1.0 for name, mass in edges.items()},
        "certified": not audited,
        "rows": int(rows),
        "audited_rows": int(audited),
        "least": least if least < math.inf else None,
        "below": int(below),
    }


class LayerCounters:
    """The counters of one attention layer."""

    def __init__(self) -> None:
        self.tail: int | None = None
        self.warned = False
        self.reset()

    def reset(self) -> None:
        """Sets all counts to zero."""
        with _LOCK:
            self.calls = self.exceeded_calls = 0
            self.dense_calls: Counter[str] = Counter()
            self.keys = Sums()
            self.mass = {phase: MassCounts() for phase in PHASES}

    def add(self, attended: torch.Tensor, visible: torch.Tensor, dense_reason: str | None = None) -> None:
        """Counts one call; the first arguments as in ``tally``."""
        with _LOCK:
            self.calls += 1
            if dense_reason is not None:
                self.dense_calls[dense_reason] += 1
            self.keys.add_later(attended, visible, self.tail)

    def add_exceeded(self) -> bool:
        """Counts a call that dropped more than is allowed; returns whether it is the first one ever."""
        with _LOCK:
            self.exceeded_calls += 1
            first, self.warned = not self.warned, True
            return first


def summary(counters: LayerCounters) -> dict[str, Any]:
    """The counts of one layer as a dictionary; fractions are None where nothing was counted."""
    return {
        "calls": counters.calls,
        **total([counters]),
        "dense_calls": dict(counters.dense_calls),
        "exceeded_calls": counters.exceeded_calls,
        "kept_mass": {phase: counts.summary() for phase, counts in counters.mass.items()},
    }


def total(layers: Sequence[LayerCounters]) -> dict[str, Any]:
    """The counts of all layers together; fractions are None where nothing was counted."""
    found = [sums.tolist() for layer in layers if len(sums := layer.keys.read())]
    attended, visible, queries, *tail = map(math.fsum, zip(*found, strict=True)) if found else [0.0] * 6
    ratio = lambda a, b: a / b if b else None  # noqa: E731
    return {
        "attended_fraction": ratio(attended, visible),
        "mean_keys": ratio(attended, queries),
        "tail_attended_fraction": ratio(tail[0], tail[1]),
        "tail_mean_keys": ratio(tail[0], tail[2]),
        "kept_mass": {phase: total_mass([layer.mass[phase] for layer in layers]) for phase in PHASES},
    }


class PatchStats(dict[str, Any]):
    """The dictionary of ``nc_stats``; ``print`` shows a line for the model and one for all layers that are alike.

    A kept mass that is estimated, and not certain, has ``~`` before it.
    """

    def __str__(self) -> str:
        layers = self["layers"]
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer in layers:
            alike.setdefault(_row(layer), []).append(layer["layer"])
        every = {**self, "calls": sum(layer["calls"] for layer in layers), "dense_calls": {}}
        rows = [("all", *_row(every))]
        if len(alike) > 1 or any(layer["dense_calls"] for layer in layers):
            rows += [(_ranges(numbers), *row) for row, numbers in alike.items()]
        # Columns in which nothing was counted say nothing.
        table = zip(_COLUMNS, *rows, strict=True)
        columns = [column for column in table if any(text.strip("-") for text in column[1:])]
        widths = [0 if column[0] == _COLUMNS[-1] else max(map(len, column)) for column in columns]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
        lines += [f"left dense: {part['kind']} ({len(part['names'])}): {part['reason']}" for part in self["left_dense"]]
        return "\n".join(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs of them joined, for example ``"0, 2-29"``."""
    runs = (list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]))
    ends = ((run[0][1], run[-1][1]) for run in runs)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _row(counts: dict[str, Any]) -> tuple[str, ...]:
    """What is printed of a layer or of the model, without its number."""
    keys, share = counts["mean_keys"], counts["attended_fraction"]
    masses = (counts["kept_mass"][phase] for phase in PHASES)
    return (
        *(str(counts["calls"]), "-" if keys is None else f"{keys:,.1f}"),
        "-" if share is None else f"{100 * share:.1f} %",
        *("-" if mass is None else f"{'' if mass['certified'] else '~'}{mass['mean']:.4f}" for mass in masses),
        "; ".join(f"{count} of them: {reason}" for reason, count in counts["dense_calls"].items()),
    )

"""What was measured, as tables, sentences and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eval_tasks.bench.measure import ABSENT, FAILED, LEFT_OUT, OK, WRONG, Row
from eval_tasks.bench.operator import Benchmark

matplotlib.use("Agg")  # draws into files; needs no display
_CASE = ["geometry", "batch", "length"]
_MISSING = ["nan", "nanx"]
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"fastest dense": "#000000", "topk": "#D55E00", "block": "#009E73", "window": "#CC79A7"}


def timed(rows: Sequence[Row]) -> pd.DataFrame:
    """Sparse rows, and of each case the fastest dense one, with ``seconds`` and ``speed`` over that dense one.

    ``line`` is the method, or ``"dense"`` whatever its implementation. Empty where nothing was timed.
    """
    found = pd.DataFrame([{"kept_mass": None, "backend": "-"} | row for row in rows if "median_seconds" in row])
    if found.empty:
        return found
    dense = found[found.kind == "dense"]
    dense = dense.loc[dense.groupby(_CASE).median_seconds.idxmin()]
    shown = pd.concat([found[found.kind == "sparse"], dense]).sort_values(_CASE, kind="stable")
    shown["line"] = shown.method.where(shown.kind == "sparse", "dense")
    fastest = dense.set_index(_CASE).median_seconds.rename("fastest")
    shown = shown.join(fastest, on=_CASE)
    return shown.assign(speed=shown.fastest / shown.median_seconds)


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """From which length on each selection is faster than the fastest dense, per geometry and batch.

    ``length`` is interpolated in the logarithms between the longest measured length at which it is not faster and the
    next one; None where it is not faster at the longest, or faster already at the shortest (``says`` tells which).
    """
    shown, found = timed(rows), []
    if not shown.empty:
        sparse = shown[(shown.kind == "sparse") & shown.speed.notna()]
        for (geometry, batch, method), of in sparse.groupby(["geometry", "batch", "method"], sort=False):
            crossing, says = _crossing(list(zip(of.length, 1 / of.speed, strict=True)))
            found.append({"geometry": geometry, "batch": batch, "selection": method, "length": crossing, "says": says})
    return found


def text(rows: Sequence[Row], benchmark: Benchmark) -> str:
    """The times of all cases, crossovers, and everything that did not run or not as meant."""
    shown, lines = timed(rows), []
    if not shown.empty:
        columns = {
            "model": shown.geometry,
            "batch": shown.batch,
            "keys": shown.length.map("{:,}".format),
            "budget": shown.budget.map("{:,}".format),
            "method": shown.method,
            benchmark.unit: (benchmark.per_second * shown.median_seconds).map("{:,.1f}".format),
            "over dense": shown.speed.map("{:.2f}x".format),
            "kept mass": shown.kept_mass.astype(float).map("{:.3f}".format),
            "backend": shown.backend,
        }
        table = pd.DataFrame(columns).replace(_MISSING, "-")
        lines += [table.to_string(index=False), "(kept mass: share of the dense softmax that is attended)"]
    lines += ["", "Faster than the fastest dense:"]
    lines += [f"  {c['selection']:7} {c['geometry']}, batch {c['batch']}: {c['says']}" for c in crossovers(rows)]
    missing = dict.fromkeys(_problem(row) for row in rows if row["status"] != OK or row.get("captured") is False)
    return "\n".join([*lines, *(["Did not run, or not as meant:", *missing] if missing else [])])


def draw(rows: Sequence[Row], benchmark: Benchmark, title: str, path: Path) -> None:
    """Writes the plot: time by length, sparse and the fastest dense, one panel per geometry and batch."""
    panels = list(timed(rows).groupby(["geometry", "batch"], sort=False))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((geometry, batch), panel) in zip(axes, panels, strict=True):
        times = panel.assign(time=benchmark.per_second * panel.median_seconds).pivot_table("time", "length", "line")
        times = times.rename(columns={"dense": "fastest dense"}).rename_axis(columns=None)
        times.plot(ax=axis, style="o-", color=_COLOURS, loglog=True, grid=True)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(times.index, [f"{n:,}" for n in times.index], rotation=45)
        axis.set(title=f"{geometry}, batch {batch}", xlabel="keys", ylabel=benchmark.unit)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def failures(rows: Sequence[Row]) -> int:
    """How many rows there are in which sparse attention failed or was wrong."""
    return sum(row["kind"] != "dense" and row["status"] in (FAILED, WRONG) for row in rows)


def _crossing(ratios: Sequence[tuple[int, float]]) -> tuple[int | None, str]:
    last = max((i for i, (_, ratio) in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return None, f"at every length measured, from {ratios[0][0]:,} keys on"
    if last == len(ratios) - 1:
        return None, f"not up to {ratios[last][0]:,} keys, where it takes {ratios[last][1]:.2f} times as long"
    (n, slower), (m, faster) = ratios[last], ratios[last + 1]
    part = math.log(slower) / (math.log(slower) - math.log(faster))
    length = round(n * (m / n) ** part)
    return length, f"from about {length:,} keys on (measured: not at {n:,}, {1 / faster:.2f} times at {m:,})"


def _problem(row: Row) -> str:
    if row["status"] == ABSENT:
        return f"  {row['method']}: {row['message']}"
    if row["status"] == LEFT_OUT:
        return f"  {row['method']} ({row['geometry']}, batch {row['batch']}): left out beyond: {row['message']}"
    where = f"{row['geometry']}, batch {row['batch']}, {row['length']:,} keys"
    what = "not captured in a CUDA graph" if row["status"] == OK else row["status"]
    return f"  {row['method']} ({where}): {what}: {row['message']}"

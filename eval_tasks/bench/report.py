"""What was measured, as tables, sentences and a plot."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eval_tasks.bench.measure import OK, Row

matplotlib.use("Agg")  # draws into files; needs no display
_UNIT = "milliseconds a layer"
_CASE = ["geometry", "batch", "length"]
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"fastest dense": "#000000", "topk": "#D55E00", "block": "#009E73", "window": "#CC79A7"}


def timed(rows: Sequence[Row]) -> pd.DataFrame:
    """Sparse rows, and of each case the fastest dense one, with ``speed`` over that dense one.

    ``line`` is the selection, or ``"fastest dense"``. Empty where nothing was timed.
    """
    found = pd.DataFrame([{"kept_mass": None, "backend": "-"} | row for row in rows if "median_seconds" in row])
    if found.empty:
        return found
    dense = found[found.kind == "dense"]
    dense = dense.loc[dense.groupby(_CASE).median_seconds.idxmin()]
    shown = pd.concat([found[found.kind == "sparse"], dense]).sort_values(_CASE, kind="stable")
    shown["line"] = shown.method.where(shown.kind == "sparse", "fastest dense")
    shown = shown.join(dense.set_index(_CASE).median_seconds.rename("fastest"), on=_CASE)
    return shown.assign(speed=shown.fastest / shown.median_seconds)


def text(rows: Sequence[Row]) -> str:
    """The times of all cases, and everything that did not run or is wrong."""
    shown, lines = timed(rows), []
    if not shown.empty:
        columns = {
            "model": shown.geometry,
            "batch": shown.batch,
            "keys": shown.length.map("{:,}".format),
            "budget": shown.budget.map("{:,}".format),
            "method": shown.method,
            _UNIT: (1e3 * shown.median_seconds).map("{:,.3f}".format),
            "over dense": shown.speed.map("{:.2f}x".format),
            "kept mass": shown.kept_mass.astype(float).map("{:.3f}".format),
            "backend": shown.backend,
        }
        table = pd.DataFrame(columns).replace(["nan", "nanx"], "-")
        lines += [table.to_string(index=False), "(kept mass: share of the dense softmax that is attended)"]
    if missing := list(dict.fromkeys(_problem(row) for row in rows if row["status"] != OK)):
        lines += ["", "Not run, or wrong:", *missing]
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes the plot: time by length, sparse and the fastest dense, one panel per geometry and batch."""
    panels = list(timed(rows).groupby(["geometry", "batch"], sort=False))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((geometry, batch), panel) in zip(axes, panels, strict=True):
        times = panel.assign(time=1e3 * panel.median_seconds).pivot_table("time", "length", "line")
        times.rename_axis(columns=None).plot(ax=axis, style="o-", color=_COLOURS, loglog=True, grid=True)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(times.index, [f"{n:,}" for n in times.index], rotation=45)
        axis.set(title=f"{geometry}, batch {batch}", xlabel="keys", ylabel=_UNIT)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _problem(row: Row) -> str:
    where = f"{row['geometry']}, batch {row['batch']}, {row['length']:,} keys"
    return f"  {row['method']} ({where}): {row['status']}: {row['message']}"

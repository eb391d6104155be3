"""What was measured, as tables, sentences and a plot."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eval_tasks.bench.measure import OK, Row

matplotlib.use("Agg")  # draws into files; needs no display
_UNIT = "milliseconds a layer"
_CASE = ["geometry", "batch", "length"]
_LINE = ["geometry", "batch", "line"]
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"fastest dense": "#000000", "topk": "#D55E00", "block": "#009E73", "window": "#CC79A7"}


def timed(rows: Sequence[Row]) -> pd.DataFrame:
    """Sparse rows, and of each case the fastest dense one, with ``speed`` over that dense one.

    ``line`` is the selection, or ``"fastest dense"``. Empty where nothing was timed.
    """
    columns = {"kept_mass": None, "backend": "-", "peak_bytes": None}
    found = pd.DataFrame([columns | row for row in rows if "median_seconds" in row])
    if found.empty:
        return found
    dense = found[found.kind == "dense"]
    dense = dense.loc[dense.groupby(_CASE).median_seconds.idxmin()]
    shown = pd.concat([found[found.kind == "sparse"], dense]).sort_values(_CASE, kind="stable")
    shown["line"] = shown.method.where(shown.kind == "sparse", "fastest dense")
    shown = shown.join(dense.set_index(_CASE).median_seconds.rename("fastest"), on=_CASE)
    return shown.assign(speed=shown.fastest / shown.median_seconds)


def exponents(rows: Sequence[Row]) -> list[Row]:
    """The exponent of time in n of each selection and the fastest dense, fitted to all lengths, where two or more."""
    shown, found = timed(rows), []
    for (geometry, batch, line), of in shown.groupby(_LINE, sort=False) if len(shown) else ():
        if len(of) > 1:
            slope = float(np.polyfit(np.log(of.length), np.log(of.median_seconds), 1)[0])
            found.append({"geometry": geometry, "batch": batch, "method": line, "exponent": slope})
    return found


def text(rows: Sequence[Row]) -> str:
    """The times of all cases, how they grow, and everything that did not run or not as meant."""
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
            "MB": (shown.peak_bytes.astype(float) / 1e6).map("{:,.0f}".format),
            "kept mass": shown.kept_mass.astype(float).map("{:.3f}".format),
            "backend": shown.backend,
        }
        table = pd.DataFrame(columns).replace(["nan", "nanx"], "-")
        table = table.loc[:, (table != "-").any()]
        lines += [table.to_string(index=False), "(kept mass: share of the dense softmax that is attended;"]
        lines += [" MB: what a step allocates beside inputs and indexes, on a GPU)"]
    grown = [f"  n^{g['exponent']:.2f}  {g['method']} ({g['geometry']}, batch {g['batch']})" for g in exponents(rows)]
    missing = list(dict.fromkeys(_problem(row) for row in rows if row["status"] != OK or row.get("message")))
    for title, found in (("Time grows with the number of keys as", grown), ("Not run, or not as meant:", missing)):
        lines += ["", title, *found] if found else []
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

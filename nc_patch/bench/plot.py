"""The plot: time by length, sparse and dense. Needs matplotlib, which nothing else here does."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display

import matplotlib.backends.backend_agg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nc_patch.bench.benchmark import Wording
from nc_patch.bench.cases import Row
from nc_patch.bench.report import fastest_dense, groups, sparse_row

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"dense": "#000000", "topk": "#D55E00", "block": "#009E73", "window": "#CC79A7"}


def draw(rows: Sequence[Row], selections: Sequence[str], wording: Wording, title: str, path: Path) -> None:
    """Writes the plot: one panel per geometry and batch; dotted, what the counts take at the machine's ceiling."""
    panels = list(groups(rows))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (group, lengths) in zip(axes, panels, strict=True):
        for name in ("dense", *selections):
            found = [
                fastest_dense(rows, group, n) if name == "dense" else sparse_row(rows, group, n, name) for n in lengths
            ]
            ran = [row for row in found if row and "median_seconds" in row]
            if not ran:
                continue
            x, colour = [row["length"] for row in ran], _COLOURS[name]
            label = "fastest dense" if name == "dense" else name
            axis.plot(x, [wording.per_second * row["median_seconds"] for row in ran], "o-", color=colour, label=label)
            limit = [wording.per_second * row["median_seconds"] * row["roofline_fraction"] for row in ran]
            axis.plot(x, limit, ":", color=colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        axis.set(title=f"{group[0]}, batch {group[1]}", xlabel="keys", ylabel=wording.unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{title}; dotted: {wording.counts}", fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})

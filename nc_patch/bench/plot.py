"""``decode.png``: time of a step by length, sparse and dense. Needs matplotlib, which nothing else here does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no display

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nc_patch.bench.report import fastest_dense, groups, sparse_row

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {"dense": "#000000", "topk": "#D55E00", "block": "#009E73", "window": "#CC79A7"}


def draw(rows: Sequence[dict[str, Any]], selections: Sequence[str], bandwidth: float, title: str, path: Path) -> None:
    """Writes the plot: one panel per geometry and batch; dotted, what the bytes take at the bandwidth of a copy."""
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
            axis.plot(x, [1e6 * row["median_seconds"] for row in ran], "o-", color=colour, label=label)
            axis.plot(x, [1e6 * row["bytes"] / bandwidth for row in ran], ":", color=colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        axis.set(title=f"{group[0]}, batch {group[1]}", xlabel="keys", ylabel="microseconds a step and layer")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{title}; dotted: bytes at the bandwidth of a copy", fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Software": None})

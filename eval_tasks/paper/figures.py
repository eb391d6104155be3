"""The pictures of docs/paper.md, drawn from what the measurements wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eval_tasks.figures import Line, Panel, draw

Record = dict[str, Any]
# Okabe and Ito's colours, which people with any colour vision tell apart; dashed lines are not of the paper's law.
_LAWS = {
    "fixed": ("fixed k", "#777777", "--"), "log n": ("k ∝ log n", "#0072B2", "--"),
    "n^0.25": ("k ∝ n^0.25", "#56B4E9", "-"), "n^0.5": ("k ∝ n^0.5", "#D55E00", "-"),
    "n^0.75": ("k ∝ n^0.75", "#009E73", "-"), "n^1": ("k ∝ n", "#CC79A7", "-"),
    "zero": ("answering zero", "#000000", ":"),
}  # fmt: skip
_OF_ROWS = {
    "weight_error": "largest error of a weight", "relative_error.shared": "relative error, values from inputs",
    "kept_mass": "dropped mass",
}  # fmt: skip
_OF_MODEL = {
    "kept_mass": "dropped mass", "relative_error": "relative output error", "output_error": "largest output error",
}  # fmt: skip


def figures(synthetic: Record | None, model: Record | None) -> dict[str, Figure]:
    """Name → picture, of the records that there are."""
    found = {}
    if synthetic:
        for name, spread in (("bounded", "sigma=2"), ("growing", "s=0.707")):
            found[name] = _by_length([row for row in synthetic["errors"] if row["spread"] == spread], _OF_ROWS)
    if model:
        found["model"] = _by_length(model["errors"], _OF_MODEL)
    return found


def _by_length(rows: Sequence[Record], losses: Mapping[str, str]) -> Figure:
    """A panel for each loss, with a line for each law through the means, and their intervals."""
    panels = []
    for loss, title in losses.items():
        lines = []
        for law, (label, colour, style) in _LAWS.items():
            own = [row for row in rows if row["law"] == law]
            if own and (law, loss) != ("zero", "kept_mass"):
                values = [np.subtract(1, row[loss])[[0, 2, 1]] if loss == "kept_mass" else row[loss] for row in own]
                mean, *ends = np.array(values).T
                drawn = {"color": colour, "linestyle": style, "yerr": np.abs(np.array(ends) - mean), "capsize": 2}
                lines.append(Line(label, pd.Series(mean, [row["n"] for row in own]), drawn))
        panels.append(Panel(title, lines, x_label="n, keys"))
    return draw(panels)

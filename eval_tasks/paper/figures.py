"""The pictures of docs/paper.md, drawn from what the measurements wrote."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval_tasks.figures import Line, Panel, draw
from eval_tasks.paper.synthetic import growing_spread, mass_share

Record = dict[str, Any]
# Okabe and Ito's colours, which people with any colour vision tell apart; dashed lines are not of the paper's law.
_BLUE, _SKY, _RED, _GREEN, _ROSE = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7"
_LAWS = {
    "fixed": ("fixed k", "#777777", "--"), "log n": ("k ∝ log n", _BLUE, "--"), "n^0.25": ("k ∝ n^0.25", _SKY, "-"),
    "n^0.5": ("k ∝ n^0.5", _RED, "-"), "n^0.75": ("k ∝ n^0.75", _GREEN, "-"), "n^1": ("k ∝ n", _ROSE, "-"),
    "zero": ("answering zero", "#000000", ":"),
}  # fmt: skip
_SPREADS = {
    "sigma=2": ("σ = 2", "#000000"), "sigma=4": ("σ = 4", "#777777"), "s=0.5": ("s² = 0.25", _SKY),
    "s=0.707": ("s² = 0.5", _RED), "s=0.866": ("s² = 0.75", _GREEN), "s=1.2": ("s² = 1.44", _ROSE),
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
            rows = [row for row in synthetic["errors"] if row["spread"] == spread]
            found[name] = _by_length(rows, _OF_ROWS)
        found["exponents"] = _exponents(synthetic)
    if model:
        found |= {"model": _by_length(model["errors"], _OF_MODEL), "heads": _heads(model)}
    if synthetic and model:
        found["mixed"] = _mixed(synthetic["mixed"]["rows"], model["mixed"]["rows"])
    return found


def _by_length(rows: Sequence[Record], losses: Mapping[str, str]) -> Figure:
    """A panel for each loss, with a line for each law."""
    panels = []
    for loss, title in losses.items():
        lines = []
        for law, (label, colour, style) in _LAWS.items():
            own = [row for row in rows if row["law"] == law]
            if own and (law, loss) != ("zero", "kept_mass"):
                values = [np.subtract(1, row[loss])[[0, 2, 1]] if loss == "kept_mass" else row[loss] for row in own]
                lines.append(_bars(label, [row["n"] for row in own], values, color=colour, linestyle=style))
        panels.append(Panel(title, lines, sorted({row["n"] for row in rows}), x_label="n, keys"))
    return draw(panels)


def _exponents(record: Record) -> Figure:
    """The slopes of both supports against the spread: measured, and expected in the limit or over these lengths."""
    lengths, grid = np.array(record["lengths"]), np.linspace(0, 1.25, 200)
    rows = [row for row in record["exponents"] if row["spread"].startswith("s=")]
    s = [float(row["spread"].removeprefix("s=")) for row in rows]
    unfrozen = grid[grid <= 1]
    counts = [np.maximum(1, n * mass_share(growing_spread(n, unfrozen), 0.05)) for n in lengths]
    expected = np.polyfit(np.log(lengths), np.log(counts), 1)[0]
    measured = {"linestyle": "", "marker": "o"}
    lines = [
        Line("1 − s²", grid, np.maximum(0, 1 - grid**2), {"color": _RED}),
        Line("expected here", unfrozen, expected, {"color": _BLUE, "linestyle": "--"}),
        _bars("exp(entropy)", s, [row["entropy"] for row in rows], color=_RED, **measured),
        _bars("95 % of the mass", s, [row["mass 0.95"] for row in rows], color=_BLUE, **measured),
    ]
    title = f"C over n = {lengths[0]:,} … {lengths[-1]:,}"
    return draw([Panel(title, lines, x_label="s, where σ² = s²·2·ln n")])


def _heads(record: Record) -> Figure:
    """How many keys hold 95 % of the mass by length, and the exponents of all heads, by layer."""
    counts, slopes = [], []
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(record["layers"])))
    for layer, colour in zip(record["layers"], colours, strict=True):
        heads = [head for head in record["heads"] if head["layer"] == layer]
        held = np.median([head["counts"]["mass 0.95"] for head in heads], axis=0)
        C = [head["exponents"]["mass 0.95"][0] for head in heads]
        counts.append(Line(f"layer {layer}", record["lengths"], held, {"color": colour, "marker": "o"}))
        slopes.append(Line("", [layer] * len(C), C, {"color": colour, "linestyle": "", "marker": "o", "alpha": 0.5}))
        slopes.append(Line("", [layer - 0.5, layer + 0.5], [np.median(C)] * 2, {"color": "#000000"}))
    first = Panel("keys with 95 % of the mass, by layer", counts, record["lengths"])
    return draw([first, Panel("their C: a dot a head, line: median", slopes, x_label="layer")])


def _mixed(spreads: Record, losses: Record) -> Figure:
    """Loss against the exponent of the budget at equal mean cost: its mean over lengths, and the worst length's."""
    gaussian = [(*style, spreads[name]["dropped_mass"]) for name, style in _SPREADS.items()]
    names = {"dropped_mass": "dropped mass", "relative_error": "relative error", "output_error": "largest error"}
    colours = _RED, _BLUE, _GREEN
    of_model = [(name, colour, losses[loss]) for (loss, name), colour in zip(names.items(), colours, strict=True)]
    shown: dict[str, Callable[[Record], float]] = {
        "mean over lengths": lambda row: row["loss"],
        "worst length": lambda row: max(row["by_length"]),
    }
    panels = []
    for inputs, drawn in (("Gaussian inputs", gaussian), ("the model", of_model)):
        for what, loss in shown.items():
            lines = [
                Line(label, [row["C"] for row in rows], [loss(row) / loss(rows[0]) for row in rows], {"color": colour})
                for label, colour, rows in drawn  # of which the first row is the fixed budget
            ]
            panels.append(
                Panel(f"{inputs}, {what}: loss over the fixed budget's", lines, x_label="C at equal mean cost")
            )
    return draw(panels, columns=2)


def _bars(label: str, x: Sequence[float], estimates: Sequence[Sequence[float]], **style: Any) -> Line:
    """A line through means, with their intervals."""
    mean, *ends = np.array(estimates).T
    return Line(label, x, mean, style | {"yerr": np.abs(np.array(ends) - mean), "capsize": 2})

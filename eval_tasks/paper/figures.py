"""The pictures of docs/paper.md, drawn from what the measurements wrote."""

from collections.abc import Callable, Collection, Sequence
from itertools import product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eval_tasks.figures import logarithmic_y
from eval_tasks.paper.synthetic import growing_spread, mass_share

Record = dict[str, Any]
Rows = Sequence[Record]

# Okabe and Ito's colours, which people with any colour vision tell apart.
_LAWS = {
    "fixed": ("k = {keys}, fixed", "#999999", "s--"),
    "log n": ("k ∝ log n", "#0072B2", "v--"),
    "n^0.25": ("k ∝ n^0.25", "#56B4E9", "o-"),
    "n^0.5": ("k ∝ n^0.5", "#D55E00", "o-"),
    "n^0.75": ("k ∝ n^0.75", "#009E73", "o-"),
    "n^1": ("k ∝ n", "#CC79A7", "^-"),
    "zero": ("answering zero", "#000000", ":"),
}
_SPREADS = {
    "sigma=2": ("σ = 2 at every n", "#000000"),
    "sigma=4": ("σ = 4 at every n", "#999999"),
    "s=0.5": ("σ² = 0.25 · 2 ln n", "#56B4E9"),
    "s=0.707": ("σ² = 0.5 · 2 ln n", "#D55E00"),
    "s=0.866": ("σ² = 0.75 · 2 ln n", "#009E73"),
    "s=1.2": ("σ² = 1.44 · 2 ln n", "#CC79A7"),
}
_TITLES = {
    "dropped_mass": "dropped mass",
    "relative_error": "relative output error",
    "output_error": "largest output error",
    "weight_error": "largest error of an attention weight",
    "relative_error.shared": "relative output error, values from the inputs",
}
_OF_ROWS = ("weight_error", "relative_error.shared", "dropped_mass")
_OF_MODEL = {"dropped_mass": "#D55E00", "relative_error": "#0072B2", "output_error": "#009E73"}


def figures(synthetic: Record | None, model: Record | None) -> dict[str, Figure]:
    """Name → picture, of the records that there are."""
    found = {}
    if synthetic:
        rows = {name: [row for row in synthetic["errors"] if row["spread"] == name] for name in ("sigma=2", "s=0.707")}
        title = "Bounded weights: scores N(0, σ²) with σ = 2 at every n"
        found["bounded"] = _by_length(title, rows["sigma=2"], _OF_ROWS, linear=_OF_ROWS[1:])
        title = "Spread that grows: scores N(0, ln n), whose entropy support is n^0.5"
        found["growing"] = _by_length(title, [row for row in rows["s=0.707"] if row["law"] != "zero"], _OF_ROWS)
        found["exponents"] = _exponents(synthetic)
    if model:
        title = f"{model['model']}: exact top-k, {len(model['layers'])} layers, all laws equal at one length"
        found["model"] = _by_length(title, model["errors"], _OF_MODEL, linear=_OF_MODEL)
        found["heads"] = _heads(model)
    if synthetic and model:
        found["mixed"] = _mixed(synthetic, model)
    return found


def _by_length(title: str, rows: Rows, losses: Collection[str], linear: Collection[str] = ()) -> Figure:
    """A panel for each loss, with a line for each law."""
    figure, axes = _frame(1, 3, title)
    for axis, loss in zip(axes, losses, strict=True):
        for place, (law, (label, colour, style)) in enumerate(_LAWS.items()):
            own = [row for row in rows if row["law"] == law]
            if own and (law, loss) != ("zero", "dropped_mass"):
                # Moved a little, so that intervals of equal budgets stand side by side.
                x = [row["n"] * 2 ** (0.03 * (place - len(_LAWS) // 2)) for row in own]
                label = label.format(keys=max(row["budget"] for row in own))
                _bars(axis, x, own, loss, fmt=style, color=colour, elinewidth=0.8, capsize=2, label=label)
        _log_lengths(axis, sorted({row["n"] for row in rows}))
        axis.set_title(_TITLES[loss])
        if loss in linear:
            axis.set_ylim(bottom=0)
        else:
            logarithmic_y(axis)
    _shared_legend(figure, axes[0])
    return figure


def _exponents(record: Record) -> Figure:
    figure, (axis,) = _frame(1, 1)
    lengths = np.array(record["lengths"])
    rows = [row for row in record["exponents"] if row["spread"].startswith("s=")]
    s = [float(row["spread"].removeprefix("s=")) for row in rows]
    grid = np.linspace(0, 1.25, 200)
    axis.plot(grid, np.maximum(0, 1 - grid**2), color="#D55E00", label="1 − s²")
    _bars(axis, s, rows, "entropy", fmt="o", color="#D55E00", label="entropy support, measured")
    _bars(axis, s, rows, "mass 0.95", fmt="s", color="#0072B2", label="keys that hold 95 %, measured")
    unfrozen = grid[grid <= 1]
    counts = [np.maximum(1, n * mass_share(growing_spread(n, unfrozen), 0.05)) for n in lengths]
    label = "keys that hold 95 %, expected over these n"
    axis.plot(unfrozen, np.polyfit(np.log(lengths), np.log(counts), 1)[0], color="#0072B2", linestyle="--", label=label)
    title = f"exponent fitted over n = {lengths[0]:,} … {lengths[-1]:,}"
    axis.set(title=title, xlabel="s, where σ² = s²·2·ln n", ylabel="C", ylim=(-0.05, 1.5))
    axis.legend(fontsize=9, loc="upper right")
    return figure


def _heads(record: Record) -> Figure:
    figure, (counts, slopes) = _frame(1, 2, f"{record['model']}: how many keys hold 95 % of the mass")
    layers, lengths = record["layers"], record["lengths"]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    for place, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        heads = [head for head in record["heads"] if head["layer"] == layer]
        held = np.array([head["counts"]["mass 0.95"] for head in heads])
        C = [head["exponents"]["mass 0.95"][0] for head in heads]
        counts.plot(lengths, np.median(held, axis=0), "o-", color=colour, label=f"layer {layer}")
        slopes.plot([place] * len(C), C, "o", color=colour, alpha=0.5, markersize=5)
        slopes.plot([place - 0.3, place + 0.3], [np.median(C)] * 2, color="#000000", linewidth=2)
    _log_lengths(counts, lengths)
    logarithmic_y(counts)
    counts.set(title="median over heads", ylabel="keys")
    slopes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    slopes.set(title="C fitted to them; a dot a head, line: median", xlabel="layer", ylabel="C")
    _shared_legend(figure, counts)
    return figure


def _mixed(synthetic: Record, model: Record) -> Figure:
    """Loss against the exponent of the budget at equal mean cost: its mean over lengths, and the worst length's."""
    figure, axes = _frame(2, 2)
    spreads, losses = synthetic["mixed"]["rows"], model["mixed"]["rows"]
    gaussian = [(label, colour, spreads[name]["dropped_mass"]) for name, (label, colour) in _SPREADS.items()]
    of_model = [(_TITLES[name], colour, losses[name]) for name, colour in _OF_MODEL.items()]
    what: dict[str, Callable[[Record], float]] = {
        "mean over all lengths": lambda row: row["loss"],
        "at the worst length": lambda row: max(row["by_length"]),
    }
    kinds = {"Gaussian inputs: dropped mass": gaussian, model["model"]: of_model}
    for axis, ((inputs, lines), (of, loss)) in zip(axes, product(kinds.items(), what.items()), strict=True):
        for label, colour, rows in lines:
            relative = [loss(row) / loss(rows[0]) for row in rows]  # the first is the fixed budget
            axis.plot([row["C"] for row in rows], relative, "o-", color=colour, label=label)
        axis.axhline(1.0, color="#000000", linewidth=1.0, linestyle=":")
        axis.set(xlabel="C of k = α·n^C, α set for equal mean cost", ylabel="loss relative to the fixed budget's")
        axis.set_title(f"{inputs}, {of}")
        axis.legend(fontsize=9)
        if lines is gaussian:
            logarithmic_y(axis)
    return figure


def _frame(rows: int, columns: int, title: str = "") -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=((5.6 if columns < 3 else 4.4) * columns, 4.2 * rows), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _bars(axis: Axes, x: Sequence[float], rows: Rows, name: str, **style: Any) -> None:
    """A loss or count of each row, with its interval."""
    mean, low, high = np.array([row["kept_mass" if name == "dropped_mass" else name] for row in rows]).T
    if name == "dropped_mass":
        mean, low, high = 1 - mean, 1 - high, 1 - low
    axis.errorbar(x, mean, np.maximum(0.0, (mean - low, high - mean)), markersize=5, **style)


def _shared_legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(10, len(labels)))


def _log_lengths(axis: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic x axis with a mark at every length, 2,048 as 2k."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    words = [f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}k" if n >= 1024 else f"{n}" for n in lengths]
    axis.set_xticks(lengths, words)
    axis.set_xlabel("n, keys")

"""The pictures of docs/paper.md, drawn from what the measurements wrote."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; needs no display

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eval_tasks.figures import logarithmic_y
from eval_tasks.paper.theory import entropy_support, growing_spread, mass_share, support_exponent
from eval_tasks.smollm2 import SMOLLM2

Record = dict[str, Any]
Rows = Sequence[Record]

# Okabe and Ito's colours, which people with any colour vision tell apart.
_LAWS = {
    "fixed": ("k = {keys}, fixed", "#999999", "s", "--"),
    "log n": ("k ∝ log n", "#0072B2", "v", "--"),
    "n^0.25": ("k ∝ n^0.25", "#56B4E9", "o", "-"),
    "n^0.5": ("k ∝ n^0.5", "#D55E00", "o", "-"),
    "n^0.75": ("k ∝ n^0.75", "#009E73", "o", "-"),
    "n^1": ("k ∝ n", "#CC79A7", "^", "-"),
    "zero": ("answering zero", "#000000", "", ":"),
}
_SPREADS = {
    "sigma=2": ("σ = 2 at every n", "#000000"),
    "sigma=4": ("σ = 4 at every n", "#999999"),
    "s=0.5": ("σ² = 0.25 · 2 ln n", "#56B4E9"),
    "s=0.707": ("σ² = 0.5 · 2 ln n", "#D55E00"),
    "s=0.866": ("σ² = 0.75 · 2 ln n", "#009E73"),
    "s=1.2": ("σ² = 1.44 · 2 ln n", "#CC79A7"),
}
_SUPPORT_SPREADS = ("sigma=1", "sigma=2", "sigma=4", "s=0.5", "s=0.707", "s=0.866", "s=1.2")
# The bounded and the growing spread that the pictures of errors show; n^0.5 is just what the latter needs.
_BOUNDED, _GROWING = "sigma=2", "s=0.707"
# Octaves between the points of one law and those of the next.
_SIDESTEP = 0.03
# A mean and the ends of its interval, None where there is no interval.
Value = Callable[[Record], Sequence[Any]]


def synthetic_figures(record: Record) -> dict[str, Figure]:
    """Name → picture of ``synthetic.json``."""
    return {
        "bounded": _bounded(record),
        "growing": _growing(record),
        "exponents": _exponents(record),
    }


def model_figures(record: Record) -> dict[str, Figure]:
    """Name → picture of ``model.json``."""
    return {"heads": _heads(record), "model": _model(record)}


def mixed_figure(synthetic: Record, model: Record) -> Figure:
    """Loss against the exponent of the budget at equal mean cost: its mean over lengths, and the worst length's."""
    figure, axes = _panels(2, 2)
    what: tuple[tuple[str, Callable[[Record], float]], ...] = (
        ("mean over all lengths", lambda row: row["loss"]),
        ("at the worst length", lambda row: max(row["by_length"])),
    )
    for axis, (title, loss) in zip(axes[:2], what, strict=True):
        for spread, (label, colour) in _SPREADS.items():
            own = synthetic["mixed"]["rows"][spread]["dropped_mass"]
            _against_fixed(axis, own, loss, label, colour, "o")
        axis.set(title=f"Gaussian inputs: dropped mass, {title}")
        logarithmic_y(axis)
    for axis, (title, loss) in zip(axes[2:], what, strict=True):
        for name, label, colour, marker in (
            ("dropped_mass", "dropped mass", "#D55E00", "o"),
            ("relative_error", "relative output error", "#0072B2", "s"),
            ("output_error", "largest output error", "#009E73", "^"),
        ):
            _against_fixed(axis, model["mixed"]["rows"][name], loss, label, colour, marker)
        axis.set(title=f"{_model_title(model)}: {title}")
    for axis in axes:
        axis.axhline(1.0, color="#000000", linewidth=1.0, linestyle=":")
        axis.set(xlabel="C of k = α·n^C, α set for equal mean cost", ylabel="loss relative to the fixed budget's")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    axes[2].legend(fontsize=9)
    return figure


def _bounded(record: Record) -> Figure:
    figure, axes = _panels(2, 2)
    rows = [row for row in record["errors"] if row["spread"] == _BOUNDED]
    panels: tuple[tuple[str, Value], ...] = (
        ("largest error of an attention weight", lambda row: row["weight_error"]),
        ("largest output error, values independent of keys", lambda row: row["output_error.independent"]),
        ("largest output error, values from the same inputs", lambda row: row["output_error.shared"]),
        ("dropped mass", _dropped),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        shown = [row for row in rows if value is not _dropped or row["law"] != "zero"]
        _by_length(axis, shown, value, title, logarithmic=value is not _dropped)
    _shared_legend(figure, axes[0])
    figure.suptitle("Bounded weights: scores N(0, σ²) with σ = 2 at every n")
    return figure


def _growing(record: Record) -> Figure:
    figure, axes = _panels(1, 3)
    rows = [row for row in record["errors"] if row["spread"] == _GROWING and row["law"] != "zero"]
    panels: tuple[tuple[str, Value], ...] = (
        ("largest error of an attention weight", lambda row: row["weight_error"]),
        ("relative output error, values from the inputs", lambda row: row["relative_error.shared"]),
        ("dropped mass", _dropped),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        _by_length(axis, rows, value, title, logarithmic=True)
    _shared_legend(figure, axes[0])
    figure.suptitle("Spread that grows: scores N(0, ln n), whose entropy support is n^0.5")
    return figure


def _model(record: Record) -> Figure:
    figure, axes = _panels(1, 3)
    panels: tuple[tuple[str, Value], ...] = (
        ("relative output error", lambda row: row["relative_error"]),
        ("largest output error", lambda row: row["output_error"]),
        ("dropped mass", _dropped),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        _by_length(axis, record["errors"], value, title, logarithmic=False)
        axis.set_ylim(bottom=0)
    _shared_legend(figure, axes[0])
    title = f"exact top-k, {len(record['layers'])} layers, all laws equal at one length"
    figure.suptitle(f"{_model_title(record)}: {title}")
    return figure


def _exponents(record: Record) -> Figure:
    figure, axes = _panels(1, 2)
    lengths = np.array(record["lengths"])
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(_SUPPORT_SPREADS)))
    for name, colour in zip(_SUPPORT_SPREADS, colours, strict=True):
        rows = [row for row in record["supports"] if row["spread"] == name]
        axes[0].errorbar(
            [row["n"] for row in rows], [row["entropy"][0] for row in rows], _bars(row["entropy"] for row in rows),
            fmt="o", markersize=5, color=colour, label=_spread_title(name),
        )  # fmt: skip
        dense = np.geomspace(lengths[0], lengths[-1], 100)
        expected = np.array([entropy_support(n, _sigma(name, n)) for n in dense])
        axes[0].plot(dense, np.where(expected > 1, expected, np.nan), color=colour, linewidth=1.2)
    _log_lengths(axes[0], lengths)
    axes[0].set_yscale("log")
    axes[0].set(title="entropy support exp(H); lines: n·exp(−σ²/2)", ylabel="keys")
    axes[0].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    slopes = [row for row in record["exponents"] if row["spread"].startswith("s=")]
    s = np.array([float(row["spread"].removeprefix("s=")) for row in slopes])
    grid = np.linspace(0, max(s) * 1.05, 200)
    axes[1].plot(grid, [support_exponent(x) for x in grid], color="#D55E00", label="1 − s²")
    for name, label, colour, marker in (
        ("entropy", "entropy support, measured", "#D55E00", "o"),
        ("mass 0.95", "keys that hold 95 %, measured", "#0072B2", "s"),
    ):
        bars = _bars(row[name] for row in slopes)
        axes[1].errorbar(s, [row[name][0] for row in slopes], bars, fmt=marker, color=colour, label=label)
    unfrozen = grid[grid <= 1]
    finite = [
        np.polyfit(np.log(lengths), [np.log(max(1.0, n * mass_share(growing_spread(n, x), 0.05))) for n in lengths], 1)[
            0
        ]
        for x in unfrozen
    ]
    axes[1].plot(unfrozen, finite, color="#0072B2", linestyle="--", label="keys that hold 95 %, expected over these n")
    title = f"exponent fitted over n = {lengths[0]:,} … {lengths[-1]:,}"
    axes[1].set(title=title, xlabel="s, where σ² = s²·2·ln n", ylabel="C", ylim=(-0.05, 1.5))
    axes[1].grid(alpha=0.3)
    axes[1].legend(fontsize=9, loc="upper right")
    return figure


def _heads(record: Record) -> Figure:
    figure, axes = _panels(1, 3)
    layers, lengths = record["layers"], record["lengths"]
    colours = dict(zip(layers, matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers))), strict=True))
    for place, layer in enumerate(layers):
        heads = [head for head in record["heads"] if head["layer"] == layer]
        counts = np.median([head["counts"]["mass 0.95"] for head in heads], axis=0)
        axes[0].plot(lengths, counts, "o-", color=colours[layer], label=f"layer {layer}")
        slopes = [head["exponents"]["mass 0.95"][0] for head in heads]
        axes[1].plot([place] * len(slopes), slopes, "o", color=colours[layer], alpha=0.5, markersize=5)
        axes[1].plot([place - 0.3, place + 0.3], [np.median(slopes)] * 2, color="#000000", linewidth=2)
        expected = [head["counts"]["normal 0.95"][-1] for head in heads]
        measured = [head["counts"]["mass 0.95"][-1] for head in heads]
        axes[2].plot(expected, measured, "o", color=colours[layer], label=f"layer {layer}")
    _log_lengths(axes[0], lengths)
    logarithmic_y(axes[0])
    axes[0].set(title="keys that hold 95 %, median over heads", ylabel="keys")
    _shared_legend(figure, axes[0])
    axes[1].set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes[1].set(title="C fitted to them; a dot a head, line: median", xlabel="layer", ylabel="C")
    axes[1].axhline(1.0, color="#000000", linewidth=1, linestyle=":")
    axes[1].axhline(0.0, color="#000000", linewidth=1, linestyle=":")
    axes[1].grid(alpha=0.3)
    axes[2].set(xscale="log", yscale="log", xlabel="keys expected from normal scores", ylabel="keys measured")
    axes[2].axline((10, 10), (100, 100), color="#000000", linewidth=1, linestyle=":")
    axes[2].set_title(f"the same at n = {lengths[-1]:,}, a dot a head")
    axes[2].grid(alpha=0.3)
    figure.suptitle(f"{_model_title(record)}: how many keys hold the mass")
    return figure


def _against_fixed(
    axis: Axes, rows: Rows, loss: Callable[[Record], float], label: str, colour: str, marker: str
) -> None:
    fixed = next(loss(row) for row in rows if row["C"] == 0.0)
    axis.plot(
        [row["C"] for row in rows], [loss(row) / fixed for row in rows], "-", marker=marker, color=colour, label=label
    )


def _dropped(row: Record) -> Sequence[Any]:
    mean, low, high = row["kept_mass"]
    return 1 - mean, None if high is None else 1 - high, None if low is None else 1 - low


def _by_length(axis: Axes, rows: Rows, value: Value, title: str, logarithmic: bool) -> None:
    for place, (name, (_, colour, marker, line)) in enumerate(_LAWS.items()):
        own = [row for row in rows if row["law"] == name]
        if own:
            # Moved a little, so that intervals of equal budgets stand side by side.
            x = [row["n"] * 2 ** (_SIDESTEP * (place - len(_LAWS) // 2)) for row in own]
            axis.errorbar(
                x, [value(row)[0] for row in own], _bars(value(row) for row in own), color=colour, marker=marker,
                linestyle=line, markersize=5, elinewidth=0.8, capsize=2, label=_law_title(name, own),
            )  # fmt: skip
    _log_lengths(axis, sorted({row["n"] for row in rows}))
    if logarithmic:
        logarithmic_y(axis)
    axis.set_title(title)


def _law_title(name: str, rows: Rows) -> str:
    return _LAWS[name][0].format(keys=max(row["budget"] for row in rows))


def _bars(estimates: Iterable[Sequence[Any]]) -> np.ndarray | None:
    """Distances of the intervals' ends from the means, ``[2, …]``, or None where there are no intervals."""
    found = list(estimates)
    if any(low is None for _, low, _ in found):
        return None
    mean, low, high = np.array(found, dtype=np.float64).T
    return np.maximum(0.0, np.stack((mean - low, high - mean)))


def _shared_legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(10, len(labels)))


def _model_title(record: Record) -> str:
    return "SmolLM2" if record["model"] == SMOLLM2 else str(record["model"])


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=((5.6 if columns < 3 else 4.4) * columns, 4.2 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _log_lengths(axis: Axes, lengths: "Sequence[int] | np.ndarray") -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(lengths, [_short(int(n)) for n in lengths])
    axis.set_xlabel("n, keys")
    axis.grid(alpha=0.3)


def _short(n: int) -> str:
    """1,048,576 as 1M and 2,048 as 2k, in powers of 1,024."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def _sigma(spread: str, n: float) -> float:
    kind, _, value = spread.partition("=")
    return float(value) if kind == "sigma" else growing_spread(int(n), float(value))


def _spread_title(spread: str) -> str:
    kind, _, value = spread.partition("=")
    return f"σ = {value}" if kind == "sigma" else f"σ² = {value}²·2 ln n: n^{support_exponent(float(value)):.2f}"

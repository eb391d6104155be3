"""The plots of a calibration: exponents, fits with their points, mass against keys, and the budgets that follow."""

from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; needs no display

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from eval_tasks.figures import FONT, minor_label
from nc_patch.budget import budgets_for, law_values
from nc_patch.calibration.fit import Fit
from nc_patch.calibration.profile import Profile

_HEADS_SHOWN = 6
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LENGTHS_MAP = "viridis"


def profile_figures(profile: Profile) -> list[tuple[str, str, Figure]]:
    """The plots of a report as (name, caption, figure)."""
    fit = shown_fit(profile)
    share = f"{100 * (1 - fit.eps):g} %"
    drawers = (
        ("exponents", f"Exponent C of the keys that hold {share} of the mass, by layer and head.", draw_exponents),
        ("fits", f"Keys that hold {share} of the mass against the keys seen, for heads from flat to steep: counted "
         "(points) and fitted (lines).", draw_fits),
        ("mass", "Mass kept by so many keys: the median over heads, and the band of the middle half of them.",
         draw_mass),
        ("budgets", f"Share of the keys that each head attends at {profile.lengths[-1]:,} tokens: {profile.aim}.",
         draw_budgets),
    )  # fmt: skip
    found = []
    for name, caption, draw in drawers:
        with matplotlib.rc_context(FONT):
            figure = Figure(figsize=(7.6, 5.0), layout="constrained")
            draw(figure.subplots(), profile)
        found.append((name, caption, figure))
    return found


def profile_figure(profile: Profile) -> Figure:
    """All plots in one picture."""
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(14.5, 10.0), layout="constrained")
        axes = figure.subplots(2, 2)
        for axis, draw in zip(axes.flat, (draw_exponents, draw_fits, draw_mass, draw_budgets), strict=True):
            draw(axis, profile)
    return figure


def shown_fit(profile: Profile) -> Fit:
    """The fit that plots and sentences speak of: that of 95 % of the mass, or the nearest."""
    return min(profile.fits, key=lambda fit: abs(fit.eps - 0.05))


def draw_exponents(axis: Axes, profile: Profile) -> None:
    """C by layer and head."""
    fit = shown_fit(profile)
    _heat_map(axis, fit.C, f"exponent C, {100 * (1 - fit.eps):g} % of the mass", "C", Normalize(0.0, 1.0))


def draw_budgets(axis: Axes, profile: Profile) -> None:
    """The share of keys that the laws in force attend at the longest length, by layer and head."""
    longest = profile.lengths[-1]
    seen = np.array([min(longest, window or longest) for window in profile.windows], dtype=float)[:, None]
    keys = budgets_for(seen, profile.alpha, profile.C)
    keys[list(profile.dense_layers)] = np.broadcast_to(seen, keys.shape)[list(profile.dense_layers)]
    _heat_map(axis, 100 * keys / seen, f"keys attended at {longest:,} tokens", "% of the keys, log scale", LogNorm())


def draw_fits(axis: Axes, profile: Profile) -> None:
    """Points and laws of a few heads, from the smallest exponent to the largest."""
    fit = shown_fit(profile)
    order = np.argsort(fit.C, axis=None, kind="stable")
    places = np.linspace(0, len(order) - 1, min(_HEADS_SHOWN, len(order))).round().astype(int)
    for colour, flat in zip(_COLOURS, order[places], strict=False):
        layer, head = np.unravel_index(flat, fit.C.shape)
        n = profile.visible[:, layer]
        label = f"layer {layer}, head {head}: {fit.alpha[layer, head]:.3g}·n^{fit.C[layer, head]:.2f}"
        axis.plot(n, fit.support[:, layer, head], "o", color=colour)
        line = np.geomspace(n.min(), n.max(), 50) if n.max() > n.min() else n
        axis.plot(line, law_values(line, fit.alpha[layer, head], fit.C[layer, head]), color=colour, label=label)
    _lengths_axis(axis, profile.lengths)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(title=f"keys that hold {100 * (1 - fit.eps):g} % of the mass", xlabel="keys seen", ylabel="keys needed")
    axis.set_ylim(top=16 * axis.get_ylim()[1])  # room for the legend
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="upper left")


def draw_mass(axis: Axes, profile: Profile) -> None:
    """Kept mass by number of keys, one line per length."""
    colours = matplotlib.colormaps[_LENGTHS_MAP](np.linspace(0.85, 0.1, len(profile.lengths)))
    keys = np.array(profile.keys, dtype=float)
    for level, length in enumerate(profile.lengths):
        inside = keys < length
        values = 100 * profile.kept[level].reshape(-1, len(keys))[:, inside]
        low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
        axis.plot(keys[inside], middle, color=colours[level], label=f"{length:,} tokens")
        axis.fill_between(keys[inside], low, high, color=colours[level], alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(title="mass kept, median and middle half of the heads", xlabel="keys attended", ylabel="% of the mass")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=10, loc="lower right")


def _heat_map(axis: Axes, values: np.ndarray, title: str, label: str, norm: Normalize) -> None:
    image = axis.imshow(values.T, cmap="viridis", norm=norm, aspect="auto", origin="lower")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set(title=title, xlabel="layer", ylabel="query head")
    figure = axis.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axis, label=label)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(FuncFormatter(minor_label))


def _lengths_axis(axis: Axes, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])

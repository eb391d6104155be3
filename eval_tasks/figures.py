"""The plots of a report, made with matplotlib: lines named where they end.

A plot is as wide as the page of a phone, where one point is one pixel; a wide page has several of them in a row.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

# Loaded with the rest rather than by the first plot, which is drawn when a run ends.
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from eval_tasks.methods import DENSE, NC, find_method, keys_of
from eval_tasks.summary import UNSEEN, title_of
from nc_patch.budget import law_values

# Colours that people with any colour vision tell apart, each dark enough to be read as text on white.
_COLOURS = {
    DENSE: "#000000", "window": "#6E6E6E", "streaming": "#9A5B00", "fixed-topk": "#0072B2", "log-topk": "#5A4FCF",
    "nc-window": "#A3487F", "nc-topk": "#C44E00", "block": "#00785A", "fraction-topk": "#7D6B00",
    "fixed-topk-mean": "#0A3A5A", "nc-topk-mean": "#7A3300", NC: "#C51B7D", "profile": "#6A3D9A",
}  # fmt: skip
_OTHER_COLOURS = ("#8C564B", "#00727E", "#5F6B00", "#7A55A0")
_BY_POSITION = ("window", "streaming", "nc-window")  # whose lines are dashed
_STYLE = {
    "font.size": 14, "axes.titlesize": 15, "axes.labelsize": 14, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#666666", "grid.color": "#DDDDDD", "axes.titlelocation": "left", "axes.titlepad": 10,
}  # fmt: skip
_WIDTH, _LABEL_HEIGHT = 352, 17.0
# Above this ratio of largest to smallest value an axis is logarithmic.
_LOGARITHMIC_FROM = 4.0
_POSITION_BINS, _TICKS = 16, 4


@dataclass(frozen=True)
class Line:
    """Values by x, and a style as ``Axes.errorbar`` takes it; named where the line ends if there is a label."""

    label: str
    values: pd.Series
    style: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One plot: its lines, whether its values are percentages, and whether x are lengths, on a logarithmic axis."""

    title: str
    lines: Sequence[Line]
    percent: bool = False
    x_label: str = "context length, tokens"
    by_length: bool = True


def quality_panels(shown: pd.DataFrame, summary: pd.DataFrame) -> list[Panel]:
    """Quality by length, a plot for each task of ``overview``; the summary has what was not seen before."""
    panels, unseen = [], summary[summary["task"] == UNSEEN].set_index("length")["perplexity"].dropna()
    for task, own in shown.groupby("task", sort=False, observed=True):
        answers = bool(own["score"].notna().any())
        lines = _lines_of(own, 100 * own["score"] if answers else own["perplexity"])
        if task == "recall" and len(unseen):
            dotted = {"color": "#444444", "linestyle": ":", "linewidth": 1.6}
            lines.append(Line("dense, not seen before", unseen, dotted))
        title = f"{title_of(task)}, {'% right' if answers else 'lower is better'}"
        panels.append(Panel(title, lines, answers))
    return panels


def needed_panels(needed: pd.DataFrame) -> list[Panel]:
    """The budget that each method needs by length, its interval and the fitted law; an arrow where none is enough."""
    panels = []
    for task, found in needed.groupby("task", sort=False):
        lines = []
        for method, own in found.set_index("length").groupby("method", sort=False):
            style, title = style_of(method) | {"linestyle": "", "capsize": 3}, find_method(method).title
            n, beyond = own.dropna(subset=["keys"]), own.loc[own["keys"].isna(), "largest"]
            ends = n["keys"] - n[["low", "keys"]].min(axis=1), n[["high", "keys"]].max(axis=1) - n["keys"]
            lines.append(Line(title, n["keys"], style | {"yerr": ends}))
            law = law_values(n.index.to_numpy(float), own["alpha"].iloc[0], own["C"].iloc[0])
            lines.append(Line("", pd.Series(law, n.index), {"color": style["color"]}))
            lines.append(Line("", beyond, style | {"yerr": 0.4 * beyond, "lolims": True}))
        panels.append(Panel(f"keys needed, {title_of(task)}", lines))
    return panels


def budget_panels(own: pd.DataFrame) -> list[Panel]:
    """Keys attended at the scored positions of one task, and the share of all keys, by length."""
    shown = {"keys read by a scored query": own["tail_mean_keys"]}
    shown["% of the keys, all queries"] = 100 * own["attended_fraction"]
    return [Panel(title, _lines_of(own, values)) for title, values in shown.items()]


def position_panels(frame: pd.DataFrame) -> list[Panel]:
    """Loss over dense by position within the scored tokens, at the longest length of each task of texts.

    Of the same samples for a method and for dense.
    """
    panels = []
    compared = frame[frame["method"] != DENSE].dropna(subset=["token_losses", "dense_token_losses"])
    for task, own in compared.groupby("task", observed=True):
        length, lines = own["length"].max(), []
        for name, measured in own[own["length"] == length].groupby("method", observed=True):
            pairs = zip(measured["token_losses"], measured["dense_token_losses"], strict=True)
            over = np.mean([np.subtract(*pair) for pair in pairs], axis=0)
            edges = np.unique(np.linspace(0, len(over), min(_POSITION_BINS, len(over)) + 1).astype(int))
            means = np.add.reduceat(over, edges[:-1]) / np.diff(edges)
            means = pd.Series(means, (edges[:-1] + edges[1:]) / 2)
            lines.append(Line(find_method(name).title, means, style_of(name)))
        lines.append(Line("dense", 0.0 * means, {"color": "#000000"}))
        title, x_label = f"{title_of(task)} at {length:,} tokens", "position among the scored tokens"
        panels.append(Panel(title, lines, x_label=x_label, by_length=False))
    return panels


def draw(panels: Sequence[Panel]) -> Figure:
    """The plots side by side."""
    count = max(1, len(panels))
    most = max((sum(bool(line.label) for line in panel.lines) for panel in panels), default=0)
    size = count * _WIDTH / 72, max(270.0, 100 + _LABEL_HEIGHT * most) / 72
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=False):
            _draw_panel(axis, panel)
        figure.draw_without_rendering()  # what follows needs heights
        for axis, panel in zip(axes, panels, strict=False):
            _name_lines(axis, panel)
    return figure


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nc_patch"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _lines_of(own: pd.DataFrame, values: pd.Series) -> list[Line]:
    """A line by length for each method, of the values that there are."""
    groups = values.dropna().groupby(own["method"].astype(str), sort=False)
    return [Line(find_method(name).title, y.rename(own["length"]), style_of(name)) for name, y in groups]


def style_of(name: str) -> dict[str, Any]:
    """How a method is drawn; those with a number of keys and presses get a colour that follows from the name."""
    colour = _COLOURS.get(name) or _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)]
    line, marker = ("-", "o") if name == DENSE else ("--", "s") if keys_of(name)[0] in _BY_POSITION else ("-", "^")
    return {"color": colour, "linestyle": line, "marker": marker, "linewidth": 2.8 if name in (DENSE, NC) else 1.8}


def _draw_panel(axis: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axis.errorbar(line.values.index, line.values, **line.style)
    low, high = axis.dataLim.intervaly
    if panel.percent:
        axis.set_ylim(-3, 103)
    elif low > 0 and high > _LOGARITHMIC_FROM * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        # An axis of less than a decade has labels at 2 and 5 too.
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_title(textwrap.fill(panel.title, 36))
    axis.set_xlabel(panel.x_label)
    axis.grid(axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(_TICKS))
    if panel.by_length:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_minor_locator(NullLocator())
        lengths = sorted({length for line in panel.lines for length in line.values.index}, reverse=True)
        ticks = lengths[:: math.ceil(len(lengths) / _TICKS) or 1]  # the longest among them
        words = (f"{n >> 20}M" if n >= 1 << 20 else f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in ticks)
        axis.set_xticks(ticks, list(words))


def _name_lines(axis: Axes, panel: Panel) -> None:
    """Puts the name of each line beside its last point, as near as the other names let it stand."""
    named = [line for line in panel.lines if line.label and len(line.values)]
    lines = sorted(named, key=lambda line: line.values.iloc[-1])
    if not lines:
        return
    ends = [(line.values.index[-1], line.values.iloc[-1]) for line in lines]
    wanted = axis.transAxes.inverted().transform(axis.transData.transform(ends))[:, 1]
    steps = _LABEL_HEIGHT / axis.get_window_extent().height * np.arange(len(ends))
    places = np.clip(isotonic_regression(wanted - steps).x, 0.0, max(0.0, 1.0 - steps[-1])) + steps
    beside = axis.transAxes + ScaledTranslation(18 / 72, 0, axis.figure.dpi_scale_trans)
    leader = {"arrowstyle": "-", "linewidth": 0.9, "alpha": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    for line, end, place in zip(lines, ends, places, strict=True):
        colour = {"color": line.style["color"]}
        options: dict[str, Any] = colour | {"va": "center", "fontsize": 13, "annotation_clip": False}
        axis.annotate(line.label, end, (1.0, place), textcoords=beside, arrowprops=leader | colour, **options)

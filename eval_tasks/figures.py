"""The plots of a report, made with matplotlib: as SVG for the page, as PNG for documents."""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; needs no display

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval_tasks.methods import DENSE, find_method, order_of
from eval_tasks.summary import Summary
from eval_tasks.tasks import TASKS

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {
    "dense": "#000000",
    "window": "#999999",
    "streaming": "#E69F00",
    "fixed-topk": "#56B4E9",
    "log-topk": "#0072B2",
    "nc-window": "#CC79A7",
    "nc-topk": "#D55E00",
    "block": "#009E73",
    "fraction-topk": "#F0E442",
    "fixed-topk-mean": "#0A3A5A",
    "nc-topk-mean": "#7A3300",
}
_OTHER_COLOURS = ("#8C564B", "#17BECF", "#BCBD22", "#9467BD")
_MARKERS = {"all": "o", "recent": "s", "content": "^"}
_LINES = {"all": "-", "recent": "--", "content": "-"}
_FONT = {"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 11, "svg.fonttype": "path"}
_REFERENCE = "unseen"
# Above this ratio of largest to smallest value an axis is logarithmic.
_LOGARITHMIC_FROM = 4.0


def task_figure(summaries: Sequence[Summary], task: str) -> Figure:
    """Perplexity of one task by length, one line per method."""
    figure, axes = _axes(1)
    _draw_task(axes[0], summaries, task)
    _legend(figure, axes)
    return figure


def budget_figure(summaries: Sequence[Summary], task: str) -> Figure:
    """Keys attended at the scored positions, and the attended fraction of all keys, by length."""
    figure, axes = _axes(2)
    own = [summary for summary in summaries if summary.task == task]
    _draw(axes[0], own, lambda summary: summary.tail_mean_keys)
    axes[0].set(title="keys attended per query, scored positions", ylabel="keys")
    _draw(axes[1], own, lambda summary: 100 * summary.attended_fraction)
    axes[1].set(title="share of the visible keys attended", ylabel="%")
    _legend(figure, axes)
    return figure


def main_figure(summaries: Sequence[Summary]) -> Figure:
    """The result in one picture: every scored task side by side."""
    tasks = [task for task in TASKS if any(s.task == task for s in summaries) and not TASKS[task].dense_only]
    figure, axes = _axes(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        _draw_task(axis, summaries, task)
    _legend(figure, axes)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page; equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_FONT | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_FONT):
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(_FONT):
        figure = Figure(figsize=(6.4 * count, 4.4), layout="constrained")
        return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_task(axis: Axes, summaries: Sequence[Summary], task: str) -> None:
    _draw(axis, [summary for summary in summaries if summary.task == task], lambda summary: summary.perplexity)
    unseen = [(s.length, s.perplexity) for s in summaries if s.task == _REFERENCE]
    if task == "recall" and unseen:
        axis.plot(*zip(*unseen, strict=True), ":", color="#444444", label="dense, passage not seen before")
    _scale(axis, logarithmic=task == "recall")
    axis.set(title=f"{TASKS[task].title}, lower is better", ylabel="perplexity")


def _draw(axis: Axes, summaries: Sequence[Summary], value: Callable[[Summary], float | None]) -> None:
    for method in map(find_method, sorted({s.method for s in summaries}, key=order_of)):
        points = [(s.length, value(s)) for s in summaries if s.method == method.name]
        points = [(length, y) for length, y in points if y is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                linestyle=_LINES[method.selects],
                marker=_MARKERS[method.selects],
                color=_colour(method.name),
                linewidth=2.6 if method.name in (DENSE, "nc-topk") else 1.6,
                label=method.title,
            )
    lengths = sorted({summary.length for summary in summaries})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("context length, tokens")
    axis.grid(alpha=0.3)
    _scale(axis)


def _colour(name: str) -> str:
    """The colour of a method; those with a number of keys and presses get one that follows from the name."""
    return _COLOURS.get(name) or _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)]


def _scale(axis: Axes, logarithmic: bool = False) -> None:
    values = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata()) if y > 0]
    if logarithmic or (values and max(values) > _LOGARITHMIC_FROM * min(values)):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(_minor_label))


def _minor_label(value: float, _: int) -> str:
    """Labels 2 and 5 between the powers of ten, where a plot would otherwise have one label or none."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    with matplotlib.rc_context(_FONT):
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3 if len(axes) == 1 else 5)

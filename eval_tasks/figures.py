"""The plots of a report, made with matplotlib: as SVG for the page, as PNG for documents."""

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; needs no display

# Loaded with the rest rather than by the first plot, which is drawn when a run ends.
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval_tasks.iso_quality import IsoQuality
from eval_tasks.methods import DENSE, find_method, keys_of, order_of
from eval_tasks.summary import Row, Summary, title_of
from eval_tasks.tasks import TASKS
from nc_patch.budget import law_values

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
    "nc": "#C51B7D",
    "profile": "#6A3D9A",
}
_OTHER_COLOURS = ("#8C564B", "#17BECF", "#BCBD22", "#9467BD")
_MARKERS = {"all": "o", "recent": "s", "content": "^", "chance": "x"}
_LINES = {"all": "-", "recent": "--", "content": "-", "chance": ":"}
FONT = {"font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 11, "svg.fonttype": "path"}
_REFERENCE = "unseen"
# Above this ratio of largest to smallest value an axis is logarithmic.
_LOGARITHMIC_FROM = 4.0
# Below this ratio a logarithmic axis may be left without a single label.
_LABELLED_FROM = 2.5
_POSITION_BINS = 16
_DEPTH_BINS = 10
_MAPS_PER_ROW = 4
_TASKS_AT_ONCE = 4


def section_figures(
    summaries: Sequence[Summary], rows: Sequence[Row], needed: Sequence[IsoQuality]
) -> list[tuple[str, str, Figure]]:
    """The plots of a report as (name, caption, figure): those for which there is something to show.

    Args:
        summaries, rows: of one run.
        needed: the budgets that iso-quality found; where there are any, their plot comes first.
    """
    tasks = _scored_tasks(summaries)
    found = []
    if _is_known(needed):
        found.append(
            ("needed", "The budget that the quality of dense needs, and the law through it.", needed_figure(needed))
        )
    for task in tasks:
        title = title_of(task).capitalize()
        description = f" {TASKS[task].description.capitalize()}." if task in TASKS else ""
        if not needed:
            found.append((task, f"{title} by context length.{description}", task_figure(summaries, task)))
        found.append(
            (f"{task}-pareto", f"{title} against what it costs, one line per method.", pareto_figure(summaries, task))
        )
        positions = position_figure(rows, task)
        if positions is not None:
            caption = f"{title}: loss over dense by position within the scored tokens."
            found.append((f"{task}-positions", caption, positions))
        depths = depth_figure(rows, task)
        if depths is not None:
            found.append((f"{task}-depths", f"{title}: share of right answers by depth and length.", depths))
    if tasks and not needed:
        caption = "What each method attended: the realised budget, and its share of all visible keys."
        found.append(("budget", caption, budget_figure(summaries, tasks[0])))
    return found


def task_figure(summaries: Sequence[Summary], task: str) -> Figure:
    """Quality of one task by length, one line per method."""
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


def pareto_figure(summaries: Sequence[Summary], task: str) -> Figure:
    """Quality against the attended fraction and against time; a line joins the lengths of a method, longest marked."""
    figure, axes = _axes(2)
    own = [summary for summary in summaries if summary.task == task]
    longest = max(summary.length for summary in own)
    seconds, cost_in_time = _time_axis(own)
    costs: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
        ("share of the visible keys attended at the scored positions, %", lambda s: 100 * s.tail_attended_fraction),
        (seconds, cost_in_time),
    )
    for axis, (label, cost) in zip(axes, costs, strict=True):
        for name in sorted({keys_of(s.method)[0] for s in own}, key=order_of):
            method = find_method(name)
            line = sorted(
                (s for s in own if keys_of(s.method)[0] == name), key=lambda s: (s.length, s.tail_attended_fraction)
            )
            at_longest = [s for s in line if s.length == longest]
            joined = at_longest if any(keys_of(s.method)[1] is not None for s in line) else line
            points = [(cost(s), _quality(s)) for s in joined if cost(s) is not None]
            if not points:  # simulated methods have no time
                continue
            axis.plot(*zip(*points, strict=True), color=_colour(name), linewidth=1.0, alpha=0.5)
            ends = [(cost(s), _quality(s)) for s in at_longest]
            if ends:
                axis.plot(
                    *zip(*ends, strict=True), linestyle="", marker=_MARKERS[method.selects], markersize=8,
                    color=_colour(name), label=method.title,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(minor_label))
        axis.set(xlabel=label, ylabel=_quality_label(own), title=f"{title_of(task)}, marks at {longest:,} tokens")
        axis.grid(alpha=0.3)
        _scale(axis, logarithmic=task == "recall")
    _legend(figure, axes)
    return figure


def _time_axis(own: Sequence[Summary]) -> tuple[str, Callable[[Summary], float | None]]:
    """What time is of, and which: of a task's sparse part where all that was timed has it apart."""
    if any(s.score is not None for s in own):
        return "seconds of prompt and answer", lambda s: s.seconds
    if all(s.sparse_seconds is not None for s in own if s.seconds is not None):
        return "seconds of the part that is sparse", lambda s: s.sparse_seconds
    return "seconds of all that was read", lambda s: s.seconds


def position_figure(rows: Sequence[Row], task: str) -> Figure | None:
    """Loss over dense by position within the scored tokens, at the longest length; None without such losses."""
    own = [row for row in rows if row["task"] == task and "token_losses" in row]
    if not own:
        return None
    longest = max(row["length"] for row in own)
    losses: dict[str, list[np.ndarray]] = {}
    for row in own:
        if row["length"] == longest:
            losses.setdefault(row["method"], []).append(np.asarray(row["token_losses"]))
    if DENSE not in losses or len(losses) < 2:
        return None
    dense = np.mean(losses[DENSE], axis=0)
    figure, axes = _axes(1)
    edges = np.unique(np.linspace(0, len(dense), min(_POSITION_BINS, len(dense)) + 1).astype(int))
    for name in sorted(losses.keys() - {DENSE}, key=order_of):
        method = find_method(name)
        difference = np.mean(losses[name], axis=0) - dense
        binned = [difference[a:b].mean() for a, b in pairwise(edges)]
        axes[0].plot(
            (edges[:-1] + edges[1:]) / 2, binned, linestyle=_LINES[method.selects], marker=_MARKERS[method.selects],
            color=_colour(name), label=method.title,
        )  # fmt: skip
    axes[0].axhline(0.0, color="#000000", linewidth=1.0)
    title = f"{title_of(task)} at {longest:,} tokens, lower is better"
    axes[0].set(title=title, xlabel="position among the scored tokens", ylabel="loss − dense, nats per token")
    axes[0].grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def depth_figure(rows: Sequence[Row], task: str) -> Figure | None:
    """Share of right answers by depth of the needle and context length, one map per method; None without depths."""
    own = [row for row in rows if row["task"] == task and "depth" in row and "score" in row]
    if not own:
        return None
    methods = sorted({row["method"] for row in own}, key=order_of)
    lengths = sorted({row["length"] for row in own})
    columns = min(_MAPS_PER_ROW, len(methods))
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(3.6 * columns + 1, 3.2 * -(-len(methods) // columns)), layout="constrained")
        grid = list(figure.subplots(-(-len(methods) // columns), columns, squeeze=False).flat)
    for axis, name in zip(grid, methods, strict=False):
        scores = np.full((_DEPTH_BINS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for band in range(_DEPTH_BINS):
                cell = [
                    row["score"]
                    for row in own
                    if (row["method"], row["length"]) == (name, length)
                    and min(int(row["depth"] * _DEPTH_BINS), _DEPTH_BINS - 1) == band
                ]
                if cell:
                    scores[band, column] = 100 * np.mean(cell)
        image = axis.imshow(scores, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="upper")
        axis.set_facecolor("#dddddd")  # where nothing was measured
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks([-0.5, _DEPTH_BINS / 2 - 0.5, _DEPTH_BINS - 0.5], ["0 %", "50 %", "100 %"])
        axis.set(title=find_method(name).title, xlabel="tokens", ylabel="depth")
    for axis in grid[len(methods) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=grid[: len(methods)], label="right, %")
    return figure


def needed_figure(needed: Sequence[IsoQuality]) -> Figure:
    """The budget that each method needs by length with its interval, and the fitted power law: a plot for each task.

    An arrow stands where more is needed than was measured.
    """
    tasks = list(dict.fromkeys(iso.task for iso in needed))
    figure, axes = _axes(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for iso in (iso for iso in needed if iso.task == task):
            _draw_needed(axis, iso)
        _lengths_axis(axis, sorted({n.length for iso in needed for n in iso.needed}))
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set(title=f"keys needed for dense attention's {title_of(task)}", ylabel="keys")
        axis.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _draw_needed(axis: Axes, iso: IsoQuality) -> None:
    method, points = find_method(iso.method), [n for n in iso.needed if n.keys is not None]
    style: dict[str, Any] = {"marker": _MARKERS[method.selects], "color": _colour(iso.method), "linestyle": ""}
    n, k = np.array([p.length for p in points], dtype=float), np.array([p.keys for p in points], dtype=float)
    low = np.array([k_ if p.low is None else min(p.low, k_) for p, k_ in zip(points, k, strict=True)])
    high = np.array([k_ if p.high is None else max(p.high, k_) for p, k_ in zip(points, k, strict=True)])
    axis.errorbar(n, k, yerr=[k - low, high - k], capsize=3, label=method.title, **style)
    for beyond in (p for p in iso.needed if p.keys is None):
        axis.errorbar([beyond.length], [beyond.largest], yerr=[0.4 * beyond.largest], lolims=True, **style)
    if iso.law is not None:
        axis.plot(n, law_values(n, iso.law.alpha, iso.law.C), color=_colour(iso.method))


def _is_known(needed: Sequence[IsoQuality]) -> bool:
    return any(n.keys is not None for iso in needed for n in iso.needed)


def main_figure(summaries: Sequence[Summary], needed: Sequence[IsoQuality] = ()) -> Figure:
    """The result in one picture: every scored task side by side, or the budgets that iso-quality found."""
    if _is_known(needed):
        return needed_figure(needed)
    tasks = _scored_tasks(summaries)[:_TASKS_AT_ONCE]
    figure, axes = _axes(max(1, len(tasks)))
    for axis, task in zip(axes, tasks, strict=False):
        _draw_task(axis, summaries, task)
    if tasks:
        _legend(figure, axes)
    return figure


def _scored_tasks(summaries: Sequence[Summary]) -> list[str]:
    tasks = dict.fromkeys(summary.task for summary in summaries)
    return [task for task in tasks if task not in TASKS or not TASKS[task].dense_only]


def _quality(summary: Summary) -> float | None:
    return summary.perplexity if summary.score is None else 100 * summary.score


def _quality_label(summaries: Sequence[Summary]) -> str:
    return "perplexity" if all(summary.score is None for summary in summaries) else "right, %"


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page; equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(FONT | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(FONT):
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(6.4 * count, 4.4), layout="constrained")
        return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_task(axis: Axes, summaries: Sequence[Summary], task: str) -> None:
    own = [summary for summary in summaries if summary.task == task]
    _draw(axis, own, _quality)
    unseen = [(s.length, s.perplexity) for s in summaries if s.task == _REFERENCE and s.perplexity is not None]
    if task == "recall" and unseen:
        axis.plot(*zip(*unseen, strict=True), ":", color="#444444", label="dense, passage not seen before")
    _scale(axis, logarithmic=task == "recall")
    label = _quality_label(own)
    better = "lower" if label == "perplexity" else "higher"
    if better == "higher":
        axis.set_yscale("linear")
        axis.set_ylim(-3, 103)
    axis.set(title=f"{title_of(task)}, {better} is better", ylabel=label)


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
    _lengths_axis(axis, sorted({summary.length for summary in summaries}))
    axis.grid(alpha=0.3)
    _scale(axis)


def _lengths_axis(axis: Axes, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("context length, tokens")


def _colour(name: str) -> str:
    """The colour of a method; those with a number of keys and presses get one that follows from the name."""
    return _COLOURS.get(name) or _OTHER_COLOURS[sum(name.encode()) % len(_OTHER_COLOURS)]


def _scale(axis: Axes, logarithmic: bool = False) -> None:
    values = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata()) if y > 0]
    spread = max(values) / min(values) if values else 1.0
    if spread > _LOGARITHMIC_FROM or (logarithmic and spread > _LABELLED_FROM):
        logarithmic_y(axis)


def logarithmic_y(axis: Axes) -> None:
    """Makes the y axis logarithmic, with labels that can be read also where it spans less than a decade."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(minor_label))


def minor_label(value: float, _: int) -> str:
    """Labels 2 and 5 between the powers of ten, where a plot would otherwise have one label or none."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    with matplotlib.rc_context(FONT):
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3 if len(axes) == 1 else 5)

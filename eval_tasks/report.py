"""The outputs of a sweep made from its rows: ``summary.csv``, ``report.html`` and ``main.png``."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.figures import budget_figure, main_figure, task_figure, to_png, to_svg
from eval_tasks.findings import Findings
from eval_tasks.methods import find_method
from eval_tasks.store import read_rows, read_run, write_atomically
from eval_tasks.summary import Row, Summary, failures, summarise, to_csv
from eval_tasks.tasks import TASKS

REPORT, SUMMARY, MAIN_FIGURE = "report.html", "summary.csv", "main.png"


def write_report(directory: Path) -> list[str]:
    """Writes ``summary.csv``, ``report.html`` and ``main.png`` from what the directory holds.

    Returns:
        The main finding, as sentences.

    Raises:
        EvalError: the directory holds no measurement, or is damaged.
    """
    run, rows = read_run(directory), read_rows(directory)
    if run is None or not rows:
        raise EvalError(f"{directory} holds no measurements; measure with nc-patch eval --out {directory}")
    unknown = sorted({row["task"] for row in rows} - TASKS.keys())
    for name in {row["method"] for row in rows}:
        find_method(name)
    if unknown:
        raise EvalError(f"{directory} holds results of {', '.join(unknown)}, which this version does not know")
    summaries = summarise(rows)
    findings = Findings(run, rows, summaries)
    write_atomically(directory / SUMMARY, to_csv(summaries, failures(rows)).encode())
    write_atomically(directory / MAIN_FIGURE, to_png(main_figure(summaries)))
    write_atomically(directory / REPORT, render(run, rows, summaries, findings).encode())
    return findings.headline()


def render(run: Mapping[str, Any], rows: Sequence[Row], summaries: Sequence[Summary], findings: Findings) -> str:
    """The report as one page of HTML that refers to nothing outside itself; all text in it is escaped."""
    identity = run["identity"]
    page = Template(resources.files("eval_tasks").joinpath("templates/report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=_escape(f"Sparse attention by context length: {identity['model']}"),
        headline=_escape(" ".join(findings.headline())),
        partial=_partial(run, rows),
        details="\n".join(f"<li>{_escape(sentence)}</li>" for sentence in findings.details()),
        setup=_setup(run),
        figures=_figures(summaries),
        tables="\n".join(_table(task, summaries) for task in TASKS if any(s.task == task for s in summaries)),
        methods=_table_rows(
            (find_method(name).title, name, find_method(name).description) for name in identity["methods"]
        ),
        failures=_failures(rows),
        command=_escape(run["command"]),
        record=_record(run, rows),
    )


def _escape(value: object) -> str:
    return html.escape(str(value))


def _table_rows(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _partial(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    identity = run["identity"]
    names = identity["tasks"]
    per_place = sum(1 if TASKS[name].dense_only else len(identity["methods"]) for name in names)
    planned = per_place * len(identity["lengths"]) * identity["samples"]
    if len(rows) >= planned:
        return ""
    return f"<p><strong>{len(rows)} of {planned} measurements are made; the same command goes on.</strong></p>"


def _failures(rows: Sequence[Row]) -> str:
    cells = failures(rows)
    if not cells:
        return ""
    listed = ((TASKS[f.task].title, f"{f.length:,}", find_method(f.method).title, f.reason, f.failed) for f in cells)
    head = "<tr><th>Task</th><th>Tokens</th><th>Method</th><th>Why</th><th>Samples</th></tr>"
    return f'<h3>Could not be measured</h3><table class="text">{head}\n{_table_rows(listed)}</table>'


def _setup(run: Mapping[str, Any]) -> str:
    identity = run["identity"]
    tasks = "; ".join(f"{TASKS[name].title}: {TASKS[name].description}" for name in identity["tasks"])
    model = f"{identity['model']} ({run['model_class']}, {run['model_parameters']:,} parameters, {run['model_dtype']})"
    budgets = (
        f"k(n) = {identity['alpha']:g} · n^{identity['C']:g}; fixed budgets {run['budget_at_equal']} and "
        f"logarithmic ones {run['log_factor']:.4g} · log2(n), so that all are equal at n = {identity['equal_at']:,}"
    )
    return _table_rows(
        [
            ("Model", model),
            ("Text", f"{run['text_origin']}, {run['text_tokens']:,} tokens"),
            ("Lengths", ", ".join(f"{length:,}" for length in identity["lengths"])),
            ("Stretches of text", identity["samples"]),
            ("Scored", f"{identity['scored']} tokens (perplexity), a passage of {identity['passage']} tokens (recall)"),
            ("Tasks", tasks),
            ("Budgets", budgets),
        ]
    )


def _figures(summaries: Sequence[Summary]) -> str:
    parts = []
    measured = [task for task in TASKS if any(s.task == task for s in summaries) and not TASKS[task].dense_only]
    for task in measured:
        caption = f"{TASKS[task].title.capitalize()} by context length. {TASKS[task].description.capitalize()}."
        parts.append(_figure(to_svg(task_figure(summaries, task), task), caption))
    if measured:
        caption = "What each method attended: the realised budget, and its share of all visible keys."
        parts.append(_figure(to_svg(budget_figure(summaries, measured[0]), "budget"), caption))
    return "\n".join(parts)


def _figure(svg: str, caption: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{_escape(caption)}" ', 1)
    return f"<figure>{labelled}<figcaption>{_escape(caption)}</figcaption></figure>"


_HEADER = (
    "Method", "Tokens", "Stretches", "Perplexity", "Bits/byte", "Loss − dense", "95 % interval", "Perplexity / dense",
    "Keys", "Share", "Seconds", "Memory, MB",
)  # fmt: skip


def _table(task: str, summaries: Sequence[Summary]) -> str:
    head = "".join(f"<th>{_escape(name)}</th>" for name in _HEADER)
    body = _table_rows(_cells(summary) for summary in summaries if summary.task == task)
    title = f"<h3>{_escape(TASKS[task].title.capitalize())}</h3>"
    return f'{title}<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _cells(summary: Summary) -> list[str]:
    interval = "" if summary.low is None else f"{summary.low:+.3f} … {summary.high:+.3f}"
    return [
        find_method(summary.method).title,
        f"{summary.length:,}",
        str(summary.samples),
        f"{summary.perplexity:.3f}" if summary.perplexity < 1000 else f"{summary.perplexity:,.0f}",
        f"{summary.bits_per_byte:.3f}",
        "" if summary.loss_minus_dense is None else f"{summary.loss_minus_dense:+.3f}",
        interval,
        "" if summary.perplexity_ratio is None else f"{summary.perplexity_ratio:.3f}",
        "" if summary.tail_mean_keys is None else f"{summary.tail_mean_keys:,.1f}",
        f"{100 * summary.attended_fraction:.2f} %",
        f"{summary.seconds:.2f}",
        f"{summary.peak_memory_mb:,.0f}",
    ]


def _record(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    commits = ", ".join(dict.fromkeys(str(row.get("commit")) for row in rows))
    sessions = ", ".join(session["started"] for session in run["sessions"])
    entries = [*run["identity"].items(), *run.get("hardware", {}).items(), ("commit", commits), ("measured", sessions)]
    return _table_rows((name, value if isinstance(value, str) else json.dumps(value)) for name, value in entries)

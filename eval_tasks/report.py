"""The outputs made from the rows of one or more runs: ``report.html``, ``report.md``, CSV files, ``main.png``."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eval_tasks.comparisons import Comparison
from eval_tasks.errors import EvalError
from eval_tasks.figures import main_figure, section_figures, to_png, to_svg
from eval_tasks.findings import Findings, answer_sentences, iso_sentences
from eval_tasks.iso_quality import IsoQuality
from eval_tasks.matching import MATCHED_BY
from eval_tasks.measure import SPARSE_IN
from eval_tasks.merging import MergedRun, differing, merge_runs
from eval_tasks.methods import find_method
from eval_tasks.store import check_out, write_atomically
from eval_tasks.summary import Row, csv_of, failures, summarise, title_of, to_csv
from eval_tasks.tables import (
    Table,
    comparison_table,
    effective_table,
    failure_table,
    iso_tables,
    quality_table,
)
from eval_tasks.tasks import TASKS
from eval_tasks.verdicts import comparisons, effective_lengths, needed_budgets

REPORT, MARKDOWN, SUMMARY, COMPARISONS, NEEDED, MAIN_FIGURE = (
    "report.html", "report.md", "summary.csv", "comparisons.csv", "needed.csv", "main.png",
)  # fmt: skip
REPORT_FILES = (REPORT, MARKDOWN, SUMMARY, COMPARISONS, NEEDED, MAIN_FIGURE)
WITHIN = 0.05
# Read before a run, not at its end.
PAGE = Template(resources.files("eval_tasks").joinpath("templates/report.html").read_text(encoding="utf-8"))


class Section:
    """Everything that is said about one run, or several that were put together."""

    def __init__(self, merged: MergedRun, within: float) -> None:
        self.merged, self.within = merged, within
        self.run, self.rows = merged.run, merged.rows
        self.summaries = summarise(self.rows)
        self.compared = comparisons(self.rows, within)
        self.needed = needed_budgets(self.rows, within)
        self.findings = Findings(self.run, self.rows, self.summaries)

    def headline(self) -> list[str]:
        """The main finding, as sentences."""
        if self.needed:
            return iso_sentences(self.needed, self.within)
        answers = answer_sentences(self.summaries)
        texts = any(s.score is None for s in self.summaries)
        return [*answers, *(self.findings.headline() if texts or not answers else [])]

    def details(self) -> list[str]:
        """The other findings."""
        return self.findings.caveats() if self.needed else self.findings.details()

    def tables(self) -> list[Table]:
        """All tables, in the order of the report."""
        tasks = list(dict.fromkeys(summary.task for summary in self.summaries))
        lengths = effective_lengths(self.rows, self.compared, self.within)
        return [
            *iso_tables(self.needed, self.within),
            *(quality_table(task, self.summaries, self.run["identity"].get("phase", "all")) for task in tasks),
            *([comparison_table(self.compared, self.summaries, self.within)] if self.compared else []),
            *([effective_table(lengths, self.summaries, self.within)] if lengths else []),
            *failure_table(failures(self.rows)),
        ]


def write_report(directories: Path | Sequence[Path], out: Path | None = None, within: float = WITHIN) -> list[str]:
    """Writes the report of what directories hold.

    Args:
        directories: of runs; those that measured the same thing the same way share a section.
        out: where the report goes; None for the directory, where there is one.
        within: the margin within which a method counts as no worse than dense, as a share.

    Returns:
        The main finding of the first section, as sentences.

    Raises:
        EvalError: a directory holds no measurement or is damaged, or the report cannot be written.
    """
    directories = [directories] if isinstance(directories, Path) else list(directories)
    if out is None and len(directories) != 1:
        raise EvalError("say where the report of several directories goes: --out DIR")
    target = out or directories[0]
    merged = merge_runs(directories)
    check_out(target, REPORT_FILES)
    sections = [Section(run, within) for run in merged]
    labels = differing(merged)
    write_atomically(target / SUMMARY, _joined(sections, lambda s: to_csv(s.summaries, failures(s.rows))).encode())
    write_atomically(target / COMPARISONS, _joined(sections, lambda s: comparisons_csv(s.compared)).encode())
    if any(section.needed for section in sections):
        write_atomically(target / NEEDED, _joined(sections, lambda s: needed_csv(s.needed)).encode())
    write_atomically(target / MAIN_FIGURE, to_png(main_figure(sections[0].summaries, sections[0].needed)))
    write_atomically(target / MARKDOWN, markdown(sections, labels).encode())
    write_atomically(target / REPORT, render(sections, labels).encode())
    return sections[0].headline()


def comparisons_csv(compared: Iterable[Comparison]) -> str:
    """The comparisons with dense as CSV."""
    names = [
        "task", "length", "method", "documents", "difference", "low", "high", "margin", "detectable", "p_difference",
        "p_margin", "needed", "needed_within", "verdict",
    ]  # fmt: skip
    return csv_of(names, [[getattr(comparison, name) for name in names] for comparison in compared])


def needed_csv(found: Iterable[IsoQuality]) -> str:
    """The budgets that the quality of dense needs as CSV, each with the law through those of its task and method."""
    names = ["length", "keys", "low", "high", "reached", "at_most", "largest"]
    rows = [
        [iso.task, iso.method, *(getattr(n, name) for name in names), iso.documents]
        + ([None] * 4 if iso.law is None else [iso.law.alpha, iso.law.C, *(iso.law.C_interval or (None, None))])
        for iso in found
        for n in iso.needed
    ]
    return csv_of(["task", "method", *names, "documents", "alpha", "C", "C_low", "C_high"], rows)


def render(sections: Sequence[Section], labels: Sequence[str]) -> str:
    """The report as one page of HTML that refers to nothing outside itself; all text in it is escaped."""
    models = ", ".join(dict.fromkeys(str(section.merged.identity["model"]) for section in sections))
    return PAGE.substitute(
        title=_escape(f"Sparse attention by context length: {models}"),
        sections="\n".join(
            _section(section, label, number, len(sections) > 1)
            for number, (section, label) in enumerate(zip(sections, labels, strict=True), 1)
        ),
    )


def markdown(sections: Sequence[Section], labels: Sequence[str]) -> str:
    """The sentences, tables and commands of the report as Markdown, beside ``main.png``."""
    lines = ["# Sparse attention by context length", "", f"![Quality by context length]({MAIN_FIGURE})", ""]
    for section, label in zip(sections, labels, strict=True):
        model = section.merged.identity["model"]
        lines += [f"## {_escape(model)}{': ' + _escape(label) if label else ''}", ""]
        lines += [_escape(" ".join(section.headline())), ""]
        lines += [f"- {_escape(sentence)}" for sentence in section.details()]
        lines += ["", *(table.to_markdown() for table in section.tables())]
        lines += ["```", *(record["command"].replace("```", "") for record in section.merged.records), "```", ""]
    return "\n".join(lines)


def _joined(sections: Sequence[Section], csv: Any) -> str:
    """One CSV of all sections; with several, a first column says which."""
    if len(sections) == 1:
        return str(csv(sections[0]))
    lines = []
    for number, section in enumerate(sections, 1):
        header, *rows = csv(section).splitlines()
        lines += [f"section,{header}"] * (number == 1) + [f"{number},{row}" for row in rows]
    return "\n".join(lines) + "\n"


def _section(section: Section, label: str, number: int, several: bool) -> str:
    merged, run = section.merged, section.run
    parts = [f"<h2>{number}. {_escape(merged.identity['model'])}: {_escape(label)}</h2>"] if several else []
    details = "\n".join(f"<li>{_escape(sentence)}</li>" for sentence in section.details())
    figures = (
        _figure(to_svg(figure, f"{number}-{name}"), caption) for name, caption, figure in section_figures(
            section.summaries, section.rows, section.needed
        )
    )  # fmt: skip
    methods = ((find_method(name).title, name, find_method(name).description) for name in merged.identity["methods"])
    parts += [
        f'<p class="lead">{_escape(" ".join(section.headline()))}</p>',
        _partial(run, section.rows),
        f"<ul>{details}</ul>" if details else "",
        f'<h2>What was measured</h2><table class="text">{_setup(run)}</table>',
        "<h2>Plots</h2>",
        *figures,
        "<h2>Tables</h2><p>Loss in nats per scored token; differences from dense are over the same samples, with a "
        "95 % bootstrap interval over documents. “Keys” and “share” are what was attended, at the scored positions or "
        "over all queries. Memory is what was held at the peak beyond the model.</p>",
        *(table.to_html() for table in section.tables()),
        f'<h2>The methods</h2><table class="text">{_table_rows(methods)}</table>',
        "<h2>Measure it again</h2>",
        *(f"<pre>{_escape(record['command'])}</pre>" for record in merged.records),
        f'<table class="text">{_record(section)}</table>',
    ]
    return "\n".join(part for part in parts if part)


def _escape(value: object) -> str:
    return html.escape(str(value))


def _table_rows(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)


def _partial(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    planned = run.get("planned")
    if planned is None or len(rows) >= planned:
        return ""
    return f"<p><strong>{len(rows)} of {planned} measurements are made; the same command goes on.</strong></p>"


def _setup(run: Mapping[str, Any]) -> str:
    identity = run["identity"]
    known = [TASKS[name] for name in identity["tasks"] if name in TASKS]
    tasks = "; ".join(f"{task.title}: {task.description}" for task in known)
    further = ", ".join(title_of(name) for name in identity["tasks"] if name not in TASKS)
    model = f"{identity['model']} ({run['model_class']}, {run['model_parameters']:,} parameters, {run['model_dtype']})"
    match = identity.get("match", "deploy")
    budgets = f"k(n) = {identity['alpha']:g} · n^{identity['C']:g}"
    if match == "deploy":
        budgets += f"; fixed {run['budget_at_equal']}; logarithmic {run['log_factor']:.4g} · log2(n)"
    return _table_rows(
        [
            ("Model", model),
            ("Text", f"{run['text_origin']}, {run['text_tokens']:,} tokens"),
            ("Lengths", ", ".join(f"{length:,}" for length in identity["lengths"])),
            ("Samples", identity["samples"]),
            ("Scored", f"{identity['scored']} tokens (perplexity), a passage of {identity['passage']} tokens (recall)"),
            ("Tasks", "; ".join(filter(None, [tasks, further]))),
            ("Sparse", SPARSE_IN[identity.get("phase", "all")]),
            ("Matched budgets", f"{match}: {MATCHED_BY[match].format(equal_at=identity['equal_at'])}"),
            ("Budgets", budgets),
        ]
    )


def _figure(svg: str, caption: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{_escape(caption)}" ', 1)
    return f"<figure>{labelled}<figcaption>{_escape(caption)}</figcaption></figure>"


def _record(section: Section) -> str:
    run = section.run
    commits = ", ".join(dict.fromkeys(str(row.get("commit")) for row in section.rows))
    sessions = ", ".join(s["started"] for record in section.merged.records for s in record["sessions"])
    directories = ", ".join(str(directory) for directory in section.merged.directories)
    entries = [
        *run["identity"].items(), *run.get("hardware", {}).items(), ("commit", commits), ("measured", sessions),
        ("directories", directories),
    ]  # fmt: skip
    return _table_rows((name, value if isinstance(value, str) else json.dumps(value)) for name, value in entries)

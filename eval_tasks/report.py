"""The outputs made from the rows of one or more runs: ``report.html``, CSV files, ``main.png``."""

import base64
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from eval_tasks import figures, findings, summary
from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHED_BY
from eval_tasks.measure import SPARSE_IN
from eval_tasks.methods import find_method
from eval_tasks.store import Row, check_out, write_atomically
from eval_tasks.tasks import TASKS

REPORT_FILES = ("report.html", "summary.csv", "comparisons.csv", "needed.csv", "main.png")
REPORT, SUMMARY, COMPARISONS, NEEDED, MAIN_FIGURE = REPORT_FILES
WITHIN = 0.05
# Read before a run, not at its end.
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    resources.files("eval_tasks").joinpath("templates/report.html").read_text(encoding="utf-8")
)
_MEASURED = "Those that begin with “tail” are of the scored positions; losses are in nats per token, memory in MB."
_TESTS = (
    "Loss over dense on the same documents (nats per token, or share of answers), p-values corrected over all lines by "
    "Holm's procedure. p difference: exact McNemar test of answers that are right or wrong, else all flips of the "
    "signs of documents. p margin, of a loss beyond {percent:g} % of perplexity or points of answers: exact binomial "
    "test of answers lost (Hoeffding's bound of partial scores), else a t-test corrected for skewness. Detectable: the "
    "smallest difference that so many documents show in 80 of 100 cases."
)
_EFFECTIVE = "The longest context up to which a method stays within the margin of dense, by the means; 0 for none."
_NEEDED = (
    "The smallest k within the margin of dense, interpolated between measured budgets; none where the largest is not "
    "enough. Reached: the share of resamples in which a measured budget is. One key and all keys end the interval of "
    "budgets known on one side alone, which the law is not fitted to."
)


class Report:
    """Everything that is said about what ``summary.merge_runs`` returns, the ``run`` and its rows.

    ``table`` is the first one, at the longest length that can be judged (None where nothing is compared); ``details``
    are the others, each a title, a note and HTML, and ``csv`` those for programs, by file. ``result`` is the main
    finding and ``caveats`` what to keep in mind, as sentences.
    """

    def __init__(self, run: dict[str, Any], rows: Sequence[Row], within: float) -> None:
        self.run, self.rows = run, rows
        self.frame = summary.measurements(rows)
        compared = summary.comparisons(self.frame, within)
        measured = summary.summarise(self.frame, compared)
        self.shown, self.needed = summary.overview(measured), summary.needed_budgets(self.frame, within)
        self.caveats = findings.caveats(run, self.frame, compared)
        planned, done = run["planned"], len(rows)
        self.progress = f"{done} of {planned} measurements are made; the same command goes on." * (done < planned)
        self.table, self.result = None, findings.NOTHING_COMPARED
        self.csv, details = {SUMMARY: measured, COMPARISONS: compared}, [("All that was measured", _MEASURED, measured)]
        length = summary.longest_compared(measured, compared)
        if len(self.needed):
            self.table = findings.needed_main(self.needed)
            self.result = findings.iso_lead(self.table.cells, within)
            self.csv[NEEDED] = self.needed
            details.insert(0, ("Budgets needed, by length", _NEEDED, self.needed))
        elif length is not None:
            at = self.shown[self.shown["length"] == length]
            cost = findings.costs(at, run)
            self.table, self.result = findings.main_table(at, *cost), findings.lead(at, *cost)
        if len(compared):
            lengths = summary.effective_lengths(measured, compared, within)
            details.append(("Tests against dense", _TESTS.format(percent=100 * within), compared))
            details.append(("Effective context length", _EFFECTIVE, lengths))
        self.details = [(title, note, findings.to_html(frame)) for title, note, frame in details if len(frame)]

    def facts(self) -> str:
        """What was measured on what, in a line."""
        count = self.run["model_parameters"]
        size = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,}"
        model = f"{self.run['identity']['model']} ({size} parameters, {self.run['model_dtype']})"
        samples = self.frame.groupby(summary.CELL, observed=True).size()
        sizes = [f"{_span(self.frame['length'])} tokens", f"{_span(samples)} samples each"]
        return " · ".join([model, self.run["text_origin"], *sizes, *findings.hardware_of(self.run)])

    def panels(self) -> list[figures.Panel]:
        """The result in plots: quality by length, or the budgets that iso-quality found."""
        if len(self.needed):
            return figures.needed_panels(self.needed)
        return figures.quality_panels(self.shown, self.csv[SUMMARY])

    def plots(self) -> Iterator[tuple[str, list[figures.Figure]]]:
        """All plots, each caption with what is drawn; the result comes first."""
        caption = "Quality by context length: perplexity (lower is better), or right answers (higher is better)."
        needed = "Budgets that the quality of dense attention needs, by context length."
        drawn = lambda panels: [figures.draw([panel]) for panel in panels]  # noqa: E731
        yield needed if len(self.needed) else caption, drawn(self.panels())
        for task, own in self.frame.dropna(subset=["depth", "score"]).groupby("task", observed=True):
            yield f"{task}: share of right answers by depth of the needle and length.", figures.depth_maps(own)
        if panels := figures.position_panels(self.frame):
            caption = "Loss over dense, in nats per token, by position within the scored tokens; above 0 is worse."
            yield caption, drawn(panels)
        if not len(self.needed) and len(self.shown):
            own = self.shown[self.shown["task"] == self.shown["task"].iloc[0]]
            caption = "What each method attended: the realised budget, and its share of all visible keys."
            yield caption, drawn(figures.budget_panels(own))

    def record(self) -> dict[str, str]:
        """Tasks, methods, versions, hardware and all settings, name by name."""
        identity, match = self.run["identity"], self.run["identity"]["match"]
        values = {
            "text": f"{self.run['text_origin']}, {self.run['text_tokens']:,} tokens",
            "sparse": SPARSE_IN[identity["phase"]],
            "matched budgets": f"{match}: {MATCHED_BY[match].format(equal_at=identity['equal_at'])}",
            **{TASKS[name].title: TASKS[name].description for name in identity["tasks"] if name in TASKS},
            **{find_method(name).title: find_method(name).description for name in identity["methods"]},
            **{name: value for name, value in (identity | self.run["hardware"]).items() if name != "text"},
            "commit": ", ".join(dict.fromkeys(str(row.get("commit")) for row in self.rows)),
            "measured": ", ".join(str(session.get("started")) for session in self.run["sessions"]),
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def write_report(directories: Sequence[Path], out: Path | None = None, within: float = WITHIN) -> list[str]:
    """Writes the report of directories of runs to ``out``, by default the only one of them.

    A method counts as no worse than dense ``within`` this margin. Returns the table and the main finding, line by line;
    raises EvalError for what ``summary.merge_runs`` refuses, or where the report cannot be written.
    """
    if out is None and len(directories) != 1:
        raise EvalError("say where the report of several directories goes: --out DIR")
    target = out or directories[0]
    merged = summary.merge_runs(directories)
    check_out(target, REPORT_FILES)
    report = Report(*merged, within)
    csv = {name: summary.csv_of(table).encode() for name, table in report.csv.items()}
    page = PAGE.render(
        report=report,
        files={name: _data("text/csv", content) for name, content in csv.items()},
        picture=lambda figure: _data("image/svg+xml", figures.to_svg(figure)),
    )
    picture = figures.to_png(figures.draw(report.panels()))
    for name, content in {**csv, MAIN_FIGURE: picture, REPORT: page.encode()}.items():
        write_atomically(target / name, content)
    return [*([report.table.title, "", report.table.to_text(), ""] if report.table else []), report.result]


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"

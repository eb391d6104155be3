"""The outputs made from the rows of one or more runs: ``report.html``, ``report.md``, CSV files, ``main.png``."""

import base64
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

from eval_tasks import figures, sentences, summary, tables
from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHED_BY
from eval_tasks.measure import SPARSE_IN
from eval_tasks.merging import MergedRun, differing, merge_runs
from eval_tasks.methods import find_method
from eval_tasks.store import check_out, write_atomically
from eval_tasks.tasks import TASKS

REPORT_FILES = ("report.html", "report.md", "summary.csv", "comparisons.csv", "needed.csv", "main.png")
REPORT, MARKDOWN, SUMMARY, COMPARISONS, NEEDED, MAIN_FIGURE = REPORT_FILES
WITHIN = 0.05
# Read before a run, not at its end.
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    resources.files("eval_tasks").joinpath("templates/report.html").read_text(encoding="utf-8")
)
_MEASURED = "Those that begin with “tail” are of the scored positions; losses are in nats per token, memory in MB."
_TESTS = (
    "Loss over dense on the same documents (nats per token, or share of answers). Non-inferior: a loss of more than "
    "the margin ({percent:g} % of perplexity, or points of answers) is excluded. p-values are corrected over all lines "
    "by Holm's procedure. p difference: exact McNemar test for answers that are right or wrong, else all flips of the "
    "signs of whole documents. p margin: for answers the exact binomial test on those lost (of partial scores "
    "Hoeffding's bound), else a t-test corrected for skewness. Detectable: the smallest difference that so many "
    "documents show in 80 of 100 cases at the level of the first of all lines."
)
_EFFECTIVE = "The longest context up to which a method stays within the margin of dense, by the means; 0 for none."
_NEEDED = (
    "The smallest k within the margin of dense, interpolated between measured budgets; none where the largest is not "
    "enough. Reached: the share of resamples in which a measured budget is. One key and all keys end the interval of "
    "budgets that are known on one side alone. The law is fitted to the lengths at which they are known on both sides."
)


class Section:
    """Everything that is said about one run, or several that were put together.

    ``table`` is the first one, at the longest length that can be judged (None where nothing is compared), ``details``
    are the others; ``result`` is the main finding and ``caveats`` what to keep in mind, as sentences.
    """

    def __init__(self, merged: MergedRun, within: float) -> None:
        self.merged, self.run, self.identity = merged, merged.run, merged.run["identity"]
        self.frame = summary.measurements(merged.rows)
        self.compared = summary.comparisons(self.frame, within)
        self.summary = summary.summarise(self.frame, self.compared)
        self.shown = summary.overview(self.summary)
        self.found = summary.needed_budgets(self.frame, within)
        self.needed = summary.needed_table(self.found)
        self.caveats = sentences.caveats(self.run, self.frame, self.compared, self.found)
        self.details = [tables.full_table("All that was measured", _MEASURED, self.summary)]
        if len(self.compared):
            note = _TESTS.format(percent=100 * within)
            self.details.append(tables.full_table("Tests against dense", note, _for_programs(self.compared)))
            lengths = summary.effective_lengths(self.summary, self.compared, within)
            self.details.append(tables.full_table("Effective context length", _EFFECTIVE, lengths))
        length = summary.longest_compared(self.summary, self.compared)
        self.table: tables.Table | None = None
        self.result = [sentences.NOTHING_COMPARED]
        if self.found:
            self.table = tables.needed_main(self.found)
            self.details.insert(0, tables.full_table("Budgets needed, by length", _NEEDED, self.needed))
            self.result = [sentences.iso_lead(self.found, within)]
        elif length is not None:
            at = self.shown[self.shown["length"] == length]
            cost = sentences.costs(at, self.run)
            self.table = tables.main_table(at, self.compared, *cost)
            self.result = [sentences.lead(at, self.compared, *cost)]

    def progress(self) -> str:
        """How much of the plan is measured; empty for a run that is whole."""
        planned, done = self.run["planned"], len(self.merged.rows)
        return "" if done >= planned else f"{done} of {planned} measurements are made; the same command goes on."

    def facts(self) -> str:
        """What was measured on what, in a line."""
        counts = self.frame.groupby(summary.CELL, observed=True).size()
        parameters = _in_millions(self.run["model_parameters"])
        model = f"{self.identity['model']} ({parameters} parameters, {self.run['model_dtype']})"
        sizes = [f"{_span(self.frame['length'])} tokens", f"{_span(counts)} samples each"]
        return " · ".join([model, self.run["text_origin"], *sizes, *sentences.hardware_of(self.run)])

    def main_panels(self) -> list[figures.Panel]:
        """The result in plots: quality by length, or the budgets that iso-quality found."""
        return figures.needed_panels(self.found) if self.found else figures.quality_panels(self.shown, self.summary)

    def main_figures(self) -> list[Figure]:
        """``main_panels``, each drawn by itself."""
        return [figures.draw([panel]) for panel in self.main_panels()]

    def figures(self) -> Iterator[tuple[str, str, list[Figure]]]:
        """The other plots: heading, caption, and what is drawn."""
        for task, own in self.frame.dropna(subset=["depth", "score"]).groupby("task", observed=True):
            caption = f"{summary.title_of(task)}: share of right answers by depth and length."
            yield "Needles by depth", caption, figures.depth_maps(own)
        if panels := figures.position_panels(self.frame):
            caption = "Loss over dense, in nats per token, by position within the scored tokens; above 0 is worse."
            yield "Loss by position", caption, [figures.draw([panel]) for panel in panels]
        if not self.found and len(self.shown):
            own = self.shown[self.shown["task"] == self.shown["task"].iloc[0]]
            caption = "What each method attended: the realised budget, and its share of all visible keys."
            yield "Budgets", caption, [figures.draw([panel]) for panel in figures.budget_panels(own)]

    def record(self) -> dict[str, str]:
        """Tasks, methods, versions, hardware and all settings, name by name."""
        identity, match = self.identity, self.identity["match"]
        values = {
            "model class": self.run["model_class"],
            "text": f"{self.run['text_origin']}, {self.run['text_tokens']:,} tokens",
            "sparse": SPARSE_IN[identity["phase"]],
            "matched budgets": f"{match}: {MATCHED_BY[match].format(equal_at=identity['equal_at'])}",
            **{TASKS[name].title: TASKS[name].description for name in identity["tasks"] if name in TASKS},
            **{find_method(name).title: find_method(name).description for name in identity["methods"]},
            **{name: value for name, value in identity.items() if name != "text"},
            **self.run["hardware"],
            "commit": ", ".join(dict.fromkeys(str(row.get("commit")) for row in self.merged.rows)),
            "measured": ", ".join(str(session.get("started")) for session in self.run["sessions"]),
            "directories": ", ".join(map(str, self.merged.directories)),
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def write_report(directories: Path | Sequence[Path], out: Path | None = None, within: float = WITHIN) -> list[str]:
    """Writes the report of directories of runs to ``out``, by default the only one of them.

    Those that measured the same thing the same way share a section. A method counts as no worse than dense ``within``
    this margin. Returns the main finding of the first section, its table and sentences, line by line; raises EvalError
    where a directory holds no measurement or is damaged, or the report cannot be written.
    """
    directories = [directories] if isinstance(directories, Path) else list(directories)
    if out is None and len(directories) != 1:
        raise EvalError("say where the report of several directories goes: --out DIR")
    target = out or directories[0]
    merged = merge_runs(directories)
    check_out(target, REPORT_FILES)
    sections, labels = [Section(run, within) for run in merged], differing(merged)
    first, csv = sections[0], csv_files(sections)
    content = {name: text.encode() for name, text in csv.items()}
    content[MAIN_FIGURE] = figures.to_png(figures.draw(first.main_panels()))
    content[MARKDOWN] = markdown(sections, labels).encode()
    content[REPORT] = render(sections, labels, csv).encode()
    for name, what in content.items():
        write_atomically(target / name, what)
    return [*([first.table.title, "", first.table.to_text(), ""] if first.table else []), *first.result]


def csv_files(sections: Sequence[Section]) -> dict[str, str]:
    """The tables for programs by file name; with several sections a first column says which."""
    found = {SUMMARY: [one.summary for one in sections], COMPARISONS: [_for_programs(one.compared) for one in sections]}
    if any(section.found for section in sections):
        found[NEEDED] = [section.needed for section in sections]
    if len(sections) == 1:
        return {name: summary.csv_of(one) for name, (one,) in found.items()}
    keys = range(1, len(sections) + 1)
    joined = {name: pd.concat(parts, keys=keys, names=["section", None]) for name, parts in found.items()}
    return {name: summary.csv_of(table.reset_index("section")) for name, table in joined.items()}


def render(sections: Sequence[Section], labels: Sequence[str], csv: dict[str, str]) -> str:
    """The report as one page of HTML that refers to nothing outside itself; all text in it is escaped."""
    models = ", ".join(dict.fromkeys(str(section.identity["model"]) for section in sections))
    title, files = f"Sparse against dense attention: {models}", {name: _data("text/csv", csv[name]) for name in csv}
    pairs = list(zip(sections, labels, strict=True))
    picture = lambda figure: _data("image/svg+xml", figures.to_svg(figure, "a"))  # noqa: E731
    return PAGE.render(title=title, sections=pairs, files=files, picture=picture)


def markdown(sections: Sequence[Section], labels: Sequence[str]) -> str:
    """The sentences, tables and commands of the report as Markdown, beside ``main.png``."""
    lines = ["# Sparse against dense attention", "", f"![Quality by context length]({MAIN_FIGURE})", ""]
    for section, label in zip(sections, labels, strict=True):
        lines += [f"## {tables.plain(section.identity['model'])}{': ' + tables.plain(label) if label else ''}", ""]
        lines += [tables.plain(section.facts()), "", tables.plain(" ".join(section.result)), ""]
        lines += [f"- {tables.plain(said)}" for said in (section.progress(), *section.caveats) if said]
        lines += ["", *(table.to_markdown() for table in (section.table, *section.details) if table)]
        lines += ["```", *(command.replace("```", "") for command in section.merged.commands), "```", ""]
    return "\n".join(lines)


def _for_programs(compared: pd.DataFrame) -> pd.DataFrame:
    return compared.drop(columns=["dense_fails", "worse_samples"])


def _data(kind: str, content: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.encode()).decode()}"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"


def _in_millions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,}"

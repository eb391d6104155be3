"""The outputs made from the rows of one or more runs: ``report.html``, CSV files, ``main.png``.

What is said first is chosen by the numbers: a sentence, a table, and what to keep in mind.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from eval_tasks import figures, summary
from eval_tasks.errors import EvalError
from eval_tasks.iso_quality import LAWS
from eval_tasks.measure import SPARSE_IN
from eval_tasks.methods import DENSE, MATCHED_BY, NC, find_method
from eval_tasks.provenance import hardware_words
from eval_tasks.stats import DENSE_FAILS
from eval_tasks.store import Row, check_out, write_atomically
from eval_tasks.summary import title_of
from eval_tasks.tasks import TASKS

REPORT_FILES = ("report.html", "summary.csv", "comparisons.csv", "needed.csv", "main.png")
REPORT, SUMMARY, COMPARISONS, NEEDED, MAIN_FIGURE = REPORT_FILES
WITHIN = 0.05
# Read before a run, not at its end.
PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    resources.files("eval_tasks").joinpath("templates/report.html").read_text(encoding="utf-8")
)
_FEW = 10
_NOTHING_COMPARED = (
    "Dense attention was not measured beside a method that could be used on the same samples, so nothing is compared."
)


@dataclass(frozen=True)
class Table:
    """The first table; a cell is its text and, on a second line, what belongs to it in small print."""

    title: str
    note: str
    cells: pd.DataFrame

    def to_text(self) -> str:
        """The cells in columns without the small print, for a terminal."""
        first, *_ = self.cells.columns
        cells = self.cells.map(lambda cell: cell.partition("\n")[0]).set_index(first)
        return str(cells.rename_axis(index=None, columns=first).to_string())


class Report:
    """Everything that is said about what ``summary.merge_runs`` returns, the ``run`` and its rows.

    ``table`` is the first one, at the longest length that can be judged (None where nothing is compared); ``details``
    are the others, by name, and ``csv`` those for programs, by file. ``result`` is the main finding and ``caveats``
    what to keep in mind, as sentences.
    """

    def __init__(self, run: dict[str, Any], rows: Sequence[Row], within: float) -> None:
        self.run, self.rows = run, rows
        self.frame = summary.measurements(rows)
        compared = summary.comparisons(self.frame, within)
        measured = summary.summarise(self.frame, compared)
        self.shown, self.needed = summary.overview(measured), summary.needed_budgets(self.frame, within)
        self.caveats = _caveats(run, self.frame, compared)
        planned, done = run["planned"], len(rows)
        self.progress = f"{done} of {planned} measurements are made; the same command goes on." * (done < planned)
        self.table, self.result = None, _NOTHING_COMPARED
        self.csv, self.details = {SUMMARY: measured, COMPARISONS: compared}, {"measured": measured, "tests": compared}
        length = summary.longest_compared(measured, compared)
        if len(self.needed):
            self.table = _needed_main(self.needed)
            self.result = _iso_lead(self.table.cells, within)
            self.csv[NEEDED] = self.details["needed"] = self.needed
        elif length is not None:
            at = self.shown[self.shown["length"] == length]
            cost, what = _costs(at, run)
            self.table = _main_table(at, cost, what)
            self.result = _lead(at, self.table, what)
        if len(compared):
            self.details["effective"] = summary.effective_lengths(compared)
        self.details = {name: table for name, table in self.details.items() if len(table)}

    def facts(self) -> str:
        """What was measured on what, in a line."""
        count = self.run["model_parameters"]
        size = f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,}"
        model = f"{self.run['identity']['model']} ({size} parameters, {self.run['model_dtype']})"
        samples = self.frame.groupby(summary.CELL, observed=True).size()
        sizes = [f"{_span(self.frame['length'])} tokens", f"{_span(samples)} samples each"]
        return " · ".join([model, self.run["text_origin"], *sizes, *_hardware_of(self.run)])

    def plots(self) -> dict[str, list[figures.Panel]]:
        """The plots, by what they are of; the result comes first: quality, or the budgets that iso-quality found."""
        positions = {"position": figures.position_panels(self.frame)}
        if len(self.needed):
            return {"needed": figures.needed_panels(self.needed)} | positions
        found = {"quality": figures.quality_panels(self.shown, self.csv[SUMMARY])} | positions
        if len(self.shown):
            own = self.shown[self.shown["task"] == self.shown["task"].iloc[0]]
            found["budget"] = figures.budget_panels(own)
        return found

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
    plots, csv = report.plots(), {name: summary.csv_of(table).encode() for name, table in report.csv.items()}
    page = PAGE.render(
        report=report,
        plots=plots,
        percent=f"{100 * within:g}",
        files={name: _data("text/csv", content) for name, content in csv.items()},
        picture=lambda panel: _data("image/svg+xml", figures.to_svg(figures.draw([panel]))),
        table=_to_html,
    )
    picture = figures.to_png(figures.draw(next(iter(plots.values()))))
    for name, content in {**csv, MAIN_FIGURE: picture, REPORT: page.encode()}.items():
        write_atomically(target / name, content)
    return [*([report.table.title, "", report.table.to_text(), ""] if report.table else []), report.result]


def _main_table(at: pd.DataFrame, cost: pd.DataFrame, what: str) -> Table:
    """What each method reads at one length of ``overview``, how good it is in each task, and its ``_costs``."""
    tasks, failing, rows = list(dict.fromkeys(at["task"])), set(at.loc[at["verdict"] == DENSE_FAILS, "task"]), []
    for method, own in at.groupby("method", observed=True):
        cells = dict.fromkeys(tasks, "not measured")
        for row in own.itertuples():
            value = f"{row.perplexity:,.2f}" if pd.isna(row.score) else f"{100 * row.score:.0f} % right"
            value += f"\n{DENSE_FAILS}" * (row.task in failing)
            cells[row.task] = value if method == DENSE else _quality(row)
        verdicts = own.groupby("verdict", sort=False)["task"].agg(", ".join)
        told = verdicts.drop(["", DENSE_FAILS], errors="ignore")
        told = told if len(told) else verdicts
        said = "; ".join(word + f" in {names}" * (len(told) > 1) for word, names in told.items())
        seconds, memory = cost["seconds"].get(method, math.nan), cost["peak_memory_mb"].get(method, math.nan)
        time = f"{seconds / cost['seconds'].get(DENSE, math.nan):.2f}×"
        if method == DENSE:
            said, time = "–", f"{seconds:,.{0 if seconds > 99 else 2}f} s"
        costs = ["–" if "nan" in time else time, "–" if pd.isna(memory) else f"{memory:,.0f} MB"]
        keys = _percent(own["attended_fraction"].mean())
        rows.append([find_method(method).title, keys, *cells.values(), said, *costs])
    note = "Small print: 95 % interval. As good: a loss beyond the margin is excluded; undecided: the samples do not "
    note += "tell." + (f" Time: of {what}." if what else "")
    titles = [title_of(task).capitalize() if task in TASKS else task for task in tasks]
    header = ["Method", "Keys read", *titles, "Verdict", "Time", "Memory"]
    title = f"Against dense attention at {at['length'].iloc[0]:,} tokens"
    return Table(title, note, pd.DataFrame(rows, columns=header))


def _needed_main(needed: pd.DataFrame) -> Table:
    """What each method needs for the quality of dense, at the longest length where that is known, and by which law."""
    rows = []
    for (task, method), own in needed.groupby(["task", "method"], sort=False):
        known = own.dropna(subset=["keys"])
        n = (known if len(known) else own).iloc[-1]
        keys = "at most " * bool(n["at_most"]) + f"{n['keys']:,.0f}" if len(known) else f"more than {n['largest']:,.0f}"
        keys += "" if pd.isna(n["low"]) else f"\n{n['low']:,.0f} … {n['high']:,.0f}"
        fitted = ["needs three known lengths", "–", "–"]
        if pd.notna(n["C"]):
            exponents = "" if pd.isna(n["C_low"]) else f"\n{n['C_low']:.2f} … {n['C_high']:.2f}"
            best = min(LAWS, key=n.get)
            law = f"{n['alpha']:.3g}·n^{n['C']:.2f}"
            fitted = [law, f"{n['C']:.2f}{exponents}", f"{best}, misses by {n[best]:.2f}"]
        rows.append([find_method(method).title, title_of(task), keys, f"{n['length']:,}", *fitted])
    note = "Small print: 95 % interval. The best law misses a length left out of the fit by this factor; 1 is perfect."
    header = ["Method", "Task", "Keys needed", "At tokens", "Fitted law", "C", "Best law"]
    return Table("Budget needed for the quality of dense", note, pd.DataFrame(rows, columns=header))


def _to_html(frame: pd.DataFrame) -> str:
    """All of a frame as an escaped table, but for columns that are empty; tasks and methods by their titles."""
    frame = frame.dropna(axis=1, how="all").astype({"task": object, "method": object})
    frame["task"], frame["method"] = frame["task"].map(title_of), [find_method(name).title for name in frame["method"]]
    frame.columns = frame.columns.str.replace("_", " ")
    number = lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: E731
    return str(frame.to_html(index=False, border=0, na_rep="", float_format=number))


def _lead(at: pd.DataFrame, table: Table, what: str) -> str:
    """The result of one method in two sentences: the package's own where it was measured, else the best.

    ``at`` and ``what`` are as for ``_main_table``, which made the table.
    """
    usable = at.dropna(subset=["loss_minus_dense"])
    first = usable[usable["task"] == usable["task"].iloc[0]].set_index("method")
    best = next((name for name in (NC, "nc-topk") if name in first.index), first["loss_minus_dense"].idxmin())
    own, title = usable[usable["method"] == best], find_method(best).title
    cells = table.cells.set_index("Method").loc[title]
    ratio, is_timed, _ = cells["Time"].partition("×")
    time = f" and takes {ratio} times as long as dense attention ({what})" * bool(is_timed)
    results = [
        f"{title_of(row.task)} {_quality(row).partition(chr(10))[0]} ({row.verdict})" for row in own.itertuples()
    ]
    said = f"At {own['length'].iloc[0]:,} tokens, {title} attention reads {cells['Keys read']} of the keys{time}."
    return f"{said} Against dense attention: {', '.join(results)}."


def _iso_lead(needed: pd.DataFrame, within: float) -> str:
    """What budget each method needs at the longest length where it is known, and how that grows, of the first table."""
    said = []
    for row in needed.to_dict("records"):
        law = f", by length {row['Fitted law']}" if "^" in row["Fitted law"] else ""
        keys = row["Keys needed"].partition("\n")[0]
        said.append(f"{row['Method']} needs {keys} of {row['At tokens']} keys in {row['Task']}{law}")
    return f"To stay within {100 * within:g} % of dense attention, {'; '.join(said)}."


def _caveats(run: Mapping[str, Any], frame: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """Few samples, lengths where dense fails, calls that ran dense, different hardware, failures."""
    said = []
    if len(compared):
        fewest = compared["documents"].min()
        told = f"{'Few samples: ' * bool(fewest < _FEW)}{fewest} documents or more in each comparison."
        judged = compared[~compared["dense_fails"] & compared["p_difference"].notna()]
        if len(judged):
            within = judged.loc[judged["needed_within"].idxmax()]
            told += (
                f" With {len(judged)} comparisons a difference takes at least {within['needed']} documents to show, "
                f"and “as good” {within['needed_within']} (margin {within['margin']:.4f}); fewer comparisons take "
                "fewer."
            )
        said.append(told)
    for task, own in compared[compared["dense_fails"]].groupby("task", observed=True):
        lengths = ", ".join(f"{length:,}" for length in sorted(set(own["length"])))
        said.append(f"Dense attention itself fails in {title_of(task)} at {lengths} tokens: judge no method there.")
    failed = frame.dropna(subset=["failed"])
    for (reason, method), own in failed.groupby(["failed", "method"], observed=True):
        cells = own.groupby(["task", "length"], observed=True).size().items()
        listed = ", ".join(f"{title_of(task)} at {n:,} tokens ({count} samples)" for (task, n), count in cells)
        said.append(f"Not measured, {reason}: {find_method(method).title} in {listed}.")
    if ran_dense := sorted({reason for calls in frame["ran_dense"].dropna() for reason in calls}):
        said.append(f"Some calls of patched models ran dense: {'; '.join(ran_dense)}.")
    if len(machines := _hardware_of(run)) > 1:
        said.append(
            f"Parts of this run were measured on different hardware ({'; '.join(machines)}): times and memory of "
            "different samples do not compare."
        )
    return said


def _hardware_of(run: Mapping[str, Any]) -> list[str]:
    """The different machines that a run was made on, in words."""
    sessions = run["sessions"]
    machines = [run["hardware"], *(session["hardware"] for session in sessions if "hardware" in session)]
    machines += [machine for session in sessions for machine in session.get("other_hardware", [])]
    return list(dict.fromkeys(map(hardware_words, machines)))


def _costs(at: pd.DataFrame, run: Mapping[str, Any]) -> tuple[pd.DataFrame, str]:
    """``seconds`` and ``peak_memory_mb`` of each method, in perplexity or else the first task, and what time is of.

    Without seconds where parts of the run were measured on different hardware.
    """
    phase, tasks = run["identity"]["phase"], list(at["task"])
    own = at[at["task"] == ("perplexity" if "perplexity" in tasks else tasks[0])].set_index("method")
    timed = own.dropna(subset=["seconds"])
    column, what = "seconds", "all that was read, dense parts included"
    if own["score"].notna().any():
        what = "prompt and answer, as long as each method made it"
        if phase in ("question", "decode") and timed["seconds_per_answer_token"].notna().all():
            column, what = "seconds_per_answer_token", "each token of an answer after the first"
    elif timed["sparse_seconds"].notna().all():
        column, what = "sparse_seconds", SPARSE_IN[phase].split(";")[0]
    if len(_hardware_of(run)) > 1 or not len(timed):
        return own[["peak_memory_mb"]].assign(seconds=math.nan), ""
    return own[["peak_memory_mb"]].assign(seconds=own[column]), what


def _quality(row: Any) -> str:
    """A method against dense in one task, change of perplexity or points of right answers, and its interval below."""
    loss = [row.loss_minus_dense, row.low, row.high]
    if math.isnan(loss[0]):
        return "failed" if row.samples == 0 else "not compared"
    if not math.isnan(row.score):
        points = [-100 * value for value in (loss[0], loss[2], loss[1])]
        mean, *ends = (f"{value:+.0f}" if abs(value) > 0.5 else "0" for value in points)
        mean = "the same" if mean == "0" else f"{mean} points"
    elif loss[0] >= math.log(2):
        mean, *ends = (f"{math.exp(value):.1f}" for value in loss)
        mean = f"{mean} times"
    else:
        mean, *ends = (f"{round(100 * math.expm1(value), 1) + 0.0:+.1f}" for value in loss)
        mean = "the same" if mean in ("+0.0", "-0.0") else f"{mean} %"
    return (mean if math.isnan(row.low) else f"{mean}\n{' … '.join(ends)}").replace("-", "−")


def _percent(share: float) -> str:
    """A share as a percentage, with a decimal where it is small; a dash for what is missing."""
    if math.isnan(share):
        return "–"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"

"""What a report says first, chosen by the numbers: a sentence, a table, and what to keep in mind."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval_tasks.iso_quality import LAWS
from eval_tasks.measure import SPARSE_IN
from eval_tasks.methods import DENSE, NC, find_method
from eval_tasks.provenance import hardware_words
from eval_tasks.stats import DENSE_FAILS
from eval_tasks.summary import title_of
from eval_tasks.tasks import TASKS

NOTHING_COMPARED = (
    "Dense attention was not measured beside a method that could be used on the same samples, so nothing is compared."
)
_FEW = 10


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


def main_table(at: pd.DataFrame, cost: pd.DataFrame, what: str) -> Table:
    """What each method reads at one length, how good it is in each task, and what it costs; see ``lead``."""
    tasks, rows = list(dict.fromkeys(at["task"])), []
    for method, own in at.groupby("method", observed=True):
        cells, verdicts = dict.fromkeys(tasks, "not measured"), defaultdict(list)
        for row in own.itertuples():
            verdicts[row.verdict].append(row.task)
            cells[row.task] = "\n".join(filter(None, quality(row)))
            if method == DENSE:
                failing = (at.loc[at["task"] == row.task, "verdict"] == DENSE_FAILS).any()
                value = f"{row.perplexity:,.2f}" if pd.isna(row.score) else f"{100 * row.score:.0f} % right"
                cells[row.task] = value + f"\n{DENSE_FAILS}" * bool(failing)
        told = {word: names for word, names in verdicts.items() if word not in ("", DENSE_FAILS)} or verdicts
        said = "; ".join(word + f" in {', '.join(names)}" * (len(told) > 1) for word, names in told.items())
        seconds, memory = cost["seconds"].get(method, math.nan), cost["peak_memory_mb"].get(method, math.nan)
        time = f"{seconds / cost['seconds'].get(DENSE, math.nan):.2f}×"
        if method == DENSE:
            said, time = "–", f"{seconds:,.{0 if seconds > 99 else 2}f} s"
        costs = ["–" if "nan" in time else time, "–" if pd.isna(memory) else f"{memory:,.0f} MB"]
        keys = percent(own["attended_fraction"].mean())
        rows.append([find_method(method).title, keys, *cells.values(), said, *costs])
    note = "Small print: 95 % interval. As good: a loss beyond the margin is excluded; undecided: the samples do not "
    note += "tell." + (f" Time: of {what}." if what else "")
    titles = [title_of(task).capitalize() if task in TASKS else task for task in tasks]
    header = ["Method", "Keys read", *titles, "Verdict", "Time", "Memory"]
    title = f"Against dense attention at {at['length'].iloc[0]:,} tokens"
    return Table(title, note, pd.DataFrame(rows, columns=header))


def needed_main(needed: pd.DataFrame) -> Table:
    """What each method needs for the quality of dense, at the longest length where that is known, and by which law."""
    rows = []
    for (task, method), own in needed.groupby(["task", "method"], sort=False):
        known = own.dropna(subset=["keys"])
        n = (known if len(known) else own).iloc[-1]
        keys = "at most " * bool(n["at_most"]) + f"{n['keys']:,.0f}" if len(known) else f"more than {n['largest']:,}"
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


def to_html(frame: pd.DataFrame) -> str:
    """All of a frame as an escaped table, but for columns that are empty; tasks and methods by their titles."""
    frame = frame.dropna(axis=1, how="all").astype({"task": object, "method": object})
    frame["task"], frame["method"] = frame["task"].map(title_of), [find_method(name).title for name in frame["method"]]
    frame.columns = frame.columns.str.replace("_", " ")
    number = lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: E731
    return str(frame.to_html(index=False, border=0, na_rep="", float_format=number))


def lead(at: pd.DataFrame, cost: pd.DataFrame, what: str) -> str:
    """The result of one method in two sentences: the package's own where it was measured, else the best.

    ``at`` is of ``overview``, at one length; ``cost`` and ``what`` are of ``costs``.
    """
    usable = at.dropna(subset=["loss_minus_dense"])
    first = usable[usable["task"] == usable["task"].iloc[0]].set_index("method")
    best = next((name for name in (NC, "nc-topk") if name in first.index), first["loss_minus_dense"].idxmin())
    own = usable[usable["method"] == best]
    said = f"At {own['length'].iloc[0]:,} tokens, {find_method(best).title} attention reads "
    said += f"{percent(own['attended_fraction'].mean())} of the keys"
    times = cost["seconds"].reindex([best, DENSE])
    if times.notna().all():
        said += f" and takes {times[best] / times[DENSE]:.2f} times as long as dense attention ({what})"
    results = []
    for row in own.itertuples():
        amount = quality(row)[0]
        side = {"+": " higher", "−": " lower"}.get(amount[0], "")
        results.append(f"{title_of(row.task)} is {amount.lstrip('+−')}{side} ({row.verdict})")
    return f"{said}. Against dense attention, {', '.join(results)}."


def iso_lead(needed: pd.DataFrame, within: float) -> str:
    """What budget each method needs at the longest length where it is known, and how that grows; of ``needed_main``."""
    said = []
    for row in needed.to_dict("records"):
        law = f", by length {row['Fitted law']}" if "^" in row["Fitted law"] else ""
        keys = row["Keys needed"].partition("\n")[0]
        said.append(f"{row['Method']} needs {keys} of {row['At tokens']} keys in {row['Task']}{law}")
    return f"To stay within {100 * within:g} % of dense attention, {'; '.join(said)}."


def caveats(run: Mapping[str, Any], frame: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """Few samples, lengths where dense fails, calls that ran dense, different hardware, failures."""
    said = []
    if len(compared):
        fewest = compared["documents"].min()
        judged = compared[~compared["dense_fails"] & compared["p_difference"].notna()]
        told = f"{'Few samples: ' * bool(fewest < _FEW)}{fewest} documents or more in each comparison."
        if len(judged):
            within = judged.loc[judged["needed_within"].idxmax()]
            told += (
                f" With {len(judged)} comparisons a difference takes at least {within['needed']} documents to show, "
                f"and “as good” {within['needed_within']} (margin {within['margin']:.4f}); fewer comparisons take "
                "fewer."
            )
        said.append(told)
    for task, own in compared[compared["dense_fails"]].groupby("task", observed=True):
        where = f"{title_of(task)} at {_listed(own['length'])} tokens"
        said.append(f"Dense attention itself fails in {where}: judge no method there.")
    failed = frame.dropna(subset=["failed"])
    for (reason, method), own in failed.groupby(["failed", "method"], observed=True):
        cells = own.groupby(["task", "length"], observed=True).size().items()
        listed = ", ".join(f"{title_of(task)} at {n:,} tokens ({count} samples)" for (task, n), count in cells)
        said.append(f"Not measured, {reason}: {find_method(method).title} in {listed}.")
    if ran_dense := sorted({reason for calls in frame["ran_dense"].dropna() for reason in calls}):
        said.append(f"Some calls of patched models ran dense: {'; '.join(ran_dense)}.")
    if len(machines := hardware_of(run)) > 1:
        said.append(
            f"Parts of this run were measured on different hardware ({'; '.join(machines)}): times and memory of "
            "different samples do not compare."
        )
    return said


def hardware_of(run: Mapping[str, Any]) -> list[str]:
    """The different machines that a run was made on, in words."""
    sessions = run["sessions"]
    machines = [run["hardware"], *(session["hardware"] for session in sessions if "hardware" in session)]
    machines += [machine for session in sessions for machine in session.get("other_hardware", [])]
    return list(dict.fromkeys(map(hardware_words, machines)))


def costs(at: pd.DataFrame, run: Mapping[str, Any]) -> tuple[pd.DataFrame, str]:
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
    if len(hardware_of(run)) > 1 or not len(timed):
        return own[["peak_memory_mb"]].assign(seconds=math.nan), ""
    return own[["peak_memory_mb"]].assign(seconds=own[column]), what


def quality(row: Any) -> tuple[str, str]:
    """A method against dense in one task, and the 95 % interval: change of perplexity, or points of right answers."""
    loss = [row.loss_minus_dense, row.low, row.high]
    if math.isnan(loss[0]):
        return "failed" if row.samples == 0 else "not compared", ""
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
    return mean.replace("-", "−"), "" if math.isnan(row.low) else " … ".join(ends).replace("-", "−")


def percent(share: float) -> str:
    """A share as a percentage, with a decimal where it is small; a dash for what is missing."""
    if math.isnan(share):
        return "–"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _listed(lengths: pd.Series) -> str:
    return ", ".join(f"{length:,}" for length in sorted(set(lengths)))

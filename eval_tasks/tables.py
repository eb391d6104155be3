"""The tables of a report."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from eval_tasks.iso_quality import IsoQuality
from eval_tasks.methods import DENSE, find_method
from eval_tasks.sentences import percent, quality
from eval_tasks.stats import DENSE_FAILS
from eval_tasks.summary import VERDICTS, title_of
from eval_tasks.tasks import TASKS


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
    tasks, rows, fails = list(dict.fromkeys(at["task"])), [], VERDICTS[DENSE_FAILS]
    for method, own in at.groupby("method", observed=True):
        cells, verdicts = dict.fromkeys(tasks, "not measured"), defaultdict(list)
        for row in own.itertuples():
            verdicts[row.verdict].append(row.task)
            cells[row.task] = "\n".join(filter(None, quality(row)))
            if method == DENSE:
                failing = (at.loc[at["task"] == row.task, "verdict"] == fails).any()
                value = f"{row.perplexity:,.2f}" if pd.isna(row.score) else f"{100 * row.score:.0f} % right"
                cells[row.task] = value + "\ndense fails" * bool(failing)
        told = {word: names for word, names in verdicts.items() if word not in ("", fails)} or verdicts
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


def needed_main(found: Sequence[IsoQuality]) -> Table:
    """What each method needs for the quality of dense, at the longest length where that is known, and by which law."""
    rows = []
    for iso in found:
        known = iso.needed.dropna(subset=["keys"])
        n, law = (known if len(known) else iso.needed).iloc[-1], iso.law
        keys = "at most " * bool(n["at_most"]) + f"{n['keys']:,.0f}" if len(known) else f"more than {n['largest']:,}"
        keys += "" if pd.isna(n["low"]) else f"\n{n['low']:,.0f} … {n['high']:,.0f}"
        fitted = ["needs three known lengths", "–", "–"]
        if law is not None:
            exponents = "" if math.isnan(law.C_low) else f"\n{law.C_low:.2f} … {law.C_high:.2f}"
            best = f"{law.best}, misses by {law.errors[law.best]:.2f}"
            fitted = [f"{law.alpha:.3g}·n^{law.C:.2f}", f"{law.C:.2f}{exponents}", best]
        rows.append([find_method(iso.method).title, title_of(iso.task), keys, f"{n['length']:,}", *fitted])
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

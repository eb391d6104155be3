"""The tables of a report, as text that HTML and Markdown share."""

import html
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval_tasks.iso_quality import IsoQuality
from eval_tasks.methods import DENSE, find_method
from eval_tasks.sentences import VERDICTS, percent, quality, verdict
from eval_tasks.stats import DENSE_FAILS
from eval_tasks.summary import title_of
from eval_tasks.tasks import TASKS


@dataclass(frozen=True)
class Table:
    """A table of words; a cell is its text and, in small print, what belongs to it."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, str]]]

    def to_markdown(self) -> str:
        """The table with its heading as Markdown."""
        cells = [[f"{text} ({note})" if note else text for text, note in row] for row in self.rows]
        lines = [self.header, ["---"] * len(self.header), *cells]
        table = ["| " + " | ".join(map(plain, line)) + " |" for line in lines]
        return "\n".join([f"### {plain(self.title)}", "", *([plain(self.note), ""] if self.note else []), *table, ""])

    def to_text(self) -> str:
        """The cells in columns, for a terminal."""
        lines = [self.header, *([text for text, _ in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main_table(at: pd.DataFrame, compared: pd.DataFrame, cost: pd.DataFrame, what: str) -> Table:
    """What each method reads at one length, how good it is in each task, and what it costs; see ``lead``."""
    tasks, rows = list(dict.fromkeys(at["task"])), []
    for method, own in at.groupby("method", observed=True):
        cells, verdicts = {row.task: row for row in own.itertuples()}, defaultdict(list)
        for task, row in cells.items():
            verdicts[verdict(compared, row)].append(task)
        told = {word: names for word, names in verdicts.items() if word not in ("", VERDICTS[DENSE_FAILS])} or verdicts
        said = "; ".join(word + f" in {', '.join(names)}" * (len(told) > 1) for word, names in told.items())
        seconds, memory = cost["seconds"].get(method, math.nan), cost["peak_memory_mb"].get(method, math.nan)
        time = f"{seconds / cost['seconds'].get(DENSE, math.nan):.2f}×"
        if method == DENSE:
            said, time = "–", f"{seconds:,.{0 if seconds > 99 else 2}f} s"
        before = [find_method(method).title, percent(own["attended_fraction"].mean())]
        after = [said, "–" if "nan" in time else time, "–" if pd.isna(memory) else f"{memory:,.0f} MB"]
        found = [_quality(cells[task], compared) if task in cells else ("not measured", "") for task in tasks]
        rows.append([*_cells(before), *found, *_cells(after)])
    note = "Small print: 95 % interval. As good: a loss beyond the margin is excluded; undecided: the samples do not "
    note += "tell." + (f" Time: of {what}." if what else "")
    titles = [title_of(task).capitalize() if task in TASKS else task for task in tasks]
    title = f"Against dense attention at {at['length'].iloc[0]:,} tokens"
    header = ["Method", "Keys read", *titles, "Verdict", "Time", "Memory"]
    return Table(title, note, header, rows)


def needed_main(found: Sequence[IsoQuality]) -> Table:
    """What each method needs for the quality of dense, at the longest length where that is known, and by which law."""
    rows = []
    for iso in found:
        known = iso.needed.dropna(subset=["keys"])
        n, law = (known if len(known) else iso.needed).iloc[-1], iso.law
        keys = "at most " * bool(n["at_most"]) + f"{n['keys']:,.0f}" if len(known) else f"more than {n['largest']:,}"
        interval = "" if pd.isna(n["low"]) else f"{n['low']:,.0f} … {n['high']:,.0f}"
        row = [*_cells([find_method(iso.method).title, title_of(iso.task)]), (keys, interval), (f"{n['length']:,}", "")]
        if law is None:
            rows.append([*row, *_cells(["needs three known lengths", "–", "–"])])
            continue
        exponents = "" if law.C_low is None else f"{law.C_low:.2f} … {law.C_high:.2f}"
        best = f"{law.best}, misses by {law.errors[law.best]:.2f}"
        rows.append([*row, (f"{law.alpha:.3g}·n^{law.C:.2f}", ""), (f"{law.C:.2f}", exponents), (best, "")])
    note = "Small print: 95 % interval. The best law misses a length left out of the fit by this factor; 1 is perfect."
    header = ["Method", "Task", "Keys needed", "At tokens", "Fitted law", "C", "Best law"]
    return Table("Budget needed for the quality of dense", note, header, rows)


def full_table(title: str, note: str, frame: pd.DataFrame) -> Table:
    """All of a frame, with the names of its columns, but for columns that are empty."""
    frame = frame.dropna(axis=1, how="all")
    rows = [_cells(_word(name, value) for name, value in row.items()) for row in frame.to_dict("records")]
    return Table(title, note, [name.replace("_", " ") for name in frame.columns], rows)


def plain(text: object) -> str:
    """Text that neither ends a cell of Markdown nor is taken for HTML, a link or a picture."""
    return re.sub(r"[\\|\[]", r"\\\g<0>", html.escape(str(text).replace("\n", " "), quote=False))


def _cells(texts: Iterable[str]) -> list[tuple[str, str]]:
    return [(text, "") for text in texts]


def _word(name: str, value: Any) -> str:
    if name in ("task", "method"):
        return title_of(value) if name == "task" else find_method(value).title
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _quality(row: Any, compared: pd.DataFrame) -> tuple[str, str]:
    if row.method != DENSE:
        return quality(row)
    here = compared[(compared["task"] == row.task) & (compared["length"] == row.length)]
    value = f"{row.perplexity:,.2f}" if pd.isna(row.score) else f"{100 * row.score:.0f} % right"
    return value, "dense fails" if here["dense_fails"].any() else ""

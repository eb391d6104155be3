"""The tables of a report, as text that HTML and Markdown share."""

import html
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval_tasks.iso_quality import IsoQuality
from eval_tasks.methods import DENSE, find_method
from eval_tasks.sentences import VERDICTS, percent, quality, verdict
from eval_tasks.stats import DENSE_FAILS
from eval_tasks.summary import title_of
from eval_tasks.tasks import TASKS

Column = Callable[[Any], str]


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


def main_table(at: pd.DataFrame, compared: pd.DataFrame, cost: pd.DataFrame, what: str) -> Table:
    """Each method at one length: what it reads, how good it is against dense in each task, and what it costs.

    Args:
        at: of ``overview``, at one length.
        compared: of ``comparisons``.
        cost, what: of ``costs``.
    """
    tasks, rows = list(dict.fromkeys(at["task"])), []
    for method, own in at.groupby("method", observed=True):
        cells, verdicts = {row.task: row for row in own.itertuples()}, defaultdict(list)
        for task, row in cells.items():
            verdicts[verdict(compared, row)].append(task)
        told = {word: names for word, names in verdicts.items() if word not in ("", VERDICTS[DENSE_FAILS])} or verdicts
        said = "; ".join(word + f" in {', '.join(names)}" * (len(told) > 1) for word, names in told.items())
        seconds, memory = cost["seconds"].get(method, math.nan), cost["peak_memory_mb"].get(method, math.nan)
        time = f"{seconds:.3g} s" if method == DENSE else f"{seconds / cost['seconds'].get(DENSE, math.nan):.2f}×"
        rows.append(
            [
                (find_method(method).title, ""),
                (percent(own["attended_fraction"].mean()), ""),
                *(_quality(cells[task], compared) if task in cells else ("not measured", "") for task in tasks),
                ("" if method == DENSE else said, ""),
                ("–" if "nan" in time else time, ""),
                ("–" if pd.isna(memory) else f"{memory:,.0f} MB", ""),
            ]
        )
    note = "Small print: 95 % interval. As good: a loss beyond the margin is excluded; undecided: the samples do not tell."
    header = ["Method", "Keys read", *(title_of(task) if task not in TASKS else title_of(task).capitalize() for task in tasks), "Verdict", "Time", "Memory"]
    title = f"Against dense attention at {at['length'].iloc[0]:,} tokens"
    return Table(title, note + (f" Time: of {what}." if what else ""), header, rows)


def quality_table(summary: pd.DataFrame) -> Table:
    """Quality, realised budgets, time and memory of all that was measured."""
    columns: dict[str, Column] = _WHICH | {
        "Samples": lambda r: f"{r.samples}" + (f" ({r.failed} failed)" if r.failed else ""),
        "Right, %": lambda r: number(100 * r.score, 1),
        "Perplexity": lambda r: number(r.perplexity, 3),
        "Bits/byte": lambda r: number(r.bits_per_byte, 3),
        "Keys, scored": lambda r: number(r.tail_mean_keys, 1),
        "Share, scored": lambda r: share(r.tail_attended_fraction),
        "Share, all": lambda r: share(r.attended_fraction),
        "Seconds": lambda r: number(r.seconds, 2),
        "Tokens/s": lambda r: number(r.tokens_per_second, 1),
        "Tokens answered": lambda r: number(r.answer_tokens, 1),
        "Memory, MB": lambda r: number(r.peak_memory_mb, 0),
    }
    return _table("All that was measured", "", summary, columns)


def comparison_table(compared: pd.DataFrame, within: float) -> Table:
    """Verdicts against dense, each with its number of documents and the smallest difference it could have seen."""
    note = (
        "Loss over dense on the same documents (nats per token, or share of answers). Non-inferior: a loss of more "
        f"than the margin ({100 * within:g} % of perplexity, or points of answers) is excluded. p-values are corrected "
        "over all lines by Holm's procedure. Differs: exact McNemar test for answers that are right or wrong, else "
        "all flips of the signs of whole documents. Within: for answers the exact binomial test on those lost (of "
        "partial scores Hoeffding's bound), else a t-test corrected for skewness. Detectable: the smallest difference "
        "that so many documents show in 80 of 100 cases at the level of the first of all lines."
    )
    columns: dict[str, Column] = _WHICH | {
        "Documents": lambda r: str(r.documents),
        "Loss − dense": lambda r: f"{r.difference:+.4f}",
        "95 % interval": lambda r: interval(r.low, r.high, "+.4f"),
        "Detectable": lambda r: number(r.detectable, 4) or "none",
        "Margin": lambda r: f"{r.margin:.4f}",
        "p, differs": lambda r: number(r.p_difference, 4),
        "p, within": lambda r: number(r.p_margin, 4),
        "Verdict": lambda r: r.verdict,
    }
    return _table("Tests against dense", note, compared, columns)


def effective_table(lengths: pd.DataFrame, within: float) -> Table:
    """Effective context lengths."""
    reached = lambda r: "none" if not r.length else f"{r.length:,}" + " (the longest measured)" * (r.length == r.longest)  # noqa: E731
    note = f"The longest context up to which a method stays within {100 * within:g} % of dense, by the means."
    columns = {"Task": _WHICH["Task"], "Method": _WHICH["Method"], "Effective length": reached}
    return _table("Effective context length", note, lengths, columns)


def needed_tables(needed: pd.DataFrame, found: Sequence[IsoQuality], within: float) -> list[Table]:
    """The laws that the smallest budgets within the margin follow, and these budgets."""
    laws = pd.DataFrame([{"task": iso.task, "method": iso.method, "last": iso.needed[-1], "law": iso.law} for iso in found])
    fitted = {
        "Task": _WHICH["Task"],
        "Method": _WHICH["Method"],
        "Fitted law": lambda r: f"{r.law.alpha:.3g} · n^{r.law.C:.2f}" if r.law else "needs three known lengths",
        "C, 95 % interval": lambda r: interval(*r.law.C_interval, ".2f") if r.law and r.law.C_interval else "",
        "Lengths": lambda r: str(r.law.lengths) if r.law else "",
        "A law misses by": lambda r: ", ".join(f"{law} {error:.2f}" for law, error in r.law.errors.items()) if r.law else "",
        "Resamples fitted": lambda r: f"{100 * r.law.fitted:.0f} %" if r.law else "",
    }
    budgets = _WHICH | {
        "Keys needed": lambda r: "at most " * r.at_most + number(r.keys, 1) or f"more than {r.largest:,}",
        "Share": lambda r: share(r.keys / r.length),
        "95 % interval": lambda r: interval(r.low, r.high, ".1f"),
        "Reached": lambda r: "" if pd.isna(r.reached) else f"{100 * r.reached:.0f} %",
        "Documents": lambda r: str(r.documents),
    }
    return [
        _table(
            "The law that needed budgets follow",
            "Fitted as log k = log α + C·log n to the lengths at which the needed budget lies between measured ones. "
            "“Misses by”: by which factor a law misses a length that it was not fitted to; 1 is perfect. Resamples in "
            "which a budget is known on one side alone widen the interval by all that it may be.",
            laws,
            fitted,
        ),
        _table(
            "Budget needed for the quality of dense",
            f"The smallest k that stays within {100 * within:g} % of dense, interpolated between measured budgets. "
            "Reached: the share of resamples in which a measured budget does. Where the smallest measured budget is "
            "enough or the largest is not, one key and all keys end the interval.",
            needed,
            budgets,
        ),
    ]


def number(value: float | None, digits: int) -> str:
    """A number for a table; empty for what is missing."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def share(value: float) -> str:
    """A share as a percentage for a table; empty for what is missing."""
    return "" if pd.isna(value) else f"{100 * value:.2f} %"


def interval(low: float, high: float, form: str) -> str:
    """An interval for a table; empty where there is none."""
    return "" if pd.isna(low) or pd.isna(high) else f"{low:{form}} … {high:{form}}"


def plain(text: object) -> str:
    """Text that neither ends a cell of Markdown nor is taken for HTML."""
    return html.escape(str(text).replace("\n", " "), quote=False).replace("|", "\\|")


_WHICH: dict[str, Column] = {
    "Task": lambda r: title_of(r.task),
    "Tokens": lambda r: f"{r.length:,}",
    "Method": lambda r: find_method(r.method).title,
}


def _table(title: str, note: str, frame: pd.DataFrame, columns: Mapping[str, Column]) -> Table:
    """A line for each row of a frame, without columns that have nothing to say."""
    made = {name: [make(row) for row in frame.itertuples()] for name, make in columns.items()}
    made = {name: cells for name, cells in made.items() if any(cells)}
    return Table(title, note, list(made), [[(cell, "") for cell in row] for row in zip(*made.values(), strict=True)])


def _quality(row: Any, compared: pd.DataFrame) -> tuple[str, str]:
    if row.method != DENSE:
        return quality(row)
    here = compared[(compared["task"] == row.task) & (compared["length"] == row.length)]
    value = number(row.perplexity, 2) if pd.isna(row.score) else f"{100 * row.score:.0f} % right"
    return value, "fails: judge no method" if here["dense_fails"].any() else ""

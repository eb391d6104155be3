"""The tables of a report, as text that HTML and Markdown share."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from eval_tasks.comparisons import Comparison
from eval_tasks.iso_quality import IsoQuality
from eval_tasks.measure import Phase
from eval_tasks.methods import find_method
from eval_tasks.summary import Failure, Summary, title_of
from eval_tasks.verdicts import EffectiveLength


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        title, note: above it; the note may be empty.
        header: of the columns.
        rows: the cells.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_html(self) -> str:
        """The table with its heading; every text in it is escaped."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        title = f"<h3>{html.escape(self.title)}</h3>"
        return f'{title}{note}<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'

    def to_markdown(self) -> str:
        """The table with its heading as Markdown."""
        lines = [f"### {_plain(self.title)}", ""]
        if self.note:
            lines += [_plain(self.note), ""]
        lines += [_line(self.header), _line(["---"] * len(self.header)), *(_line(row) for row in self.rows), ""]
        return "\n".join(lines)


def quality_table(task: str, summaries: Sequence[Summary], phase: Phase = "all") -> Table:
    """Quality, realised budgets, time and memory of one task, whose sparse part is that of a phase."""
    own = [summary for summary in summaries if summary.task == task]
    answers = any(summary.score is not None for summary in own)
    quality = ("Right, %", "Lost, points") if answers else ("Perplexity", "Bits/byte", "Loss − dense")
    header = (
        "Method", "Tokens", "Samples", *quality, "95 % interval",
        *(("Tokens answered",) if answers else ("Perplexity / dense",)),
        "Keys, scored", "Share, scored", "Share, all", "Seconds", "Tokens/s", "Memory, MB",
    )  # fmt: skip
    return Table(
        _capital(title_of(task)),
        TIMED["answers" if answers else phase],
        header,
        tuple(_quality_row(s, answers) for s in own),
    )


TIMED = {
    "all": "Seconds: of one forward pass over all tokens.",
    "prefill": "Seconds: of a sparse prefill of the context and of the scored tokens, which are read densely. "
    "Tokens/s: of the prefill.",
    "question": "Seconds: of a dense prefill of the context and of the scored tokens after it, read at once. Tokens/s: "
    "of these.",
    "decode": "Seconds: of a dense prefill of the context and of the scored tokens after it, one by one. Tokens/s: of "
    "these.",
    "answers": "Seconds: of the prompt and of as many tokens as each method answered with, which differ from method to "
    "method. Tokens/s: of the answer's tokens after the first, where these were timed apart.",
}
"""What the times of a table are of: by phase, and of answers."""


def _quality_row(summary: Summary, answers: bool) -> tuple[str, ...]:
    scale = 100.0 if answers else 1.0
    digits = 1 if answers else 3
    missing = summary.loss_minus_dense is None
    difference = "" if missing else f"{scale * (summary.loss_minus_dense or 0.0):+.{digits}f}"
    interval = interval_text(summary.low, summary.high, scale, digits)
    quality = (
        (f"{100 * (summary.score or 0.0):.1f}", difference)
        if answers
        else (number(summary.perplexity, 3), number(summary.bits_per_byte, 3), difference)
    )
    return (
        find_method(summary.method).title,
        f"{summary.length:,}",
        str(summary.samples) + (f" ({summary.failed} failed)" if summary.failed else ""),
        *quality,
        interval,
        number(summary.answer_tokens, 1) if answers else number(summary.perplexity_ratio, 3),
        number(summary.tail_mean_keys, 1),
        f"{100 * summary.tail_attended_fraction:.2f} %",
        f"{100 * summary.attended_fraction:.2f} %",
        number(summary.seconds, 2),
        number(summary.tokens_per_second, 1),
        number(summary.peak_memory_mb, 0),
    )


def comparison_table(comparisons: Sequence[Comparison], summaries: Sequence[Summary], within: float) -> Table:
    """Verdicts against dense, each with its number of documents and the smallest difference it could have seen."""
    cells = {(s.task, s.length, s.method): s for s in summaries}
    rows = []
    for c in comparisons:
        summary = cells[c.task, c.length, c.method]
        rows.append(
            (
                title_of(c.task),
                f"{c.length:,}",
                find_method(c.method).title,
                number(summary.tail_mean_keys, 1),
                f"{100 * summary.tail_attended_fraction:.2f} %",
                str(c.documents),
                f"{c.difference:+.4f}",
                interval_text(c.low, c.high, 1.0, 4),
                "none" if c.detectable is None else number(c.detectable, 4),
                f"{c.margin:.4f}",
                number(c.p_difference, 4),
                number(c.p_margin, 4),
                c.verdict,
            )
        )
    note = (
        "Loss over dense on the same documents (nats per token, or share of answers). Non-inferior: a loss of more "
        f"than the margin ({100 * within:g} % of perplexity, or points of answers) is excluded. p-values are corrected "
        "over all lines by Holm's procedure. Differs: exact McNemar test for answers that are right or wrong, else "
        "all flips of the signs of whole documents. Within: for answers the exact binomial test on those lost (of "
        "partial scores Hoeffding's bound), else a t-test corrected for skewness. Detectable: the smallest difference "
        "that so many documents show in 80 of 100 cases at the level of the first of all lines." + _fewest(comparisons)
    )
    header = (
        "Task", "Tokens", "Method", "Keys, scored", "Share, scored", "Documents", "Loss − dense", "95 % interval",
        "Detectable", "Margin", "p, differs", "p, within", "Verdict",
    )  # fmt: skip
    return Table("Compared with dense", note, header, tuple(rows))


def _fewest(comparisons: Sequence[Comparison]) -> str:
    """How many documents a verdict needs in this family of comparisons, as further sentences of the note."""
    difference = max((c.needed for c in comparisons), default=0)
    margins = dict.fromkeys((c.margin, c.needed_within) for c in comparisons)
    within = " or ".join(f"{needed} (margin {margin:.4f})" for margin, needed in margins)
    return (
        f" Among so many lines a difference needs at least {difference} documents, all of which differ the same way, "
        f"and non-inferiority at least {within}, of which none loses anything; fewer lines need fewer."
    )


def effective_table(lengths: Sequence[EffectiveLength], summaries: Sequence[Summary], within: float) -> Table:
    """Effective context lengths, with what was attended there."""
    cells = {(s.task, s.length, s.method): s for s in summaries}
    rows = []
    for found in lengths:
        at = cells.get((found.task, found.length or -1, found.method))
        reached = "none" if found.length is None else f"{found.length:,}"
        rows.append(
            (
                title_of(found.task),
                find_method(found.method).title,
                f"{reached} (the longest measured)" if found.length == found.longest else reached,
                "" if at is None else number(at.tail_mean_keys, 1),
                "" if at is None else f"{100 * at.tail_attended_fraction:.2f} %",
            )
        )
    note = f"The longest context up to which a method stays within {100 * within:g} % of dense, by the means."
    header = ("Task", "Method", "Effective length", "Keys, scored", "Share, scored")
    return Table("Effective context length", note, header, tuple(rows))


def iso_tables(found: Sequence[IsoQuality], within: float) -> list[Table]:
    """The smallest budgets within the margin and the laws they follow; empty where nothing of the kind was measured."""
    if not found:
        return []
    needed = tuple(
        (
            title_of(iso.task),
            find_method(iso.method).title,
            f"{n.length:,}",
            f"more than {n.largest:,}" if n.keys is None else ("at most " if n.at_most else "") + number(n.keys, 1),
            "" if n.keys is None else f"{100 * n.keys / n.length:.2f} %",
            interval_text(n.low, n.high, 1.0, 1, sign=False),
            "" if n.reached is None else f"{100 * n.reached:.0f} %",
            str(iso.documents),
        )
        for iso in found
        for n in iso.needed
    )
    laws = tuple(
        (
            title_of(iso.task),
            find_method(iso.method).title,
            f"{iso.law.alpha:.3g} · n^{iso.law.C:.2f}",
            "" if iso.law.C_interval is None else interval_text(*iso.law.C_interval, 1.0, 2, sign=False),
            str(iso.law.lengths),
            *(f"{iso.law.errors[law]:.2f}" for law in ("constant", "logarithmic", "power")),
            f"{100 * iso.law.fitted:.0f} %",
        )
        if iso.law
        else (title_of(iso.task), find_method(iso.method).title, "needs three lengths where it is known", *[""] * 6)
        for iso in found
    )
    return [
        Table(
            "Budget needed for the quality of dense",
            f"The smallest k that stays within {100 * within:g} % of dense, interpolated between measured budgets. "
            "Reached: the share of resamples in which a measured budget does. Where the smallest measured budget is "
            "enough or the largest is not, in the data or in resamples, one key and all keys end the interval.",
            ("Task", "Method", "Tokens", "Keys needed", "Share", "95 % interval", "Reached", "Documents"),
            needed,
        ),
        Table(
            "The law that it follows",
            "Fitted as log k = log α + C·log n to the lengths at which the needed budget lies between measured ones. "
            "Resamples in which it does not are in the interval with all that it may be; “resamples fitted” is the "
            "share of the others. The columns before it say by which factor each law misses a length that it "
            "was not fitted to: 1 is perfect.",
            (
                "Task",
                "Method",
                "Fitted law",
                "C, 95 % interval",
                "Lengths",
                "Constant misses by",
                "Logarithmic by",
                "Power by",
                "Resamples fitted",
            ),
            laws,
        ),
    ]


def failure_table(failed: Sequence[Failure]) -> list[Table]:
    """What could not be measured; empty where there is nothing of the kind."""
    rows = tuple(
        (title_of(f.task), f"{f.length:,}", find_method(f.method).title, f.reason, str(f.failed)) for f in failed
    )
    header = ("Task", "Tokens", "Method", "Why", "Samples")
    return [Table("Could not be measured", "", header, rows)] if rows else []


def number(value: float | None, digits: int) -> str:
    """A number for a table; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def interval_text(low: float | None, high: float | None, scale: float, digits: int, sign: bool = True) -> str:
    """An interval for a table; empty where there is none."""
    if low is None or high is None:
        return ""
    form = "+" if sign else ""
    return f"{scale * low:{form}.{digits}f} … {scale * high:{form}.{digits}f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that neither ends a cell nor is taken for HTML."""
    return html.escape(text.replace("\n", " "), quote=False).replace("|", "\\|")

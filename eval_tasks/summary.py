"""Rows of measurements summed up by method, task and length, each beside dense on the same samples."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, median
from typing import Any

from eval_tasks.bootstrap import paired_difference
from eval_tasks.methods import DENSE, order_of
from eval_tasks.tasks import TASKS

Row = Mapping[str, Any]
Place = tuple[int, int]
"""What tells a sample from others of its task and length: its seed, and its number among those of the seed."""


@dataclass(frozen=True)
class Summary:
    """One method at one task and length.

    Attributes:
        task, length, method: which.
        samples: how many places of the text were measured.
        budget: k(n) of the method's law at this length; the length itself for dense.
        attended_fraction, mean_keys: realised, over all queries, layers and heads.
        tail_attended_fraction, tail_mean_keys: realised at the scored positions.
        score: mean over samples of the share of answers that are right; None for tasks that score a text.
        loss: mean over samples of nats per scored token; for answers 1 − score.
        perplexity: exp(loss); None for answers.
        bits_per_byte: of the scored text; None for answers.
        loss_minus_dense: mean paired difference of the loss from dense; None where dense was not measured.
        low, high: its bootstrap interval; None with fewer than two samples.
        worse_samples: in how many samples the loss is above dense.
        perplexity_ratio: perplexity / dense perplexity on the same samples.
        seconds: median of all that was read, a dense prefill and the answer included; None, as what follows from it
            and the memory, where it was simulated.
        tokens_per_second: of the part that is sparse: all tokens, those of the prefill, or those scored after it; of
            answers those given after the first. None where that part was not timed apart.
        peak_memory_mb: largest over samples, in 10^6 bytes above what was held before.
        failed: how many samples more could not be measured.
        sparse_seconds: median of the part that the phase makes sparse, of texts; None where it was not timed apart.
        seconds_per_answer_token: median, of the tokens after the first; None for texts and where not timed apart.
        answer_tokens: mean number of tokens that a method answered with.
    """

    task: str
    length: int
    method: str
    samples: int
    budget: int
    attended_fraction: float
    mean_keys: float | None
    tail_attended_fraction: float
    tail_mean_keys: float | None
    score: float | None
    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    loss_minus_dense: float | None
    low: float | None
    high: float | None
    worse_samples: int | None
    perplexity_ratio: float | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_mb: float | None
    failed: int = 0
    sparse_seconds: float | None = None
    seconds_per_answer_token: float | None = None
    answer_tokens: float | None = None


@dataclass(frozen=True)
class Failure:
    """Samples of one method at one task and length that could not be measured.

    Attributes:
        task, length, method: which.
        failed: how many samples.
        reason: why, in the words of the first.
    """

    task: str
    length: int
    method: str
    failed: int
    reason: str


def loss_of(row: Row) -> float:
    """Nats per scored token of a row; of an answer, 1 − its score."""
    if "score" in row:
        return 1.0 - float(row["score"])
    return float(row["loss_sum"]) / int(row["tokens"])


def place_of(row: Row) -> Place:
    """Which sample a row measured.

    Rows without an ``index`` were written before there was one: their ``sample`` goes on over the seeds, so they match
    rows of the same run, and ``merge_runs`` gives them their index before they meet others.
    """
    return int(row.get("seed") or 0), int(row.get("index", row["sample"]))


def losses(rows: Iterable[Row], task: str, length: int, method: str) -> dict[Place, float]:
    """Loss by sample of one method at one task and length."""
    return {
        place_of(row): loss_of(row)
        for row in rows
        if "failed" not in row and (row["task"], row["length"], row["method"]) == (task, length, method)
    }


def documents_of(rows: Iterable[Row]) -> dict[Place, str]:
    """The document of each sample: as its row says, or one of its own."""
    return {place_of(row): str(row.get("document", "sample {} of seed {}".format(*place_of(row)))) for row in rows}


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Sums up rows of ``results.jsonl``, ordered by task, length and method as they are listed.

    Dense is compared on the samples that both have.
    """
    cells: dict[tuple[str, int, str], list[Row]] = {}
    failed: Counter[tuple[str, int, str]] = Counter()
    for row in rows:
        cell = (row["task"], int(row["length"]), row["method"])
        if "failed" in row:
            failed[cell] += 1
        else:
            cells.setdefault(cell, []).append(row)
    return [
        replace(_summary(cell, cells[cell], cells.get((cell[0], cell[1], DENSE), [])), failed=failed[cell])
        for cell in sorted(cells, key=cell_order)
    ]


def failures(rows: Iterable[Row]) -> list[Failure]:
    """What could not be measured, in the order of ``summarise``."""
    cells: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if "failed" in row:
            cells.setdefault((row["task"], int(row["length"]), row["method"]), []).append(row)
    return [Failure(*cell, len(cells[cell]), cells[cell][0]["failed"]) for cell in sorted(cells, key=cell_order)]


def cell_order(cell: tuple[str, int, str]) -> tuple[int, str, int, tuple[int, str, int]]:
    """A key that sorts (task, length, method) as tasks and methods are listed."""
    task, length, method = cell
    return list(TASKS).index(task) if task in TASKS else len(TASKS), task, length, order_of(method)


def _summary(cell: tuple[str, int, str], rows: list[Row], dense_rows: list[Row]) -> Summary:
    task, length, method = cell
    dense = {place_of(row): loss_of(row) for row in dense_rows}
    own = {place_of(row): loss_of(row) for row in rows}
    shared = sorted(own.keys() & dense.keys()) if method != DENSE else []
    pairs = [(own[sample], dense[sample]) for sample in shared]
    owners = documents_of(rows)
    difference = (
        paired_difference([a for a, _ in pairs], [b for _, b in pairs], documents=[owners[sample] for sample in shared])
        if pairs
        else None
    )
    loss = fmean(own.values())
    peaks = [int(row["peak_memory"]) for row in rows if row["peak_memory"] is not None]
    parts = [part for row in rows if (part := _sparse_part(row)) is not None]
    answers = [row for row in rows if "score" in row]
    return Summary(
        task=task,
        length=length,
        method=method,
        samples=len(own),
        budget=int(rows[0]["budget"]),
        attended_fraction=fmean(row["attended_fraction"] for row in rows),
        mean_keys=_mean_or_none(rows, "mean_keys"),
        tail_attended_fraction=fmean(row["tail_attended_fraction"] for row in rows),
        tail_mean_keys=_mean_or_none(rows, "tail_mean_keys"),
        score=1.0 - loss if answers else None,
        loss=loss,
        perplexity=None if answers else math.exp(loss),
        bits_per_byte=None if answers else _bits_per_byte(rows),
        loss_minus_dense=difference.mean if difference else None,
        low=difference.low if difference else None,
        high=difference.high if difference else None,
        worse_samples=sum(a > b for a, b in pairs) if pairs else None,
        perplexity_ratio=math.exp(difference.mean) if difference and not answers else None,
        seconds=_median(float(row["seconds"]) for row in rows if row["seconds"] is not None),
        tokens_per_second=_median(tokens / seconds for tokens, seconds in parts),
        peak_memory_mb=max(peaks) / 1e6 if peaks else None,
        sparse_seconds=None if answers else _median(seconds for _, seconds in parts),
        seconds_per_answer_token=_median(seconds / tokens for tokens, seconds in parts) if answers else None,
        answer_tokens=_mean_or_none(rows, "said_tokens") if all("said_tokens" in row for row in rows) else None,
    )


def _sparse_part(row: Row) -> tuple[int, float] | None:
    """Tokens and seconds of what the phase of a row makes sparse; of an answer, of its tokens after the first.

    None where it was not timed apart, or holds no token.
    """
    seconds, phase = row["seconds"], row.get("phase", "all")
    prefill, first = row.get("prefill_seconds"), row.get("first_token_seconds")
    part: tuple[int, float] | None = None
    if seconds is None:
        return None
    if "score" in row:
        part = None if first is None else (int(row.get("said_tokens", 0)) - 1, float(seconds) - float(first))
    elif phase == "all":
        part = int(row["length"]), float(seconds)
    elif prefill is not None:
        scored = int(row["tokens"])
        part = (
            (int(row["length"]) - scored, float(prefill))
            if phase == "prefill"
            else (scored, float(seconds) - float(prefill))
        )
    return part if part is not None and part[0] > 0 and part[1] > 0 else None


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return median(values) if values else None


def _bits_per_byte(rows: list[Row]) -> float:
    nats = math.fsum(row["loss_sum"] for row in rows)
    return float(nats / sum(row["bytes"] for row in rows) / math.log(2))


def title_of(task: str) -> str:
    """The label of a task in plots and tables; tasks of generated answers are called by their names."""
    return TASKS[task].title if task in TASKS else task


def _mean_or_none(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else fmean(values)


def to_csv(summaries: Iterable[Summary], failed: Iterable[Failure] = ()) -> str:
    """The summaries as CSV with a header, then cells without any result; a value that does not exist is empty."""
    summaries = list(summaries)
    measured = {(s.task, s.length, s.method) for s in summaries}
    names = [field.name for field in fields(Summary)]
    empty = [f for f in failed if (f.task, f.length, f.method) not in measured]
    return csv_of(
        names,
        [[getattr(summary, name) for name in names] for summary in summaries]
        + [[0 if name == "samples" else getattr(failure, name, None) for name in names] for failure in empty],
    )


def csv_of(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV with a header; None is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""From the rows of a run to tables: what each method reaches, compared with dense, and the budgets that quality needs.

All tables are data frames of pandas, in the order in which tasks, lengths and methods are listed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval_tasks.iso_quality import IsoQuality, iso_quality
from eval_tasks.methods import DENSE, keys_of, order_of
from eval_tasks.stats import MIN_SAMPLES, compare, corrected, effective_length
from eval_tasks.tasks import TASKS

Row = Mapping[str, Any]
CELL = ["task", "length", "method"]
# What tells a sample from others of its task and length: its seed, and its number among those of the seed.
PLACE = ["seed", "index"]
UNSEEN = "unseen"
_TASKS_SHOWN = 3
# Dense attention has to gain so many nats from the first copy, or answer so much right, to be compared with.
_GAIN_NEEDED = _SCORE_NEEDED = 0.5
_NUMBERS = [
    "score", "loss_sum", "tokens", "bytes", "budget", "attended_fraction", "mean_keys", "tail_attended_fraction",
    "tail_mean_keys", "seconds", "peak_memory", "prefill_seconds", "first_token_seconds", "said_tokens", "depth",
]  # fmt: skip
_OTHERS = [*CELL, *PLACE, "document", "phase", "failed", "ran_dense", "token_losses"]


def measurements(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows of ``results.jsonl`` with a ``loss``: nats per scored token, or 1 − score; NaN where measuring failed."""
    names = [*_OTHERS, *_NUMBERS]
    frame = pd.DataFrame([[row.get(name) for name in names] for row in rows], columns=names, dtype=object)
    frame = frame.astype(dict.fromkeys(_NUMBERS, float) | dict.fromkeys(("length", *PLACE), "int64"))
    alone = "sample " + frame["index"].astype(str) + " of seed " + frame["seed"].astype(str)
    frame["document"] = frame["document"].where(frame["document"].notna(), alone).map(ascii)
    loss = (1.0 - frame["score"]).fillna(frame["loss_sum"] / frame["tokens"])
    frame["loss"] = loss.where(frame["failed"].isna())
    there = set(frame["task"])
    tasks = [*(name for name in TASKS if name in there), *sorted(there - set(TASKS))]
    frame["task"] = pd.Categorical(frame["task"], tasks)
    frame["method"] = pd.Categorical(frame["method"], sorted(set(frame["method"]), key=order_of))
    frame = frame.loc[frame["failed"].isna().sort_values(kind="stable").index]  # a success counts before any failure
    return frame.drop_duplicates([*CELL, *PLACE], keep="last").sort_values([*CELL, *PLACE], ignore_index=True)


def summarise(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """One line for each method at each task and length, from ``measurements`` and ``comparisons``.

    ``perplexity``, its ratio and ``bits_per_byte`` are of texts, ``score`` and ``answer_tokens`` (the mean) of answers.
    ``budget`` is k(n) of the method's law; attended keys are realised, with ``tail_`` at the scored positions.
    ``seconds`` is the median of all that was read, ``sparse_seconds`` and ``tokens_per_second`` of the part that is
    sparse.
    """
    frame = frame.join(_sparse_part(frame))
    cells = frame.groupby(CELL, observed=True)
    found = pd.DataFrame([_cell(own) for _, own in cells], index=pd.MultiIndex.from_tuples(list(cells.groups)))
    found = found.rename_axis(CELL).reset_index().astype(frame.dtypes[CELL].to_dict())
    against = compared[[*CELL, "difference", "low", "high", "worse_samples"]]
    found = found.merge(against.rename(columns={"difference": "loss_minus_dense"}), how="left", on=CELL)
    found["perplexity"] = np.exp(found["loss"]).where(found["score"].isna())
    found["perplexity_ratio"] = np.exp(found["loss_minus_dense"]).where(found["score"].isna())
    counts = ["samples", "budget", "worse_samples", "failed"]
    found = found.astype(dict.fromkeys(found.columns.drop(CELL), float)).astype(dict.fromkeys(counts, "Int64"))
    return found[
        [
            *CELL, "samples", "budget", "attended_fraction", "mean_keys", "tail_attended_fraction", "tail_mean_keys",
            "score", "loss", "perplexity", "bits_per_byte", "loss_minus_dense", "low", "high", "worse_samples",
            "perplexity_ratio", "seconds", "tokens_per_second", "peak_memory_mb", "failed", "sparse_seconds",
            "seconds_per_answer_token", "answer_tokens",
        ]
    ]  # fmt: skip


def comparisons(frame: pd.DataFrame, within: float) -> pd.DataFrame:
    """Every method against dense at every task and length, p-values corrected over all of them by Holm's procedure.

    ``within`` is the margin: 0.05 is five percent more perplexity, or five answers in a hundred.
    """
    cells, paired = [], []
    for (task, length), own in frame.dropna(subset=["loss"]).groupby(["task", "length"], observed=True):
        wide = own.pivot(index=PLACE, columns="method", values="loss")
        owners = own.drop_duplicates(PLACE, keep="last").set_index(PLACE)["document"]
        for method in wide.columns.drop(DENSE, errors="ignore"):
            pairs = wide[[method, DENSE]].dropna() if DENSE in wide else wide[:0]
            if len(pairs):
                cells.append((task, length, method))
                fails = dense_fails(frame, task, length)
                paired.append((pairs[method], pairs[DENSE], list(owners[pairs.index]), fails))
    family = sum(len(set(documents)) >= MIN_SAMPLES for *_, documents, fails in paired if not fails)
    found = [
        compare(a.to_numpy(), b.to_numpy(), documents, *_margin(frame, task, within), fails, family)
        for (task, _, _), (a, b, documents, fails) in zip(cells, paired, strict=True)
    ]
    worse = [int((a > b).sum()) for a, b, *_ in paired]
    names = [
        "documents", "difference", "low", "high", "margin", "detectable", "p_difference", "p_margin", "needed",
        "needed_within", "verdict", "dense_fails",
    ]  # fmt: skip
    rows = [[*cell, *(getattr(c, name) for name in names)] for cell, c in zip(cells, corrected(found), strict=True)]
    table = pd.DataFrame(rows, columns=[*CELL, *names]).astype(frame.dtypes[CELL].to_dict())
    numbers = ["difference", "low", "high", "margin", "detectable", "p_difference", "p_margin", "worse_samples"]
    return table.assign(worse_samples=worse).astype(dict.fromkeys(numbers, float) | {"dense_fails": bool})


def dense_fails(frame: pd.DataFrame, task: str, length: int) -> bool:
    """Whether dense attention itself fails at a task and length, so that no method can be judged there."""
    dense = frame[(frame["length"] == length) & (frame["method"] == DENSE)]
    mean = dense.loc[dense["task"] == task, "loss"].mean()
    if is_answer(frame, task):
        return bool(mean > 1 - _SCORE_NEEDED)
    return task == "recall" and bool(dense.loc[dense["task"] == UNSEEN, "loss"].mean() - mean < _GAIN_NEEDED)


def is_answer(frame: pd.DataFrame, task: str) -> bool:
    """Whether a task scores generated answers, and not a text."""
    return bool(frame.loc[frame["task"] == task, "score"].notna().any())


def effective_lengths(summary: pd.DataFrame, compared: pd.DataFrame, within: float) -> pd.DataFrame:
    """The longest context within the margin of dense, by the means, of each method and task (0 for none).

    Lengths where dense fails are left out; ``longest`` is the longest of the others.
    """
    dense = summary[summary["method"] == DENSE].set_index(["task", "length"])["score"]
    found = []
    for (task, method), own in compared[~compared["dense_fails"]].groupby(["task", "method"], observed=True):
        right = own["length"].map(lambda length, task=task: dense[task, length])
        ratios = (own["difference"] / right).where(right.notna(), np.expm1(own["difference"]))
        reached = effective_length(dict(zip(own["length"], ratios, strict=True)), within)
        found.append((task, method, reached or 0, own["length"].max()))
    return pd.DataFrame(found, columns=["task", "method", "length", "longest"])


def overview(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary of the tasks that methods are compared in; of more than three, those with answers as one mean."""
    dense_only = [name for name, task in TASKS.items() if task.dense_only]
    shown = summary[~summary["task"].isin(dense_only)].astype({"task": object})
    answers = shown[shown["score"].notna()]
    tasks = answers["task"].nunique()
    if shown["task"].nunique() <= _TASKS_SHOWN or tasks < 2:
        return shown
    cells = answers.groupby(["length", "method"], observed=True)
    mean = cells.mean(numeric_only=True)[(cells.size() == tasks)].reset_index()
    if set(mean["method"]) <= {DENSE}:  # no method has answered all tasks
        return shown
    compared = (cells["loss_minus_dense"].count() == tasks)[cells.size() == tasks].to_numpy()
    mean["loss_minus_dense"] = mean["loss_minus_dense"].where(compared)
    mean = mean.assign(task=f"mean of {tasks} tasks", low=np.nan, high=np.nan)
    return pd.concat([shown[shown["score"].isna()], mean], ignore_index=True)


def longest_compared(summary: pd.DataFrame, compared: pd.DataFrame) -> int | None:
    """The longest length at which, in some task, dense works and each method has its samples.

    Else the longest at which a line of ``overview`` compares anything; None without any.
    """
    shown = overview(summary).dropna(subset=["loss_minus_dense"])
    usable = summary[summary["samples"] > 0]
    tried = (usable["samples"] + usable["failed"]).groupby([usable["task"], usable["length"]], observed=True).nunique()
    judged = compared[compared["length"].isin(shown["length"])]
    if not len(judged):
        return None
    whole = [tried[cell] == 1 for cell in zip(judged["task"], judged["length"], strict=True)]
    best = judged[np.array(whole) & ~judged["dense_fails"]]
    return int((best if len(best) else judged)["length"].max())


def needed_budgets(frame: pd.DataFrame, within: float) -> list[IsoQuality]:
    """What each method needs to stay within the margin of dense, from rows of methods with numbers of keys.

    Only documents measured with every length and budget count. Lengths where dense fails are left out, and those that
    are not measured to the end: fewer documents, or fewer budgets, would say less of all others.
    """
    named = pd.DataFrame([keys_of(name) for name in frame["method"]], columns=["base", "keys"], index=frame.index)
    swept, found = frame.join(named).dropna(subset=["keys"]), []
    for task, method in dict.fromkeys(zip(swept["task"], swept["base"], strict=True)):
        own, cells = swept[(swept["task"] == task) & (swept["base"] == method)], {}
        own = own[~own["length"].isin([n for n in set(own["length"]) if dense_fails(frame, task, n)])]
        for length, cell in own.groupby("length"):
            dense = frame[(frame["task"] == task) & (frame["length"] == length) & (frame["method"] == DENSE)]
            wide = cell.pivot(index=PLACE, columns="keys", values="loss")
            if set(own.loc[own["keys"] < length, "keys"]) <= set(wide.columns):
                # What failed was measured, and holds nothing.
                over = wide.dropna(axis=1, how="all").sub(dense.set_index(PLACE)["loss"], axis=0)
                if len(over.columns):
                    cells[length] = over.dropna()
        most = max(map(len, cells.values()), default=0)
        cells = {length: cell for length, cell in cells.items() if len(cell) == most}
        shared = pd.concat(cells.values(), axis=1, join="inner").index if cells else []
        if len(shared):
            owners = frame[frame["task"] == task].drop_duplicates(PLACE, keep="last").set_index(PLACE)["document"]
            by_document = {
                length: cell.loc[shared].groupby(list(owners[shared]), sort=False).mean().to_dict("list")
                for length, cell in cells.items()
            }
            found.append(iso_quality(task, method, by_document, _margin(frame, task, within)[0]))
    return found


def needed_table(found: Sequence[IsoQuality]) -> pd.DataFrame:
    """The budgets that the quality of dense needs, each with the law through those of its task and method."""
    laws = ["alpha", "C", "C_low", "C_high"]
    columns = ["task", "method", "length", "keys", "low", "high", "reached", "at_most", "largest", "documents", *laws]
    parts = [pd.DataFrame(columns=columns)] if not found else []
    for iso in found:
        law = {name: getattr(iso.law, name, math.nan) for name in laws}
        parts.append(iso.needed.assign(task=iso.task, method=iso.method, documents=iso.documents, **law))
    return pd.concat(parts, ignore_index=True)[columns]


def csv_of(table: pd.DataFrame) -> str:
    """A table as CSV with a header; what is missing is an empty field."""
    return str(table.to_csv(index=False, float_format="%.6g"))


def title_of(task: str) -> str:
    """The label of a task in plots and tables; tasks of generated answers are called by their names."""
    return TASKS[task].title if task in TASKS else task


def _margin(frame: pd.DataFrame, task: str, within: float) -> tuple[float, bool]:
    """The margin on the loss that ``within`` means, and whether it is one of answers rather than of nats per token."""
    answers = is_answer(frame, task)
    return (within if answers else math.log1p(within)), answers


def _cell(own: pd.DataFrame) -> dict[str, Any]:
    done = own[own["failed"].isna()]
    answers = bool(done["score"].notna().any())
    means = ["attended_fraction", "mean_keys", "tail_attended_fraction", "tail_mean_keys", "loss"]
    nats, letters = (done[name].sum(min_count=1) for name in ("loss_sum", "bytes"))
    return {
        "samples": len(done),
        "failed": len(own) - len(done),
        "budget": done["budget"].iloc[0] if len(done) else None,
        **done[means].mean(skipna=False),
        "score": 1.0 - done["loss"].mean() if answers else None,
        "bits_per_byte": None if answers else nats / letters / math.log(2),
        "seconds": done["seconds"].median(),
        "tokens_per_second": (done["part_tokens"] / done["part_seconds"]).median(),
        "peak_memory_mb": done["peak_memory"].max() / 1e6,
        "sparse_seconds": None if answers else done["part_seconds"].median(),
        "seconds_per_answer_token": (done["part_seconds"] / done["part_tokens"]).median() if answers else None,
        "answer_tokens": done["said_tokens"].mean(skipna=False),
    }


def _sparse_part(frame: pd.DataFrame) -> pd.DataFrame:
    """Tokens and seconds of what the phase of a row makes sparse; of an answer, of its tokens after the first.

    NaN where it was not timed apart, or holds no token.
    """
    which = [frame["score"].notna(), frame["phase"] == "all", frame["phase"] == "prefill"]
    read = [frame["said_tokens"] - 1, frame["length"], frame["length"] - frame["tokens"]]
    spent = [frame["seconds"] - frame["first_token_seconds"], frame["seconds"], frame["prefill_seconds"]]
    tokens = np.select(which, read, frame["tokens"])
    seconds = np.select(which, spent, frame["seconds"] - frame["prefill_seconds"])
    part = pd.DataFrame({"part_tokens": tokens, "part_seconds": seconds}, index=frame.index)
    return part.where((part["part_tokens"] > 0) & (part["part_seconds"] > 0))

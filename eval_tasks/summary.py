"""From the rows of runs to tables: what each method reaches, compared with dense, and the budgets that quality needs.

All tables are data frames of pandas, in the order in which tasks, lengths and methods are listed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval_tasks.errors import EvalError
from eval_tasks.iso_quality import iso_quality
from eval_tasks.methods import DENSE, keys_of, order_of
from eval_tasks.stats import MIN_SAMPLES, compare, corrected
from eval_tasks.store import Row, differing, each_cell_once, read_rows, read_run
from eval_tasks.tasks import TASKS

CELL = ["task", "length", "method"]
_SAMPLE = ["task", "length", "sample"]
UNSEEN = "unseen"
# What may differ between runs that belong together: which cells they measured.
_CELLS = ("methods", "tasks", "lengths", "samples", "iso_keys")
_TASKS_SHOWN = 3
# Dense attention has to gain so many nats from the first copy, or answer so much right, to be compared with.
_GAIN_NEEDED = _SCORE_NEEDED = 0.5
_NUMBERS = [
    "score", "loss_sum", "tokens", "bytes", "budget", "attended_fraction", "mean_keys", "tail_attended_fraction",
    "tail_mean_keys", "seconds", "peak_memory", "prefill_seconds", "first_token_seconds", "said_tokens",
]  # fmt: skip
_OTHERS = [*CELL, "sample", "phase", "failed", "ran_dense", "token_losses"]


def merge_runs(directories: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Reads runs of the same settings, which may have measured other methods, tasks, lengths and samples.

    Returns what ``run.json`` of the first says, with the cells, sessions and ``commands`` of all, and the rows, each
    cell once. Raises EvalError for a directory that holds no measurement, is damaged, or differs from the first in a
    setting.
    """
    runs, measured = [], list[Row]()
    for directory in directories:
        run, rows = read_run(directory), read_rows(directory)
        if run is None or not rows:
            raise EvalError(f"{directory} holds no measurements; measure with nc-patch eval --out {directory}")
        runs.append(run)
        measured += rows
        first, here = _settings(runs[0]), _settings(run)
        if changed := differing(first, here, first | here):
            raise EvalError(
                f"{directory} cannot be reported together with {directories[0]}, whose settings are others: {changed}"
            )
    rows = each_cell_once(measured)
    methods, tasks, lengths = (dict.fromkeys(v for run in runs for v in run["identity"][name]) for name in _CELLS[:3])
    cells = {"methods": sorted(methods, key=order_of), "tasks": list(tasks), "lengths": sorted(lengths)}
    return {
        **runs[0],
        "identity": {**runs[0]["identity"], **cells, "samples": max(run["identity"]["samples"] for run in runs)},
        "sessions": [session for run in runs for session in run["sessions"]],
        "planned": sum(run["planned"] for run in runs) - (len(measured) - len(rows)),
        "commands": [run["command"] for run in runs],
    }, rows


def measurements(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows, each cell once, with a ``loss``: nats per scored token, or 1 − score; NaN where measuring failed.

    ``dense_loss`` and ``dense_token_losses`` are those of dense attention on the same sample. ``is_answer`` says that
    the task scores generated answers, and not a text.
    """
    names = [*_OTHERS, *_NUMBERS]
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    frame = frame.astype(dict.fromkeys(_NUMBERS, float) | dict.fromkeys(("length", "sample"), "int64"))
    frame["is_answer"] = frame["score"].notna().groupby(frame["task"]).transform("any")
    loss = (1.0 - frame["score"]).fillna(frame["loss_sum"] / frame["tokens"])
    frame["loss"] = loss.where(frame["failed"].isna())
    listed = lambda task: ([*TASKS, task].index(task), task)  # noqa: E731
    frame["task"] = pd.Categorical(frame["task"], sorted(set(frame["task"]), key=listed))
    frame["method"] = pd.Categorical(frame["method"], sorted(set(frame["method"]), key=order_of))
    dense = frame[frame["method"] == DENSE].set_index(_SAMPLE)[["loss", "token_losses"]].add_prefix("dense_")
    return frame.sort_values([*CELL, "sample"], ignore_index=True).join(dense, on=_SAMPLE)


def summarise(frame: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """One line for each method at each task and length, from ``measurements`` and ``comparisons``.

    ``perplexity``, its ratio and ``bits_per_byte`` are of texts, ``score`` and ``answer_tokens`` (the mean) of answers.
    ``budget`` is k(n) of the method's law; attended keys are realised, with ``tail_`` at the scored positions.
    ``seconds`` is the median of all that was read, ``sparse_seconds`` of the part that is sparse.
    """
    frame = frame.assign(part_seconds=_sparse_seconds(frame))
    every, done = (own.groupby(CELL, observed=True) for own in (frame, frame[frame["failed"].isna()]))
    failed = every["failed"].count()
    found = pd.DataFrame({"samples": every.size() - failed, "failed": failed, "budget": done["budget"].first()})
    keys = ["attended_fraction", "mean_keys", "tail_attended_fraction", "tail_mean_keys"]
    found = found.join(done[[*keys, "loss", "score"]].mean())
    texts = found["score"].isna()
    found["perplexity"] = np.exp(found["loss"]).where(texts)
    found["bits_per_byte"] = done["loss_sum"].sum() / done["bytes"].sum().where(texts) / math.log(2)
    against = compared.set_index(CELL)[["difference", "low", "high", "verdict"]]
    against = against.rename(columns={"difference": "loss_minus_dense"})
    found = found.join(against.astype({"loss_minus_dense": float, "low": float, "high": float}))
    found["perplexity_ratio"] = np.exp(found["loss_minus_dense"]).where(texts)
    found = found.join(done["seconds"].median())
    found["peak_memory_mb"] = done["peak_memory"].max() / 1e6
    found["sparse_seconds"] = done["part_seconds"].median().where(texts)
    found["seconds_per_answer_token"] = done["part_seconds"].median().mask(texts)
    found["answer_tokens"] = done["said_tokens"].mean()
    return found.astype(dict.fromkeys(("samples", "failed", "budget"), "Int64")).reset_index()


def comparisons(frame: pd.DataFrame, within: float) -> pd.DataFrame:
    """Every method against dense at every task and length: ``compare``, with p-values ``corrected`` over all of them.

    ``within`` is the margin: 0.05 is five percent more perplexity, or five answers in a hundred.
    """
    paired = frame[frame["method"] != DENSE].dropna(subset=["loss", "dense_loss"]).groupby(CELL, observed=True)
    fails = {cell: dense_fails(frame, *cell[:2]) for cell in paired.groups}
    family = sum(len(own) >= MIN_SAMPLES and not fails[cell] for cell, own in paired)
    rows = []
    for cell, own in paired:
        found = compare(own["loss"].to_numpy(), own["dense_loss"].to_numpy(), *_margin(own, within), family)
        rows.append([*cell, *found.values(), fails[cell]])
    columns = [*CELL, *compare([0.0], [0.0], 1.0), "dense_fails"]
    table = pd.DataFrame(rows, columns=columns).astype(frame.dtypes[CELL].to_dict() | {"dense_fails": bool})
    return corrected(table)


def dense_fails(frame: pd.DataFrame, task: str, length: int) -> bool:
    """Whether dense attention itself fails at a task and length, so that no method can be judged there."""
    dense = frame[(frame["length"] == length) & (frame["method"] == DENSE)]
    own = dense[dense["task"] == task]
    if own["is_answer"].any():
        return bool(own["loss"].mean() > 1 - _SCORE_NEEDED)
    gain = dense.loc[dense["task"] == UNSEEN, "loss"].mean() - own["loss"].mean()
    return task == "recall" and bool(gain < _GAIN_NEEDED)


def effective_lengths(compared: pd.DataFrame) -> pd.DataFrame:
    """The longest context up to which the mean of a method stays within the margin of dense, by task (0 for none).

    Lengths where dense fails are left out; ``longest`` is the longest of the others.
    """
    own = compared[~compared["dense_fails"]]
    within = own["difference"] <= own["margin"] + 1e-9  # which a share of answers may miss by rounding
    inside = within.groupby([own["task"], own["method"]], observed=True).cummin()
    lengths = own.assign(reached=own["length"].where(inside, 0)).groupby(["task", "method"], observed=True)
    return lengths.agg(length=("reached", "max"), longest=("length", "max")).reset_index()


def overview(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary of the tasks that methods are compared in.

    Of more than three tasks, those with answers are shown as one mean, and how often there is which verdict.
    """
    dense_only = [name for name, task in TASKS.items() if task.dense_only]
    shown = summary[~summary["task"].isin(dense_only)].astype({"task": object})
    shown["verdict"] = shown["verdict"].fillna("")
    answers = shown[shown["score"].notna()]
    tasks, cells = answers["task"].nunique(), answers.groupby(["length", "method"], observed=True)
    mean = cells.mean(numeric_only=True).assign(task=f"mean of {tasks} tasks", low=np.nan, high=np.nan)
    mean["loss_minus_dense"] = cells["loss_minus_dense"].agg(lambda losses: losses.mean(skipna=False))
    mean["verdict"] = cells["verdict"].agg(
        lambda said: ", ".join(f"{word} in {n}" for word, n in said[said != ""].value_counts().items())
    )
    mean = mean[cells.size() == tasks].reset_index()
    # Too many tasks for the table, and some method has answered all of those with answers.
    if shown["task"].nunique() > _TASKS_SHOWN and tasks > 1 and set(mean["method"]) - {DENSE}:
        return pd.concat([shown[shown["score"].isna()], mean], ignore_index=True)
    return shown


def longest_compared(summary: pd.DataFrame, compared: pd.DataFrame) -> int | None:
    """The longest length at which, in some task, dense works and each method has its samples.

    Else the longest at which a line of ``overview`` compares anything; None without any.
    """
    shown = overview(summary).dropna(subset=["loss_minus_dense"])
    usable = summary[summary["samples"] > 0]
    tried = (usable["samples"] + usable["failed"]).groupby([usable["task"], usable["length"]], observed=True).nunique()
    judged = compared[compared["length"].isin(shown["length"])].join(tried.rename("tried"), on=["task", "length"])
    best = judged[(judged["tried"] == 1) & ~judged["dense_fails"]]
    return int((best if len(best) else judged)["length"].max()) if len(judged) else None


def needed_budgets(frame: pd.DataFrame, within: float) -> pd.DataFrame:
    """What each method needs to stay within the margin of dense, from rows of methods with numbers of keys.

    The tables of ``iso_quality`` with ``task`` and ``method``, one below the other; without columns where nothing is
    found. Only samples measured with every length and budget count. Lengths where dense fails are left out, and those
    that are not measured to the end: fewer samples, or fewer budgets, would say less of all others.
    """
    named = pd.DataFrame([keys_of(name) for name in frame["method"]], columns=["base", "keys"], index=frame.index)
    swept, found = frame.join(named).dropna(subset=["keys"]), {}
    swept["over"] = swept["loss"] - swept["dense_loss"]
    for (task, method), own in swept.groupby(["task", "base"], sort=False, observed=True):
        own = own[~own["length"].isin([n for n in set(own["length"]) if dense_fails(frame, task, n)])]
        tried = own.groupby("length")["keys"].agg(set)
        ended = [n for n, keys in tried.items() if keys >= set(own.loc[own["keys"] < n, "keys"])]
        own = own[own["length"].isin(ended)]
        over = own.pivot(index="sample", columns=["length", "keys"], values="over")
        over = over.dropna(axis=1, how="all")  # what failed was measured, and holds nothing
        samples = over.notna().T.groupby(level="length").all().sum(axis=1)
        over = over[samples.index[samples == samples.max()]].dropna()
        if over.size:
            found[task, method] = iso_quality(over, _margin(own, within)[0])
    if not found:
        return pd.DataFrame()
    return pd.concat(found, names=["task", "method"]).reset_index([0, 1]).reset_index(drop=True)


def csv_of(table: pd.DataFrame) -> str:
    """A table as CSV with a header; what is missing is an empty field."""
    return str(table.to_csv(index=False, float_format="%.6g"))


def title_of(task: str) -> str:
    """The label of a task in plots and tables; tasks of generated answers are called by their names."""
    return TASKS[task].title if task in TASKS else task


def _margin(own: pd.DataFrame, within: float) -> tuple[float, bool]:
    """The margin on the loss that ``within`` means in one task, and whether it is one of answers, not of nats."""
    answers = bool(own["is_answer"].any())
    return (within if answers else math.log1p(within)), answers


def _sparse_seconds(frame: pd.DataFrame) -> pd.Series:
    """The time of what the phase of a row makes sparse; of an answer, of each of its tokens after the first.

    NaN where it was not timed apart, or there is no such token.
    """
    after_first = (frame["seconds"] - frame["first_token_seconds"]) / (frame["said_tokens"] - 1)
    which = [frame["score"].notna(), frame["phase"].isin(["all", "generate"]), frame["phase"] == "prefill"]
    spent = [after_first, frame["seconds"], frame["prefill_seconds"]]
    seconds = pd.Series(np.select(which, spent, frame["seconds"] - frame["prefill_seconds"]), frame.index)
    return seconds.where(np.isfinite(seconds) & (seconds > 0))


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What figures depend on. Places in the text follow from the longest length; times may be of any machine."""
    identity = {name: value for name, value in run["identity"].items() if name not in _CELLS}
    longest = max(run["identity"]["lengths"], default=0)
    return identity | {"longest": longest, "device": run["hardware"].get("device")}

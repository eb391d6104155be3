"""Runs of several directories put together where they measured the same thing the same way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHES
from eval_tasks.measure import PHASES
from eval_tasks.methods import find_method, order_of
from eval_tasks.store import each_key_once, read_rows, read_run
from eval_tasks.summary import Row
from eval_tasks.tasks import TASKS

# What may differ between runs that belong together: which cells they measured. The longest length stays, since the
# places in the text follow from it.
_CELLS = ("methods", "tasks", "lengths", "samples", "iso_keys")


@dataclass(frozen=True)
class MergedRun:
    """Directories whose rows, each key once, can stand in one table, and the commands that measured them.

    ``run`` is what ``run.json`` of the first says, with the methods, tasks, lengths and samples of all.
    """

    directories: tuple[Path, ...]
    run: dict[str, Any]
    rows: list[Row]
    commands: tuple[str, ...]


def merge_runs(directories: Sequence[Path]) -> list[MergedRun]:
    """Reads runs and puts together those of one model, text, hardware, version and set of budgets.

    Raises EvalError for a directory that holds no measurement, is damaged, or holds what this version does not know.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any], list[Row]]]] = {}
    for directory in directories:
        run, rows = read_run(directory), read_rows(directory)
        if run is None or not rows:
            raise EvalError(f"{directory} holds no measurements; measure with nc-patch eval --out {directory}")
        _check_known(directory, run, rows)
        identity = {name: value for name, value in run["identity"].items() if name not in _CELLS}
        longest = max(run["identity"]["lengths"], default=0)
        setting = json.dumps([identity, longest, run.get("hardware"), _samples_matter(run)], sort_keys=True)
        groups.setdefault(setting, []).append((directory, run, [_with_index(run, row) for row in rows]))
    return [_merged(group) for group in groups.values()]


def differing(runs: Sequence[MergedRun]) -> list[str]:
    """For each run the settings in which the runs differ, in words; empty strings for a single run."""
    # Where the number of samples keeps runs apart, it tells them apart.
    cells = set(_CELLS) - ({"samples"} if any(_samples_matter(run.run) is not None for run in runs) else set())
    identities = [{**run.run["identity"], **run.run.get("hardware", {})} for run in runs]
    given = dict.fromkeys(name for identity in identities for name in identity if name not in cells)
    names = [name for name in given if len({json.dumps(identity.get(name)) for identity in identities}) > 1]
    return [", ".join(f"{name} {identity.get(name)}" for name in names) for identity in identities]


def _check_known(directory: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> None:
    identity = run["identity"]
    for name, known, default in (("match", MATCHES, "deploy"), ("phase", PHASES, "all")):
        if identity.get(name, default) not in known:
            got = ascii(identity[name])[:60]
            raise EvalError(f"{directory} was measured with {name} {got}, which this version does not know")
    texts = {row["task"] for row in rows if "score" not in row and "failed" not in row}
    if unknown := sorted(texts - set(TASKS)):
        raise EvalError(f"{directory} holds results of {', '.join(unknown)}, which this version does not know")
    for name in sorted({row["method"] for row in rows} | set(identity["methods"])):
        try:
            find_method(name)
        except EvalError as error:
            raise EvalError(f"{directory} holds results that this version does not know: {error}") from error


def _samples_matter(run: Mapping[str, Any]) -> int | None:
    """The samples of each seed where they decide what a sample is: lm-eval's documents are counted over all seeds."""
    identity = run["identity"]
    foreign = any(name.startswith("lm-eval:") for name in identity["tasks"])
    return int(identity["samples"]) if foreign and len(_seeds(run)) > 1 else None


def _seeds(run: Mapping[str, Any]) -> list[int]:
    seed = run["identity"].get("seed", 0)
    return list(seed) if isinstance(seed, list) else [seed]


def _with_index(run: Mapping[str, Any], row: Row) -> Row:
    """A row with its number among the samples of its seed, which in older rows follows from ``sample`` and the run."""
    if "index" in row:
        return row
    seeds, samples = _seeds(run), int(run["identity"]["samples"])
    seed, index = divmod(int(row["sample"]), samples) if len(seeds) > 1 else (0, int(row["sample"]))
    return {**row, "seed": seeds[seed % len(seeds)], "index": index}


def _merged(group: Sequence[tuple[Path, dict[str, Any], list[Row]]]) -> MergedRun:
    runs = [run for _, run, _ in group]
    methods, tasks, lengths = (dict.fromkeys(v for run in runs for v in run["identity"][name]) for name in _CELLS[:3])
    cells = {"methods": sorted(methods, key=order_of), "tasks": list(tasks), "lengths": sorted(lengths)}
    identity = {**runs[0]["identity"], **cells, "samples": max(run["identity"]["samples"] for run in runs)}
    sessions = [session for run in runs for session in run["sessions"]]
    measured = [row for _, _, rows in group for row in rows]
    rows = each_key_once(measured)
    planned: list[Any] = [run.get("planned") for run in runs]
    whole = None if None in planned else sum(planned) - (len(measured) - len(rows))
    run = {**runs[0], "identity": identity, "sessions": sessions, "planned": whole}
    return MergedRun(tuple(path for path, _, _ in group), run, rows, tuple(r["command"] for r in runs))

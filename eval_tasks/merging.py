"""Runs of several directories put together where they measured the same thing the same way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHES
from eval_tasks.measure import PHASES
from eval_tasks.methods import METHODS, PRESS, keys_of, order_of
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
        _check_known(directory, run["identity"], rows)
        # An option that an older version lacked counts as None.
        identity = {name: value for name, value in run["identity"].items() if name not in _CELLS and value is not None}
        setting = json.dumps([identity, max(run["identity"]["lengths"], default=0), run["hardware"]], sort_keys=True)
        groups.setdefault(setting, []).append((directory, run, list(rows)))
    return [_merged(group) for group in groups.values()]


def differing(runs: Sequence[MergedRun]) -> list[str]:
    """For each run the settings in which the runs differ, in words; empty strings for a single run."""
    identities = [{**run.run["identity"], **run.run["hardware"]} for run in runs]
    given = dict.fromkeys(name for identity in identities for name in identity if name not in _CELLS)
    names = [name for name in given if len({json.dumps(identity.get(name)) for identity in identities}) > 1]
    return [", ".join(f"{name} {identity.get(name)}" for name in names) for identity in identities]


def _check_known(directory: Path, identity: Mapping[str, Any], rows: Sequence[Row]) -> None:
    methods = {row["method"] for row in rows} | {*identity["methods"]}
    names = {keys_of(name)[0] for name in methods if not name.startswith(PRESS)}
    names |= {row["task"] for row in rows if "loss_sum" in row} | {identity["match"], identity["phase"]}
    if unknown := sorted(names - {*METHODS, *TASKS, *MATCHES, *PHASES}):
        raise EvalError(f"{directory} holds results of {ascii(unknown[0])[:60]}, which this version does not know")


def _merged(group: Sequence[tuple[Path, dict[str, Any], list[Row]]]) -> MergedRun:
    runs = [run for _, run, _ in group]
    methods, tasks, lengths = (dict.fromkeys(v for run in runs for v in run["identity"][name]) for name in _CELLS[:3])
    cells = {"methods": sorted(methods, key=order_of), "tasks": list(tasks), "lengths": sorted(lengths)}
    identity = {**runs[0]["identity"], **cells, "samples": max(run["identity"]["samples"] for run in runs)}
    sessions = [session for run in runs for session in run["sessions"]]
    measured = [row for _, _, rows in group for row in rows]
    rows = each_key_once(measured)
    planned = sum(run["planned"] for run in runs) - (len(measured) - len(rows))
    run = {**runs[0], "identity": identity, "sessions": sessions, "planned": planned}
    return MergedRun(tuple(path for path, _, _ in group), run, rows, tuple(r["command"] for r in runs))

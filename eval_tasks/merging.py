"""Runs of several directories put together where they measured the same way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHED_BY
from eval_tasks.measure import SPARSE_IN
from eval_tasks.methods import METHODS, PRESS, keys_of, order_of
from eval_tasks.provenance import differing
from eval_tasks.store import Row, each_cell_once, read_rows, read_run
from eval_tasks.tasks import TASKS

# What may differ between runs that belong together: which cells they measured.
_CELLS = ("methods", "tasks", "lengths", "samples", "iso_keys")


def merge_runs(directories: Sequence[Path]) -> tuple[dict[str, Any], list[Row]]:
    """Reads runs of the same settings, which may have measured other methods, tasks, lengths and samples.

    Returns what ``run.json`` of the first says, with the cells, sessions and ``commands`` of all, and the rows, each
    cell once. Raises EvalError for a directory that holds no measurement, is damaged, holds what this version does not
    know, or differs from the first in a setting.
    """
    runs, measured = [], list[Row]()
    for directory in directories:
        run, rows = read_run(directory), read_rows(directory)
        if run is None or not rows:
            raise EvalError(f"{directory} holds no measurements; measure with nc-patch eval --out {directory}")
        _check_known(directory, run["identity"], rows)
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


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What figures depend on. Places in the text follow from the longest length; times may be of any machine."""
    identity = {name: value for name, value in run["identity"].items() if name not in _CELLS}
    longest = max(run["identity"]["lengths"], default=0)
    return identity | {"longest": longest, "device": run["hardware"].get("device")}


def _check_known(directory: Path, identity: Mapping[str, Any], rows: Sequence[Row]) -> None:
    methods = {row["method"] for row in rows} | {*identity["methods"]}
    names = {keys_of(name)[0] for name in methods if not name.startswith(PRESS)}
    names |= {row["task"] for row in rows if "loss_sum" in row} | {identity["match"], identity["phase"]}
    if unknown := sorted(names - {*METHODS, *TASKS, *MATCHED_BY, *SPARSE_IN}):
        raise EvalError(f"{directory} holds results of {ascii(unknown[0])[:60]}, which this version does not know")

"""Runs a sweep: measures what a directory does not hold yet, alone or with other processes, until time is up."""

import contextlib
import itertools
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch

from eval_tasks.cells import Measurer, Planned
from eval_tasks.errors import EvalError
from eval_tasks.ingredients import Ingredients, check_methods, load_ingredients, load_model_of
from eval_tasks.methods import budget_at, without_choice
from eval_tasks.models import attention_of, pick_device, tokenizer_fingerprint
from eval_tasks.plan import groups_of, plan_of
from eval_tasks.progress import Forecast, Progress, Step, duration
from eval_tasks.provenance import check_same, commit, hardware, hardware_words, record_session, versions
from eval_tasks.ranks import Ranks, agreed
from eval_tasks.report import REPORT_FILES
from eval_tasks.schema import check_rows
from eval_tasks.store import ResultStore, check_out, read_run, valid_rows
from eval_tasks.sweep import Sweep
from nc_patch.calibration.fingerprint import weights_fingerprint

Known = list[tuple[str, tuple[str, int, float | None], bool]]
"""What a directory holds, row by row: key, what it cost, and whether it failed."""


def run_sweep(sweep: Sweep, directory: Path, command: str, ranks: Ranks | None = None) -> bool:
    """Measures what the directory does not hold yet, and adds it there.

    Args:
        sweep: what to measure.
        directory: where results go; made when missing. Processes on several machines need it to be the same one.
        command: the command line, for the record.
        ranks: the processes that share the work; None for this one alone.

    Returns:
        Whether everything was measured, by all processes; False when the time limit came first in any of them.

    Raises:
        EvalError: something is missing or does not fit, or another process ended; nothing that was measured is lost.
    """
    ranks = ranks or Ranks()
    with agreed(ranks):
        if sweep.threads is not None:
            torch.set_num_threads(sweep.threads)
        check_same(directory, sweep.identity() | versions())
        ingredients = load_ingredients(sweep)
        device = _own_device(sweep, ranks)
    with contextlib.ExitStack() as stack:
        with agreed(ranks):
            if ranks.is_first:
                check_out(directory, REPORT_FILES)
            first_store = stack.enter_context(ResultStore(directory)) if ranks.is_first else None
        with agreed(ranks):
            model = load_model_of(sweep, str(device))
            identity = sweep.identity() | versions() | _fingerprints(model, ingredients)
            if ranks.is_first:
                check_same(directory, identity)
            check_methods(sweep, model)
        constants = {"weights": identity["weights"], "text": ingredients.text.sha256, "dtype": str(model.dtype)}
        plan = plan_of(sweep, ingredients.foreign, constants)
        session = _session(hardware(device, torch.get_num_threads()), ranks)
        with agreed(ranks):
            if ranks.is_first:
                details = _details(sweep, model, ingredients) | {"planned": len(plan), "hardware": session["hardware"]}
                record_session(directory, identity, details, command, session)
        with agreed(ranks):
            store = first_store or stack.enter_context(_part_store(directory, ranks, session["id"]))
        with agreed(ranks):
            if ranks.is_first:
                check_rows(directory, store.rows)
        known_rows = list(store.rows)
        known = ranks.from_first([(row["key"], _costs(row), "failed" in row) for row in valid_rows(known_rows)])
        began = time.monotonic()
        todo = _todo(sweep, plan, known, ranks)
        complete = _measure_all(sweep, todo, _forecast(known), store, Measurer(sweep, model, ingredients), ranks)
        if not ranks.is_first:
            stack.close()
        complete = all(ranks.gathered(complete))  # and every other process has closed its part
        if first_store is not None:
            first_store.take_in_parts()
            new = {row["key"] for row in first_store.rows[len(known_rows) :]}
            left = sum(planned.key not in new for planned in todo)
            _say_how_it_ended(sweep, time.monotonic() - began, complete, left, len(plan))
        return complete


def _fingerprints(model: Any, ingredients: Ingredients) -> dict[str, Any]:
    """What must be the same in every session, and is known once the model is there."""
    return {
        "weights": weights_fingerprint(model),
        "attention": attention_of(model),
        "tokenizer": tokenizer_fingerprint(ingredients.tokenizer),
        "text_sha256": ingredients.text.sha256,
    }


def _details(sweep: Sweep, model: Any, ingredients: Ingredients) -> dict[str, Any]:
    return {
        "text_origin": ingredients.text.origin,
        "text_tokens": len(ingredients.tokens.ids),
        "model_class": type(model).__name__,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "model_parameters": model.num_parameters(),
        "budget_at_equal": sweep.budgets.fixed,
        "log_factor": sweep.budgets.log_factor,
    }


def _session(here: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What is recorded of a session: an id, the hardware of process 0, and any other that processes run on."""
    machines = ranks.gathered(here)
    others = {hardware_words(each): each for each in machines}
    del others[hardware_words(machines[0])]
    session = {"id": secrets.token_hex(8), "processes": ranks.world, "hardware": machines[0]}
    return ranks.from_first(session | ({"other_hardware": list(others.values())} if others else {}))


def _own_device(sweep: Sweep, ranks: Ranks) -> torch.device:
    device = pick_device(sweep.device)
    if device.type == "cuda" and device.index is None and ranks.world > 1:
        return pick_device(f"cuda:{ranks.local_rank}")
    return device


def _part_store(directory: Path, ranks: Ranks, session: str) -> ResultStore:
    run = read_run(directory) or {"sessions": [{}]}
    if run["sessions"][-1].get("id") != session:
        raise EvalError(
            f"{directory} is not the directory that process 0 writes to; several machines need one they share"
        )
    return ResultStore(directory, ranks.rank)


def _costs(row: dict[str, Any]) -> tuple[str, int, float | None]:
    return row["method"], row["length"], row.get("seconds")


def _todo(sweep: Sweep, plan: list[Planned], known: Known, ranks: Ranks) -> list[Planned]:
    """What is not measured yet; the first process says how much there is."""
    failed = {key for key, _, has_failed in known if has_failed}
    done = {key for key, _, _ in known} - (failed if sweep.retry_failed else set())
    if ranks.is_first:
        _say_what_is_there(plan, done, failed)
        _say_what_chooses_no_block(sweep)
    return [planned for planned in plan if planned.key not in done]


def _forecast(known: Known) -> Forecast:
    forecast = Forecast()
    for _, (method, length, seconds), _ in known:
        if seconds is not None:
            forecast.learn(Step(method, length), seconds)
    return forecast


def _measure_all(
    sweep: Sweep, todo: list[Planned], forecast: Forecast, store: ResultStore, measurer: Measurer, ranks: Ranks
) -> bool:
    """Measures this process's share; returns whether it left nothing of it for want of time."""
    began = time.monotonic()
    source_commit = commit()
    writes = ranks.is_first or sweep.tp_plan is None
    groups = groups_of(todo)
    first_steps = list(itertools.accumulate((len(group) for group in groups), initial=0))
    progress = Progress([planned.step for planned in todo], forecast, ranks.world, ranks.is_first)
    try:
        for turn, number in enumerate(ranks.take(len(groups))):
            group = groups[number]
            # One group is measured whatever the limit, so that runs that are repeated always get further.
            stops = turn > 0 and _exceeds(
                sweep.minutes, time.monotonic() - began, forecast.seconds(p.step for p in group)
            )
            if sweep.tp_plan is not None and sweep.minutes is not None:
                stops = ranks.from_first(stops)  # each has a clock of its own, and none can go on alone
            if stops:
                return False
            progress.begun_before(first_steps[number])
            for planned in group:
                progress.starts(f"{planned.length:,} tokens, {planned.task}, {planned.method}")
                began_row = time.monotonic()
                row = measurer.row(planned)
                if writes:
                    store.append(row | {"commit": source_commit, "process": ranks.rank})
                if "failed" not in row:
                    forecast.learn(planned.step, time.monotonic() - began_row)
                progress.finished()
    finally:
        progress.close()
    return True


def _say_how_it_ended(sweep: Sweep, seconds: float, complete: bool, left: int, planned: int) -> None:
    if complete:
        print(f"Measured in {duration(seconds)}.", file=sys.stderr)
    else:
        print(
            f"Stopped before the limit of {sweep.minutes:g} minutes with {left} of {planned} measurements to go; the "
            "same command goes on.",
            file=sys.stderr,
        )


def _say_what_is_there(plan: list[Planned], done: set[str], failed: set[str]) -> None:
    there = sum(planned.key in done for planned in plan)
    if there:
        print(f"{there} of {len(plan)} measurements are there already.", file=sys.stderr)
    gone = sum(planned.key in failed & done for planned in plan)
    if gone:
        print(f"{gone} of them failed; --retry-failed measures them again.", file=sys.stderr)


def _say_what_chooses_no_block(sweep: Sweep) -> None:
    cells = [
        (name, length, budget_at(name, sweep.budgets, length))
        for length in sweep.layout.lengths
        for name in sweep.methods_at(length)
    ]
    for sentence in without_choice(cells, sweep.budgets.block_size, sweep.phase):
        print(f"{sentence} Smaller --block-size, or larger budgets, leave some to choose.", file=sys.stderr)


def _exceeds(minutes: float | None, spent: float, expected: float | None) -> bool:
    return minutes is not None and spent + (expected or 0.0) > 60 * minutes

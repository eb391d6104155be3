"""A sweep: every task and method at every length and sample, in an order in which a part is already of use."""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval_tasks.errors import EvalError
from eval_tasks.measure import measure, warm_up
from eval_tasks.methods import DENSE, METHODS, Budgets, budget_at
from eval_tasks.models import (
    find_model,
    load_model,
    load_tokenizer,
    max_positions,
    pick_device,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from eval_tasks.progress import Forecast, Progress, Step, duration
from eval_tasks.provenance import check_same, commit, hardware, record_session, versions
from eval_tasks.store import ResultStore, measurement_key
from eval_tasks.tasks import TASKS, Layout, TokenisedText, check_lengths, places, tokenise
from eval_tasks.texts import load_text


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        model: a name as ``find_model`` takes it.
        text: a name as ``load_text`` takes it.
        methods, tasks: names of ``METHODS`` and ``TASKS``.
        budgets: of the methods.
        layout: lengths, samples and seed.
        dtype, device: as ``load_model`` takes them.
        threads: of PyTorch on the CPU; None leaves its choice.
        minutes: after the first, no sample is begun that is not expected to end within so many minutes; None for no
            limit.
    """

    model: str
    text: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budgets: Budgets
    layout: Layout
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    minutes: float | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same in every session that adds to one directory."""
        return {
            "model": self.model,
            "text": self.text,
            "methods": list(self.methods),
            "tasks": list(self.tasks),
            "lengths": list(self.layout.lengths),
            "samples": self.layout.samples,
            "seed": self.layout.seed,
            "scored": self.layout.scored,
            "passage": self.layout.passage,
            "alpha": self.budgets.alpha,
            "C": self.budgets.C,
            "equal_at": self.budgets.equal_at,
            "block_size": self.budgets.block_size,
            "backend": self.budgets.backend,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Planned:
    """One measurement to make."""

    length: int
    sample: int
    task: str
    method: str
    key: str

    @property
    def step(self) -> Step:
        """What the forecast needs to know."""
        return Step(self.method, self.length)


def run_sweep(sweep: Sweep, directory: Path, command: str) -> bool:
    """Measures what the directory does not hold yet, and adds it there.

    Args:
        sweep: what to measure.
        directory: where results go; made when missing.
        command: the command line, for the record.

    Returns:
        Whether everything was measured; False when the time limit came first.

    Raises:
        EvalError: something is missing or does not fit; nothing that was measured is lost.
    """
    if sweep.threads is not None:
        torch.set_num_threads(sweep.threads)
    check_same(directory, sweep.identity() | versions())
    device = pick_device(sweep.device)
    text = load_text(sweep.text)
    source = find_model(sweep.model)
    _check_positions(sweep, max_positions(source))
    tokenizer = load_tokenizer(source)
    tokens = tokenise(tokenizer, text.content)
    check_lengths([TASKS[name] for name in sweep.tasks], sweep.layout, len(tokens.prefix))
    starts = places(tokens, sweep.layout)
    with ResultStore(directory) as store:
        model = load_model(sweep.model, sweep.dtype, str(device)).model
        identity = (
            sweep.identity()
            | versions()
            | {
                "weights": weights_fingerprint(model),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "text_sha256": text.sha256,
            }
        )
        check_same(directory, identity)
        for name in sweep.methods:
            _check_method(model, name, sweep.budgets)
        details = {
            "text_origin": text.origin,
            "text_tokens": len(tokens.ids),
            "model_class": type(model).__name__,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "model_parameters": model.num_parameters(),
            "budget_at_equal": sweep.budgets.fixed,
            "log_factor": sweep.budgets.log_factor,
            "hardware": hardware(device, torch.get_num_threads()),
        }
        record_session(directory, identity, details, command)
        plan = _plan(sweep, {"weights": identity["weights"], "text": text.sha256, "dtype": str(model.dtype)})
        return _measure_all(sweep, plan, store, model, tokens, starts)


def _check_positions(sweep: Sweep, positions: int | None) -> None:
    longest = max(sweep.layout.lengths)
    if positions is not None and longest > positions:
        raise EvalError(
            f"length {longest:,} is beyond the {positions:,} positions of {sweep.model} (max_position_embeddings); "
            "leave it out of --lengths"
        )


def _check_method(model: Any, name: str, budgets: Budgets) -> None:
    """Tries a method on a few tokens, which also takes its one-off costs out of the first measurement."""
    try:
        warm_up(model, METHODS[name].config(budgets))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise EvalError(f"the method {name} does not run on this model and device: {error}") from error


def _plan(sweep: Sweep, constants: dict[str, Any]) -> list[Planned]:
    """Short lengths first, at each length task by task, and each sample with all methods."""
    plan = []
    layout = sweep.layout
    for length, task, sample, method in itertools.product(
        layout.lengths, sweep.tasks, range(layout.samples), sweep.methods
    ):
        if TASKS[task].dense_only and method != DENSE:
            continue
        config = METHODS[method].config(sweep.budgets)
        key = measurement_key(
            constants
            | {"method": method, "config": config and config.to_dict(), "task": task, "length": length}
            | {"sample": sample, "samples_of": max(layout.lengths), "seed": layout.seed}
            | {"scored": layout.scored, "passage": layout.passage, "device": sweep.device}
        )
        plan.append(Planned(length, sample, task, method, key))
    return plan


def _measure_all(
    sweep: Sweep, plan: list[Planned], store: ResultStore, model: Any, tokens: TokenisedText, starts: list[int]
) -> bool:
    began = time.monotonic()
    forecast = Forecast()
    for row in store.rows:
        forecast.learn(Step(row["method"], row["length"]), row["seconds"])
    done = {row["key"] for row in store.rows}
    todo = [planned for planned in plan if planned.key not in done]
    if len(todo) < len(plan):
        print(f"{len(plan) - len(todo)} of {len(plan)} measurements are there already.", file=sys.stderr)
    source_commit = commit()
    progress = Progress([planned.step for planned in todo], forecast)
    try:
        for number, group in enumerate(_groups(todo)):
            # One group is measured whatever the limit, so that runs that are repeated always get further.
            if number and _exceeds(sweep.minutes, time.monotonic() - began, forecast.seconds(p.step for p in group)):
                left = sum(planned.key not in {row["key"] for row in store.rows} for planned in todo)
                print(
                    f"Stopped before the limit of {sweep.minutes:g} minutes with {left} of {len(plan)} measurements to "
                    "go; the same command goes on.",
                    file=sys.stderr,
                )
                return False
            for planned in group:
                progress.starts(f"{planned.length:,} tokens, {planned.task}, {planned.method}")
                row = _row(sweep, planned, model, tokens, starts)
                store.append(row | {"commit": source_commit})
                forecast.learn(planned.step, row["seconds"])
                progress.finished()
    finally:
        progress.close()
    print(f"Measured in {duration(time.monotonic() - began)}.", file=sys.stderr)
    return True


def _groups(todo: list[Planned]) -> list[list[Planned]]:
    """Measurements that only make sense together: all methods on one sample of one task and length."""
    return [list(group) for _, group in itertools.groupby(todo, lambda p: (p.length, p.sample, p.task))]


def _exceeds(minutes: float | None, spent: float, expected: float | None) -> bool:
    return minutes is not None and spent + (expected or 0.0) > 60 * minutes


def _row(sweep: Sweep, planned: Planned, model: Any, tokens: TokenisedText, starts: list[int]) -> dict[str, Any]:
    sample = TASKS[planned.task].build(tokens, starts[planned.sample], planned.length, sweep.layout)
    try:
        measured = measure(model, METHODS[planned.method].config(sweep.budgets), sample)
    except EvalError as error:
        raise EvalError(f"{planned.task} with {planned.method} at {planned.length:,} tokens: {error}") from error
    return {
        "key": planned.key,
        "model": sweep.model,
        "method": planned.method,
        "task": planned.task,
        "length": planned.length,
        "sample": planned.sample,
        "place": starts[planned.sample],
        "budget": budget_at(planned.method, sweep.budgets, planned.length),
        **measured.to_dict(),
    }

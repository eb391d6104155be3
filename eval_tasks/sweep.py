"""A sweep: every task and method at every length and sample, in an order in which a part is already of use."""

import contextlib
import hashlib
import itertools
import json
import secrets
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval_tasks.answers import check_generated
from eval_tasks.cells import Measurer, Planned
from eval_tasks.errors import EvalError
from eval_tasks.findings import without_choice
from eval_tasks.matching import Budgets, load_profile
from eval_tasks.measure import Phase, warm_up
from eval_tasks.methods import DENSE, Method, budget_at, find_method, with_keys
from eval_tasks.models import (
    ModelSource,
    attention_of,
    find_model,
    load_model,
    load_tokenizer,
    max_positions,
    pick_device,
    tokenizer_fingerprint,
)
from eval_tasks.presses import find_press
from eval_tasks.progress import Forecast, Progress, Step, duration
from eval_tasks.provenance import check_same, commit, hardware, record_session, versions
from eval_tasks.ranks import Ranks, agreed
from eval_tasks.schema import check_rows
from eval_tasks.store import ResultStore, measurement_key, read_run, valid_rows
from eval_tasks.synthetic import GENERATORS, Material
from eval_tasks.tasks import LM_EVAL, TASKS, Layout, check_lengths, places, tokenise
from eval_tasks.texts import load_text
from nc_patch import Profile, ProfileError
from nc_patch.fingerprint import weights_fingerprint

if TYPE_CHECKING:
    from eval_tasks.lm_eval.in_sweep import LmEvalTasks

Known = list[tuple[str, tuple[str, int, float | None], bool]]
"""What a directory holds, row by row: key, what it cost, and whether it failed."""


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
        device_map, tp_plan: how one model is spread over devices or processes; as ``load_model`` takes them.
        phase: which part of a forward pass is sparse; as ``measure`` takes it.
        iso_keys: budgets that ``match="iso"`` tries.
        answer_tokens: the most tokens of an answer to a generated task; None for each task's own number.
        retry_failed: whether cells that failed in an earlier session are measured again.
        more_seeds: seeds beside that of the layout; every one of them has as many samples.
        revision, trust_remote_code: of the model; as ``load_model`` takes them.
        hub_copies: a directory with copies of the hub's data sets, as ``Material`` takes it.
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
    device_map: str | None = None
    tp_plan: str | None = None
    phase: Phase = "all"
    iso_keys: tuple[int, ...] = ()
    answer_tokens: int | None = None
    retry_failed: bool = False
    more_seeds: tuple[int, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    hub_copies: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds; each draws its own samples."""
        return (self.layout.seed, *self.more_seeds)

    def methods_at(self, length: int) -> tuple[str, ...]:
        """The names of what is measured at a length: the methods, or for ``iso`` each with every budget."""
        if self.budgets.match != "iso":
            return self.methods
        sparse = [name for name in self.methods if name != DENSE]
        return (DENSE, *(with_keys(name, keys) for name in sparse for keys in self.iso_keys if keys < length))

    def identity(self) -> dict[str, Any]:
        """What must be the same in every session that adds to one directory."""
        return {
            "model": self.model,
            "text": self.text,
            "methods": list(self.methods),
            "tasks": list(self.tasks),
            "lengths": list(self.layout.lengths),
            "samples": self.layout.samples,
            "seed": list(self.seeds) if self.more_seeds else self.layout.seed,
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
            "device_map": self.device_map,
            "tp_plan": self.tp_plan,
            "match": self.budgets.match,
            "phase": self.phase,
            "iso_keys": list(self.iso_keys),
            "answer_tokens": self.answer_tokens,
            **({} if self.budgets.profile is None else {"profile": _profile_digest(self.budgets.profile)}),
            **({} if self.revision is None else {"revision": self.revision}),
        }


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
        text = load_text(sweep.text)
        source = find_model(sweep.model, sweep.revision, sweep.trust_remote_code)
        _check_positions(sweep, max_positions(source))
        tokenizer = load_tokenizer(source)
        tokens = tokenise(tokenizer, text.content)
        scored = [TASKS[name] for name in sweep.tasks if name in TASKS]
        check_lengths(scored, sweep.layout, len(tokens.prefix))
        material = Material(sweep.text, sweep.hub_copies)
        generated = [name for name in sweep.tasks if name in GENERATORS]
        check_generated(generated, sweep.layout.lengths, sweep.layout.seed, material)
        foreign = _lm_eval_tasks(sweep, source)
        starts = {seed: places(tokens, replace(sweep.layout, seed=seed)) if scored else [] for seed in sweep.seeds}
        device = _own_device(sweep, ranks)
    with contextlib.ExitStack() as stack:
        with agreed(ranks):
            first_store = stack.enter_context(ResultStore(directory)) if ranks.is_first else None
        with agreed(ranks):
            model = load_model(
                *(sweep.model, sweep.dtype, str(device), sweep.device_map, sweep.tp_plan),
                revision=sweep.revision,
                trust_remote_code=sweep.trust_remote_code,
            ).model
            identity = (
                sweep.identity()
                | versions()
                | {
                    "weights": weights_fingerprint(model),
                    "attention": attention_of(model),
                    "tokenizer": tokenizer_fingerprint(tokenizer),
                    "text_sha256": text.sha256,
                }
            )
            if ranks.is_first:
                check_same(directory, identity)
            if sweep.budgets.profile is not None:
                _check_profile(model, load_profile(sweep.budgets.profile))
            for name in sweep.methods:
                _check_method(model, find_method(name), sweep)
        plan = _plan(sweep, foreign, {"weights": identity["weights"], "text": text.sha256, "dtype": str(model.dtype)})
        details = {
            "planned": len(plan),
            "text_origin": text.origin,
            "text_tokens": len(tokens.ids),
            "model_class": type(model).__name__,
            "model_dtype": str(model.dtype).removeprefix("torch."),
            "model_parameters": model.num_parameters(),
            "budget_at_equal": sweep.budgets.fixed,
            "log_factor": sweep.budgets.log_factor,
            "hardware": hardware(device, torch.get_num_threads()),
        }
        here = {"processes": ranks.world, "hardware": details["hardware"]}
        session = ranks.from_first(secrets.token_hex(8))
        with agreed(ranks):
            if ranks.is_first:
                record_session(directory, identity, details, command, {"id": session, **here})
        with agreed(ranks):
            store = first_store or stack.enter_context(_part_store(directory, ranks, session))
        with agreed(ranks):
            if ranks.is_first:
                check_rows(directory, store.rows)
        known_rows = list(store.rows)
        known = ranks.from_first([(row["key"], _costs(row), "failed" in row) for row in valid_rows(known_rows)])
        began = time.monotonic()
        todo = _todo(sweep, plan, known, ranks)
        measurer = Measurer(sweep, model, tokenizer, tokens, starts, material, foreign)
        complete = _measure_all(sweep, todo, _forecast(known), store, measurer, ranks)
        if not ranks.is_first:
            stack.close()
        complete = ranks.all(complete)  # and every other process has closed its part
        if first_store is not None:
            first_store.take_in_parts()
            new = {row["key"] for row in first_store.rows[len(known_rows) :]}
            left = sum(planned.key not in new for planned in todo)
            _say_how_it_ended(sweep, time.monotonic() - began, complete, left, len(plan))
        return complete


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


def _profile_digest(path: str) -> str:
    """What a profile holds, in short, wherever its file lies."""
    return hashlib.sha256(json.dumps(load_profile(path).to_dict(), sort_keys=True).encode()).hexdigest()[:20]


def _check_positions(sweep: Sweep, positions: int | None) -> None:
    longest = max(sweep.layout.lengths)
    if positions is not None and longest > positions:
        raise EvalError(
            f"length {longest:,} is beyond the {positions:,} positions of {sweep.model} (max_position_embeddings); "
            "leave it out of --lengths"
        )


def _check_profile(model: Any, profile: Profile) -> None:
    try:
        profile.check_model(model)
    except ProfileError as error:
        raise EvalError(str(error)) from error


def _check_method(model: Any, method: Method, sweep: Sweep) -> None:
    """Tries a method on a few tokens, which also takes its one-off costs out of the first measurement."""
    if method.press is not None:
        find_press(method.press)
        if sweep.phase not in ("question", "decode"):
            raise EvalError(
                f"{method.name} compresses what a dense prefill left, which is not what the other methods do; measure "
                "all of them that way with --phase question or --phase decode"
            )
        return
    try:
        warm_up(model, method.config(sweep.budgets.at(max(sweep.layout.lengths))))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise EvalError(f"the method {method.name} does not run on this model and device: {error}") from error


def _lm_eval_tasks(sweep: Sweep, source: ModelSource) -> "LmEvalTasks | None":
    """What runs the tasks of lm-eval; None where none is asked for, since importing lm-eval takes seconds."""
    if not any(name.startswith(LM_EVAL) for name in sweep.tasks):
        return None
    if sweep.phase != "all":
        raise EvalError(f"lm-eval's own evaluator knows no phases: leave out --phase {sweep.phase}")
    if any(find_method(name).press is not None for name in sweep.methods):
        raise EvalError("lm-eval's own evaluator runs no presses of kvpress: leave them out")
    from eval_tasks.lm_eval.in_sweep import LmEvalTasks

    return LmEvalTasks(
        source.location,
        source.options,
        sweep.layout.samples * len(sweep.seeds),
        sweep.layout.seed,
        sweep.text,
        sweep.answer_tokens,
        sweep.hub_copies,
    )


def _single_tasks(sweep: Sweep, foreign: "LmEvalTasks | None") -> list[str]:
    """The tasks, with the members of lm-eval's groups in place of the groups."""
    found = []
    for name in sweep.tasks:
        if foreign is None or not name.startswith(LM_EVAL):
            found.append(name)
        else:
            members = foreign.members(name.removeprefix(LM_EVAL), min(sweep.layout.lengths))
            found.extend(LM_EVAL + member for member in members)
    return list(dict.fromkeys(found))


def _plan(sweep: Sweep, foreign: "LmEvalTasks | None", constants: dict[str, Any]) -> list[Planned]:
    """Short lengths first, at each length task by task, and each sample with all methods."""
    plan = []
    layout = sweep.layout
    tasks = _single_tasks(sweep, foreign)
    drawn = [(seed, index) for seed in sweep.seeds for index in range(layout.samples)]
    for length, task, (sample, (seed, index)) in itertools.product(layout.lengths, tasks, enumerate(drawn)):
        for method in sweep.methods_at(length):
            if task in TASKS and TASKS[task].dense_only and method != DENSE:
                continue
            config = find_method(method).config(sweep.budgets.at(length))
            key = measurement_key(
                constants
                | {"method": method, "config": config and config.to_dict(), "task": task, "length": length}
                | {"sample": index, "samples_of": max(layout.lengths), "seed": seed, "phase": sweep.phase}
                | {"scored": layout.scored, "passage": layout.passage, "device": sweep.device}
                | ({} if task in TASKS else {"answer_tokens": sweep.answer_tokens})
                | ({"budget": budget_at(method, sweep.budgets, length)} if find_method(method).press else {})
            )
            plan.append(Planned(length, sample, seed, index, task, method, key))
    return plan


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
    groups = _groups(todo)
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


def _groups(todo: list[Planned]) -> list[list[Planned]]:
    """Measurements that only make sense together: all methods on one sample of one task and length."""
    return [list(group) for _, group in itertools.groupby(todo, lambda p: (p.length, p.sample, p.task))]


def _exceeds(minutes: float | None, spent: float, expected: float | None) -> bool:
    return minutes is not None and spent + (expected or 0.0) > 60 * minutes

"""Runs a sweep: measures what a directory does not hold yet, alone or with other processes."""

import contextlib
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval_tasks.answers import Question, answer, build_question, check_generated
from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.matching import load_profile
from eval_tasks.measure import measure, warm_up
from eval_tasks.methods import Method, attention_by, budget_at, find_method
from eval_tasks.models import attention_of, find_model, load_model, load_tokenizer, max_positions, tokenizer_fingerprint
from eval_tasks.presses import find_press
from eval_tasks.processes import Processes
from eval_tasks.provenance import check_same, commit, hardware, hardware_words, record_session, versions
from eval_tasks.report import REPORT_FILES
from eval_tasks.store import append_row, check_out, claimed, read_rows, read_run
from eval_tasks.sweep import Cells, Sweep, plan_of, total
from eval_tasks.synthetic import GENERATORS, Material
from eval_tasks.tasks import TASKS, Sample, TokenisedText, check_lengths, places, tokenise
from eval_tasks.texts import Text, load_text
from nc_patch import ProfileError
from nc_patch.calibration.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Source:
    """All that samples are built from: the text as it is and as tokens, the tokenizer, and what generated tasks use.

    ``starts`` says where in the text the samples of each seed begin.
    """

    text: Text
    tokens: TokenisedText
    tokenizer: PreTrainedTokenizerBase
    starts: dict[int, list[int]]
    material: Material

    def start(self, cells: Cells) -> int | None:
        """Where in the text the sample begins; None for a generated task."""
        return self.starts[cells.seed][cells.index] if cells.task in TASKS else None

    def build(self, cells: Cells, sweep: Sweep) -> Sample | Question:
        """The sample of some cells."""
        start = self.start(cells)
        if start is not None:
            return TASKS[cells.task].build(self.tokens, start, cells.length, sweep.layout)
        drawn = (cells.length, cells.seed, cells.index)
        return build_question(cells.task, self.tokenizer, *drawn, self.material, sweep.answer_tokens)


def run_sweep(sweep: Sweep, directory: Path, command: str, processes: Processes | None = None) -> None:
    """Measures what the directory does not hold yet, and adds it there; ``command`` is for the record.

    The ``processes`` share the work; on several machines they need the directory to be the same one. Raises EvalError
    where something is missing or does not fit, or another process ended; nothing that was measured is lost.
    """
    processes = processes or Processes()
    with contextlib.ExitStack() as stack:
        with processes.together():
            if sweep.threads is not None:
                torch.set_num_threads(sweep.threads)
            check_same(directory, sweep.identity() | versions())
            source = load_source(sweep)
            device = processes.device(sweep.device)
        with processes.together():
            if processes.is_first:
                check_out(directory, REPORT_FILES)
                stack.enter_context(claimed(directory))
        with processes.together():
            spread = (sweep.device_map, sweep.tp_plan, sweep.revision, sweep.trust_remote_code)
            model = load_model(sweep.model, sweep.dtype, str(device), *spread).model
            identity = sweep.identity() | versions() | _fingerprints(model, source)
            if processes.is_first:
                check_same(directory, identity)
            check_methods(sweep, model)
        _check_alike(sweep, processes, identity | {"model's dtype": str(model.dtype)})
        plan = plan_of(sweep, {"weights": identity["weights"], "text": source.text.sha256, "dtype": str(model.dtype)})
        session = _session(command, hardware(device, torch.get_num_threads()), processes)
        with processes.together():
            if processes.is_first:
                record_session(directory, identity, _details(sweep, model, source, plan, session), session)
        with processes.together():
            if (read_run(directory) or {"sessions": [{}]})["sessions"][-1].get("id") != session["id"]:
                raise EvalError(
                    f"{directory} is not the directory that process 0 writes to; several machines need one they share"
                )
            if not processes.is_first:
                stack.enter_context(claimed(directory, is_first=False))
            todo = _todo(sweep, plan, read_rows(directory)) if processes.is_first else []
        # All share out the list of the first one, since what they read of a file may differ between machines.
        todo = processes.from_first(todo)
        began = time.monotonic()
        _measure_all(sweep, model, source, todo, directory, processes)
        processes.gathered(None)  # the first one waits for all shares
        if processes.is_first:
            print(f"Measured in {tqdm.format_interval(time.monotonic() - began)}.", file=sys.stderr)


def load_source(sweep: Sweep) -> Source:
    """Loads what samples are built from.

    Raises EvalError where something is missing, or a length or task does not fit the model, text or tokenizer.
    """
    text = load_text(sweep.text)
    found = find_model(sweep.model, sweep.revision, sweep.trust_remote_code)
    positions, longest = max_positions(found), max(sweep.layout.lengths)
    if positions is not None and longest > positions:
        raise EvalError(
            f"length {longest:,} is beyond the {positions:,} positions of {sweep.model} (max_position_embeddings); "
            "leave it out of --lengths"
        )
    tokenizer = load_tokenizer(found)
    tokens = tokenise(tokenizer, text.content)
    scored = [TASKS[name] for name in sweep.tasks if name in TASKS]
    check_lengths(scored, sweep.layout, len(tokens.prefix))
    check_generated([name for name in sweep.tasks if name in GENERATORS], sweep.layout.lengths)
    starts = {seed: places(tokens, replace(sweep.layout, seed=seed)) if scored else [] for seed in sweep.seeds}
    return Source(text, tokens, tokenizer, starts, Material(sweep.text))


def check_methods(sweep: Sweep, model: Any) -> None:
    """Tries every method on a few tokens, which also takes its one-off costs out of the first measurement.

    Raises EvalError where a method does not run on the model, or the profile is of another one.
    """
    if sweep.budgets.profile is not None:
        try:
            load_profile(sweep.budgets.profile).check_model(model)
        except ProfileError as error:
            raise EvalError(str(error)) from error
    for name in sweep.methods:
        _check_method(sweep, model, find_method(name))


def _check_method(sweep: Sweep, model: Any, method: Method) -> None:
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


def _measure_all(
    sweep: Sweep, model: Any, source: Source, todo: Sequence[Cells], directory: Path, processes: Processes
) -> None:
    """Measures this process's share; all of it where the processes share one model."""
    source_commit, shares = commit(), sweep.tp_plan is not None
    mine = todo if shares else todo[processes.rank :: processes.world]
    terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(cells.cost * len(cells.keys) for cells in mine),
        disable=not processes.is_first,
        bar_format="{percentage:3.0f}%|{bar}| {desc}{remaining} left",
        mininterval=0.1 if terminal else 30,
        delay=0.5 if terminal else 30,
        leave=False,
    ) as bar:
        for cells in mine:
            subject = source.build(cells, sweep)
            for method in cells.keys:
                bar.set_description_str(f"{cells.length:,} tokens, {cells.task}, {method}, ", refresh=terminal)
                row = _row(sweep, model, source, cells, method, subject)
                if processes.is_first or not shares:
                    append_row(directory, row | {"commit": source_commit, "process": processes.rank})
                bar.update(cells.cost)


def _row(
    sweep: Sweep, model: Any, source: Source, cells: Cells, method: str, subject: Sample | Question
) -> dict[str, Any]:
    """The row of one method on a sample; where memory runs out, one that says so."""
    start, what = source.start(cells), f"{cells.task} with {method} at {cells.length:,} tokens"
    try:
        attention = attention_by(method, sweep.budgets, cells.length)
        if isinstance(subject, Sample):
            measured = measure(model, attention, subject, sweep.phase)
        else:
            measured = answer(model, source.tokenizer, attention, subject, sweep.phase)
    except MemoryRanOut as error:
        if sweep.tp_plan is not None:  # the other processes still wait for this one's part of a layer
            raise EvalError(f"{what}: {error}") from error
        print(f"{what}: {error}. It is recorded, and the run goes on.", file=sys.stderr)
        measured = {"failed": "out of memory", "error": str(error)}
    except EvalError as error:
        raise EvalError(f"{what}: {error}") from error
    return {
        "key": cells.keys[method],
        "model": sweep.model,
        "method": method,
        **{name: getattr(cells, name) for name in ("task", "length", "sample", "seed", "index")},
        "place": start,
        # Two seeds that choose the same stretch have one document between them.
        **({} if start is None else {"document": str(start)}),
        "phase": sweep.phase,
        "budget": budget_at(method, sweep.budgets, cells.length),
        **measured,
    }


def _fingerprints(model: Any, source: Source) -> dict[str, Any]:
    """What must be the same in every session, and is known once the model is there."""
    return {
        "weights": weights_fingerprint(model),
        "attention": attention_of(model),
        "tokenizer": tokenizer_fingerprint(source.tokenizer),
        "text_sha256": source.text.sha256,
    }


def _check_alike(sweep: Sweep, processes: Processes, identity: dict[str, Any]) -> None:
    """Raises EvalError in all processes where one of them would measure something else than the first."""
    first = processes.from_first(identity)
    # Where processes hold parts of one model, what tells its weights from others may differ, too.
    compared = set(identity) - ({"weights"} if sweep.tp_plan is not None else set())
    differing = [name for name in identity if name in compared and identity[name] != first[name]]
    with processes.together():
        if differing:
            said = "; ".join(f"{name} is {identity[name]} here, {first[name]} in process 0" for name in differing)
            raise EvalError(f"{said}. All machines need the same model, text and versions")


def _details(
    sweep: Sweep, model: Any, source: Source, plan: Sequence[Cells], session: dict[str, Any]
) -> dict[str, Any]:
    return {
        "text_origin": source.text.origin,
        "text_tokens": len(source.tokens.ids),
        "model_class": type(model).__name__,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "model_parameters": model.num_parameters(),
        "budget_at_equal": sweep.budgets.fixed,
        "log_factor": sweep.budgets.log_factor,
        "planned": total(plan),
        "hardware": session["hardware"],
    }


def _session(command: str, here: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """What is recorded of a session: an id, the hardware of process 0, and any other that processes run on."""
    first, *machines = processes.gathered(here)
    others = {hardware_words(each): each for each in machines if hardware_words(each) != hardware_words(first)}
    session = {"id": secrets.token_hex(8), "command": command, "processes": processes.world, "hardware": first}
    found: dict[str, Any] = processes.from_first(session | ({"other_hardware": [*others.values()]} if others else {}))
    return found


def _todo(sweep: Sweep, plan: Sequence[Cells], known: Sequence[dict[str, Any]]) -> list[Cells]:
    """What is not measured yet; says how much is there."""
    failed = {row["key"] for row in known if "failed" in row}
    done = {row["key"] for row in known} - (failed if sweep.retry_failed else set())
    todo = [left for cells in plan if (left := cells.without(done)).keys]
    if there := total(plan) - total(todo):
        print(f"{there} of {total(plan)} measurements are there already.", file=sys.stderr)
    if gone := sum(key in failed & done for cells in plan for key in cells.keys.values()):
        print(f"{gone} of them failed; --retry-failed measures them again.", file=sys.stderr)
    return todo

"""Runs a sweep: measures what a directory does not hold yet, alone or with other processes."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.answers import Question, answer, build_question, check_generated
from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.matching import load_profile
from eval_tasks.measure import measure, warm_up
from eval_tasks.methods import attention_by, budget_at, find_method
from eval_tasks.models import attention_of, find_model, load_model, tokenizer_fingerprint
from eval_tasks.processes import Processes
from eval_tasks.provenance import check_same, commit, hardware, hardware_words, record_session, versions
from eval_tasks.report import REPORT_FILES
from eval_tasks.store import append_row, check_out, claimed, read_rows, read_run
from eval_tasks.sweep import Cells, Sweep, plan_of, total
from eval_tasks.synthetic import GENERATORS
from eval_tasks.tasks import TASKS, Sample, TokenisedText, check_lengths, places, tokenise
from eval_tasks.texts import Text, load_text
from nc_patch.calibration.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Source:
    """All that samples are built from: the text as it is and as tokens, and the tokenizer.

    ``starts`` says where in the text the samples of each seed begin.
    """

    text: Text
    tokens: TokenisedText
    tokenizer: PreTrainedTokenizerBase
    starts: dict[int, list[int]]

    def build(self, cells: Cells, sweep: Sweep) -> tuple[Sample | Question, int | None]:
        """The sample of some cells, and where in the text it begins (None for a generated task)."""
        if cells.task in TASKS:
            start = self.starts[cells.seed][cells.index]
            return TASKS[cells.task].build(self.tokens, start, cells.length, sweep.layout), start
        drawn = (cells.length, cells.seed, cells.index)
        return build_question(cells.task, self.tokenizer, *drawn, sweep.text, sweep.answer_tokens), None


def run_sweep(sweep: Sweep, directory: Path, command: str, processes: Processes | None = None) -> None:
    """Measures what the directory does not hold yet, and adds it there; ``command`` is for the record.

    The ``processes`` share the work; on several machines they need the directory to be the same one. Raises EvalError
    where something is missing or does not fit, or another process ended; nothing that was measured is lost.
    """
    processes = processes or Processes()
    with contextlib.ExitStack() as claim:
        with processes.together():
            if sweep.threads is not None:
                torch.set_num_threads(sweep.threads)
            check_same(directory, sweep.identity() | versions())
            source, device = load_source(sweep), processes.device(sweep.device)
            if processes.is_first:
                check_out(directory, REPORT_FILES)
                claim.enter_context(claimed(directory))
            how = (sweep.dtype, str(device), sweep.device_map, sweep.revision, sweep.trust_remote_code)
            model = load_model(sweep.model, *how).model
            constants = {"weights": weights_fingerprint(model), "text": source.text.sha256, "dtype": str(model.dtype)}
            identity = sweep.identity() | versions() | {"weights": constants["weights"]}
            identity |= {"attention": attention_of(model), "tokenizer": tokenizer_fingerprint(source.tokenizer)}
            identity |= {"text_sha256": source.text.sha256}
            check_same(directory, identity)
            check_methods(sweep, model)
        plan = plan_of(sweep, constants)
        machines = processes.gathered(hardware(device, torch.get_num_threads()))
        agreed: Any = None
        with processes.together():
            if processes.is_first:
                session = _session(command, machines)
                record_session(directory, identity, _details(sweep, model, source, plan, session), session)
                agreed = read_run(directory), _todo(sweep, plan, read_rows(directory))
        # All share out the list of the first one, since what they read of a file may differ between machines.
        recorded, todo = processes.from_first(agreed)
        with processes.together():
            if read_run(directory) != recorded:
                raise EvalError(
                    f"{directory} is not the directory that process 0 writes to; several machines need one they share"
                )
            check_same(directory, identity)  # which machines with other weights or versions do not have
            if not processes.is_first:
                claim.enter_context(claimed(directory, is_first=False))
        began = time.monotonic()
        _measure_all(sweep, model, source, todo[processes.rank :: processes.world], directory, processes.rank)
        processes.gathered(None)  # the first one waits for all shares
        if processes.is_first:
            print(f"Measured in {tqdm.format_interval(time.monotonic() - began)}.", file=sys.stderr)


def load_source(sweep: Sweep) -> Source:
    """Loads what samples are built from.

    Raises EvalError where something is missing, or a length or task does not fit the model, text or tokenizer.
    """
    text = load_text(sweep.text)
    found = find_model(sweep.model, sweep.revision, sweep.trust_remote_code)
    positions = getattr(found.load(AutoConfig).get_text_config(), "max_position_embeddings", None)
    longest = max(sweep.layout.lengths)
    if positions is not None and longest > positions:
        raise EvalError(
            f"length {longest:,} is beyond the {positions:,} positions of {sweep.model} (max_position_embeddings); "
            "leave it out of --lengths"
        )
    tokenizer = found.load(AutoTokenizer)
    tokens = tokenise(tokenizer, text.content)
    scored = [TASKS[name] for name in sweep.tasks if name in TASKS]
    check_lengths(scored, sweep.layout, len(tokens.prefix))
    check_generated([name for name in sweep.tasks if name in GENERATORS], sweep.layout.lengths)
    starts = {seed: places(tokens, replace(sweep.layout, seed=seed)) if scored else [] for seed in sweep.seeds}
    return Source(text, tokens, tokenizer, starts)


def check_methods(sweep: Sweep, model: Any) -> None:
    """Tries every method on a few tokens, which also takes its one-off costs out of the first measurement.

    Raises EvalError where a method does not run on the model, and ProfileError where the profile is of another one.
    """
    if sweep.budgets.profile is not None:
        load_profile(sweep.budgets.profile).check_model(model)
    for name in sweep.methods:
        try:
            warm_up(model, find_method(name).config(sweep.budgets.at(max(sweep.layout.lengths))))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise EvalError(f"the method {name} does not run on this model and device: {error}") from error


def _measure_all(sweep: Sweep, model: Any, source: Source, share: Sequence[Cells], directory: Path, rank: int) -> None:
    """Measures the share of the process of a rank."""
    measured_by = {"commit": commit(), "process": rank}
    terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(cells.cost * len(cells.keys) for cells in share),
        disable=rank != 0,
        bar_format="{percentage:3.0f}%|{bar}| {desc}{remaining} left",
        mininterval=0.1 if terminal else 30,
        delay=0.5 if terminal else 30,
        leave=False,
    ) as bar:
        for cells in share:
            sample, start = source.build(cells, sweep)
            where = {name: getattr(cells, name) for name in ("task", "length", "sample", "seed", "index")}
            # Two seeds that choose the same stretch have one document between them.
            where |= {"place": start} if start is None else {"place": start, "document": str(start)}
            for method, key in cells.keys.items():
                what = f"{cells.task} with {method} at {cells.length:,} tokens"
                bar.set_description_str(f"{what}, ", refresh=terminal)
                row = {"key": key, "model": sweep.model, "method": method, **where, "phase": sweep.phase}
                row["budget"] = budget_at(method, sweep.budgets, cells.length)
                try:
                    attention = attention_by(method, sweep.budgets, cells.length)
                    if isinstance(sample, Sample):
                        row |= measure(model, attention, sample, sweep.phase)
                    else:
                        row |= answer(model, source.tokenizer, attention, sample, sweep.phase)
                except MemoryRanOut as error:
                    print(f"{what}: {error}. It is recorded, and the run goes on.", file=sys.stderr)
                    row |= {"failed": "out of memory", "error": str(error)}
                except EvalError as error:
                    raise EvalError(f"{what}: {error}") from error
                append_row(directory, row | measured_by)
                bar.update(cells.cost)


def _session(command: str, machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of a session: the command, the hardware of process 0, and any other that processes run on."""
    others = {hardware_words(each): each for each in machines}
    others.pop(hardware_words(machines[0]))
    session = {"command": command, "processes": len(machines), "hardware": machines[0]}
    return session | ({"other_hardware": [*others.values()]} if others else {})


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

"""A sweep: its settings, every cell to measure, and a run, alone or with other processes, of those that are missing."""

import contextlib
import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.arguments import load_chosen_model
from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.measure import Phase, answer, measure, warm_up
from eval_tasks.methods import DENSE, Budgets, attention_by, budget_at, load_profile, with_keys
from eval_tasks.models import attention_of, find_model, tokenizer_fingerprint
from eval_tasks.processes import device_of, gathered
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.report import REPORT_FILES
from eval_tasks.store import Cell, Row, append_row, check_out, check_same, claimed, read_rows, read_run, record_session
from eval_tasks.synthetic import GENERATORS, SyntheticSample, chat, synthesize
from eval_tasks.synthetic.sample import SHORTEST
from eval_tasks.tasks import TASKS, Layout, Sample, TokenisedText, check_lengths, places, tokenise
from eval_tasks.texts import Text, load_text
from nc_patch.calibration.fingerprint import weights_fingerprint


@dataclass(frozen=True)
class Sweep:
    """What to measure: ``model``, ``text``, ``methods`` and ``tasks`` by name, and lengths and samples in a ``layout``.

    How the model runs is said as ``load_model`` takes it; ``threads`` are PyTorch's on the CPU. ``phase`` is as
    ``measure`` takes it, ``iso_keys`` are the budgets that ``match="iso"`` tries, ``answer_tokens`` the most tokens of
    an answer (None: each task's own number).
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
    device_map: str | None = None
    phase: Phase = "all"
    iso_keys: tuple[int, ...] = ()
    answer_tokens: int | None = None
    retry_failed: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def methods_at(self, length: int) -> tuple[str, ...]:
        """The names of what is measured at a length: the methods, or for ``iso`` each with every budget."""
        if self.budgets.match != "iso":
            return self.methods
        sparse = [name for name in self.methods if name != DENSE]
        return (DENSE, *(with_keys(name, keys) for name in sparse for keys in self.iso_keys if keys < length))

    def identity(self) -> dict[str, Any]:
        """What must be the same in every session that adds to one directory."""
        found = asdict(self)
        found |= found.pop("budgets") | found.pop("layout")
        if self.budgets.profile is not None:  # what it holds, wherever its file lies
            content = json.dumps(load_profile(self.budgets.profile).to_dict(), sort_keys=True)
            found["profile"] = hashlib.sha256(content.encode()).hexdigest()[:20]
        return {name: value for name, value in found.items() if name not in ("retry_failed", "trust_remote_code")}

    def plan(self) -> list[Cell]:
        """Every cell, short lengths first, at each length task by task, with all methods of a sample together."""
        plan: list[Cell] = []
        for length, task in itertools.product(self.layout.lengths, self.tasks):
            methods = (DENSE,) if task in TASKS and TASKS[task].dense_only else self.methods_at(length)
            places = itertools.product(range(self.layout.samples), methods)
            plan += [Cell(task, length, sample, method) for sample, method in places]
        return plan


@dataclass(frozen=True)
class Source:
    """All that samples are built from: the text as it is and as tokens, and the tokenizer.

    ``starts`` says where in the text the samples begin.
    """

    text: Text
    tokens: TokenisedText
    tokenizer: PreTrainedTokenizerBase
    starts: list[int]

    def build(self, cell: Cell, sweep: Sweep) -> Sample | SyntheticSample:
        """The sample of a cell."""
        if cell.task in TASKS:
            return TASKS[cell.task].build(self.tokens, self.starts[cell.sample], cell.length, sweep.layout)
        options: dict[str, Any] = {"text": sweep.text, "new_tokens": sweep.answer_tokens}
        if self.tokenizer.chat_template:
            options["render"] = chat(self.tokenizer)
        drawn = (cell.length, sweep.layout.seed, cell.sample)
        return synthesize(GENERATORS[cell.task], self.tokenizer, *drawn, **options)


def run_sweep(sweep: Sweep, directory: Path, command: str, processes: PartialState) -> None:
    """Measures what the directory does not hold yet, and adds it there; ``command`` is for the record.

    The ``processes`` share the work; on several machines they need the directory to be the same one. Raises EvalError
    where something is missing or does not fit, or another process ended; nothing that was measured is lost.
    """
    with contextlib.ExitStack() as claim:
        identity = sweep.identity() | versions()
        check_same(directory, identity)
        source, device = load_source(sweep), device_of(processes, sweep.device)
        if processes.is_main_process:
            check_out(directory, REPORT_FILES)
            claim.enter_context(claimed(directory))
        model = load_chosen_model(sweep, str(device)).model
        identity |= {"weights": weights_fingerprint(model), "text_sha256": source.text.sha256}
        identity |= {"attention": attention_of(model), "tokenizer": tokenizer_fingerprint(source.tokenizer)}
        check_same(directory, identity)
        check_methods(sweep, model)
        machines = gathered(processes, hardware(device, torch.get_num_threads()))
        agreed: Any = None
        if processes.is_main_process:
            plan = sweep.plan()
            details = {
                "text_origin": source.text.origin,
                "text_tokens": len(source.tokens.ids),
                "model_class": type(model).__name__,
                "model_dtype": str(model.dtype).removeprefix("torch."),
                "model_parameters": model.num_parameters(),
                "planned": len(plan),
            }
            record_session(directory, identity, details, command, machines)
            agreed = read_run(directory), _todo(plan, read_rows(directory), sweep.retry_failed)
        # All share out the list of the first one, since what they read of a file may differ between machines.
        recorded, todo = gathered(processes, agreed)[0]
        if read_run(directory) != recorded:
            raise EvalError(
                f"{directory} is not the directory that process 0 writes to; several machines need one they share"
            )
        check_same(directory, identity)  # which machines with other weights or versions do not have
        if not processes.is_main_process:
            claim.enter_context(claimed(directory, is_first=False))
        gathered(processes, None)  # nothing is measured where one of them cannot
        rank = processes.process_index
        _measure_all(sweep, model, source, todo[rank :: processes.num_processes], directory, rank)
        gathered(processes, None)  # the first one waits for all shares


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
    shortest = min(sweep.layout.lengths)
    for name in sweep.tasks:
        if name in GENERATORS and shortest < SHORTEST:
            raise EvalError(f"length {shortest} is too short for the task {name}, which needs {SHORTEST} tokens")
    starts = places(tokens, sweep.layout) if scored else []
    return Source(text, tokens, tokenizer, starts)


def check_methods(sweep: Sweep, model: Any) -> None:
    """Tries every method on a few tokens, which also takes its one-off costs out of the first measurement.

    Raises EvalError where a method does not run on the model, and ProfileError where the profile is of another one.
    """
    if sweep.budgets.profile is not None:
        load_profile(sweep.budgets.profile).check_model(model)
    for name in sweep.methods:
        try:
            warm_up(model, attention_by(name, sweep.budgets, max(sweep.layout.lengths)))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise EvalError(f"the method {name} does not run on this model and device: {error}") from error


def _measure_all(
    sweep: Sweep, model: Any, source: Source, share: Sequence[Sequence[Cell]], directory: Path, rank: int
) -> None:
    """Measures the share of the process of a rank: all methods on a sample, then those on the next."""
    measured_by = {"commit": commit(), "process": rank}
    terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(map(_cost, itertools.chain(*share))),
        disable=rank != 0,
        bar_format="{percentage:3.0f}%|{bar}| {desc}{remaining} left",
        mininterval=0.1 if terminal else 30,
        delay=0.5 if terminal else 30,
        leave=False,
    ) as bar:
        for cells in share:
            sample = source.build(cells[0], sweep)
            for cell in cells:
                what = f"{cell.task} with {cell.method} at {cell.length:,} tokens"
                bar.set_description_str(f"{what}, ", refresh=terminal)
                row = {"model": sweep.model, **vars(cell), "phase": sweep.phase}
                row["budget"] = budget_at(cell.method, sweep.budgets, cell.length)
                try:
                    attention = attention_by(cell.method, sweep.budgets, cell.length)
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
                bar.update(_cost(cell))


def _cost(cell: Cell) -> float:
    """Relative cost of a forward pass, of linear layers and attention: what a forecast of its time goes by."""
    return cell.length * (1 + cell.length / 2048)


def _todo(plan: Sequence[Cell], rows: Sequence[Row], retry_failed: bool) -> list[list[Cell]]:
    """The cells of a plan that are not measured yet, those of one sample together; says how much is there."""
    failed = {Cell.of(row) for row in rows if "failed" in row}
    done = {Cell.of(row) for row in rows} - (failed if retry_failed else set())
    if there := done.intersection(plan):
        print(f"{len(there)} of {len(plan)} measurements are there already.", file=sys.stderr)
    if gone := there & failed:
        print(f"{len(gone)} of them failed; --retry-failed measures them again.", file=sys.stderr)
    left = [cell for cell in plan if cell not in done]
    return [list(cells) for _, cells in itertools.groupby(left, attrgetter("task", "length", "sample"))]

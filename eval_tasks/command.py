"""``nc-patch eval`` and ``nc-patch report``: arguments in, a directory of results out."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from eval_tasks.arguments import (
    TEXT_FORMS,
    add_budget_options,
    add_lengths,
    add_model_options,
    model_options,
    positive,
    spaced,
)  # fmt: skip
from eval_tasks.errors import EvalError
from eval_tasks.matching import MATCHED_BY, MATCHES, Budgets
from eval_tasks.measure import PHASES, SPARSE_IN
from eval_tasks.methods import DEFAULT_METHODS, DENSE, METHODS, PRESS, PROFILE, Method, find_method, order_of
from eval_tasks.processes import is_started_here, joined_processes, launched_rank, refused, start_processes
from eval_tasks.report import REPORT, WITHIN, write_report
from eval_tasks.run import run_sweep
from eval_tasks.sweep import Sweep
from eval_tasks.synthetic import GENERATORS, Generator
from eval_tasks.tasks import TASKS, Layout, Task, ascending
from eval_tasks.texts import PYTHON_REFERENCE
from nc_patch.cli import INTERRUPTED
from nc_patch.ops.backends import BACKENDS

_LENGTHS = (512, 1024, 2048)
_ISO_KEYS = (16, 32, 64, 128, 256, 512, 1024)
_ISO_METHODS = (DENSE, "fixed-topk", "fixed-topk-mean", "streaming")


def run_eval(argv: Sequence[str]) -> int:
    """Measures methods by context length and writes the report; returns 0, 2 for errors, or 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    if arguments.list_methods or arguments.list_tasks:
        print(_listed(METHODS if arguments.list_methods else {**TASKS, **GENERATORS}))
        return 0
    transformers_logging.disable_progress_bar()
    command = shlex.join(["nc-patch", "eval", *argv])
    try:
        directory = _directory(arguments)
        sweep = _sweep(arguments)
        code = start_processes(arguments.processes, ["eval", *argv])
        if code is not None:
            return code
        with joined_processes(sweep.tp_plan is not None, sweep.device) as processes:
            if sweep.tp_plan is not None and processes.world == 1:
                raise EvalError("--tp-plan spreads a model over several processes: add --processes N, or use torchrun")
            run_sweep(sweep, directory, command, processes)
        if processes.is_first:
            _write_report([directory], None, arguments.within / 100)
    except EvalError as error:
        return refused(error)
    except KeyboardInterrupt:
        if launched_rank() == 0 and not is_started_here():
            print(f"\nInterrupted; what was measured is kept. To go on: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_report(argv: Sequence[str]) -> int:
    """Writes the report of one or more directories, from what they hold; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="nc-patch report", description="Write one report of what directories hold.", allow_abbrev=False
    )
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="the --out of nc-patch eval")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where it goes (default: DIR, where there is only one)")
    _add_within(parser)
    arguments = parser.parse_args(argv)
    try:
        _write_report(arguments.directories, arguments.out, arguments.within / 100)
    except EvalError as error:
        return refused(error)
    return 0


def _write_report(directories: Sequence[Path], out: Path | None, within: float) -> None:
    print("\n".join(write_report(directories, out, within)))
    print(f"\nReport: {shlex.quote(str((out or directories[0]) / REPORT))}")


def _add_within(parser: argparse.ArgumentParser) -> None:
    what = f"how much worse than dense counts as no worse (default: {100 * WITHIN:g})"
    parser.add_argument("--within", type=_percentage, default=100 * WITHIN, metavar="PERCENT", help=what)


def _percentage(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"must be between 0 and 100 percent, got {text}")
    return value


def _directory(arguments: argparse.Namespace) -> Path:
    if arguments.out is None:
        raise EvalError("say where the results go: --out DIR")
    directory: Path = arguments.out.expanduser()
    if directory.exists() and not directory.is_dir():
        raise EvalError(f"--out {directory} is a file; give a directory")
    return directory


def _sweep(arguments: argparse.Namespace) -> Sweep:
    """The sweep that the arguments ask for; raises EvalError for values that do not fit."""
    given = arguments
    try:
        law = (given.alpha, given.C, given.equal_at)
        budgets = Budgets(*law, given.backend, given.match, profile=given.profile)
    except (ValueError, TypeError) as error:
        raise EvalError(str(error)) from error
    if given.match == "iso" and min(given.iso_keys) >= max(given.lengths):
        raise EvalError(
            f"every budget of --iso-keys ({spaced(given.iso_keys)}) holds all keys of every length "
            f"({spaced(given.lengths)}): give smaller ones, or longer --lengths"
        )
    if len(set(given.seed)) < len(given.seed) or min(given.seed) < 0:
        raise EvalError(f"--seed takes different numbers from 0 on, got {spaced(given.seed)}")
    return Sweep(
        model=given.model,
        text=given.text,
        methods=_methods(given),
        tasks=_tasks(given.tasks),
        budgets=budgets,
        layout=Layout(ascending(given.lengths), given.samples, given.scored, given.passage, given.seed[0]),
        threads=given.threads,
        tp_plan=given.tp_plan,
        phase=given.phase,
        iso_keys=tuple(sorted(set(given.iso_keys))) if given.match == "iso" else (),
        answer_tokens=given.answer_tokens,
        retry_failed=given.retry_failed,
        seeds=tuple(given.seed),
        **model_options(given),
    )


def _tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks asked for, in the order in which they are listed; raises EvalError for unknown ones."""
    known = [*TASKS, *GENERATORS]
    if unknown := [name for name in names if name not in known]:
        said = f"unknown task {unknown[0]!r}; allowed are {', '.join(known)}"
        raise EvalError(f"{said}. Tasks of lm-eval run by python -m eval_tasks.lm_eval")
    return tuple(name for name in known if name in names)


def _methods(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The methods asked for, in the order in which they are listed; raises EvalError for unknown ones."""
    iso = arguments.match == "iso"
    names = {*(arguments.methods or (_ISO_METHODS if iso else DEFAULT_METHODS))}
    if PROFILE in names and arguments.profile is None:
        raise EvalError("the method profile needs a calibrated profile: --profile FILE, from nc-patch calibrate")
    if arguments.profile:
        names.add(PROFILE)
    for name in sorted(names, key=order_of):
        if "@" in name:
            raise EvalError(f"{name}: numbers of keys are chosen by --match iso --iso-keys K ...")
        if find_method(name).press is not None and iso:
            raise EvalError(f"{name} has no budget that --match iso could vary; leave it out")
        if name == PROFILE and iso:
            raise EvalError(f"{name} gives each head its own budget, which --match iso cannot set; leave it out")
    if iso and names == {DENSE}:
        raise EvalError("--match iso compares budgets of sparse methods with dense: name one, for example fixed-topk")
    return tuple(sorted(names, key=order_of))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nc-patch eval",
        allow_abbrev=False,
        description="Measure what sparse attention keeps of a model, by context length.\n"
        "Interrupted, the same command goes on where it was.",
        epilog=f"methods:\n{_listed(METHODS)}\n\ntasks:\n{_listed({**TASKS, **GENERATORS})}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    matches = "; ".join(f"{name}: {MATCHED_BY[name].format(equal_at=1024)}" for name in MATCHES)
    phases = "; ".join(f"{name}: {what}" for name, what in SPARSE_IN.items())
    methods = f"default: {spaced(DEFAULT_METHODS)}; also {PRESS}NAMEPress where kvpress is installed"
    keys = f"with --match iso: the budgets, in keys, that are measured (default: {spaced(_ISO_KEYS)})"
    add("--out", type=Path, metavar="DIR", help="directory for results.jsonl, summary.csv, run.json and report.html")
    add_model_options(parser)
    add("--text", default=PYTHON_REFERENCE, help=f"{TEXT_FORMS} (default)")
    add("--methods", nargs="+", metavar="METHOD", help=methods)
    add("--profile", metavar="FILE", help="a profile from nc-patch calibrate; adds the method profile")
    add("--match", choices=list(MATCHES), default="deploy", help=f"how budgets are matched; {matches}")
    add("--iso-keys", nargs="+", type=positive, metavar="K", default=list(_ISO_KEYS), help=keys)
    _add_within(parser)
    add("--phase", choices=list(PHASES), default="all", help=f"what is sparse (default: all). {phases}")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {spaced(TASKS)}")
    add_lengths(parser, _LENGTHS, "context lengths in tokens")
    add("--samples", type=positive, default=4, help="stretches of text at each length (default: 4)")
    add_budget_options(parser)
    add("--scored", type=positive, default=256, help="last tokens that perplexity scores (default: 256)")
    add("--passage", type=positive, default=192, help="tokens of the passage that recall repeats (default: 192)")
    add("--answer-tokens", type=positive, metavar="N", help="most tokens of an answer (default: as in the original)")
    seeds = "seeds of the random draws; each draws --samples samples (default: 0)"
    add("--seed", type=int, nargs="+", default=[0], help=seeds)
    add("--backend", choices=list(BACKENDS), default="auto", help="what runs sparse attention (default: auto)")
    add("--processes", type=positive, metavar="N", help="share the samples among N processes of this machine")
    add("--tp-plan", metavar="PLAN", help="auto: spread every layer of one model over all processes")
    add("--retry-failed", action="store_true", help="measure cells again that ran out of memory before")
    add("--list-methods", action="store_true", help="print the methods and end")
    add("--list-tasks", action="store_true", help="print the tasks and end")
    return parser


def _listed(entries: Mapping[str, Method | Task | Generator]) -> str:
    return "\n".join(f"  {entry.name:16} {entry.description}" for entry in entries.values())

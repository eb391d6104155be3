"""``nc-patch eval`` and ``nc-patch report``: arguments in, a directory of results out."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from transformers.utils import logging as transformers_logging

from eval_tasks import arguments as shared
from eval_tasks.arguments import directory, not_negative, positive, spaced
from eval_tasks.errors import EvalError
from eval_tasks.measure import SPARSE_IN, find_press
from eval_tasks.methods import (
    DEFAULT_METHODS,
    DENSE,
    MATCHED_BY,
    METHODS,
    PRESS,
    PROFILE,
    Budgets,
    Method,
    find_method,
    order_of,
)
from eval_tasks.processes import joined_processes
from eval_tasks.report import REPORT, WITHIN, write_report
from eval_tasks.sweep import Sweep, run_sweep
from eval_tasks.synthetic import GENERATORS, Generator
from eval_tasks.tasks import TASKS, Layout, Task, ascending
from eval_tasks.texts import PYTHON_REFERENCE
from nc_patch.cli import INTERRUPTED, launched_rank
from nc_patch.ops.backends import BACKENDS

_LENGTHS = (512, 1024, 2048)
_ISO_KEYS = (16, 32, 64, 128, 256, 512, 1024)
_ISO_METHODS = (DENSE, "fixed-topk", "fixed-topk-mean", "streaming")
_TASKS: dict[str, Task | Generator] = {**TASKS, **GENERATORS}


def run_eval(argv: Sequence[str]) -> int:
    """Measures methods by context length and writes the report; returns 0, or 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    command = shlex.join(["nc-patch", "eval", *argv])
    try:
        sweep = _sweep(arguments)
        with joined_processes() as processes:
            run_sweep(sweep, arguments.out, command, processes)
            if processes.is_main_process:
                _write_report([arguments.out], None, arguments.within / 100)
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print(f"\nInterrupted; what was measured is kept. To go on: {command}", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_report(argv: Sequence[str]) -> int:
    """Writes the report of one or more directories, from what they hold."""
    parser = argparse.ArgumentParser(
        prog="nc-patch report", description="Write one report of what directories hold.", allow_abbrev=False
    )
    parser.add_argument("directories", type=directory, nargs="+", metavar="DIR", help="the --out of nc-patch eval")
    shared.add_out(parser, "where it goes (default: DIR, where there is only one)", required=False)
    _add_within(parser)
    arguments = parser.parse_args(argv)
    _write_report(arguments.directories, arguments.out, arguments.within / 100)
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


def _sweep(given: argparse.Namespace) -> Sweep:
    """The sweep that the arguments ask for; raises EvalError for values that do not fit."""
    iso = given.match == "iso"
    budgets = Budgets(given.alpha, given.C, given.equal_at, given.backend, given.match, given.profile)
    if iso and min(given.iso_keys) >= max(given.lengths):
        raise EvalError(
            f"every budget of --iso-keys ({spaced(given.iso_keys)}) holds all keys of every length "
            f"({spaced(given.lengths)}): give smaller ones, or longer --lengths"
        )
    options = {field.name: getattr(given, field.name) for field in fields(Sweep) if field.name in given}
    layout = Layout(ascending(given.lengths), given.samples, given.scored, given.passage, given.seed)
    options["methods"] = _methods(given, budgets.at(layout.lengths[-1]))
    options["tasks"] = tuple(name for name in _TASKS if name in given.tasks)
    options["iso_keys"] = tuple(sorted(set(given.iso_keys))) if iso else ()
    return Sweep(budgets=budgets, layout=layout, **options)


def _methods(given: argparse.Namespace, budgets: Budgets) -> tuple[str, ...]:
    """The methods asked for, in the order in which they are listed; raises EvalError for those that do not fit."""
    iso = given.match == "iso"
    names = {*(given.methods or (_ISO_METHODS if iso else DEFAULT_METHODS)), *([PROFILE] if given.profile else [])}
    for name in sorted(names):
        method = find_method(name)
        press = method.press
        if "@" in name:
            raise EvalError(f"{name}: numbers of keys are chosen by --match iso --iso-keys K ...")
        method.config(budgets)  # raises for budgets that it cannot have
        if iso and (press or name == PROFILE):
            what = "keeps a share of the cache" if press else "gives each head its own budget"
            raise EvalError(f"{name} {what}, which --match iso cannot set; leave it out")
        if press and given.phase not in ("question", "decode"):
            raise EvalError(
                f"{name} compresses what a dense prefill left, which is not what the other methods do; measure all of "
                "them that way with --phase question or --phase decode"
            )
        if press:
            find_press(press)
    if iso and names == {DENSE}:
        raise EvalError("--match iso compares budgets of sparse methods with dense: name one, for example fixed-topk")
    return tuple(sorted(names, key=order_of))


def _parser() -> argparse.ArgumentParser:
    methods, tasks = _listed(METHODS), _listed(_TASKS)
    parser = argparse.ArgumentParser(
        prog="nc-patch eval",
        allow_abbrev=False,
        description="Measure what sparse attention keeps of a model, by context length.\n"
        "Interrupted, the same command goes on where it was.",
        epilog=f"methods:\n{methods}\n\ntasks:\n{tasks}\n\nTasks of lm-eval run by python -m eval_tasks.lm_eval.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    matches = "; ".join(f"{name}: {what.format(equal_at=1024)}" for name, what in MATCHED_BY.items())
    phases = "; ".join(f"{name}: {what}" for name, what in SPARSE_IN.items())
    default = f"default: {spaced(DEFAULT_METHODS)}; also {PRESS}NAMEPress where kvpress is installed"
    keys = f"with --match iso: the budgets, in keys, that are measured (default: {spaced(_ISO_KEYS)})"
    shared.add_out(parser, "directory for results.jsonl, summary.csv, run.json and report.html")
    shared.add_model_options(parser)
    add("--text", default=PYTHON_REFERENCE, help=f"{shared.TEXT_FORMS} (default)")
    add("--methods", nargs="+", metavar="METHOD", help=default)
    add("--profile", metavar="FILE", help="a profile from nc-patch calibrate; adds the method profile")
    add("--match", choices=MATCHED_BY, default="deploy", help=f"how budgets are matched; {matches}")
    add("--iso-keys", nargs="+", type=positive, metavar="K", default=list(_ISO_KEYS), help=keys)
    _add_within(parser)
    add("--phase", choices=SPARSE_IN, default="all", help=f"what is sparse (default: all). {phases}")
    add("--tasks", nargs="+", choices=_TASKS, default=[*TASKS], metavar="TASK", help=f"default: {spaced(TASKS)}")
    shared.add_lengths(parser, _LENGTHS, "context lengths in tokens")
    add("--samples", type=positive, default=4, help="stretches of text at each length (default: 4)")
    shared.add_budget_options(parser)
    add("--scored", type=positive, default=256, help="last tokens that perplexity scores (default: 256)")
    add("--passage", type=positive, default=192, help="tokens of the passage that recall repeats (default: 192)")
    add("--answer-tokens", type=positive, metavar="N", help="most tokens of an answer (default: as in the original)")
    add("--seed", type=not_negative, default=0, help="of the choice of samples (default: 0)")
    add("--backend", choices=list(BACKENDS), default="auto", help="what runs sparse attention (default: auto)")
    add("--retry-failed", action="store_true", help="measure cells again that ran out of memory before")
    add("--list-methods", action="version", version=methods, help="print the methods and end")
    add("--list-tasks", action="version", version=tasks, help="print the tasks and end")
    return parser


def _listed(entries: Mapping[str, Method | Task | Generator]) -> str:
    return "\n".join(f"  {entry.name:16} {entry.description}" for entry in entries.values())

"""``nc-patch calibrate``: a model and texts in, ``profile.json`` and a report of it out."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from transformers.utils import logging as transformers_logging

from eval_tasks.arguments import TEXT_FORMS, add_lengths, add_model_options, add_out, load_chosen_model, not_negative
from eval_tasks.errors import EvalError
from eval_tasks.processes import device_of, gathered, joined_processes
from eval_tasks.profile_report import PROFILE, PROFILE_PICTURE, PROFILE_TABLE, write_profile_report
from eval_tasks.store import check_out
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch.calibration import calibrate as defaults
from nc_patch.calibration.calibrate import calibrate
from nc_patch.calibration.profile import checked_count, checked_fraction, checked_layers
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.patch import model_shape

_FILES = (PROFILE, PROFILE_TABLE, PROFILE_PICTURE)


def run_calibrate(argv: Sequence[str]) -> int:
    """Calibrates a model and writes the profile and its report."""
    arguments = _parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    out = arguments.out
    with joined_processes() as processes:
        check_out(out, _FILES)
        _check_budget(arguments)
        texts = [_part(load_text(name).content, arguments.part) for name in arguments.text]
        loaded = load_chosen_model(arguments, str(device_of(processes, arguments.device)))
        dense = checked_layers(arguments.dense_layers, model_shape(loaded.model)[0])
        gathered(processes, None)  # nothing is measured where one of them cannot
        options = {name: getattr(arguments, name) for name in ("eps", "pieces", "rows", "seed")}
        profile = calibrate(loaded.model, loaded.tokenizer, texts, arguments.lengths, arguments.target, **options)
        profile = replace(profile, model=arguments.model, dense_layers=dense)
        if arguments.fraction is not None:
            profile = profile.at_budget(arguments.fraction, n=arguments.at, dense_below=arguments.dense_below)
        if processes.is_main_process:
            profile.save(out / PROFILE)
            print("\n".join(write_profile_report(profile, out, arguments.dense_below)))
            print(f"\nWritten: {', '.join(str(out / name) for name in _FILES)}")
    return 0


def _check_budget(arguments: argparse.Namespace) -> None:
    """Raises EvalError or ProfileError for a budget that is none, before anything is measured."""
    if arguments.fraction is None:
        if arguments.at is None and arguments.dense_below is None:
            return
        raise EvalError("--at and --dense-below say how the budget of --fraction is counted: give that too")
    fraction = checked_fraction("fraction", arguments.fraction)
    ends = arguments.lengths if arguments.at is None else [checked_count("n", arguments.at)]
    below = NCConfig(1.0).dense_below if arguments.dense_below is None else arguments.dense_below
    dense = [min(n, checked_count("dense_below", below, least=0)) for n in ends]
    least = sum(n * (n + 1) for n in dense) / max(1, sum(n * (n + 1) for n in ends))
    if fraction < least:
        raise EvalError(
            f"queries that see at most {below:,} keys attend {least:.3g} of all keys, and --fraction is {fraction:g}: "
            "give a larger one, a longer --at or a smaller --dense-below"
        )


def _part(content: str, part: str) -> str:
    middle = len(content) // 2
    return {"all": content, "first": content[:middle], "second": content[middle:]}[part]


def _parser() -> argparse.ArgumentParser:
    description = "Measure how sparse every head of a model is, and write a profile of budgets."
    parser = argparse.ArgumentParser(prog="nc-patch calibrate", allow_abbrev=False, description=description)
    add = parser.add_argument
    add_out(parser, f"for {PROFILE} and the report")
    add_model_options(parser)
    add("--text", nargs="+", default=[PYTHON_REFERENCE], metavar="TEXT", help=f"each {TEXT_FORMS} (default)")
    halves = "half of each text to read, so that the other is left to test on (default: all)"
    add("--part", choices=["all", "first", "second"], default="all", help=halves)
    add_lengths(parser, defaults.DEFAULT_LENGTHS, "context lengths in tokens")
    shares = f"shares of the mass to leave out (default: {' '.join(map(str, defaults.DEFAULT_EPS))})"
    add("--eps", nargs="+", type=float, default=list(defaults.DEFAULT_EPS), metavar="E", help=shares)
    add("--target", type=float, default=defaults.DEFAULT_TARGET, help="mass of the budgets (default: %(default)g)")
    add("--fraction", type=float, metavar="F", help="budgets for this share of all keys, in place of --target")
    add("--at", type=int, metavar="N", help="context length at which --fraction holds (default: over all lengths)")
    below = f"count the budget of --fraction for rows that attend all of up to N keys (default: {DEFAULT_DENSE_BELOW})"
    add("--dense-below", type=int, metavar="N", help=below)
    add("--dense-layers", nargs="+", type=int, default=[], metavar="LAYER", help="layers that stay dense")
    add("--pieces", type=int, default=defaults.DEFAULT_PIECES, help="pieces of text (default: %(default)s)")
    rows = "rows at each length of each piece (default: %(default)s)"
    add("--rows", type=int, default=defaults.DEFAULT_ROWS, help=rows)
    add("--seed", type=not_negative, default=0, help="of random numbers (default: 0)")
    return parser

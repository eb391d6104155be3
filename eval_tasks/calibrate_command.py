"""``nc-patch calibrate``: a model and texts in, ``profile.json`` and a report of it out."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from eval_tasks.arguments import TEXT_FORMS, add_lengths, add_model_options, load_chosen_model, positive, spaced
from eval_tasks.errors import EvalError
from eval_tasks.launch import run_processes, wanted_launch, without_processes
from eval_tasks.models import pick_device
from eval_tasks.profile_report import PROFILE, PROFILE_PICTURE, PROFILE_REPORT, write_profile_report
from eval_tasks.provenance import command_line
from eval_tasks.ranks import AgreedError, Ranks, agreed, joined_ranks, launched_rank
from eval_tasks.store import check_out
from eval_tasks.texts import PYTHON_REFERENCE, load_text
from nc_patch.calibration.calibrate import (
    DEFAULT_EPS,
    DEFAULT_LENGTHS,
    DEFAULT_PIECES,
    DEFAULT_ROWS,
    DEFAULT_TARGET,
    calibrate,
)
from nc_patch.calibration.profile import Profile, checked_count, checked_layers, checked_number
from nc_patch.cli import INTERRUPTED, USAGE_ERROR
from nc_patch.common import ProfileError, UnsupportedModelError
from nc_patch.patch import model_shape


def run_calibrate(argv: Sequence[str]) -> int:
    """Calibrates a model and writes the profile and its report; returns 0, 2 for errors, or 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    command = command_line(["calibrate", *argv])
    try:
        launch = wanted_launch(arguments.processes)
        if launch is not None:
            return run_processes(launch, ["calibrate", *without_processes(argv)])
        with joined_ranks(device=arguments.device) as ranks:
            profile = _calibrated(arguments, ranks)
            sentences = []
            with agreed(ranks), _shared_errors():
                if ranks.is_first:
                    profile.save(arguments.out / PROFILE)
                    sentences = write_profile_report(profile, arguments.out, command)
    except (EvalError, ProfileError, UnsupportedModelError) as error:
        if launched_rank() == 0 or not isinstance(error, AgreedError):
            print(f"nc-patch: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print("\nInterrupted; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    if sentences:
        print("\n".join(sentences))
        profile_path, report = (shlex.quote(str(arguments.out / name)) for name in (PROFILE, PROFILE_REPORT))
        print(f"\nProfile: {profile_path}\nReport: {report}")
    return 0


def _calibrated(arguments: argparse.Namespace, ranks: Ranks) -> Profile:
    with agreed(ranks), _shared_errors():
        check_out(arguments.out, (PROFILE, PROFILE_REPORT, PROFILE_PICTURE))
        if arguments.fraction is not None:
            checked_number("fraction", arguments.fraction)
            checked_count("n", 1 if arguments.at is None else arguments.at)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        texts = [_part(load_text(name).content, arguments.part) for name in arguments.text]
        device = pick_device(arguments.device)
        if device.type == "cuda" and device.index is None and ranks.world > 1:
            device = pick_device(f"cuda:{ranks.local_rank}")
        loaded = load_chosen_model(arguments, str(device))
        dense = checked_layers(arguments.dense_layers, model_shape(loaded.model)[0])
    profile = calibrate(
        loaded.model,
        loaded.tokenizer,
        texts,
        arguments.lengths,
        arguments.target,
        eps=arguments.eps,
        pieces=arguments.pieces,
        rows=arguments.rows,
        seed=arguments.seed,
    )
    profile = replace(profile, model=arguments.model, dense_layers=dense)
    if arguments.fraction is not None:
        profile = profile.at_budget(arguments.fraction, n=arguments.at)
    return profile


@contextmanager
def _shared_errors() -> Iterator[None]:
    """Makes a ProfileError an EvalError, of which the other processes hear."""
    try:
        yield
    except ProfileError as error:
        raise EvalError(str(error)) from error


def _part(content: str, part: str) -> str:
    if part == "all":
        return content
    middle = len(content) // 2
    return content[:middle] if part == "first" else content[middle:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nc-patch calibrate",
        allow_abbrev=False,
        description="Measure how sparse every head of a model is, and write a profile of budgets.",
    )
    add = parser.add_argument
    add("--out", type=_directory, required=True, metavar="DIR", help=f"for {PROFILE} and the report")
    add_model_options(parser)
    add(
        "--text",
        nargs="+",
        default=[PYTHON_REFERENCE],
        metavar="TEXT",
        help=f"each {TEXT_FORMS} (default)",
    )
    add(
        "--part",
        choices=["all", "first", "second"],
        default="all",
        help="half of each text to read, so that the other is left to test on (default: all)",
    )
    add_lengths(parser, DEFAULT_LENGTHS, "context lengths in tokens")
    add(
        "--eps",
        nargs="+",
        type=float,
        default=list(DEFAULT_EPS),
        metavar="E",
        help=f"shares of the mass to leave out (default: {spaced(DEFAULT_EPS)})",
    )
    add("--target", type=float, default=DEFAULT_TARGET, help="mass that the budgets are for (default: %(default)g)")
    add("--fraction", type=float, metavar="F", help="budgets for this share of all keys, in place of --target")
    add("--at", type=int, metavar="N", help="context length at which --fraction holds (default: over all lengths)")
    add("--dense-layers", nargs="+", type=int, default=[], metavar="LAYER", help="layers that stay dense")
    add("--pieces", type=int, default=DEFAULT_PIECES, help="pieces of text (default: %(default)s)")
    add("--rows", type=int, default=DEFAULT_ROWS, help="rows at each length of each piece (default: %(default)s)")
    add("--seed", type=int, default=0, help="of random numbers (default: 0)")
    add("--processes", type=positive, metavar="N", help="share the pieces among N processes of this machine")
    return parser


def _directory(text: str) -> Path:
    return Path(text).expanduser()

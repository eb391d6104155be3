"""The command line: ``nc-patch COMMAND ...``, also as ``python -m nc_patch COMMAND ...``.

Commands live in ``eval_tasks`` and are imported when they are called, so that the library needs none of their packages.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from eval_tasks.errors import EvalError, ProcessEnded
from nc_patch.common import ProfileError, UnsupportedModelError
from nc_patch.version import __version__

USAGE_ERROR, INTERRUPTED = 2, 130
INSTALL_EVAL = "pip install -e '.[eval]' in the checkout of nc_patch"
_REQUIRED = ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "pandas", "psutil", "scipy")
_OF_BENCH = ("pandas", "psutil")


class Command(NamedTuple):
    """A subcommand: the function of the remaining arguments, which returns the exit code, and its line of the help.

    The function raises EvalError, ProfileError or UnsupportedModelError with what is said to the user.
    """

    module: str
    function: str
    summary: str
    requires: tuple[str, ...] = _REQUIRED


COMMANDS = {
    "demo": Command("eval_tasks.demo", "run_demo", "answer one question about a long prompt, dense and sparse"),
    "eval": Command("eval_tasks.command", "run_eval", "measure sparse attention by context length"),
    "report": Command("eval_tasks.command", "run_report", "write one report of earlier evals"),
    "fidelity": Command(
        "eval_tasks.fidelity_command", "run_fidelity", "compare each layer and head with dense attention"
    ),
    "bench": Command(
        "eval_tasks.bench.command", "run_bench", "time sparse attention against dense attention", _OF_BENCH
    ),
    "calibrate": Command(
        "eval_tasks.calibrate_command", "run_calibrate", "measure how sparse every head is, for budgets that follow it"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 2 for arguments or an environment that do not fit, or what the command returns.

    ``argv`` are the arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nc-patch", epilog="nc-patch COMMAND --help says more.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"nc_patch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, each in COMMANDS.items():
        commands.add_parser(name, help=each.summary)
    try:
        command = COMMANDS[name := parser.parse_args(arguments[:1]).command]
        if missing := [module for module in command.requires if importlib.util.find_spec(module) is None]:
            print(f"nc-patch: {name} needs {', '.join(missing)}: {INSTALL_EVAL}", file=sys.stderr)
            return USAGE_ERROR
        return int(getattr(importlib.import_module(command.module), command.function)(arguments[1:]))
    except SystemExit as stop:  # argparse ends this way, after its message
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except (EvalError, ProfileError, UnsupportedModelError) as error:
        rank = launched_rank()
        if rank == 0 or not isinstance(error, ProcessEnded):
            print("nc-patch:", *([f"process {rank}:"] if rank else []), error, file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED


def launched_rank() -> int:
    """Which of the processes of a launcher this one is; 0 alone."""
    return int(os.environ.get("RANK", "0"))

"""The command line: ``nc-patch COMMAND ...``, also as ``python -m nc_patch COMMAND ...``.

Commands live in ``eval_tasks`` and are imported when they are called, so that the library needs none of their packages.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple

from nc_patch.version import __version__

USAGE_ERROR, INTERRUPTED = 2, 130
INSTALL_EVAL = "pip install -e '.[eval]' in the checkout of nc_patch"
_REQUIRED = ("accelerate", "matplotlib", "numpy", "pandas", "psutil", "scipy", "torch", "tqdm", "transformers")


class Command(NamedTuple):
    """A subcommand: where its function of the remaining arguments is, which returns the exit code, its line of the
    help, and the modules that must be installed.
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
        "eval_tasks.bench.command",
        "run_bench",
        "time sparse attention against dense attention",
        ("matplotlib", "pandas", "psutil", "torch", "transformers"),
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
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:9} {command.summary}" for name, command in COMMANDS.items())
        said = f"usage: nc-patch [--version] COMMAND ...\n\n{commands}\n\nnc-patch COMMAND --help says more."
        print(said, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"nc_patch {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"nc-patch: unknown command {arguments[0]!r}; allowed are {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    missing = [name for name in command.requires if importlib.util.find_spec(name) is None]
    if missing:
        print(f"nc-patch: {arguments[0]} needs {', '.join(missing)}: {INSTALL_EVAL}", file=sys.stderr)
        return USAGE_ERROR
    try:
        function = getattr(importlib.import_module(command.module), command.function)
        return int(function(arguments[1:]))
    except SystemExit as stop:  # argparse ends this way, after its message
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED

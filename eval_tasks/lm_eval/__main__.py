"""lm-eval's own command line with the model ``nc_hf`` and the tasks of ``eval_tasks`` in it.

``python -m eval_tasks.lm_eval run --model nc_hf --model_args pretrained=NAME,alpha=2,C=0.7 --tasks nc_perplexity``
takes every option of ``lm_eval``; so do ``ls`` and ``validate``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.settings import TASKS_DIRECTORY
from eval_tasks.store import check_out
from nc_patch.common import ProfileError, UnsupportedModelError


def main() -> None:
    """Runs lm-eval's command line on ``sys.argv``; exits with 1 and one line on arguments that cannot be used."""
    setup_logging()
    cli = HarnessCLI()
    arguments = cli.parse_args()
    if hasattr(arguments, "include_path"):
        arguments.include_path = task_directories(arguments)
    try:
        # lm-eval tries to write when all is done, and where that fails keeps nothing.
        output = _given(arguments, "output_path")
        if output is not None:
            check_out(Path(output).parent if Path(output).suffix == ".json" else Path(output), option="--output_path")
        cli.execute(arguments)
    except (EvalError, ProfileError, UnsupportedModelError) as error:
        sys.exit(f"error: {error}")


def task_directories(arguments: argparse.Namespace) -> list[str]:
    """This package's tasks, then the user's ``--include_path`` (or the one in ``--config``), whose names win."""
    given = _given(arguments, "include_path") or []
    paths = [given] if isinstance(given, str) else given
    return [str(TASKS_DIRECTORY), *(path for path in paths if Path(path).resolve() != TASKS_DIRECTORY)]


def _given(arguments: argparse.Namespace, name: str) -> Any:
    """The value of an option from the command line or the file ``--config``; None where neither has it."""
    given = getattr(arguments, name, None)
    if given is None and getattr(arguments, "config", None):
        given = EvaluatorConfig.load_yaml_config(arguments.config).get(name)
    return given


if __name__ == "__main__":
    main()

"""lm-eval's own command line with the model ``nc_hf`` and the tasks of ``eval_tasks`` in it.

``python -m eval_tasks.lm_eval run --model nc_hf --model_args pretrained=NAME,alpha=2,C=0.7 --tasks nc_perplexity``
takes every option of ``lm_eval``; so do ``ls`` and ``validate``.
"""

import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval._cli import HarnessCLI
from lm_eval.utils import setup_logging

from eval_tasks.errors import EvalError
from eval_tasks.store import check_out
from nc_patch.common import ProfileError, UnsupportedModelError

# Where this package's tasks lie.
TASKS_DIRECTORY = Path(__file__).resolve().parents[1]
_TaskManager = lm_eval.tasks.TaskManager


def main() -> None:
    """Runs lm-eval's command line on ``sys.argv``; exits with 1 and one line on arguments that cannot be used."""
    setup_logging()
    cli = HarnessCLI()
    arguments = cli.parse_args()
    lm_eval.tasks.TaskManager = task_manager  # what every subcommand makes
    try:
        if output := getattr(arguments, "output_path", None):  # lm-eval tries to write when all is done
            check_out(Path(output).parent if Path(output).suffix == ".json" else Path(output), option="--output_path")
        cli.execute(arguments)
    except (EvalError, OSError, ProfileError, UnsupportedModelError) as error:
        sys.exit(f"error: {error}")


def task_manager(*args: Any, include_path: Any = None, **options: Any) -> Any:
    """lm-eval's task manager of this package's tasks, and then of the user's ``--include_path``, whose names win."""
    given = include_path if isinstance(include_path, list) else [include_path] if include_path else []
    further = [path for path in given if Path(path).resolve() != TASKS_DIRECTORY]
    return _TaskManager(*args, include_path=[TASKS_DIRECTORY, *further], **options)


if __name__ == "__main__":
    main()

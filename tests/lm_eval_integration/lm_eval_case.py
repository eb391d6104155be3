"""Sizes, and ways to the tasks, that the tests of this directory share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS_DIRECTORY = ROOT / "eval_tasks"
POSITIONS = 1100
LENGTHS = [48, 96, 160]
SCORED = 16


def load_task(name, **metadata):
    """A task of the package as lm-eval's task manager makes it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def rows(name, **metadata):
    """The documents of a task."""
    return list(load_task(name, **metadata).dataset["test"])


def figures(results, task="nc_perplexity"):
    """The metrics of a task by name."""
    found = results["results"][task].items()
    return {
        name.removesuffix(",none"): value for name, value in found if name.endswith(",none") and "_stderr" not in name
    }

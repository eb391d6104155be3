"""Sizes, and ways to the tasks, that the tests of this directory share."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS_DIRECTORY = ROOT / "eval_tasks"
POSITIONS = 1100
LENGTHS = [48, 96, 160]
SCORED = 16


def manager_of(**metadata):
    """lm-eval's task manager of the package's tasks alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)


def load_task(name, **metadata):
    """A task of the package as lm-eval's task manager makes it."""
    return manager_of(**metadata).load([name])["tasks"][name]


def rows(name, **metadata):
    """The documents of a task."""
    return list(load_task(name, **metadata).dataset["test"])


def figures(results, task="nc_perplexity"):
    """The metrics of a task by name."""
    names = (name.removesuffix(",none") for name in results["results"][task] if name.endswith(",none"))
    return {name: results["results"][task][f"{name},none"] for name in names if "_stderr" not in name}

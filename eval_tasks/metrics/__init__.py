"""Metrics for Hugging Face ``evaluate`` that need no hub: ``evaluate.load(str(metric_path("string_match")))``."""

from functools import cache
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError

METRICS: tuple[str, ...] = ("perplexity_by_position", "string_match")


def metric_path(name: str) -> Path:
    """The directory of a metric, which ``evaluate.load`` takes.

    Raises:
        EvalError: there is no metric of that name.
    """
    if name not in METRICS:
        raise EvalError(f"no metric named {name!r}: there are {', '.join(METRICS)}")
    return Path(__file__).parent / name


@cache
def load_metric(name: str) -> Any:
    """The metric as an ``evaluate.Metric`` that keeps its inputs in memory; loaded once per process."""
    import evaluate

    return evaluate.load(str(metric_path(name)), keep_in_memory=True)

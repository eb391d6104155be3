"""Metrics for Hugging Face ``evaluate`` that need no hub: ``evaluate.load(str(metric_path("string_match")))``.

``evaluate`` copies what it loads into a cache and waits for a lock there; this package calls the functions instead.
"""

from pathlib import Path

from eval_tasks.errors import EvalError

METRICS: tuple[str, ...] = ("perplexity_by_position", "string_match")


def metric_path(name: str) -> Path:
    """The directory of a metric, which ``evaluate.load`` takes; raises EvalError where there is none of that name."""
    if name not in METRICS:
        raise EvalError(f"no metric named {name!r}: there are {', '.join(METRICS)}")
    return Path(__file__).parent / name

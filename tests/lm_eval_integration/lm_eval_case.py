"""The sizes that the tests of this directory share."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TASKS_DIRECTORY = ROOT / "eval_tasks"
POSITIONS = 192
LONG_POSITIONS = 1100
LENGTHS = [48, 96, 160]
SCORED = 16


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The metrics of ``nc_perplexity`` by name."""
    found = results["results"]["nc_perplexity"].items()
    return {name.removesuffix(",none"): value for name, value in found if name.split("_")[-1].split(",")[0].isdigit()}

"""What a row of ``results.jsonl`` and a ``run.json`` must hold to be believed: names, types and sizes.

Directories of results are passed from hand to hand; what is in them is checked before anything is made of it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError

Check = Callable[[Any], bool]

# Names of tasks and methods: they go into file names, tables and headings.
_NAME = re.compile(r"[\w.@:/+=, -]{1,120}")
# What moves a terminal's cursor, and halves of pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# Losses whose exponential float64 can hold, and counts beyond which nothing can have been measured.
_LARGEST_LOSS = 700.0
_LARGEST_COUNT = 10**15
_LONGEST_TEXT = 100_000


def row_problem(row: Any) -> str | None:
    """What is wrong with one line of ``results.jsonl``, as JSON has read it, or None."""
    if not isinstance(row, dict) or "key" not in row:
        return "it is no object with a key"
    problem = _first_problem(row, _OF_EVERY_ROW, required=True) or _first_problem(row, _WHERE_GIVEN, required=False)
    if problem is not None or "failed" in row:
        return problem
    problem = _first_problem(row, _OF_MEASUREMENTS, required=True)
    if problem is None and "score" not in row:
        problem = _first_problem(row, _OF_TEXTS, required=True)
        if problem is None and abs(row["loss_sum"] / row["tokens"]) > _LARGEST_LOSS:
            problem = f"loss_sum / tokens must be within {_LARGEST_LOSS:g}, got {row['loss_sum'] / row['tokens']:g}"
    return problem


def check_rows(directory: Path, rows: Iterable[Any]) -> None:
    """Raises EvalError, which names the row, unless nothing is wrong with any of the rows of a directory."""
    for row in rows:
        problem = row_problem(row)
        if problem is not None:
            key = ascii(row["key"])[:60] if isinstance(row, dict) and "key" in row else "without a key"
            raise EvalError(
                f"{directory} holds a damaged result, {key}: {problem}. Remove that line, or give another directory"
            )


def run_problem(run: Any) -> str | None:
    """What is wrong with a ``run.json``, as JSON has read it, or None."""
    if not isinstance(run, dict):
        return "it is no object"
    return (
        _first_problem(run, _OF_RUNS, required=True)
        or _first_problem(run["identity"], _OF_IDENTITIES, required=True)
        or _first_problem(run["identity"], _OF_IDENTITIES_WHERE_GIVEN, required=False)
        or _first_problem(run, _OF_RUNS_WHERE_GIVEN, required=False)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and _UNPRINTABLE.search(value) is None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value[0] not in "=+-@"


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST_COUNT


def _is_number(value: Any, low: float = -1e15, high: float = 1e15) -> bool:
    # An integer of any size can be compared; only what lies between is turned into a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _list_of(check: Check, most: int = 10_000) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_flat(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of texts, numbers, lists and objects, none of them large or deep."""
    if value is None or isinstance(value, bool) or _is_text(value) or _is_number(value):
        return True
    if depth > 6 or not isinstance(value, (list, dict)) or len(value) > 10_000:
        return False
    if isinstance(value, dict):
        return all(_is_text(name) and _is_flat(item, depth + 1) for name, item in value.items())
    return all(_is_flat(item, depth + 1) for item in value)


def _is_session(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("started")):
        return False
    others = value.get("other_hardware", [])
    machines = [value.get("hardware", {}), *(others if isinstance(others, list) else [None])]
    return all(isinstance(machine, dict) for machine in machines) and _is_flat(value)


_POSITIVE: Check = lambda value: _is_count(value, 1)  # noqa: E731
_SHARE: Check = lambda value: _is_number(value, 0.0, 1.0)  # noqa: E731

# field: (check, what is allowed)
_Checks = Mapping[str, tuple[Check, str]]
_OF_EVERY_ROW: _Checks = {
    "key": (_is_text, "a text"),
    "method": (_is_name, "a name"),
    "task": (_is_name, "a name"),
    "length": (_POSITIVE, "a positive integer"),
    "sample": (_is_count, "an integer of at least 0"),
}
_WHERE_GIVEN: _Checks = {
    "failed": (_is_text, "a text"),
    "commit": (_or_none(_is_text), "a text or null"),
    "ran_dense": (lambda v: isinstance(v, dict) and all(map(_is_text, v)) and _is_flat(v), "an object of counts"),
    "document": (lambda v: _is_text(v) or _is_count(v), "a text or an integer"),
    "seed": (_or_none(_is_count), "an integer of at least 0"),
    "index": (_is_count, "an integer of at least 0"),
    "depth": (_or_none(_SHARE), "a number in [0, 1]"),
    "score": (lambda v: _is_number(v, -1e6, 1e6), "a number"),
    "phase": (_is_text, "a text"),
    "prefill_seconds": (_or_none(lambda v: _is_number(v, 0.0)), "a number of at least 0, or null"),
    "first_token_seconds": (_or_none(lambda v: _is_number(v, 0.0)), "a number of at least 0, or null"),
    "said_tokens": (_is_count, "an integer of at least 0"),
    "token_losses": (_list_of(_is_number, 10**7), "a list of numbers"),
}
_OF_MEASUREMENTS: _Checks = {
    "budget": (_is_count, "an integer of at least 0"),
    "attended_fraction": (lambda v: _is_number(v, 0.0, 1.0 + 1e-6), "a number in [0, 1]"),
    "tail_attended_fraction": (lambda v: _is_number(v, 0.0, 1.0 + 1e-6), "a number in [0, 1]"),
    "mean_keys": (_or_none(lambda v: _is_number(v, 0.0)), "a number of at least 0, or null"),
    "tail_mean_keys": (_or_none(lambda v: _is_number(v, 0.0)), "a number of at least 0, or null"),
    "seconds": (_or_none(lambda v: _is_number(v, 1e-9)), "a positive number or null"),
    "peak_memory": (_or_none(_is_count), "an integer of at least 0, or null"),
}
_OF_TEXTS: _Checks = {
    "loss_sum": (_is_number, "a number"),
    "tokens": (_POSITIVE, "a positive integer"),
    "bytes": (_POSITIVE, "a positive integer"),
}
_OF_RUNS: _Checks = {
    "identity": (lambda v: isinstance(v, dict) and _is_flat(v), "a flat object"),
    "command": (_is_text, "a text"),
    "sessions": (_list_of(_is_session), "a list with started in each"),
    "model_class": (_is_text, "a text"),
    "model_dtype": (_is_text, "a text"),
    "model_parameters": (_is_count, "an integer of at least 0"),
    "text_origin": (_is_text, "a text"),
    "text_tokens": (_is_count, "an integer of at least 0"),
    "budget_at_equal": (_is_number, "a number"),
    "log_factor": (_is_number, "a number"),
}
_OF_RUNS_WHERE_GIVEN: _Checks = {
    "hardware": (lambda v: isinstance(v, dict) and _is_flat(v), "a flat object"),
    "planned": (_or_none(_is_count), "an integer of at least 0, or null"),
}
_OF_IDENTITIES: _Checks = {
    "model": (_is_text, "a text"),
    "methods": (_list_of(_is_name), "a list of names"),
    "tasks": (_list_of(_is_name), "a list of names"),
    "lengths": (_list_of(_POSITIVE), "a list of positive integers"),
    "samples": (_POSITIVE, "a positive integer"),
    "scored": (_POSITIVE, "a positive integer"),
    "passage": (_POSITIVE, "a positive integer"),
    "alpha": (_is_number, "a number"),
    "C": (_is_number, "a number"),
    "equal_at": (_POSITIVE, "a positive integer"),
}
_OF_IDENTITIES_WHERE_GIVEN: _Checks = {
    "block_size": (_POSITIVE, "a positive integer"),
    "seed": (lambda v: _is_count(v) or (_list_of(_is_count)(v) and v != []), "an integer of at least 0, or several"),
}


def _first_problem(values: Mapping[str, Any], checks: _Checks, *, required: bool) -> str | None:
    for name, (check, allowed) in checks.items():
        if name not in values:
            if required:
                return f"{name} is missing"
        elif not check(values[name]):
            return f"{name} must be {allowed}, got {_shown(values[name])}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return ascii(value)[:80]

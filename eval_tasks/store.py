"""The directory of a sweep: ``results.jsonl``, one row a line and safe whatever happens, and ``run.json`` beside it.

Every process of a run appends to the same file, which is locked for the moment of a line; the lock of the directory is
the run's. What is read is checked, since directories of results are passed from hand to hand.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from eval_tasks.errors import EvalError
from nc_patch.common import check_directory, replace_file

Row = TypeVar("Row", bound=Mapping[str, Any])
RESULTS = "results.jsonl"
RUN = "run.json"
_LOCK = ".lock"
# No sweep writes more: a file beyond is not read into memory.
_LARGEST_FILE = 1 << 30


def measurement_key(identity: Mapping[str, Any]) -> str:
    """A short hex digest of what identifies a measurement; equal for equal JSON, whatever the order of the fields."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def check_out(directory: Path, names: Iterable[str] = (), option: str = "--out") -> None:
    """Makes the directory that an option names; raises EvalError where files of these names cannot be written there."""
    if directory.exists() and not directory.is_dir():
        raise EvalError(f"{option} {directory} is a file; give a directory")
    try:
        check_directory(directory, names)
    except OSError as error:
        raise EvalError(f"{option} {directory} cannot be written: {error.strerror}. Give another.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers, and an interruption, see the old content or the new; raises EvalError."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise EvalError(f"{path} cannot be written: {error.strerror or error}. Make room, or check it.") from error


@contextlib.contextmanager
def claimed(directory: Path, is_first: bool = True) -> Iterator[None]:
    """Within, no other run may add to the directory; a last line that was torn when an earlier run ended is cut off.

    The first process of a run claims it while nobody holds it, and then all of them hold it: where the first one is
    killed, the others keep the next run out until they have ended, too. Raises EvalError where another run is measuring
    into it, or it cannot be written.
    """
    with _opened(directory / _LOCK) as lock:
        try:
            if is_first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _say_torn_line(directory)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise EvalError(
                f"another process is measuring into {directory}; wait for it, or give another --out"
            ) from error
        yield


def append_row(directory: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to the results of a directory; it is on the disk, whole, when this returns.

    Raises EvalError where the disk is full or failing; what was measured before is kept.
    """
    path = directory / RESULTS
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the descriptor is closed
            _cut_torn_line(file)  # of a process that was killed
            if os.write(file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                _cut_torn_line(file)
            raise EvalError(
                f"{path} cannot be written: {error.strerror}. What was measured before is kept; make room, and the "
                "same command goes on."
            ) from error


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory, each key once; a last line that was never finished is left out.

    Raises EvalError where a line that is not the last is damaged, or a row is not as ``nc-patch eval`` writes it.
    """
    path, rows = directory / RESULTS, []
    lines = (_content(path) or b"").removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is None or not isinstance(row.get("key"), str):
            if line and number < len(lines):
                raise EvalError(f"line {number} of {path} is damaged; remove that line to go on, or give another --out")
            continue
        problem = _problem(row, _FAILED_ROW if "failed" in row else _ANSWER_ROW if "score" in row else _TEXT_ROW)
        if problem is not None:
            raise EvalError(
                f"{directory} holds a damaged result, {ascii(row['key'])[:60]}: {problem}. Remove line {number} of "
                f"{path}, or give another directory"
            )
        rows.append(row)
    return each_key_once(rows)


def each_key_once(rows: Iterable[Row]) -> list[Row]:
    """Of rows with one key the last one, a cell that failed and was tried again; a success in place of any failure."""
    found: dict[str, Row] = {}
    for row in rows:
        here = found.get(row["key"])
        if here is None or "failed" in here or "failed" not in row:
            found[row["key"]] = row
    return list(found.values())


def read_run(directory: Path) -> dict[str, Any] | None:
    """The directory's ``run.json``, or None where there is none; raises EvalError for a damaged one."""
    path = directory / RUN
    content = _content(path)
    if content is None:
        return None
    run = _parsed(content)
    problem = "it is no object of JSON" if run is None else _problem(run, _RUN)
    problem = problem or _problem(run["identity"], _IDENTITY)  # type: ignore[index]
    if problem is not None:
        raise EvalError(f"{path} is damaged: {problem}. Give another directory, or remove this one")
    return run


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor that adds to a file, made where it is missing. A link is refused: it might lead anywhere."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no ordinary file")
    except OSError as error:
        raise EvalError(f"{path} cannot be written: {error.strerror}. Give another --out.") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _say_torn_line(directory: Path) -> None:
    with _opened(directory / RESULTS) as file:
        if _cut_torn_line(file):
            said = "was torn off when the last run ended; it is measured again."
            print(f"The last line of {directory / RESULTS} {said}", file=sys.stderr)


def _cut_torn_line(descriptor: int) -> bool:
    """Cuts off a last line that is not whole: torn by the end of a process, or damaged by that of the machine."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, min(size, 1 << 24), max(0, size - (1 << 24)))
    start = tail.removesuffix(b"\n").rfind(b"\n") + 1
    last = tail[start:]
    row = _parsed(last)
    if not last or (row is not None and "key" in row and last.endswith(b"\n")):
        return False
    if row is not None and "key" in row:
        os.write(descriptor, b"\n")
        return False
    os.ftruncate(descriptor, size - len(last))
    return True


def _content(path: Path) -> bytes | None:
    """What a file holds; None where there is none. Raises EvalError for what is no ordinary file of ordinary size."""
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            raise EvalError(
                f"{path} is no file of results: it must be an ordinary file of at most {_LARGEST_FILE:,} bytes. "
                "Remove it, or give another directory"
            )
        return path.read_bytes()
    except OSError as error:
        raise EvalError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object that a text of JSON holds; None where it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_number(value: Any, low: float = -1e15, high: float = 1e15) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_flat(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of texts, numbers, lists and objects, none of them deep."""
    if value is None or isinstance(value, bool) or _KINDS["text"](value) or _is_number(value):
        return True
    if depth > 6 or not isinstance(value, (list, dict)):
        return False
    names, items = (value, value.values()) if isinstance(value, dict) else ((), value)
    return all(map(_KINDS["text"], names)) and all(_is_flat(item, depth + 1) for item in items)


# What a field may hold. Names go into file names, tables and headings; control characters move a terminal's cursor.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_KINDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str) and re.fullmatch(r"[\w.:/][\w.@:/+=, -]{0,119}", v) is not None,
    "text": lambda v: isinstance(v, str) and len(v) < 1e5 and not _CONTROL.search(v),
    "number": _is_number,
    "count": lambda v: isinstance(v, int) and _is_number(v, 0),
    "positive count": lambda v: isinstance(v, int) and _is_number(v, 1),
    "number from 0 on": lambda v: _is_number(v, 0),
    "share of 1": lambda v: _is_number(v, 0, 1 + 1e-6),
    "object": lambda v: isinstance(v, dict) and _is_flat(v),
    "session": lambda v: (
        _fits(v, "object")
        and isinstance(v.get("hardware", {}), dict)
        and _fits(v.get("other_hardware", []), "list of object")
    ),
    "seed or several": lambda v: _fits(v, "count") or (v != [] and _fits(v, "list of count")),
}
_CELL = {
    "method": "name",
    "task": "name",
    "length": "positive count",
    **dict.fromkeys(("sample", "seed", "index"), "count"),
}
_FAILED_ROW = _CELL | {"failed": "text"}
_MEASURED = _CELL | {"budget": "count", "peak_memory": "count", "seconds": "number from 0 on", "phase": "text"}
_MEASURED |= dict.fromkeys(("attended_fraction", "tail_attended_fraction"), "share of 1") | {"ran_dense": "object"}
_MEASURED |= dict.fromkeys(("mean_keys", "tail_mean_keys"), "number from 0 on or null")
_ANSWER_ROW = _MEASURED | {"score": "number"}
_TEXT_ROW = _MEASURED | {"loss_sum": "number", "tokens": "positive count", "bytes": "positive count"}
_RUN = {"identity": "object", "sessions": "list of session", "model_parameters": "count", "text_tokens": "count"}
_RUN |= dict.fromkeys(("command", "model_class", "model_dtype", "text_origin"), "text")
_RUN |= dict.fromkeys(("budget_at_equal", "log_factor"), "number") | {"planned": "count", "hardware": "object"}
_IDENTITY = {"model": "text", "lengths": "list of positive count", "alpha": "number", "C": "number", "phase": "text"}
_IDENTITY |= dict.fromkeys(("methods", "tasks"), "list of name") | {"match": "text", "seed": "seed or several"}
_IDENTITY |= dict.fromkeys(("samples", "scored", "passage", "equal_at"), "positive count")
# What a row may lack.
_OPTIONAL = {"commit": "text or null", "depth": "share of 1", "token_losses": "list of number", "said_tokens": "count"}
_OPTIONAL |= dict.fromkeys(("prefill_seconds", "first_token_seconds"), "number from 0 on")


def _problem(values: Mapping[str, Any], required: Mapping[str, str]) -> str | None:
    """What is wrong with an object, in words; None where nothing is."""
    for name, kind in {**required, **{name: _OPTIONAL[name] for name in _OPTIONAL if name in values}}.items():
        if name not in values:
            return f"{name} is missing"
        if not _fits(values[name], kind):
            return f"{name} must be a {kind}, got {type(values[name]).__name__} {ascii(values[name])[:60]}"
    if "loss_sum" in required:
        losses, tokens = values.get("token_losses"), values["tokens"]
        if losses is not None and len(losses) != tokens:
            return f"token_losses must be {tokens}, one for each of the tokens, got {len(losses)}"
        if abs(values["loss_sum"] / tokens) > 700:  # its exponential must be a number
            return f"loss_sum / tokens must be within 700, got {values['loss_sum'] / tokens:g}"
    return None


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith(" or null"):
        return value is None or _fits(value, kind.removesuffix(" or null"))
    if kind.startswith("list of "):
        return isinstance(value, list) and all(_fits(item, kind.removeprefix("list of ")) for item in value)
    return _KINDS[kind](value)

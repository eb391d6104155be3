"""The directory of a sweep: ``results.jsonl``, one row a line and safe whatever happens, and ``run.json`` beside it.

Every process of a run appends to the same file, which is locked for the moment of a line; the lock of the directory is
the run's.
"""

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from eval_tasks.errors import EvalError, told
from eval_tasks.provenance import commit, hardware_words
from nc_patch.common import check_directory, replace_file

Row = Mapping[str, Any]
RESULTS = "results.jsonl"
RUN = "run.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class Cell:
    """What one row is of: a method, on a sample of a task and length."""

    task: str
    length: int
    sample: int
    method: str

    @classmethod
    def of(cls, row: Row) -> "Cell":
        """The cell of a row."""
        return cls(*(row[field.name] for field in fields(cls)))


def check_out(directory: Path, names: Iterable[str] = (), option: str = "--out") -> None:
    """Makes the directory that an option names; raises EvalError where files of these names cannot be written there."""
    if directory.exists() and not directory.is_dir():
        raise EvalError(f"{option} {directory} is a file; give a directory")
    with told(f"{option} {directory}", "written", "Give another."):
        check_directory(directory, names)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers, and an interruption, see the old content or the new; raises EvalError."""
    with told(path, "written", "Make room, or check it."):
        replace_file(path, content)


@contextlib.contextmanager
def claimed(directory: Path, is_first: bool = True) -> Iterator[None]:
    """Within, no other run may add to the directory.

    The first process of a run claims it while nobody holds it, and then all of them hold it: where the first one is
    killed, the others keep the next run out until they have ended, too. Raises EvalError where another run is measuring
    into it, or it cannot be written.
    """
    with _opened(directory / _LOCK) as lock, _opened(directory / RESULTS):  # whether rows can be written shows now
        try:
            if is_first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            said = f"another process is measuring into {directory}; wait for it, or give another --out"
            raise EvalError(said) from error
        yield


def append_row(directory: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to the results of a directory; it is on the disk, whole, when this returns.

    Raises EvalError where the disk is full or failing; what was measured before is kept.
    """
    path, advice = directory / RESULTS, "What was measured before is kept; make room, and the same command goes on."
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with told(path, "written", advice), _opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        _cut_torn_line(file)  # of a process that was killed, or of an earlier run
        file.write(line)
        file.flush()
        os.fsync(file)


def read_rows(directory: Path) -> list[Row]:
    """The rows of a directory, each cell once; a last line that was never finished is left out.

    Raises EvalError where a line that is not the last is damaged, or a row is not as ``nc-patch eval`` writes it.
    """
    path, rows = directory / RESULTS, []
    lines = (_content(path) or b"").removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _parsed(line, "method")
        if row is not None:
            rows.append(row)
            measured = ("failed",) if "failed" in row else ("score",) if "score" in row else _OF_TEXT
            if problem := _problem(row, (*_CELL, *measured)):
                what = f"a damaged result: {problem}. Remove that line, or give another directory"
                raise EvalError(f"line {number} of {path} is {what}")
        elif line and number < len(lines):
            raise EvalError(f"line {number} of {path} is damaged; remove that line to go on, or give another --out")
    return each_cell_once(rows)


def each_cell_once(rows: Iterable[Row]) -> list[Row]:
    """Of rows of one cell the last one, as it failed and was tried again; a success in place of any failure."""
    failures_first = sorted(rows, key=lambda row: "failed" not in row)
    return list({Cell.of(row): row for row in failures_first}.values())


def read_run(directory: Path) -> dict[str, Any] | None:
    """The directory's ``run.json``, or None where there is none; raises EvalError for a damaged one."""
    path = directory / RUN
    if (content := _content(path)) is None:
        return None
    run = _parsed(content) or {}
    if problem := _problem(run, ("identity", *_RUN)) or _problem(run["identity"], _IDENTITY):
        raise EvalError(f"{path} is damaged: {problem}. Give another directory, or remove this one")
    return run


def check_same(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuses a directory that holds a run of another identity, by an EvalError that names what differs.

    ``identity`` has everything that must not change within one directory; what its record lacks is not compared.
    """
    if (run := read_run(directory)) is None:
        if read_rows(directory):
            raise EvalError(f"{directory} holds results and no {RUN}, which says what they are of: give another --out")
        return
    before = run["identity"]
    if changed := differing(before, identity, [name for name in identity if name in before]):
        raise EvalError(
            f"{directory} holds a run of other arguments: {changed}. Give another --out, the same arguments as before, "
            "or remove the directory."
        )


def differing(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """Which of the settings of these names differ, in words; a missing one is None."""
    shown = {name: [json.dumps(each.get(name), ensure_ascii=False) for each in (before, now)] for name in names}
    return "; ".join(f"{name} was {was}, is {new}" for name, (was, new) in shown.items() if was != new)


def record_session(
    directory: Path,
    identity: Mapping[str, Any],
    details: Mapping[str, Any],
    command: str,
    machines: Sequence[Mapping[str, Any]],
) -> None:
    """Writes ``run.json``, or adds a session to the one there is.

    ``details`` are what later sessions need not repeat. Of a session the command is recorded, and the ``machines``: the
    hardware of each of its processes, by which the first one's stands for all that are alike.
    """
    first = {"command": command, "identity": dict(identity), **details, "hardware": machines[0], "sessions": []}
    run = read_run(directory) or first
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session: dict[str, Any] = {"started": now, "commit": commit(), "command": command, "processes": len(machines)}
    session["hardware"] = machines[0]
    if others := [*{hardware_words(each): each for each in machines}.values()][1:]:
        session["other_hardware"] = others
    run["sessions"].append(session)
    write_atomically(directory / RUN, (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode())


def _opened(path: Path) -> BinaryIO:
    """A file to add to, made where it is missing. A link is refused: it might lead anywhere."""
    with told(path, "written", "Give another --out."):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o644))


def _cut_torn_line(file: BinaryIO) -> None:
    """Cuts off a last line that is not whole: torn by the end of a process, or damaged by that of the machine."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 24)))
    tail = file.read()
    last = tail[tail.removesuffix(b"\n").rfind(b"\n") + 1 :]
    if last and _parsed(last, "method") is None:
        file.truncate(size - len(last))
    elif last and not last.endswith(b"\n"):
        file.write(b"\n")


def _content(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    with told(path, "read", "Remove it, or give another directory"):
        return path.read_bytes() if path.exists() else None


def _parsed(text: bytes, *names: str) -> dict[str, Any] | None:
    """The object that a text of JSON holds, with values of these names; None where it holds anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.keys() >= {*names} else None


_CELL, _OF_TEXT = tuple(field.name for field in fields(Cell)), ("loss_sum", "tokens", "bytes")
_IDENTITY = ("model", "phase", "match", "methods", "tasks", "lengths", "samples", "equal_at")
_RUN = ("command", "text_origin", "model_dtype", "text_tokens", "model_parameters", "planned", "hardware", "sessions")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("task", "method", "failed", "model", "phase", "match"), str),
    **dict.fromkeys(("command", "text_origin", "model_dtype"), str),
    **dict.fromkeys(("length", "sample", "samples", "equal_at"), int),
    **dict.fromkeys(("text_tokens", "model_parameters", "planned"), int),
    **dict.fromkeys(("score", *_OF_TEXT), (int, float)),
    **dict.fromkeys(("sessions", "methods", "tasks", "lengths"), list),
    **dict.fromkeys(("hardware", "identity"), dict),
}


def _problem(values: Mapping[str, Any], required: Iterable[str]) -> str | None:
    """Which field of those that an object needs is missing or of another type, in words; None where all are right."""
    for name in required:
        if name not in values:
            return f"{name} is missing"
        if not isinstance(values[name], _KINDS[name]):
            return f"{name} cannot be {ascii(values[name])[:60]}"
    return None

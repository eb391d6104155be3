"""The directory of a sweep: results appended line by line, so that nothing measured is lost whatever happens.

The first process of a run adds to ``results.jsonl``; every other one to a part of its own, ``results.rank1.jsonl`` and
so on, which the first one takes in at the end of the run, or at the start of the next.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError
from nc_patch.common import check_directory, replace_file

RESULTS = "results.jsonl"
PARTS = "results.rank*.jsonl"
RUN = "run.json"
_LOCK = ".lock"
# No sweep writes more: a file beyond is not read into memory, and a longer line is damaged.
_LARGEST_FILE = 1 << 30
_LONGEST_LINE = 1 << 24


def measurement_key(identity: Mapping[str, Any]) -> str:
    """A short hex digest of what identifies a measurement; equal for equal JSON, whatever the order of the fields."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def check_out(directory: Path, names: Iterable[str] = (), option: str = "--out") -> None:
    """Makes the directory that an option names, and sees that files of these names can be written there at the end.

    Raises:
        EvalError: they cannot.
    """
    if directory.exists() and not directory.is_dir():
        raise EvalError(f"{option} {directory} is a file; give a directory")
    try:
        check_directory(directory, names)
    except OSError as error:
        raise EvalError(f"{option} {directory} cannot be written: {error.strerror}. Give another.") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers, and an interruption, see the old content or the new, never a part.

    Raises:
        EvalError: the directory cannot be written, or the disk is full.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise EvalError(f"{path} cannot be written: {error.strerror or error}. Make room, or check it.") from error


class ResultStore:
    """The results of one directory: the rows measured so far, and a place to add to them.

    Use as a context manager: while it is open no other process can add to the same file.

    Args:
        directory: where the files lie; made when missing.
        rank: of the process; 0 adds to ``results.jsonl`` and takes in the parts of the others.

    Attributes:
        rows: the rows in the order they were added, each a dictionary with a ``"key"``; for ranks above 0 only those
            of its own part.
    """

    def __init__(self, directory: Path, rank: int = 0) -> None:
        self.directory = directory
        self.path = directory / (PARTS.replace("*", str(rank)) if rank else RESULTS)
        self.rows: list[dict[str, Any]] = []
        self._lock_path = directory / _LOCK if rank == 0 else self.path
        self._file = -1
        self._lock = -1

    def __enter__(self) -> "ResultStore":
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _open_to_write(self._lock_path)
            self._file = _open_to_write(self.path)
        except OSError as error:
            self._close()
            raise EvalError(
                f"the directory {self.directory} cannot be written: {error.strerror}. Give another --out."
            ) from error
        try:
            _claim(self._lock, self.directory)
            _repair(self.path, self._file)
            self.rows = _rows_of(self.path)
            if self.path.name == RESULTS:
                self.take_in_parts()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row, which is on the disk when this returns. The row appears whole or not at all.

        Raises:
            EvalError: the disk is full or failing; what was measured before is kept.
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line is cut off when the file is opened again
                os.ftruncate(self._file, size)
            raise EvalError(
                f"{self.path} cannot be written: {error.strerror}. What was measured before is kept; make room, and "
                "the same command goes on."
            ) from error
        self.rows.append(dict(row))

    def take_in_parts(self) -> None:
        """Adds the rows of other processes' parts that are not here yet, and removes the parts.

        A row also counts as not here while all there is of its cell is a failure: it was tried again, with success. An
        interruption in between loses nothing, and doubles nothing: rows are told by their keys.

        Raises:
            EvalError: a process still adds to its part.
        """
        known = {row["key"]: row for row in valid_rows(self.rows)}
        for path in sorted(self.directory.glob(PARTS)):
            part = _open_part(path)
            try:
                _claim(part, self.directory)
                _repair(path, part)
                for row in _rows_of(path):
                    here = known.get(row["key"])
                    if here is None or ("failed" in here and "failed" not in row):
                        self.append(row)
                        known[row["key"]] = row
                path.unlink()
            finally:
                os.close(part)

    def _close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory, parts included, each key once; a last line that was never finished is left out.

    Raises:
        EvalError: a line that is not the last one of its file is damaged.
    """
    files = [directory / RESULTS, *sorted(directory.glob(PARTS))]
    return valid_rows(row for path in files for row in _rows_of(path))


def valid_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each key once: of rows with the same key the last one counts, a cell that failed and was tried again.

    A failure never takes the place of a success.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        here = found.get(row["key"])
        if here is None or "failed" in here or "failed" not in row:
            found[row["key"]] = row
    return list(found.values())


def _rows_of(path: Path) -> list[dict[str, Any]]:
    content = _content(path)
    return [] if content is None else list(_parse(path, content.removesuffix(b"\n").split(b"\n")))


def _content(path: Path) -> bytes | None:
    """What a file holds; None where there is none. Raises EvalError for what is no ordinary file of ordinary size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise EvalError(
                f"{path} is no file of results: it must be an ordinary file of at most {_LARGEST_FILE:,} bytes. "
                "Remove it, or give another directory"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, EvalError):
            raise
        raise EvalError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_run(directory: Path) -> dict[str, Any] | None:
    """The directory's ``run.json``, or None where there is none.

    Raises:
        EvalError: the file is damaged.
    """
    path = directory / RUN
    content = _content(path)
    if content is None:
        return None
    try:
        run = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path} is damaged ({error}); give another --out, or remove the directory") from error
    if not isinstance(run, dict):
        raise EvalError(f"{path} is damaged (not an object); give another --out, or remove the directory")
    return run


def _parse(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            yield row
        elif line and number < len(lines):
            raise EvalError(f"line {number} of {path} is damaged; remove that line to go on, or give another --out")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if len(line) <= _LONGEST_LINE else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


def _open_to_write(path: Path) -> int:
    """A descriptor that adds to a file, made where it is missing; what is no file of the directory itself is refused.

    Following a link would change a file that lies anywhere.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no ordinary file")
    return descriptor


def _open_part(path: Path) -> int:
    try:
        return _open_to_write(path)
    except OSError as error:
        raise EvalError(f"{path} cannot be taken in: {error.strerror}. Remove it, or give another --out.") from error


def _claim(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise EvalError(f"another process is measuring into {directory}; wait for it, or give another --out") from error


def _repair(path: Path, descriptor: int) -> None:
    """Cuts off a last line that was torn by the end of the process or damaged by that of the machine, and says so."""
    content = path.read_bytes()
    if not content:
        return
    start = content.removesuffix(b"\n").rfind(b"\n") + 1
    if _row(content[start:]) is None:
        os.ftruncate(descriptor, start)
        print(f"The last line of {path} was torn off when the last run ended; it is measured again.", file=sys.stderr)
    elif content.endswith(b"\n"):
        return
    else:
        os.write(descriptor, b"\n")
    os.fsync(descriptor)

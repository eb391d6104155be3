"""The directory of a sweep: results appended line by line, so that nothing measured is lost whatever happens."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval_tasks.errors import EvalError

RESULTS = "results.jsonl"
RUN = "run.json"
_LOCK = ".lock"


def measurement_key(identity: Mapping[str, Any]) -> str:
    """A short hex digest of what identifies a measurement; equal for equal JSON, whatever the order of the fields."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that readers, and an interruption, see the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class ResultStore:
    """``results.jsonl`` of one directory: the rows measured so far, and a place to add to them.

    Use as a context manager: while it is open no other process can add to the directory.

    Attributes:
        directory: where the file lies.
        rows: the rows in the order they were measured, each a dictionary with a ``"key"``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows: list[dict[str, Any]] = []
        self._file = -1
        self._lock = -1

    def __enter__(self) -> "ResultStore":
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._file = os.open(self.directory / RESULTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            self._close()
            raise EvalError(
                f"the directory {self.directory} cannot be written: {error.strerror}. Give another --out."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._close()
            raise EvalError(
                f"another process is measuring into {self.directory}; wait for it, or give another --out"
            ) from error
        _repair(self.directory / RESULTS, self._file)
        self.rows = read_rows(self.directory)
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
            written = os.write(self._file, line)
            if written != len(line):
                os.ftruncate(self._file, size)
                raise OSError(28, "no space left on the device")
            os.fsync(self._file)
        except OSError as error:
            raise EvalError(f"{self.directory / RESULTS} cannot be written: {error.strerror}") from error
        self.rows.append(dict(row))

    def _close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory's ``results.jsonl``; a last line that was never finished is left out.

    Raises:
        EvalError: a line that is not the last one is damaged.
    """
    try:
        lines = (directory / RESULTS).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise EvalError(f"{directory / RESULTS} cannot be read: {error.strerror}") from error
    return [row for _, row in _parse(directory / RESULTS, lines)]


def read_run(directory: Path) -> dict[str, Any] | None:
    """The directory's ``run.json``, or None where there is none.

    Raises:
        EvalError: the file is damaged.
    """
    path = directory / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise EvalError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EvalError(f"{path} is damaged ({error}); give another --out, or remove the directory") from error
    if not isinstance(run, dict):
        raise EvalError(f"{path} is damaged (not an object); give another --out, or remove the directory")
    return run


def _parse(path: Path, lines: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            yield number, row
        elif line and number < len(lines):
            raise EvalError(f"line {number} of {path} is damaged; remove that line to go on, or give another --out")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "key" in row else None


def _repair(path: Path, descriptor: int) -> None:
    """Cuts off a last line that was torn by the end of the process, and says so."""
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    whole = content.rfind(b"\n") + 1
    if _row(content[whole:]) is not None:
        os.write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, whole)
        print(f"The last line of {path} was torn off when the last run ended; it is measured again.", file=sys.stderr)
    os.fsync(descriptor)

"""Commands, and calls in processes of their own, forked from one server that has imported everything."""

import multiprocessing.process
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from nc_patch.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["eval_tasks.command"])


def run(*command: object, ends: int = 0, cwd: Path | None = None, **environment: str) -> str:
    """What a command says, on both outputs; fails where its exit status is not ``ends``."""
    words, said = list(map(str, command)), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=cwd, env=os.environ | environment, timeout=3600, check=False, **said)
    assert done.returncode == ends, done.stdout[-10_000:]
    return done.stdout


def python(*arguments: object, **options: Any) -> str:
    """The same of ``python ARGUMENTS``."""
    return run(sys.executable, *arguments, **options)


def start(
    function: Callable[..., None], *arguments: Any, said: Path, **environment: str
) -> multiprocessing.process.BaseProcess:
    """Starts ``function(*arguments)``, a function of a module; what it says goes to the file ``said``."""
    process = _CONTEXT.Process(target=_call, args=(function, arguments, environment, said), daemon=True)
    process.start()
    return process


def command(arguments: list[str], setup: Callable[[], None] | None = None) -> None:
    """To be started: ``nc-patch ARGUMENTS``, after ``setup``."""
    if setup is not None:
        setup()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(
    home: Path, function: Callable[..., None], *arguments: Sequence[Any]
) -> tuple[list[int | None], list[str]]:
    """Runs ``function`` with each of ``arguments`` in the processes of one run: exit codes, and what each said."""
    shared = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    said, ranks = [home / f"said{rank}" for rank in range(len(arguments))], []
    for rank, own in enumerate(arguments):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start(function, *own, said=said[rank], **place, **shared))
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks], [file.read_text() for file in said]


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until a condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def lines(path: Path) -> int:
    """How many whole lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _call(function: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str], said: Path) -> None:
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    function(*arguments)

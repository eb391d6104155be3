"""Runs of ``nc-patch`` in processes of their own, forked from one server that has imported everything."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["eval_tasks.command"])


def _run(arguments: list[str], environment: Mapping[str, str], said: Path, setup: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from nc_patch.cli import main

    torch.set_num_threads(1)
    if setup is not None:
        setup()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(
    arguments: list[str], said: Path, setup: Callable[[], None] | None = None, **environment: str
) -> "multiprocessing.process.BaseProcess":
    """Starts ``nc-patch ARGUMENTS``; what it says goes to the file ``said``; ``setup`` runs in it first."""
    process = _CONTEXT.Process(target=_run, args=(arguments, environment, said, setup), daemon=True)
    process.start()
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until a condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def lines(path: Path) -> int:
    """How many whole lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0

"""Runs of ``nc-patch``, and calls, in processes of their own, forked from one server that has imported everything."""

import multiprocessing.process
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from nc_patch.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["eval_tasks.command"])


def start_call(
    function: Callable[..., None], *arguments: Any, said: Path, **environment: str
) -> multiprocessing.process.BaseProcess:
    """Starts ``function(*arguments)``, a function of a module; what it says goes to the file ``said``."""
    process = _CONTEXT.Process(target=_call, args=(function, arguments, environment, said), daemon=True)
    process.start()
    return process


def start(arguments: list[str], said: Path, setup: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    """Starts ``nc-patch ARGUMENTS``; what it says goes to the file ``said``; ``setup`` runs in it first."""
    return start_call(_run, arguments, setup, said=said)


def start_ranks(
    home: Path, arguments: Sequence[list[str]], setups: Sequence[Callable[[], None] | None] = (None, None)
) -> list[multiprocessing.process.BaseProcess]:
    """Starts the processes of one run, each ``nc-patch ARGUMENTS``; what they say goes to ``said0`` and ``said1``."""
    return call_ranks(home, _run, list(zip(arguments, setups, strict=True)))


def call_ranks(
    home: Path, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
) -> list[multiprocessing.process.BaseProcess]:
    """The same of calls ``function(*arguments)``, of a function of a module."""
    shared, ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}, []
    for rank, own in enumerate(arguments):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_call(function, *own, said=home / f"said{rank}", **place, **shared))
    return ranks


def ended(home: Path, ranks: Sequence[multiprocessing.process.BaseProcess]) -> tuple[list[int | None], str, str]:
    """The exit codes of two processes of ``start_ranks``, and what each of them said."""
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks], *((home / f"said{rank}").read_text() for rank in (0, 1))


def python(*command: object, **options: Any) -> str:
    """What ``python COMMAND`` says, with options of ``subprocess.run``; fails where that fails."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until a condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def lines(path: Path) -> int:
    """How many whole lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _call(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], said: Path
) -> None:
    os.environ.update(environment)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    function(*arguments)


def _run(arguments: list[str], setup: Callable[[], None] | None) -> None:
    if setup is not None:
        setup()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

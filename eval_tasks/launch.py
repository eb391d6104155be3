"""Starting the processes of a run, where nobody else has.

``accelerate launch --cpu --num_processes N`` starts a single process unless it is given an MPI host file; it only says
where N processes should meet. ``nc-patch`` then starts them itself, from the launcher's own command line.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from eval_tasks.errors import EvalError
from eval_tasks.ranks import launched_world

_POLL_SECONDS = 0.05
# What the others are given to end by themselves when one has failed.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Launch:
    """Processes to start on this machine.

    Attributes:
        local: how many here.
        world: how many on all machines.
        first: the rank of the first one here.
        address, port: where the process of rank 0 is found; port 0 stands for a free one.
    """

    local: int
    world: int
    first: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def wanted_launch(processes: int | None) -> Launch | None:
    """The processes to start: those the user asked for, or those that accelerate announced and did not start.

    Raises:
        EvalError: both a launcher and the user ask for processes, or what accelerate announced cannot be found out.
    """
    if launched_world() > 1:
        if processes is not None:
            raise EvalError(f"a launcher started {launched_world()} processes already; leave out --processes")
        return None
    if processes is not None:
        return Launch(processes, processes) if processes > 1 else None
    return _announced(os.environ)


def run_processes(launch: Launch, arguments: Sequence[str]) -> int:
    """Runs ``python -m nc_patch ARGUMENTS`` in each process and waits; when one fails, the others are ended.

    Returns:
        The exit code of the process that failed first (128 + signal for one that was killed), or 0.
    """
    port = launch.port or free_port()
    processes = []
    try:
        for local_rank in range(launch.local):
            environment = os.environ | {
                "RANK": str(launch.first + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(launch.world),
                "MASTER_ADDR": launch.address,
                "MASTER_PORT": str(port),
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local)))
            processes.append(subprocess.Popen([sys.executable, "-m", "nc_patch", *arguments], env=environment))
        return _wait(processes)
    except KeyboardInterrupt:
        _end(processes, signal.SIGINT)
        raise
    finally:
        _end(processes, signal.SIGTERM)


def without_processes(arguments: Sequence[str]) -> list[str]:
    """The arguments without ``--processes N``, which the processes themselves must not see."""
    left: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--processes":
            next(words, None)
        elif not word.startswith("--processes="):
            left.append(word)
    return left


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0]
            if code < 0:
                print(
                    f"nc-patch: a process was ended by {signal.Signals(-code).name} (number {rank} here), so the run "
                    "stops; a sweep keeps what it has measured, and the same command goes on.",
                    file=sys.stderr,
                )
            return 128 - code if code < 0 else code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _end(processes: Sequence["subprocess.Popen[bytes]"], how: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(how)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _announced(environment: Mapping[str, str]) -> Launch | None:
    if environment.get("ACCELERATE_USE_CPU") != "True" or "MASTER_PORT" not in environment:
        return None
    from accelerate.commands.launch import launch_command_parser

    command = _launcher_command()
    if command is None:
        raise EvalError(
            "accelerate launch --cpu started one process and not the several that it announced. Use nc-patch eval "
            "--processes N, or torchrun --nproc_per_node N -m nc_patch eval ..."
        )
    options, _ = launch_command_parser().parse_known_args(command)
    machines, total = options.num_machines or 1, options.num_processes or 1
    local, this = total // machines, options.machine_rank or 0
    print(f"accelerate launch --cpu started one process; starting the {local} of this machine.", file=sys.stderr)
    return Launch(local, total, local * this, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))


def _launcher_command() -> list[str] | None:
    """The arguments behind ``accelerate launch`` of the process that started this one."""
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    for place, word in enumerate(command):
        if word == "launch" or word.endswith(("accelerate-launch", "accelerate.commands.launch")):
            return command[place + 1 :]
    return None


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

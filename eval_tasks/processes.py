"""The processes that share one run: started here or by a launcher, joined by accelerate.

They talk over gloo, on GPUs too: they exchange a few words, and gloo notices at once when a process is gone.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, get_int_from_env

from eval_tasks.errors import EvalError
from eval_tasks.models import pick_device
from nc_patch.cli import USAGE_ERROR
from nc_patch.common import ProfileError

# The names that torchrun, Intel MPI, Open MPI and MVAPICH give to the same numbers.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Tells processes that were started here from those of a launcher.
_RUN_ID = "nc_patch"
# How long a process waits for the others: at the start for a model that is loaded, at the end for the shares of slower
# machines. Of one that is gone it hears at once.
_PATIENCE = timedelta(days=1)


class AgreedError(EvalError):
    """An error that all processes raise, and that the first one prints."""


@dataclass(frozen=True)
class Processes:
    """One of the ``world`` processes that share a run, by default a process alone.

    ``rank`` counts the processes of all machines, from 0, ``local_rank`` those of this one, which has a GPU for each.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that a name means, as ``pick_device`` says; of several processes each has a GPU of its own."""
        device = pick_device(name)
        if device.type == "cuda" and device.index is None and self.world > 1:
            return pick_device(f"cuda:{self.local_rank}")
        return device

    def gathered(self, value: Any) -> list[Any]:
        """What each process passed, in their order, in all of them; waits for them."""
        if self.world == 1:
            return [value]
        try:
            found: list[Any] = gather_object([value])
        except RuntimeError as error:
            raise AgreedError(
                f"another of the {self.world} processes ended or does not answer ({str(error).splitlines()[0]}); a "
                "sweep keeps what it has measured, and the same command goes on"
            ) from error
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process passed, in all of them."""
        return self.gathered(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that all processes take; where one of them raises EvalError or ProfileError, all do."""
        mine: EvalError | ProfileError | None = None
        try:
            yield
        except (EvalError, ProfileError) as error:
            if self.world == 1 or isinstance(error, AgreedError):
                raise
            mine = error
        errors = self.gathered(None if mine is None else str(mine))
        for rank, text in enumerate(errors):
            if text is not None:
                raise AgreedError(text if rank == 0 else f"process {rank} of {self.world}: {text}") from mine


@contextmanager
def joined_processes(shared_model: bool = False, device: str = "auto") -> Iterator[Processes]:
    """Joins the processes that a launcher started (``accelerate launch``, ``torchrun``, ``mpirun``), for the block.

    With a ``shared_model`` (``tp_plan``) they exchange tensors too, on ``device``, as ``load_model`` takes it. Raises
    EvalError where they do not find each other.
    """
    if launched_world() <= 1:
        yield Processes()
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        state = PartialState(cpu=not (shared_model and on_gpu), timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise EvalError(
            f"process {launched_rank()} of {launched_world()} does not reach the others: {str(error).splitlines()[0]}. "
            "MASTER_ADDR and MASTER_PORT must name the machine of process 0 and a free port there."
        ) from error
    try:
        yield Processes(state.process_index, state.num_processes, state.local_process_index)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


def start_processes(processes: int | None, command: Sequence[str]) -> int | None:
    """Runs ``python -m nc_patch COMMAND`` in as many processes of this machine as the user asked for.

    ``accelerate launch --cpu --num_processes N`` starts one process and only says where N should meet; these are
    started here, too. Returns the exit code of the process that failed first (128 + signal for one that was killed), or
    0; None where this process is to do the work itself. Raises EvalError where both a launcher and the user ask for
    processes.
    """
    if launched_world() > 1 or is_started_here():
        if processes is not None and not is_started_here():
            raise EvalError(f"a launcher started {launched_world()} processes already; leave out --processes")
        return None
    if processes is not None:
        nodes, local = 1, processes
        options: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0"}
    else:
        nodes, local, options = _announced()
    if nodes * local <= 1:
        return None
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    config = LaunchConfig(
        nodes, nodes, local, DefaultLogsSpecs(), run_id=_RUN_ID, max_restarts=0, monitor_interval=0.05, **options
    )
    logging.disable(logging.CRITICAL)  # what failed has said so itself
    try:
        elastic_launch(config, sys.executable)("-m", "nc_patch", *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        how = signal.Signals(-failure.exitcode).name
        print(
            f"nc-patch: process {rank} was ended by {how}, so the run stops; a sweep keeps what it has measured, and "
            "the same command goes on.",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0


def refused(error: Exception) -> int:
    """Prints an error for the user, once where all processes raise it, and returns the exit code."""
    if launched_rank() == 0 or not isinstance(error, AgreedError):
        print(f"nc-patch: {error}", file=sys.stderr)
    return USAGE_ERROR


def launched_world() -> int:
    """How many processes a launcher started, this one among them."""
    return int(get_int_from_env(_WORLD, 1))


def launched_rank() -> int:
    """Which of them this one is."""
    return int(get_int_from_env(_RANK, 0))


def is_started_here() -> bool:
    """Whether ``start_processes`` started this process, and speaks for it where the user interrupts them."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _announced() -> tuple[int, int, dict[str, Any]]:
    """Machines, processes of this one, and where they meet, as ``accelerate launch --cpu`` was told."""
    if os.environ.get("ACCELERATE_USE_CPU") != "True" or "MASTER_PORT" not in os.environ:
        return 1, 1, {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    command = _launcher_command()
    if command is None:
        raise EvalError(
            "accelerate launch --cpu started one process and not the several that it announced. Use nc-patch eval "
            "--processes N, or torchrun --nproc_per_node N -m nc_patch eval ..."
        )
    options, _ = launch_command_parser().parse_known_args(command)
    if options.num_processes is None:  # they stand in a configuration of accelerate, or follow from the machine
        options, *_ = _validate_launch_command(options)
    machines, total = options.num_machines or 1, options.num_processes or 1
    local = total // machines
    print(f"accelerate launch --cpu started one process; starting the {local} of this machine.", file=sys.stderr)
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rank = {"rank": options.machine_rank or 0}
    return machines, local, {"rdzv_backend": "static", "rdzv_endpoint": meeting, "rdzv_configs": rank}


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

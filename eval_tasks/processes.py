"""The processes that share a run: started by a launcher, joined by accelerate.

They talk over gloo, on GPUs too: they exchange a few words, and gloo notices at once when a process is gone.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval_tasks.errors import EvalError
from eval_tasks.models import pick_device
from nc_patch.cli import USAGE_ERROR

# How long a process waits for the others, which may load a model or be slower; of one that is gone it hears at once.
_PATIENCE = timedelta(days=1)


class ProcessEnded(EvalError):
    """Another process ended or does not answer; what happened there, it has said itself."""


@dataclass(frozen=True)
class Processes:
    """One of the ``world`` processes that share a run.

    ``rank`` counts the processes of all machines, from 0, ``local_rank`` those of this one, which has a GPU for each.
    """

    rank: int
    world: int
    local_rank: int

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
        """What each process passed, in their order, in all of them; waits for them, or raises ProcessEnded."""
        if self.world == 1:
            return [value]
        try:
            found: list[Any] = gather_object([value])
        except RuntimeError as error:
            raise ProcessEnded(
                f"another of the {self.world} processes ended or does not answer ({str(error).splitlines()[0]}); a "
                "sweep keeps what it has measured, and the same command goes on"
            ) from error
        return found


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Joins the processes that a launcher started (``accelerate launch``, ``torchrun``, ``mpirun``), for the block.

    Raises EvalError where they do not find each other, or the launcher started one where several were asked for.
    """
    try:
        state = PartialState(cpu=True, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise EvalError(
            f"process {launched_rank()} does not reach the others: {str(error).splitlines()[0]}. MASTER_ADDR and "
            "MASTER_PORT must name the machine of process 0 and a free port there."
        ) from error
    try:
        if state.num_processes == 1 and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():
            raise EvalError(
                "accelerate launch started one process instead of several, as it does on CPUs: give it --multi_gpu in "
                "place of --cpu, or use torchrun --nproc_per_node N"
            )
        yield Processes(state.process_index, state.num_processes, state.local_process_index)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


def refused(error: Exception) -> int:
    """Prints an error for the user, and returns the exit code; that another process ended, only the first one says."""
    rank = launched_rank()
    if rank == 0 or not isinstance(error, ProcessEnded):
        print("nc-patch:", *([f"process {rank}:"] if rank else []), error, file=sys.stderr)
    return USAGE_ERROR


def launched_rank() -> int:
    """Which of the processes of a launcher this one is; 0 alone."""
    return int(os.environ.get("RANK", "0"))

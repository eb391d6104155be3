"""The processes that share a run: started by a launcher, joined by accelerate.

They talk over gloo, on GPUs too: they exchange a few words, and gloo notices at once when a process is gone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval_tasks.errors import EvalError, ProcessEnded
from eval_tasks.models import pick_device
from nc_patch.cli import launched_rank

# How long a process waits for the others, which may load a model or be slower; of one that is gone it hears at once.
_PATIENCE = timedelta(days=1)


@contextmanager
def joined_processes() -> Iterator[PartialState]:
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
        yield state
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


def device_of(processes: PartialState, name: str) -> torch.device:
    """The device that a name means, as ``pick_device`` says; of several processes each has a GPU of its own."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and processes.num_processes > 1:
        return pick_device(f"cuda:{processes.local_process_index}")
    return device


def gathered(processes: PartialState, value: Any) -> list[Any]:
    """What each process passed, in their order, in all of them; waits for them, or raises ProcessEnded."""
    if processes.num_processes == 1:
        return [value]
    try:
        found: list[Any] = gather_object([value])
    except RuntimeError as error:
        raise ProcessEnded(
            f"another of the {processes.num_processes} processes ended or does not answer "
            f"({str(error).splitlines()[0]}); a sweep keeps what it has measured, and the same command goes on"
        ) from error
    return found

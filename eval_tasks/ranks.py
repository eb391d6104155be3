"""The processes of one run: which of them this one is, what they agree on, and which takes which piece of work.

Pieces are handed out one by one, so that no process waits for a slower one. The processes talk over gloo, on GPUs too:
they exchange a few words, never tensors, and gloo notices at once when a process is gone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from eval_tasks.errors import EvalError

# The names that torchrun, Intel MPI, Open MPI and MVAPICH give to the same numbers.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
# How long a process waits for the others: at the start for a model that is loaded, at the end for a last sample.
_PATIENCE = timedelta(hours=2)
_FAILED = "nc_patch/failed"


class AgreedError(EvalError):
    """An error that all processes raise, and that the first one prints."""


@dataclass
class Ranks:
    """One of the processes that share a run.

    Attributes:
        rank: which process of all machines, from 0; the first one keeps the results and speaks.
        world: how many there are.
        local_rank: which process of this machine; the number of its GPU.
        store: what the processes hand out work by; None for a process alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that keeps the results."""
        return self.rank == 0

    def agree(self, error: EvalError | None = None) -> None:
        """Waits for all processes; raises EvalError in each of them when any brings an error along."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        errors = self.gathered(None if error is None else str(error))
        failed = {rank: text for rank, text in enumerate(errors) if text is not None}
        if failed:
            rank, text = min(failed.items())
            raise AgreedError(text if rank == 0 else f"process {rank} of {self.world}: {text}")

    def from_first(self, value: Any) -> Any:
        """What the first process passed, in all of them."""
        if self.world == 1:
            return value
        values = [value]
        with self._watched():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process passed, in their order, in all of them; waits for them."""
        values = [value] * self.world
        if self.world > 1:
            with self._watched():
                dist.all_gather_object(values, value)
        return values

    def take(self, pieces: int) -> Iterator[int]:
        """Numbers of pieces below ``pieces`` in ascending order; over all processes each number comes once.

        Raises:
            EvalError: another process said that it failed.
        """
        for turn in count():
            number = turn
            if self.store is not None:
                with self._watched():
                    if self.store.check([_FAILED]):
                        raise AgreedError(f"stopped, because another process did: {self.store.get(_FAILED).decode()}")
                    number = self.store.add("nc_patch/next", 1) - 1
            if number >= pieces:
                return
            yield number

    def fail(self, error: BaseException) -> None:
        """Tells the others to stop, where they can still be told."""
        if self.store is not None:
            try:
                self.store.set(_FAILED, f"process {self.rank}: {error}")
            except RuntimeError:  # the process that holds the store is gone, and the others know by that
                return

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise AgreedError(
                f"another of the {self.world} processes ended or does not answer "
                f"({str(error).splitlines()[0]}); a sweep keeps what it has measured, and the same command goes on"
            ) from error


@contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """A step that all processes take; where one of them fails, all do."""
    try:
        yield
    except EvalError as error:
        ranks.agree(error)
        raise
    ranks.agree()


@contextmanager
def joined_ranks(shared_model: bool = False, device: str = "auto") -> Iterator[Ranks]:
    """Joins the processes that a launcher started (``accelerate launch``, ``torchrun``, ``mpirun``), for the block.

    Args:
        shared_model: the processes hold parts of one model (``tp_plan``), and exchange tensors too.
        device: where the model runs; as ``load_model`` takes it.

    Raises:
        EvalError: the processes do not find each other.
    """
    rank, world, local_rank = (
        _from_environment(_RANK, 0),
        _from_environment(_WORLD, 1),
        _from_environment(_LOCAL_RANK, 0),
    )
    if world <= 1:
        yield Ranks()
        return
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank))
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
        backend = "cpu:gloo,cuda:nccl" if shared_model and _on_gpu(device) else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise EvalError(
            f"process {rank} of {world} does not reach the others: {str(error).splitlines()[0]}. MASTER_ADDR and "
            "MASTER_PORT must name the machine of process 0 and a free port there."
        ) from error
    ranks = Ranks(rank, world, local_rank, None if shared_model else store)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def launched_world() -> int:
    """How many processes a launcher started, this one among them."""
    return _from_environment(_WORLD, 1)


def launched_rank() -> int:
    """Which of them this one is."""
    return _from_environment(_RANK, 0)


def _on_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _from_environment(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), default)

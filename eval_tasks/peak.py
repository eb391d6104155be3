"""Time and memory of a block of code, and an error of memory told from others."""

import contextlib
import ctypes
import gc
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from eval_tasks.errors import MemoryRanOut

_SAMPLING_SECONDS = 0.005


class Peak:
    """Times a block and finds its peak memory above the start: ``seconds`` and ``bytes`` when it is left.

    Memory is resident on the CPU, and allocated on GPUs, added up over those that share a model.
    """

    def __init__(self, model: Any) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.seconds = 0.0
        self.bytes = 0
        self.marks: dict[str, float] = {}

    def __enter__(self) -> "Peak":
        self._synchronize()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        if self.devices:
            self._before = sum(torch.cuda.memory_allocated(device) for device in self.devices)
        else:
            _return_freed_memory()
            self._sampler = _ResidentSampler()
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronize()
        self.seconds = time.perf_counter() - self._start
        if self.devices:
            self.bytes = sum(torch.cuda.max_memory_allocated(device) for device in self.devices) - self._before
        else:
            self.bytes = self._sampler.stop()

    def mark(self, name: str) -> None:
        """Notes, under a name, how many seconds have passed; what was begun on GPUs is waited for."""
        self._synchronize()
        self.marks[name] = time.perf_counter() - self._start

    def _synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


class _ResidentSampler(threading.Thread):
    """Samples the resident memory of this process in the background."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self._before = self._peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        """Ends the sampling and returns the bytes of the peak above the start."""
        self._done.set()
        self.join()
        return max(self._peak, self._process.memory_info().rss) - self._before


@contextlib.contextmanager
def memory_watched(tokens: int) -> Iterator[None]:
    """Raises ``MemoryRanOut`` for an error of memory within the block, once what was allocated there is free again."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        # On the CPU PyTorch raises a plain RuntimeError, which only its words tell apart.
        ours = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
        if not ours:
            raise
        reason = str(error).split("\n")[0]
        traceback.clear_frames(error.__traceback__)  # which hold what was allocated, and are held by the next error
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise MemoryRanOut(f"memory ran out at {tokens:,} tokens ({reason}); ask for shorter lengths")


def _return_freed_memory() -> None:
    """Gives freed memory back to the system, so that a later peak is not hidden in what an earlier one left (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

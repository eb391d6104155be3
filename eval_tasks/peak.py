"""Time and memory of a block of code, and an error of memory told from others."""

import contextlib
import ctypes
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

from eval_tasks.errors import MemoryRanOut

_SAMPLING_SECONDS = 0.005


class Peak:
    """Times a block and finds its peak memory above the start: fields of a row in ``found``, all when it is left.

    Memory, in bytes, is resident on the CPU, sampled in the background, and allocated on GPUs, added up over those that
    share a model.
    """

    def __init__(self, model: Any) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.found: dict[str, float] = {}
        self._process = psutil.Process()

    def __enter__(self) -> "Peak":
        for device in self.devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        if not self.devices:
            # Freed memory goes back to the system (glibc), so that the peak is not hidden in what an earlier one left.
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        self._before = self._peak = self._held()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.mark("seconds")
        self._done.set()
        self._sampler.join()
        self.found["peak_memory"] = max(self._peak, self._held()) - self._before

    def mark(self, name: str) -> None:
        """Notes, in a field, how many seconds have passed; what was begun on GPUs is waited for."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.found[name] = time.perf_counter() - self._start

    def _held(self) -> int:
        if self.devices:  # whose peak is kept by PyTorch, so that before and after is enough
            return sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
        return int(self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self.devices and not self._done.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, self._held())


@contextlib.contextmanager
def memory_watched(tokens: int) -> Iterator[None]:
    """Raises ``MemoryRanOut`` for an error of memory within the block, once what was allocated there is free again."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        # On the CPU PyTorch raises a plain RuntimeError, which only its words tell apart.
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)):
            raise
        reason = str(error).split("\n")[0]
        traceback.clear_frames(error.__traceback__)  # which hold what was allocated, and are held by the next error
    clear_device_cache(garbage_collection=True)
    raise MemoryRanOut(f"memory ran out at {tokens:,} tokens ({reason}); ask for shorter lengths")

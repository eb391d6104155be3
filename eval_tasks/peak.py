"""Time and memory of a block of code, and an error of memory told from others."""

import contextlib
import ctypes
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from eval_tasks.errors import MemoryRanOut


class Peak:
    """Times a block and finds its peak memory above the start: fields of a row in ``found``, all when it is left.

    Memory, in bytes, is resident on the CPU, by Linux's own high-water mark, and allocated on GPUs, added up over those
    that share a model.
    """

    def __init__(self, model: Any) -> None:
        self.devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.found: dict[str, float] = {}

    def __enter__(self) -> "Peak":
        for device in self.devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        if not self.devices:
            # Freed memory goes back to the system (glibc), so that the peak is not hidden in what an earlier one left.
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
            with contextlib.suppress(OSError):  # refused in a sandbox, where the peak is that of the process until now
                Path("/proc/self/clear_refs").write_text("5")
        self._before = self._highest()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.mark("seconds")
        self.found["peak_memory"] = self._highest() - self._before

    def mark(self, name: str) -> None:
        """Notes, in a field, how many seconds have passed; what was begun on GPUs is waited for."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.found[name] = time.perf_counter() - self._start

    def _highest(self) -> int:
        if self.devices:
            return sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
        highest = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(highest[1]) if highest else 0


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

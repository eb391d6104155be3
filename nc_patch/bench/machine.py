"""What a measurement was made with and on, from PyTorch and the system alone."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nc_patch


def versions() -> dict[str, str | None]:
    """Versions that times depend on; None for a package that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "nc_patch": nc_patch.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "transformers", "flash-attn", "flash-attn-3", "flashinfer-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, threads, and the GPU where one is used."""
    found: dict[str, Any] = {
        "device": device.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(cache_bytes(device) / 1e6, 1),
            "driver": _driver(),
        }
    return found


def cache_bytes(device: torch.device) -> int:
    """Size of the cache that inputs should not fit into: the GPU's second level, or a guess for a processor."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    return 32 << 20


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class PeakMemory:
    """The most memory that a GPU holds for PyTorch from now on, beyond what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int | None:
        """Waits for the device; None on a processor, where PyTorch does not know."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def commit() -> str | None:
    """The git commit of the source, with ``-dirty`` where tracked files differ from it; None where git cannot say."""
    root = Path(nc_patch.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head and head + ("-dirty" if changes else "")


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

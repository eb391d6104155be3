"""What is needed to believe a figure and to measure it again: versions, hardware, commit."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import nc_patch


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nc_patch": nc_patch.__version__,
    }


def hardware(device: torch.device, threads: int) -> dict[str, Any]:
    """What is measured on: processor, cores, memory, and the GPU where it is used."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    processor = name[1].strip() if name else platform.processor() or platform.machine()
    found: dict[str, Any] = {"device": device.type, "processor": processor, "cores": os.cpu_count(), "threads": threads}
    found |= {"memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "system": platform.system()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return found


def hardware_words(found: Mapping[str, Any]) -> str:
    """What ``hardware`` found, in a few words: the GPU, or the processor, cores and threads."""
    processor = f"{found.get('processor')}, {found.get('cores')} cores, {found.get('threads')} threads"
    return f"{found['gpu']} beside {processor}" if found.get("gpu") else processor


@cache
def commit() -> str | None:
    """The git commit of the installed source, with ``-dirty`` when tracked files differ from it, or None."""
    root = Path(nc_patch.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

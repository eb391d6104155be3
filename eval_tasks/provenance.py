"""What is needed to believe a figure and to measure it again: versions, hardware, commit, and ``run.json``."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import nc_patch
from eval_tasks.errors import EvalError
from eval_tasks.store import RUN, read_rows, read_run, write_atomically


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
    """The git commit of the installed source, with ``-dirty`` when tracked files differ from it; None outside git."""
    root = Path(nc_patch.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"The git commit could not be read ({error}); it is recorded as unknown.", file=sys.stderr)
        return None


def check_same(directory: Path, identity: Mapping[str, Any]) -> None:
    """Refuses a directory that holds a run of another identity, by an EvalError that names what differs.

    ``identity`` has everything that must not change within one directory; what its record lacks is not compared.
    """
    if (run := read_run(directory)) is None:
        if read_rows(directory):
            raise EvalError(f"{directory} holds results and no {RUN}, which says what they are of: give another --out")
        return
    before = run["identity"]
    if changed := differing(before, identity, [name for name in identity if name in before]):
        raise EvalError(
            f"{directory} holds a run of other arguments: {changed}. Give another --out, the same arguments as before, "
            "or remove the directory."
        )


def differing(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """Which of the settings of these names differ, in words; a missing one is None."""
    shown = {name: [json.dumps(each.get(name), ensure_ascii=False) for each in (before, now)] for name in names}
    return "; ".join(f"{name} was {was}, is {new}" for name, (was, new) in shown.items() if was != new)


def record_session(
    directory: Path,
    identity: Mapping[str, Any],
    details: Mapping[str, Any],
    command: str,
    machines: Sequence[Mapping[str, Any]],
) -> None:
    """Writes ``run.json``, or adds a session to the one there is; says so where its hardware is another.

    ``details`` are what later sessions need not repeat. Of a session the command is recorded, and the ``machines``: the
    hardware of each of its processes, by which the first one's stands for all that are alike.
    """
    first = {"command": command, "identity": dict(identity), **details, "hardware": machines[0], "sessions": []}
    run = read_run(directory) or first
    before, here = hardware_words(run["hardware"]), hardware_words(machines[0])
    if before != here:
        said = f"This session runs on other hardware ({here}) than the first ({before}); it is recorded, and the report"
        print(f"{said} says that times do not compare.", file=sys.stderr)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    session: dict[str, Any] = {"started": now, "commit": commit(), "command": command, "processes": len(machines)}
    session["hardware"] = machines[0]
    if others := {words: each for each in machines if (words := hardware_words(each)) != here}:
        session["other_hardware"] = [*others.values()]
    run["sessions"].append(session)
    write_atomically(directory / RUN, (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode())

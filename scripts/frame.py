"""What the measuring scripts share: a command line with ``--out``, and a record of how the figures were made."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.store import write_atomically
from nc_patch.common import check_directory

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


class Measurement(argparse.ArgumentParser):
    """The command line of a script that measures, and the file of ``docs/results`` that it writes."""

    def __init__(self, doc: str | None, name: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--out", type=Path, default=RESULTS / name, help=f"default: docs/results/{name}")

    def start(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The arguments, and what the file holds already; raises OSError where it cannot be written."""
        self.command = shlex.join(["python", f"scripts/{self.prog}", *(sys.argv[1:] if argv is None else argv)])
        arguments = self.parse_args(argv)
        self.out = arguments.out
        check_directory(self.out.parent, [self.out.name])
        return arguments, json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else {}

    def save(self, **content: Any) -> None:
        """Writes the file: the command, commit, versions and hardware, and what was measured."""
        record = {"command": self.command, "commit": commit(), "versions": versions()}
        record["hardware"] = hardware(torch.device("cpu"), torch.get_num_threads())
        write_atomically(self.out, (json.dumps({**record, **content}, indent=1) + "\n").encode())

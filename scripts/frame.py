"""What the measuring scripts share: a command line with ``--out``, how the figures were made, and tokens of a text."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.models import LoadedModel
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.store import write_atomically
from eval_tasks.tasks import tokenise
from eval_tasks.texts import Text, load_text
from nc_patch.common import check_directory

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


class Measurement(argparse.ArgumentParser):
    """The command line of a script that measures, and the file or folder of ``docs/results`` that it writes."""

    def __init__(self, doc: str | None, name: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--out", type=Path, default=RESULTS / name, help=f"default: docs/results/{name}")

    def start(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The arguments, and what the file holds already; raises OSError where it cannot be written."""
        self.command = shlex.join(["python", f"scripts/{self.prog}", *(sys.argv[1:] if argv is None else argv)])
        arguments = self.parse_args(argv)
        self.out = arguments.out
        if self.get_default("out").suffix:
            check_directory(self.out.parent, [self.out.name])
        else:
            check_directory(self.out)
        return arguments, json.loads(self.out.read_text(encoding="utf-8")) if self.out.is_file() else {}

    def record(self) -> dict[str, Any]:
        """The command, commit, versions and hardware."""
        machine = hardware(torch.device("cpu"), torch.get_num_threads())
        return {"command": self.command, "commit": commit(), "versions": versions(), "hardware": machine}

    def save(self, **content: Any) -> None:
        """Writes the file: the record, and what was measured."""
        write_atomically(self.out, (json.dumps({**self.record(), **content}, indent=1) + "\n").encode())


def read(loaded: LoadedModel, text: str, least: int = 0) -> tuple[Text, torch.Tensor]:
    """A text and its tokens, int64 ``[1, L]``; ends the program where these are too few."""
    source = load_text(text)
    ids = torch.from_numpy(tokenise(loaded.tokenizer, source.content).ids)[None]
    if ids.shape[1] < least:
        raise SystemExit(f"{text} has {ids.shape[1]} tokens, {least} are needed")
    return source, ids

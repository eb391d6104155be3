"""The command ``nc-patch bench``: its arguments, its time limit, and what it writes."""

import argparse
import datetime
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from eval_tasks.arguments import add_out, positive, spaced
from eval_tasks.bench.inputs import GEOMETRIES
from eval_tasks.bench.measure import FAILED, OK, WRONG, Row, first_line, measure_all
from eval_tasks.bench.operator import Case, Settings
from eval_tasks.errors import EvalError
from eval_tasks.models import DTYPES, pick_device
from eval_tasks.provenance import commit, hardware, hardware_words, versions
from eval_tasks.store import check_out, write_atomically
from eval_tasks.tasks import ascending
from nc_patch.cli import USAGE_ERROR
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

PHASES = {
    "decode": "one decoding step of a layer: upkeep of indexes, choice of keys, attention; CUDA graphs on a GPU",
    "prefill": "causal attention of a whole prompt at a layer: budgets, choice of keys, attention",
}
SELECTIONS = ("topk", "block", "window")
# What is measured unasked, by phase and device. In prefill the keys that are attended are what is compared: nothing
# stands for the others.
_OPTIONS: dict[str, dict[str, Any]] = {"decode": {"dense_below": 0}, "prefill": {"tail": "drop"}}
_CPU, _GPU = {"geometry": ["smollm2"], "dtype": "float32"}, {"geometry": ["llama3-8b"], "dtype": "bfloat16"}
_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("decode", "cpu"): _CPU | {"lengths": [512, 2048, 8192], "repeats": 5},
    ("decode", "cuda"): _GPU | {"lengths": [2**i for i in range(12, 19)], "repeats": 30},
    ("prefill", "cpu"): _CPU | {"lengths": [1024, 2048, 4096, 8192], "repeats": 5},
    ("prefill", "cuda"): _GPU | {"lengths": [2**i for i in range(13, 21)], "repeats": 20},
}
_CASE, _UNIT = ["geometry", "batch", "length"], "milliseconds a layer"
# The columns of the table that is printed, and how their values are written.
_SHOWN: dict[str, Callable[[Any], str]] = {"model": str, "batch": str, "keys": "{:,}".format, "budget": "{:,}".format}
_SHOWN |= {"method": str, _UNIT: "{:,.3f}".format, "over dense": "{:.2f}x".format, "kept mass": "{:.3f}".format}
_SHOWN["backend"] = str


def run_bench(arguments: Sequence[str]) -> int:
    """Runs ``nc-patch bench``; returns 0, 1 where sparse attention failed or was wrong, or 2 for wrong arguments."""
    parsed = parser().parse_args(list(arguments))
    file = parsed.out / f"{parsed.benchmark}.json"
    try:
        settings = settings_of(parsed)
        check_out(parsed.out, [file.name])
    except (EvalError, ValueError, TypeError) as error:
        print(f"nc-patch bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    return _measure(settings, parsed.minutes, shlex.join(["nc-patch", "bench", *arguments]), file)


def settings_of(parsed: argparse.Namespace) -> Settings:
    """The settings of parsed arguments, or else the defaults; raises ValueError or TypeError for what is wrong."""
    phase, device = parsed.benchmark, pick_device(parsed.device)
    if not parsed.minutes > 0:
        raise ValueError(f"--minutes must be a positive number, got {parsed.minutes}")
    chosen: dict[str, Any] = {name: getattr(parsed, name) for name in ("batch", "selections", "alpha", "C", "seed")}
    for name, default in _DEFAULTS[phase, device.type].items():
        chosen[name] = getattr(parsed, name) or default
    chosen |= {"lengths": ascending(chosen["lengths"]), "dtype": DTYPES[chosen["dtype"]]}
    settings = Settings(phase=phase, device=device, options=_OPTIONS[phase] | dict(parsed.set), **chosen)
    for name in settings.selections:
        settings.config(name)  # raises for values outside their ranges
    return settings


def parser() -> argparse.ArgumentParser:
    """The arguments of ``nc-patch bench``."""
    description = "Times sparse attention against the fastest dense attention of PyTorch."
    found = argparse.ArgumentParser(prog="nc-patch bench", description=description)
    commands = found.add_subparsers(dest="benchmark", metavar="{" + ",".join(PHASES) + "}", required=True)
    for phase, what in PHASES.items():
        _add_options(commands.add_parser(phase, help=what, description=f"Times {what}."), phase)
    return found


def _measure(settings: Settings, minutes: float, command: str, file: Path) -> int:
    """Measures, writes the results after every case, prints the report, and returns the exit code."""
    started, rows, problems = time.monotonic(), list[Row](), list[str]()
    chosen = [getattr(settings.config(name), settings.phase).to_dict() for name in settings.selections]
    plain = {"device": str(settings.device), "dtype": str(settings.dtype).removeprefix("torch."), "options": chosen}
    record: dict[str, Any] = {
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "hardware": hardware(settings.device, torch.get_num_threads()),
        "settings": {**vars(settings), **plain},
        "rows": rows,
    }
    print(f"{hardware_words(record['hardware'])}, {plain['dtype']}: {len(settings.cases())} cases")

    def write() -> None:
        write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())

    try:
        say = lambda case: print(f"  {time.monotonic() - started:5.0f} s  {case}", flush=True)  # noqa: E731
        for found in measure_all(settings, started + 60 * minutes, say):
            rows += found
            write()
    except (KeyboardInterrupt, RuntimeError) as error:  # the device itself; what was measured before stays
        record["stopped"] = first_line(error)
        problems.append(f"stopped: {record['stopped']}")
    write()
    print(f"\nbudget {settings.alpha:g} n^{settings.C:g}\n{text(rows)}\n\nWritten: {file}")
    if not any("median_seconds" in row for row in rows):
        problems.append("nothing could be timed, see above")
    if failed := sum(row["kind"] != "dense" and row["status"] in (FAILED, WRONG) for row in rows):
        problems.append(f"sparse attention failed or was wrong in {failed} rows, see above")
    for problem in problems:
        print(f"nc-patch bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _option(text: str) -> tuple[str, Any]:
    """The type of an option of ``NCConfig``: its name, and its value as JSON, or else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be OPTION=VALUE, such as dense_below=0, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_options(of_phase: argparse.ArgumentParser, phase: str) -> None:
    def both(name: str) -> str:
        defaults = (_DEFAULTS[phase, kind][name] for kind in ("cpu", "cuda"))
        shown = (spaced(default) if isinstance(default, list) else default for default in defaults)
        return "by default {} on the CPU, {} on a GPU".format(*shown)

    add = of_phase.add_argument
    add_out(of_phase, f"where {phase}.json goes")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="by default the GPU where there is one")
    add("--lengths", type=positive, nargs="+", metavar="N", help=f"keys, or tokens of a prompt; {both('lengths')}")
    add("--batch", type=positive, nargs="+", default=[1], metavar="B", help="by default 1")
    add("--geometry", choices=GEOMETRIES, nargs="+", help=both("geometry"))
    add("--alpha", type=float, default=DEFAULT_ALPHA, help="factor of the budget; by default %(default)g")
    add("--C", type=float, default=DEFAULT_C, help="exponent of the budget; by default %(default)g")
    add("--selections", choices=SELECTIONS, nargs="+", default=SELECTIONS, help="by default all")
    unasked = spaced(f"{name}={json.dumps(value)}" for name, value in _OPTIONS[phase].items())
    options = f"of NCConfig, by the names that it has for them, such as sample_stride=4; by default {unasked}"
    add("--set", type=_option, nargs="+", default=[], metavar="OPTION=VALUE", help=options)
    add("--dtype", choices=DTYPES, help=both("dtype"))
    add("--repeats", type=positive, metavar="R", help=both("repeats"))
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=math.inf, help="no case begins after that; by default no limit")


def text(rows: Sequence[Row]) -> str:
    """The times of all selections and of the fastest dense attention, and everything that did not run or is wrong."""
    lines, timed = list[str](), pd.DataFrame([row for row in rows if "median_seconds" in row])
    if not timed.empty:
        dense = timed[timed.kind == "dense"]
        dense = dense.loc[dense.groupby(_CASE).median_seconds.idxmin()]
        shown = pd.concat([timed[timed.kind == "sparse"], dense]).sort_values(_CASE, kind="stable")
        shown = shown.join(dense.set_index(_CASE).median_seconds.rename("fastest"), on=_CASE)
        shown[_UNIT], shown["over dense"] = 1e3 * shown.median_seconds, shown.fastest / shown.median_seconds
        shown = shown.rename(columns={"geometry": "model", "length": "keys", "kept_mass": "kept mass"})
        table = shown.reindex(columns=[*_SHOWN]).to_string(index=False, na_rep="-", formatters=_SHOWN)
        lines += [table, "(kept mass: share of the dense softmax that is attended)"]
    if missing := [row for row in rows if row["status"] != OK]:
        lines += ["", "Not run, or wrong:"]
    for row in missing:
        case = Case(*(row[name] for name in _CASE))
        lines.append(f"  {row['method']} ({case}): {row['status']}: {row['message']}")
    return "\n".join(lines)

"""The command ``nc-patch bench``: its arguments, its time limit, and what it writes."""

import argparse
import datetime
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval_tasks.arguments import positive, spaced
from eval_tasks.bench import report
from eval_tasks.bench.inputs import GEOMETRIES
from eval_tasks.bench.measure import Row, measure_all
from eval_tasks.bench.operator import DECODE, PREFILL, Benchmark, Settings
from eval_tasks.bench.timing import first_line
from eval_tasks.errors import EvalError
from eval_tasks.models import DTYPES, pick_device
from eval_tasks.provenance import commit, hardware, hardware_words, versions
from eval_tasks.store import check_out, write_atomically
from eval_tasks.tasks import ascending
from nc_patch.cli import USAGE_ERROR
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

BENCHMARKS = {benchmark.phase: benchmark for benchmark in (DECODE, PREFILL)}


def run_bench(arguments: Sequence[str]) -> int:
    """Runs ``nc-patch bench``; returns 0, 1 where sparse attention failed or was wrong, or 2 for wrong arguments."""
    parsed = parser().parse_args(list(arguments))
    benchmark = BENCHMARKS[parsed.benchmark]
    try:
        settings = settings_of(parsed)
        check_out(parsed.out, (f"{benchmark.phase}.json", f"{benchmark.phase}.png"))
    except (EvalError, ValueError, TypeError) as error:
        print(f"nc-patch bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    return _measure(benchmark, parsed, settings, shlex.join(["nc-patch", "bench", *arguments]))


def settings_of(parsed: argparse.Namespace) -> Settings:
    """The settings of parsed arguments, or else the defaults; raises ValueError or TypeError for what is wrong."""
    benchmark, device = BENCHMARKS[parsed.benchmark], pick_device(parsed.device)
    if not parsed.minutes > 0:
        raise ValueError(f"--minutes must be a positive number, got {parsed.minutes}")
    chosen: dict[str, Any] = {name: getattr(parsed, name) for name in ("batch", "selections", "alpha", "C", "seed")}
    for name in ("geometry", "lengths", "dtype", "repeats"):
        chosen[name] = getattr(parsed, name) or benchmark.defaults[device.type][name]
    chosen |= {"lengths": ascending(chosen["lengths"]), "dtype": DTYPES[chosen["dtype"]]}
    settings = Settings(device=device, options=benchmark.options | dict(parsed.set), **chosen)
    for name in settings.selections:
        settings.config(name)  # raises for values outside their ranges
    return settings


def parser() -> argparse.ArgumentParser:
    """The arguments of ``nc-patch bench``."""
    description = "Times sparse attention against the fastest dense attention of PyTorch."
    found = argparse.ArgumentParser(prog="nc-patch bench", description=description)
    commands = found.add_subparsers(dest="benchmark", metavar="{" + ",".join(BENCHMARKS) + "}", required=True)
    for name, what in (("decode", "one step of a layer"), ("prefill", "attention of a whole prompt at a layer")):
        _add_options(commands.add_parser(name, help=what, description=BENCHMARKS[name].what), BENCHMARKS[name])
    return found


def _measure(benchmark: Benchmark, parsed: argparse.Namespace, settings: Settings, command: str) -> int:
    """Measures, writes the results after every case, prints the report, and returns the exit code."""
    started, file, picture = time.monotonic(), *(parsed.out / f"{benchmark.phase}.{kind}" for kind in ("json", "png"))
    rows: list[Row] = []
    record: dict[str, Any] = {
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "hardware": hardware(settings.device, torch.get_num_threads()),
        "what": benchmark.what,
        "settings": _plain(settings, benchmark.phase),
        "rows": rows,
    }
    machine, law = hardware_words(record["hardware"]), f"budget {settings.alpha:g} n^{settings.C:g}"
    print(f"{machine}, {record['settings']['dtype']}: {len(settings.cases())} cases")

    def write() -> None:
        record.update(minutes=(time.monotonic() - started) / 60, exponents=report.exponents(rows))
        write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())

    problems = list[str]()
    try:
        say = lambda case: print(f"  {time.monotonic() - started:5.0f} s  {case}", flush=True)  # noqa: E731
        for found in measure_all(benchmark, settings, started + 60 * parsed.minutes, say):
            rows += found
            write()
    except (KeyboardInterrupt, RuntimeError) as error:  # the device itself; what was measured before stays
        record["stopped"] = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
        problems.append(f"stopped: {record['stopped']}")
    write()
    print(f"\n{law}\n{report.text(rows, benchmark)}\n\nWritten: {file}")
    if any("median_seconds" in row for row in rows):
        report.draw(rows, benchmark, f"{machine}, {law}", picture)
        print(f"         {picture}")
    else:
        problems.append("nothing could be timed, see above")
    if failed := report.failures(rows):
        problems.append(f"sparse attention failed or was wrong in {failed} rows, see above")
    for problem in problems:
        print(f"nc-patch bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _plain(settings: Settings, phase: str) -> dict[str, Any]:
    found = {**vars(settings), "device": str(settings.device), "dtype": str(settings.dtype).removeprefix("torch.")}
    return {**found, "options": [getattr(settings.config(name), phase).to_dict() for name in settings.selections]}


def _option(text: str) -> tuple[str, Any]:
    """The type of an option of ``NCConfig``: its name, and its value as JSON, or else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be OPTION=VALUE, such as dense_below=0, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _add_options(of_benchmark: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    def both(name: str) -> str:
        by_device = (benchmark.defaults[kind][name] for kind in ("cpu", "cuda"))
        cpu, cuda = (spaced(d) if isinstance(d, list) else d for d in by_device)
        return f"by default {cpu} on the CPU, {cuda} on a GPU"

    add, files = of_benchmark.add_argument, f"{benchmark.phase}.json and {benchmark.phase}.png"
    add("--out", type=Path, required=True, metavar="DIR", help=f"where {files} go")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="by default the GPU where there is one")
    add("--lengths", type=positive, nargs="+", metavar="N", help=f"keys, or tokens of a prompt; {both('lengths')}")
    add("--batch", type=positive, nargs="+", default=[1], metavar="B", help="by default 1")
    add("--geometry", choices=GEOMETRIES, nargs="+", help=both("geometry"))
    add("--alpha", type=float, default=DEFAULT_ALPHA, help="factor of the budget; by default %(default)g")
    add("--C", type=float, default=DEFAULT_C, help="exponent of the budget; by default %(default)g")
    selections = list(benchmark.selections)
    add("--selections", choices=selections, nargs="+", default=selections, help="by default all")
    unasked = spaced(f"{name}={json.dumps(value)}" for name, value in benchmark.options.items())
    options = f"of NCConfig, by the names that it has for them, such as sample_stride=4; by default {unasked}"
    add("--set", type=_option, nargs="+", default=[], metavar="OPTION=VALUE", help=options)
    add("--dtype", choices=DTYPES, help=both("dtype"))
    add("--repeats", type=positive, metavar="R", help=both("repeats"))
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=math.inf, help="no case begins after that; by default no limit")

"""The command ``nc-patch bench``: its arguments, its time limit, and what it writes."""

import argparse
import datetime
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nc_patch.bench import report
from nc_patch.bench.benchmark import Benchmark
from nc_patch.bench.cases import FAILED, Row, Settings, cases, measure_all
from nc_patch.bench.decode import DECODE
from nc_patch.bench.dense_rivals import KINDS
from nc_patch.bench.inputs import GEOMETRIES
from nc_patch.bench.machine import commit, hardware, versions
from nc_patch.bench.prefill import PREFILL
from nc_patch.bench.timing import first_line
from nc_patch.common import check_directory
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

BENCHMARKS = {benchmark.name: benchmark for benchmark in (DECODE, PREFILL)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FAILURE, USAGE_ERROR = 1, 2
# Part of the time that the operator may take where a whole model is measured too.
_OPERATOR_SHARE = 0.7


class _BenchError(Exception):
    """Arguments or an environment that do not fit."""


def run_bench(arguments: Sequence[str]) -> int:
    """Runs ``nc-patch bench``.

    Args:
        arguments: what follows ``bench``.

    Returns:
        0; 1 where sparse attention failed or was wrong in a case; 2 for arguments that do not fit.
    """
    parsed = _parser().parse_args(list(arguments))
    benchmark = BENCHMARKS[parsed.benchmark]
    try:
        settings, whole_lengths = _settings(parsed, benchmark)
        draw = _plotter()
        _make_directory(parsed.out, (benchmark.file, benchmark.plot))
    except (_BenchError, ValueError) as error:
        print(f"nc-patch bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    return _measure(benchmark, parsed, settings, whole_lengths, draw, shlex.join(["nc-patch", "bench", *arguments]))


def _measure(
    benchmark: Benchmark,
    parsed: argparse.Namespace,
    settings: Settings,
    whole_lengths: tuple[int, ...],
    draw: Callable[..., None] | None,
    command: str,
) -> int:
    started = time.monotonic()
    limit = math.inf if parsed.minutes is None else 60 * parsed.minutes
    operator_limit = limit * (_OPERATOR_SHARE if whole_lengths else 1.0)
    size = benchmark.defaults[settings.device.type]["ceiling_size"]
    ceiling = benchmark.ceiling(settings.device, settings.dtype, size)
    whole = benchmark.whole
    rows: list[Row] = []
    whole_rows: list[Row] = []
    record: dict[str, Any] = {
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(settings.device),
        "what": benchmark.what,
        "settings": _plain(settings),
        benchmark.ceiling_name: ceiling,
        "rows": rows,
        "crossovers": [],
        whole.name: whole_rows,
    }
    where = record["hardware"].get("gpu", record["hardware"]["processor"])
    machine = f"{where}, {record['settings']['dtype']}: {benchmark.ceiling_in_words(ceiling)}"
    print(f"{machine}; {len(cases(settings))} cases", flush=True)
    path, lost = parsed.out / benchmark.file, None

    def say(case: str) -> None:
        print(f"  {time.monotonic() - started:5.0f} s  {case}", flush=True)

    try:
        for found in measure_all(benchmark.measure, benchmark.growth, settings, ceiling, started + operator_limit, say):
            rows += found
            record["crossovers"] = report.crossovers(rows, settings.selections)
            _write(path, record)
        if whole_lengths:
            say(whole.name)
        for row in whole.measure(settings, whole_lengths, started + limit) if whole_lengths else ():
            whole_rows.append(row)
            _write(path, record)
    except RuntimeError as error:  # the device itself; what was measured before stays
        lost = record["stopped"] = first_line(error)
    except KeyboardInterrupt:
        lost = record["stopped"] = "interrupted"
    record["minutes"] = (time.monotonic() - started) / 60
    entries, said = benchmark.findings(rows, settings)
    record |= entries
    _write(path, record)
    print(report.table(rows, settings.selections, settings.law, benchmark.wording))
    print(report.findings(rows, settings.selections, benchmark.wording) + said)
    if whole_rows:
        print(whole.table(whole_rows))
    timed = any("median_seconds" in row for row in rows)
    drawn = ""
    if draw is not None and timed:
        plot = parsed.out / benchmark.plot
        draw(rows, settings.selections, benchmark.wording, f"{where}, budget {settings.law}", plot)
        drawn = f" and {plot}"
    print(f"\nWritten: {path}{drawn}")
    failed = len(report.failures(rows)) + sum(
        row["method"] != "dense" and row["status"] == FAILED for row in whole_rows
    )
    if lost:
        print(f"nc-patch bench: stopped: {lost}", file=sys.stderr)
    if failed:
        print(f"nc-patch bench: sparse attention failed or was wrong in {failed} rows, see above", file=sys.stderr)
    if not timed:
        print("nc-patch bench: nothing could be timed, see above", file=sys.stderr)
    return FAILURE if failed or lost or not timed else 0


def _plotter() -> Callable[..., None] | None:
    """What draws the plot, loaded before anything is measured; None, which is said, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("There will be no plot: matplotlib is not installed (pip install matplotlib).")
        return None
    try:
        from nc_patch.bench.plot import draw
    except ImportError as error:
        raise _BenchError(f"matplotlib is installed and cannot be imported ({error}); mend it, or remove it") from error
    return draw


def _settings(parsed: argparse.Namespace, benchmark: Benchmark) -> tuple[Settings, tuple[int, ...]]:
    """The settings, defaults filled in, and the context lengths of the whole model (none where it is not asked for)."""
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise _BenchError(f"--device cuda: torch {torch.__version__} sees no GPU; use --device cpu")
    kind = parsed.device if parsed.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if parsed.minutes is not None and not (math.isfinite(parsed.minutes) and parsed.minutes > 0):
        raise _BenchError(f"--minutes must be a positive number, got {parsed.minutes}")
    defaults, whole = benchmark.defaults[kind], benchmark.whole.name
    for name in ("lengths", "batch", "geometry", "selections", "dense", whole):
        given = getattr(parsed, name) or ()
        twice = [value for value in given if list(given).count(value) > 1]
        if twice:
            raise _BenchError(f"--{name}: {twice[0]} is given twice")
    settings = Settings(
        device=torch.device(kind),
        dtype=DTYPES[parsed.dtype or defaults["dtype"]],
        geometries=tuple(parsed.geometry or defaults["geometry"]),
        batches=tuple(parsed.batch),
        lengths=tuple(parsed.lengths or defaults["lengths"]),
        selections=tuple(parsed.selections),
        alpha=parsed.alpha,
        C=parsed.C,
        options=benchmark.options(parsed),
        repeats=parsed.repeats or defaults["repeats"],
        seed=parsed.seed,
        dense=tuple(parsed.dense),
    )
    settings.config("dense")  # raises for values outside their ranges
    if getattr(parsed, whole) is None:
        return settings, ()
    return settings, tuple(getattr(parsed, whole) or defaults[whole])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nc-patch bench",
        description="Times sparse attention against the fastest dense attention that is installed.",
    )
    commands = parser.add_subparsers(dest="benchmark", metavar="{" + ",".join(BENCHMARKS) + "}", required=True)
    for benchmark in BENCHMARKS.values():
        of_benchmark = commands.add_parser(benchmark.name, help=benchmark.summary, description=benchmark.what)
        _add_arguments(of_benchmark, benchmark)
        benchmark.add_options(of_benchmark)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    cpu, cuda = benchmark.defaults["cpu"], benchmark.defaults["cuda"]

    def both(name: str) -> str:
        shown = [d[name] if isinstance(d[name], (str, int)) else " ".join(map(str, d[name])) for d in (cpu, cuda)]
        return f"by default {shown[0]} on the CPU, {shown[1]} on a GPU"

    files, lengths = f"{benchmark.file} and {benchmark.plot}", benchmark.lengths_are
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where {files} go")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--lengths", type=_at_least(2), nargs="+", metavar="N", help=f"{lengths}; {both('lengths')}")
    parser.add_argument("--batch", type=_at_least(1), nargs="+", default=[1], metavar="B", help="by default 1")
    parser.add_argument("--geometry", choices=GEOMETRIES, nargs="+", help=both("geometry"))
    parser.add_argument("--alpha", type=float, default=DEFAULT_ALPHA, help="factor of the budget; by default 12")
    parser.add_argument("--C", type=float, default=DEFAULT_C, help="exponent of the budget; by default 0.5")
    chosen = benchmark.selections
    parser.add_argument("--selections", choices=chosen, nargs="+", default=list(chosen), help="by default all")
    kinds = "kinds of dense attention to compare with"
    parser.add_argument("--dense", choices=KINDS, nargs="+", default=list(KINDS), help=f"{kinds}; by default all")
    parser.add_argument("--dtype", choices=DTYPES, help=both("dtype"))
    parser.add_argument("--repeats", type=_at_least(1), metavar="R", help=both("repeats"))
    parser.add_argument("--seed", type=int, default=0)
    whole = benchmark.whole
    parser.add_argument(
        f"--{whole.name}", type=_at_least(2), nargs="*", metavar="N", help=f"{whole.help}; {both(whole.name)}"
    )
    parser.add_argument("--minutes", type=float, help="no case begins after that; by default no limit")


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return integer


def _make_directory(out: Path, names: Sequence[str]) -> None:
    if out.is_file():
        raise _BenchError(f"--out {out} is a file; give a directory")
    try:
        check_directory(out, names)
    except OSError as error:
        raise _BenchError(f"--out {out} cannot be written: {error.strerror}. Give another") from error


def _plain(settings: Settings) -> dict[str, Any]:
    found = {**vars(settings), "device": settings.device.type, "dtype": str(settings.dtype).removeprefix("torch.")}
    return {**found, "options": [settings.config(name).prefill.to_dict() for name in settings.selections]}


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file in one step, so that an interrupted run leaves the last whole one."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)

"""The command ``nc-patch bench``: its arguments, and what it writes."""

import argparse
import datetime
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nc_patch.bench import generate, report
from nc_patch.bench.decode import FAILED, Settings, cases, measure_all
from nc_patch.bench.inputs import GEOMETRIES
from nc_patch.bench.machine import commit, hardware, versions
from nc_patch.bench.timing import first_line
from nc_patch.bench.traffic import copy_bandwidth
from nc_patch.config import NCConfig

FILE, PLOT = "decode.json", "decode.png"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SELECTIONS = ("topk", "block", "window")
FAILURE, USAGE_ERROR = 1, 2
# By device: what is measured where the arguments do not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": (512, 2048, 8192),
        "geometry": ("smollm2",),
        "dtype": "float32",
        "repeats": 5,
        "generate": (1024,),
        "copy_megabytes": 256,
    },
    "cuda": {
        "lengths": (4096, 8192, 16384, 32768, 65536, 131072, 262144),
        "geometry": ("llama3-8b",),
        "dtype": "bfloat16",
        "repeats": 30,
        "generate": (32768,),
        "copy_megabytes": 2048,
    },
}
# Part of the time that the operator may take where generate is measured too.
_OPERATOR_SHARE = 0.7
_WHAT = (
    "One decoding step of one layer: upkeep of the index (one key), choice of keys, attention. CUDA graphs on a GPU; "
    "medians of interleaved repeats over rotating inputs. Dense: the fastest of all implementations that ran."
)


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
    try:
        settings, generate_lengths = _settings(parsed)
        _make_directory(parsed.out)
    except (_BenchError, ValueError) as error:
        print(f"nc-patch bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    return _measure(parsed, settings, generate_lengths, shlex.join(["nc-patch", "bench", *arguments]))


def _measure(parsed: argparse.Namespace, settings: Settings, generate_lengths: tuple[int, ...], command: str) -> int:
    started = time.monotonic()
    limit = math.inf if parsed.minutes is None else 60 * parsed.minutes
    operator_limit = limit * (_OPERATOR_SHARE if generate_lengths else 1.0)
    bandwidth = copy_bandwidth(settings.device, _DEFAULTS[settings.device.type]["copy_megabytes"])
    record: dict[str, Any] = {
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(settings.device),
        "what": _WHAT,
        "settings": _plain(settings),
        "copy_bytes_per_second": bandwidth,
        "rows": [],
        "crossovers": [],
        "generate": [],
    }
    where = record["hardware"].get("gpu", record["hardware"]["processor"])
    print(f"{where}, {record['settings']['dtype']}: copies {bandwidth / 1e9:,.0f} GB/s; {len(cases(settings))} cases")
    path, lost = parsed.out / FILE, None

    def say(case: str) -> None:
        print(f"  {time.monotonic() - started:5.0f} s  {case}", flush=True)

    try:
        for rows in measure_all(settings, bandwidth, started + operator_limit, say):
            record["rows"] += rows
            record["crossovers"] = report.crossovers(record["rows"], settings.selections)
            _write(path, record)
        if generate_lengths:
            say("generate")
        for row in generate.measure_generate(settings, generate_lengths, started + limit) if generate_lengths else ():
            record["generate"].append(row)
            _write(path, record)
    except RuntimeError as error:  # the device itself; what was measured before stays
        lost = record["stopped"] = first_line(error)
    except KeyboardInterrupt:
        lost = record["stopped"] = "interrupted"
    record["minutes"] = (time.monotonic() - started) / 60
    _write(path, record)
    law = f"{settings.alpha:g} n^{settings.C:g}"
    print(report.table(record["rows"], settings.selections, law))
    print(report.findings(record["rows"], settings.selections))
    if record["generate"]:
        print(generate.table(record["generate"]))
    print(f"\nWritten: {path}" + _draw(record, settings, parsed.out / PLOT, f"{where}, budget {law}"))
    failed = len(report.failures(record["rows"])) + sum(
        row["method"] != "dense" and row["status"] == FAILED for row in record["generate"]
    )
    if lost:
        print(f"nc-patch bench: stopped: {lost}", file=sys.stderr)
    if failed:
        print(f"nc-patch bench: sparse attention failed or was wrong in {failed} rows, see above", file=sys.stderr)
    timed = any("median_seconds" in row for row in record["rows"])
    if not timed:
        print("nc-patch bench: nothing could be timed, see above", file=sys.stderr)
    return FAILURE if failed or lost or not timed else 0


def _draw(record: dict[str, Any], settings: Settings, path: Path, title: str) -> str:
    """Draws the plot where that is possible; what to say after the name of the results."""
    if importlib.util.find_spec("matplotlib") is None:
        return "; no plot: matplotlib is not installed (pip install matplotlib)"
    if not any("median_seconds" in row for row in record["rows"]):
        return "; no plot: nothing was timed"
    from nc_patch.bench.plot import draw

    draw(record["rows"], settings.selections, record["copy_bytes_per_second"], title, path)
    return f" and {path}"


def _settings(parsed: argparse.Namespace) -> tuple[Settings, tuple[int, ...]]:
    """The settings, defaults filled in, and the context lengths of generate (none where it is not asked for)."""
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise _BenchError(f"--device cuda: torch {torch.__version__} sees no GPU; use --device cpu")
    kind = parsed.device if parsed.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if parsed.minutes is not None and not (math.isfinite(parsed.minutes) and parsed.minutes > 0):
        raise _BenchError(f"--minutes must be a positive number, got {parsed.minutes}")
    NCConfig.create(parsed.alpha, parsed.C)
    defaults = _DEFAULTS[kind]
    for name in ("lengths", "batch", "geometry", "selections", "generate"):
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
        repeats=parsed.repeats or defaults["repeats"],
        seed=parsed.seed,
    )
    if parsed.generate is None:
        return settings, ()
    return settings, tuple(parsed.generate or defaults["generate"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nc-patch bench",
        description="Times decoding with sparse attention against the fastest dense attention that is installed.",
    )
    cpu, cuda = _DEFAULTS["cpu"], _DEFAULTS["cuda"]

    def both(name: str) -> str:
        shown = [d[name] if isinstance(d[name], (str, int)) else " ".join(map(str, d[name])) for d in (cpu, cuda)]
        return f"by default {shown[0]} on the CPU, {shown[1]} on a GPU"

    parser.add_argument("what", choices=["decode"], help="decode: one step of the operator, per layer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where {FILE} and {PLOT} go")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--lengths", type=_at_least(2), nargs="+", metavar="N", help=f"keys; {both('lengths')}")
    parser.add_argument("--batch", type=_at_least(1), nargs="+", default=[1], metavar="B", help="by default 1")
    parser.add_argument("--geometry", choices=GEOMETRIES, nargs="+", help=both("geometry"))
    parser.add_argument("--alpha", type=float, default=4.0, help="factor of the budget; by default 4")
    parser.add_argument("--C", type=float, default=0.6, help="exponent of the budget; by default 0.6")
    parser.add_argument("--selections", choices=SELECTIONS, nargs="+", default=list(SELECTIONS), help="by default all")
    parser.add_argument("--dtype", choices=DTYPES, help=both("dtype"))
    parser.add_argument("--repeats", type=_at_least(1), metavar="R", help=both("repeats"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--generate",
        type=_at_least(2),
        nargs="*",
        metavar="N",
        help=f"time generate() too, after prompts of N tokens; {both('generate')}",
    )
    parser.add_argument("--minutes", type=float, help="no case begins after that; by default no limit")
    return parser


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


def _make_directory(out: Path) -> None:
    if out.is_file():
        raise _BenchError(f"--out {out} is a file; give a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _BenchError(f"--out {out} cannot be written: {error}") from error


def _plain(settings: Settings) -> dict[str, Any]:
    found = {**vars(settings), "device": settings.device.type, "dtype": str(settings.dtype).removeprefix("torch.")}
    return {**found, "config": settings.config.to_dict()}


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replaces the file in one step, so that an interrupted run leaves the last whole one."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)

"""Times prefill of a model on the CPU, dense and with blocks, and writes docs/results/prefill_cpu.json.

Two measurements, both of interleaved runs in one process, compared by their medians: the whole forward pass, and
attention alone on the queries, keys and values of some of its layers. Beside them the peak memory of a process of its
own for each method, and of the operator at growing lengths, which must grow linearly.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from eval_tasks.capture import Captured, capture, token_ids
from eval_tasks.measure import peak_resident_bytes
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import NCConfig, nc_stats, patched, sparse_attention
from nc_patch.common import check_directory

METHODS: dict[str, NCConfig | None] = {
    "dense": None,
    "block": NCConfig(4.0, 0.6, selection="block", dense_below=0),
    "block, min_mass 0.9": NCConfig(4.0, 0.6, selection="block", min_mass=0.9, dense_below=0),
}
LAYERS = (1, 10, 22)


def load(name: str, length: int) -> tuple[Any, torch.Tensor]:
    """The model in float32 and the first ``length`` tokens of the text."""
    loaded = load_model(name, "float32", "cpu")
    return loaded.model, token_ids(loaded.tokenizer, load_text("python-reference"), length)


def forward(model: Any, ids: torch.Tensor, config: NCConfig | None) -> tuple[float, float]:
    """Seconds of one forward pass, and the attended fraction."""
    with torch.inference_mode(), patched(model, config=config) if config else nullcontext():
        seconds = timed(lambda: model(ids, use_cache=False, logits_to_keep=1))
        return seconds, nc_stats(model)["attended_fraction"] if config else 1.0


def timed(run: Callable[[], Any]) -> float:
    """Seconds that ``run`` takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, ``repeats`` times each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def attention_alone(captured: Sequence[Captured], repeats: int) -> list[dict[str, Any]]:
    """Seconds of dense and block attention of every captured layer; dense gets keys repeated to all query heads."""
    rows = []
    for layer, (query, key, value, _) in zip(LAYERS, captured, strict=True):
        group = query.shape[1] // key.shape[1]
        repeated = [t.repeat_interleave(group, 1) for t in (key, value)]
        block = lambda q=query, k=key, v=value, **options: sparse_attention(  # noqa: E731
            q, k, v, alpha=4.0, C=0.6, selection="block", **options
        )
        runs: dict[str, Callable[[], Any]] = {
            "dense": lambda q=query, r=repeated: torch.nn.functional.scaled_dot_product_attention(
                q, *r, is_causal=True
            ),
            "block": block,
            "block, min_mass 0.9": lambda block=block: block(min_mass=0.9),
        }
        with torch.inference_mode():
            block()
            seconds = interleaved(runs, repeats)
        rows.append({"layer": layer, **compared(seconds)})
    return rows


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """All times, and dense's median over that of each method."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": seconds, "speedup": {name: medians["dense"] / median for name, median in medians.items()}}


def operator_memory(length: int) -> int:
    """Bytes by which the peak of resident memory grows while block attention runs on random tensors."""
    query, key = torch.randn(1, 9, length, 64), torch.randn(1, 3, length, 64)
    with torch.inference_mode():
        sparse_attention(query[:, :, :256], key[:, :, :256], key[:, :, :256], alpha=4.0, C=0.6, selection="block")
        before = peak_resident_bytes()
        sparse_attention(query, key, key, alpha=4.0, C=0.6, selection="block")
    return peak_resident_bytes() - before


def in_own_process(arguments: argparse.Namespace, *options: str) -> int:
    """The number that this script prints when run with ``options``."""
    command = [sys.executable, __file__, "--model", arguments.model, "--threads", str(arguments.threads), *options]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def times(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of a run without its memory."""
    model, ids = load(arguments.model, arguments.length)
    captured = capture(model, ids, LAYERS)
    alone = attention_alone(captured, arguments.repeats)
    for row in alone:
        print("attention of layer", row["layer"], {name: round(x, 2) for name, x in row["speedup"].items()}, flush=True)
    del captured
    fractions: dict[str, float] = {}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda name=name: fractions.update({name: forward(model, ids, METHODS[name])[1]})
        for name in arguments.methods
    }
    whole = compared(interleaved(runs, arguments.forward_repeats)) | {"attended_fraction": fractions}
    print("whole forward", {name: round(x, 2) for name, x in whole["speedup"].items()}, fractions, flush=True)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "tokens": arguments.length,
        "whole_forward": whole,
        "attention_alone": alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3, help="of attention alone (default: 3)")
    parser.add_argument("--forward-repeats", type=int, default=3, help="of the whole forward pass (default: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/prefill_cpu.json"))
    parser.add_argument("--memory-only", action="store_true", help="keep the times that --out holds")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--operator-memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(arguments.threads)
    if arguments.operator_memory:
        print(operator_memory(arguments.operator_memory))
        return
    if "dense" not in arguments.methods:
        parser.error("--methods must hold dense, which the others are compared with")
    if arguments.memory_of:
        model, ids = load(arguments.model, arguments.length)
        forward(model, ids, METHODS[arguments.memory_of])
        print(peak_resident_bytes())
        return
    record = json.loads(arguments.out.read_text()) if arguments.memory_only else times(arguments)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    length = str(arguments.length)
    operator = {str(n): in_own_process(arguments, "--operator-memory", str(n)) for n in arguments.memory_lengths}
    memory = {name: in_own_process(arguments, "--memory-of", name, "--length", length) for name in arguments.methods}
    print("peak memory", memory, "of the operator", operator)
    record |= {"peak_memory_bytes": memory, "operator_peak_memory_bytes": operator}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times a model's forward pass, dense and patched, and writes docs/results/forward_cpu.json.

Times are medians of interleaved runs in one process; peak memory is that of a process of its own for each method. The
text is the language reference of the running CPython, read from its beginning.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from eval_tasks.measure import peak_resident_bytes
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import NCConfig, nc_stats, patched
from nc_patch.common import check_directory

METHODS: dict[str, NCConfig | None] = {
    "dense": None,
    "topk a=2 C=0.7": NCConfig(2.0, 0.7, selection="topk", dense_below=0),
    "topk a=2 C=0.5": NCConfig(2.0, 0.5, selection="topk", dense_below=0),
    "window a=2 C=0.7": NCConfig(2.0, 0.7, selection="window", dense_below=0),
    "window a=2 C=0.5": NCConfig(2.0, 0.5, selection="window", dense_below=0),
    "block a=4 C=0.6": NCConfig(4.0, 0.6, selection="block", dense_below=0),
}


def load(name: str, length: int) -> tuple[Any, torch.Tensor]:
    """The model in float32 and the first ``length`` tokens of the text."""
    loaded = load_model(name, "float32", "cpu")
    ids = loaded.tokenizer(load_text("python-reference").content[: length * 12])["input_ids"][:length]
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens, {length} are needed")
    return loaded.model, torch.tensor([ids])


def forward(model: Any, ids: torch.Tensor, config: NCConfig | None) -> tuple[float, float]:
    """Seconds of one forward pass, and the attended fraction."""
    with torch.inference_mode(), patched(model, config=config) if config else nullcontext():
        begin = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
        seconds = time.perf_counter() - begin
        return seconds, nc_stats(model)["attended_fraction"] if config else 1.0


def peak_memory(arguments: argparse.Namespace, length: int, method: str) -> int:
    """Peak resident bytes of a process that loads the model and runs one forward pass."""
    command = [sys.executable, __file__, "--model", arguments.model, "--lengths", str(length), "--memory-of", method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/forward_cpu.json"))
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    if "dense" not in arguments.methods:
        parser.error("--methods must hold dense, which the others are compared with")
    if arguments.memory_of:
        model, ids = load(arguments.model, arguments.lengths[0])
        forward(model, ids, METHODS[arguments.memory_of])
        print(peak_resident_bytes())
        return
    results = []
    print(f"{'tokens':>6}  {'method':18} {'seconds':>8} {'of dense':>8} {'attended':>8} {'peak MB':>8}")
    for length in arguments.lengths:
        memory = {method: peak_memory(arguments, length, method) for method in arguments.methods}
        model, ids = load(arguments.model, length)
        forward(model, ids[:, :256], None)
        seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
        fractions: dict[str, float] = {}
        for _ in range(arguments.repeats):
            for method in arguments.methods:
                taken, fractions[method] = forward(model, ids, METHODS[method])
                seconds[method].append(taken)
        dense = statistics.median(seconds["dense"])
        for method in arguments.methods:
            median = statistics.median(seconds[method])
            row = {
                "tokens": length,
                "method": method,
                "seconds": seconds[method],
                "median_over_dense": median / dense,
                "attended_fraction": fractions[method],
                "peak_memory_bytes": memory[method],
            }
            results.append(row)
            print(
                f"{length:6d}  {method:18} {median:8.2f} {median / dense:8.2f} {fractions[method]:8.3f} "
                f"{memory[method] / 1e6:8.0f}"
            )
    where = hardware(torch.device("cpu"), torch.get_num_threads())
    record = {
        "commit": commit(),
        "versions": versions(),
        "hardware": where,
        "model": arguments.model,
        "results": results,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

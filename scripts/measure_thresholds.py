"""Times the algorithms of ``nc_patch.ops.kth_largest`` on this machine and writes docs/results/thresholds.json.

Rows are random normal scores, as many as one block of query rows holds; figures are medians of interleaved runs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from eval_tasks.provenance import commit, hardware, versions
from nc_patch.budget import budget_of
from nc_patch.common import check_directory
from nc_patch.ops.kth_largest import by_partition_, by_sort, by_topk
from nc_patch.ops.rows import rows_per_block

ALGORITHMS = {"partition": by_partition_, "topk": by_topk, "sort": by_sort}
HEADS = 9


def measure(length: int, budget: int, repeats: int) -> dict[str, float]:
    """Median nanoseconds per score of each algorithm."""
    rows = rows_per_block(HEADS, length)
    scores = torch.randn(HEADS, rows, length)
    scratch = torch.empty_like(scores)
    count = torch.full((rows,), budget)
    seconds: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    for _ in range(repeats + 1):
        for name, algorithm in ALGORITHMS.items():
            scratch.copy_(scores)
            begin = time.perf_counter()
            algorithm(scratch, count)
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) / scores.numel() * 1e9 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/thresholds.json"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    results = []
    print(f"{'keys':>7} {'budget':>7} " + " ".join(f"{name:>10}" for name in ALGORITHMS) + "   ns per score")
    for length in (512, 2048, 8192):
        for alpha, C in ((2.0, 0.5), (2.0, 0.7), (4.0, 0.6)):
            budget = budget_of(length, alpha, C)
            times = measure(length, budget, arguments.repeats)
            results.append({"keys": length, "budget": budget, "ns_per_score": times})
            print(f"{length:7d} {budget:7d} " + " ".join(f"{times[name]:10.2f}" for name in ALGORITHMS))
    where = hardware(torch.device("cpu"), torch.get_num_threads())
    record = {"commit": commit(), "versions": versions(), "hardware": where, "heads": HEADS, "results": results}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

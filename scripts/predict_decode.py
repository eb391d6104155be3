"""Counts what a step of ``topk`` by codes launches and moves, and predicts its times: docs/results/decode_counts.json.

Counted are, kernel by kernel, programs, bytes from device memory, what one multiprocessor has on its way at once, and
memory accesses that wait for one another, for one layer of Llama-3-8B's geometry, batch 1, one query, the upkeep of the
index included. Launch parameters are those of ``plan_for``, registers those of docs/results/kernel_resources.json, and
how many keys each stage leaves is docs/results/candidates.json. The rates and latencies are assumptions, given as
arguments; nothing runs on a GPU. A kernel is predicted to take

    launch + chain of accesses and steps + bytes / min(memory's rate, bytes on their way / latency)

so that no kernel overlaps with another, as in a stream or a captured graph.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from eval_tasks.provenance import commit, versions
from nc_patch.common import check_directory
from nc_patch.selections.topk.plan import Plan, Sizes, plan_for

# Llama-3-8B: one layer, batch 1.
QUERY_HEADS, KV_HEADS, HEAD_DIM, ELEMENT = 32, 8, 128, 2
GROUP, ROW = QUERY_HEADS // KV_HEADS, HEAD_DIM * ELEMENT
MULTIPROCESSORS, REGISTERS, SHARED = 132, 65536, 227 * 1024
_VARIANT, _TARGET = "bf16-d128-q1", "sm_90"
_RESULTS = Path("docs/results")
# What a key's scale and its two residuals take. A sampled key's scale is a whole sector of memory.
_NUMBERS, _SECTOR = 8, 32
# Quarterings of a bracket: those of a guess, and about those that part as many scores as reach it.
_GUESS_STEPS, _CHOOSE_STEPS = 10, 9


@dataclass
class Kernel:
    """One launch.

    Attributes:
        programs: of its grid. resident: how many fit one multiprocessor, by registers and shared memory.
        megabytes: read and written, as if nothing were found in a cache but what the same kernel has read before.
        on_the_way: bytes of a program's loads that are under way while it computes.
        accesses: that wait for one another, besides the stream. steps: of a search, each over all threads.
    """

    name: str
    programs: int
    resident: int
    megabytes: float
    on_the_way: int
    accesses: int
    steps: int = 0

    @property
    def waves(self) -> int:
        """How often the multiprocessors are filled to run all programs."""
        return math.ceil(self.programs / (self.resident * MULTIPROCESSORS))

    def microseconds(self, assumed: argparse.Namespace) -> float:
        """See the module."""
        busy = min(self.programs / MULTIPROCESSORS, self.resident) * MULTIPROCESSORS
        rate = min(assumed.memory_tb * 1e12, busy * self.on_the_way / (assumed.latency_us * 1e-6))
        chain = self.accesses * assumed.access_us + self.steps * assumed.step_us
        return assumed.launch_us + chain + 1e6 * self.megabytes * 1e6 / rate


def resident_programs(name: str) -> int:
    """How many programs of a kernel one multiprocessor holds, from its recorded registers and shared memory."""
    table = json.loads((_RESULTS / "kernel_resources.json").read_text())["kernels"]
    found = next(row for row in table if (row["variant"], row["target"]) == (name, _TARGET))
    registers = (found["registers"] + 7) // 8 * 8 * found["threads"]
    return max(1, min(REGISTERS // registers, SHARED // max(1, found["shared"]), 2048 // found["threads"]))


def kernels_of(n: int, plan: Plan, found: dict[str, float]) -> list[Kernel]:
    """The launches of a step over n keys; ``found`` are the means of candidates.json at this length."""
    half, budget = HEAD_DIM // 2, found["budget"]
    blocks = triton.cdiv(GROUP, plan.rows) * KV_HEADS
    listed, chosen = budget * found["listed_union"], budget * found["chosen_union"]
    reached = budget * found["reached_per_row"]
    tile_of_halves = plan.keys * half
    low = found["low_halves_share"]

    def kernel(name: str, programs: int, bytes_moved: float, on_the_way: int, accesses: int, steps: int = 0) -> Kernel:
        variant = name if "-" in name else f"codes_{name}-{_VARIANT}"
        return Kernel(name, programs, resident_programs(variant), bytes_moved / 1e6, on_the_way, accesses, steps)

    parts = QUERY_HEADS * plan.chunks * (HEAD_DIM + 2) * 4
    sampled = plan.samples * (KV_HEADS * (2 * half + _SECTOR) + QUERY_HEADS * 4)
    return [
        kernel("encode-bf16-d128", KV_HEADS, KV_HEADS * (ROW + HEAD_DIM + _NUMBERS), 16 * ROW, 2),
        kernel("sample", blocks * plan.samples // plan.keys, sampled, 2 * tile_of_halves, 3),
        kernel("guess", QUERY_HEADS, QUERY_HEADS * plan.samples * 4, plan.samples * 4, 2, _GUESS_STEPS),
        kernel(
            "scan",
            blocks * plan.splits,
            KV_HEADS * (n * (half + _NUMBERS + low * half) + listed * 4),
            round(tile_of_halves * (1 + low)),
            4,
        ),
        kernel(
            "score",
            blocks * plan.scorers,
            KV_HEADS * listed * (ROW + 2 * 4) + QUERY_HEADS * (listed * 4 + reached * 8),
            plan.scored * ROW,
            6,
        ),
        kernel("choose", QUERY_HEADS, QUERY_HEADS * reached * 4, plan.held * 4, 2, _CHOOSE_STEPS),
        kernel(
            "gather",
            blocks * plan.chunks,
            KV_HEADS * (chosen * ROW + listed * 4) + QUERY_HEADS * listed * 4 + parts,
            2 * plan.gathered * ROW,
            3,
        ),
        kernel(f"combine-{_VARIANT}", QUERY_HEADS * 4, parts, plan.chunks * 32 * 4, 2),
        kernel("score_flagged", blocks * plan.splits, 0, 1, 1),
        kernel("choose_flagged", QUERY_HEADS, 0, 1, 1),
        kernel(f"codes_gather_flagged-{_VARIANT}-tail", blocks * plan.chunks, 0, 1, 1),
    ]


def dense_microseconds(n: int, assumed: argparse.Namespace) -> float:
    """Every key and value once, at the memory's rate, in one launch that costs nothing."""
    return 2e6 * n * KV_HEADS * ROW / (assumed.memory_tb * 1e12)


def predict(n: int, rows: list[dict[str, float]], assumed: argparse.Namespace) -> dict[str, Any]:
    """Counts and times at one length."""
    found = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name != "guess_holds"}
    plan = plan_for(Sizes(1, KV_HEADS, GROUP, 1, n, HEAD_DIM, HEAD_DIM), int(found["budget"]))
    kernels = kernels_of(n, plan, found)
    times = {kernel.name: kernel.microseconds(assumed) for kernel in kernels}
    total, dense = sum(times.values()), dense_microseconds(n, assumed)
    megabytes = sum(kernel.megabytes for kernel in kernels)
    return {
        "n": n,
        "launches": len(kernels),
        "megabytes": megabytes,
        "sparse_us": total,
        "dense_us": dense,
        "ratio": dense / total,
        "of_the_roofline": megabytes / assumed.memory_tb / total,
        "kernels": [{**asdict(k), "waves": k.waves, "us": times[k.name]} for k in kernels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-tb", type=float, default=4.3, help="TB/s of device memory (assumed)")
    parser.add_argument("--latency-us", type=float, default=0.7, help="of an access under load (assumed)")
    parser.add_argument("--launch-us", type=float, default=1.2, help="from one kernel of a graph to the next (assumed)")
    parser.add_argument("--access-us", type=float, default=0.5, help="of an access that others wait for (assumed)")
    parser.add_argument("--step-us", type=float, default=0.25, help="of counting over a program's threads (assumed)")
    parser.add_argument("--out", type=Path, default=_RESULTS / "decode_counts.json")
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    candidates = json.loads((_RESULTS / "candidates.json").read_text())
    lengths = sorted({row["n"] for row in candidates["rows"]})
    rows = [predict(n, [row for row in candidates["rows"] if row["n"] == n], arguments) for n in lengths]
    for row in rows:
        print(*(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "kernels"))
        for kernel in row["kernels"]:
            print("   ", *(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in kernel.items()))
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": "none: predicted from counts, not measured",
        "assumed": {name: value for name, value in vars(arguments).items() if name != "out"},
        "alpha": candidates["alpha"],
        "C": candidates["C"],
        "geometry": {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

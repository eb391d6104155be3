"""Counts what a decoding step launches, issues and moves, and predicts its times: docs/results/decode_counts.json.

Counted are, kernel by kernel, programs, bytes from device memory, instructions that warps issue, and accesses that wait
for one another, for one layer of Llama-3-8B's geometry, batch 1, one query, the upkeep of the indexes included. What is
launched follows from the plans of the library. Instructions of a loop are counted in the compiled code (sm_90,
bfloat16, by ``cuobjdump`` of what ``tests/recorded_launches.py`` compiles) and stand below; how many keys each stage of
``topk`` leaves is docs/results/candidates.json. The rates are assumptions, given as arguments; nothing runs on a GPU. A
kernel is predicted to take

    launch + accesses and steps that wait for one another + max(bytes / memory's rate, instructions / rate of issue)

so that no kernel overlaps with another, as in a stream or a captured graph.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval_tasks.provenance import commit, versions
from nc_patch.budget import budget_of
from nc_patch.common import check_directory
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C
from nc_patch.ops.triton.split import share
from nc_patch.selections.block.block import Block
from nc_patch.selections.block.decode import decode_tiles
from nc_patch.selections.topk.plan import Sizes, plan_for

# Llama-3-8B: one layer, batch 1.
QUERY_HEADS, KV_HEADS, HEAD_DIM, ELEMENT = 32, 8, 128, 2
GROUP, ROW = QUERY_HEADS // KV_HEADS, HEAD_DIM * ELEMENT
MULTIPROCESSORS, SCHEDULERS, WARPS = 132, 4, 4
_RESULTS = Path("docs/results")
# Instructions of a warp: of a program besides its loops, and of a loop for one tile.
PREPARE, PREPARE_TILE = 2000, 438
GUESS, GUESS_PASS = 350, 30
SCAN, SCAN_TILE = 2279, 488
SCORE, SCORE_TILE = 1500, 133 + 34 + 104
CHOOSE, CHOOSE_PASS, CHOOSE_COUNT = 700, 300, 137
GATHER, GATHER_TILE, PAGES_TILE = 1600, 371, 555
PAGE_SCORE, PAGE_SCORE_TILE = 2200, 828
PAGE_CHOOSE, PAGE_CHOOSE_TILE = 700, 500
PAGE_ATTEND, PAGE_ATTEND_TILE = 1000, 544
# Passes of a search: of a guess, and about as many as part what reaches it.
_GUESS_PASSES, _CHOOSE_PASSES = 10, 10


class Kernel(NamedTuple):
    """One launch: programs, megabytes read and written, thousands of instructions issued, and what waits in it."""

    name: str
    programs: int
    megabytes: float
    kiloinstructions: float
    accesses: int
    steps: int = 0

    def microseconds(self, assumed: argparse.Namespace) -> float:
        """See the module; a kernel of few programs issues on as many multiprocessors alone."""
        busy = min(self.programs, MULTIPROCESSORS) * SCHEDULERS
        issue = self.kiloinstructions * 1e3 / (busy * assumed.clock_ghz * 1e3 * assumed.issue)
        memory = self.megabytes / assumed.memory_tb
        return float(
            assumed.launch_us + self.accesses * assumed.access_us + self.steps * assumed.step_us + max(issue, memory)
        )


def topk_kernels(n: int, found: dict[str, float]) -> list[Kernel]:
    """The launches of a step of ``topk`` with means over n keys; ``found`` are the means of candidates.json."""
    budget = int(found["budget"])
    plan = plan_for(Sizes(1, KV_HEADS, GROUP, 1, n, HEAD_DIM, HEAD_DIM), budget, has_tail=True)
    listed, chosen = KV_HEADS * budget * found["listed_union"], KV_HEADS * budget * found["chosen_union"]
    reached, slots, blocks = QUERY_HEADS * budget * found["reached_per_row"], KV_HEADS * n / 16, KV_HEADS
    splits, samples = blocks * plan.splits, KV_HEADS * plan.samples
    samplers = blocks * plan.options["prepare"]["SAMPLERS"]
    shape, pages = plan.options["gather"]["shape"], plan.options["gather"]["pages"]
    scored, gathered, paged = plan.options["score"]["shape"].BLOCK_N.value, shape.BLOCK_N.value, pages.BLOCK_N.value
    parts = QUERY_HEADS * plan.parts * (HEAD_DIM + 2) * 4
    held_warps = plan.options["choose"]["num_warps"]

    def kernel(name: str, programs: int, of_bytes: float, issued: float, *waits: int) -> Kernel:
        return Kernel(name, programs, of_bytes / 1e6, issued / 1e3, *waits)

    return [
        kernel(
            "prepare",
            samplers,
            samples * (HEAD_DIM + 32) + QUERY_HEADS * plan.samples * 4 + KV_HEADS * 33 * ROW,
            WARPS * (samplers * PREPARE + samples / plan.keys * PREPARE_TILE),
            3,
        ),
        kernel(
            "guess",
            QUERY_HEADS,
            QUERY_HEADS * (plan.samples * 4 + n / 4),
            QUERY_HEADS * 8 * (GUESS + _GUESS_PASSES * GUESS_PASS),
            2,
            _GUESS_PASSES,
        ),
        kernel(
            "scan",
            splits,
            KV_HEADS * n * (HEAD_DIM + 8) + listed * 4,
            WARPS * (splits * SCAN + KV_HEADS * n / plan.keys * SCAN_TILE),
            3,
        ),
        kernel(
            "score",
            splits,
            listed * (ROW + 4 + 8 * GROUP) + reached * 8,
            WARPS * (splits * SCORE + listed / scored * SCORE_TILE),
            5,
        ),
        kernel(
            "choose",
            QUERY_HEADS,
            reached * 12,
            held_warps * QUERY_HEADS * (CHOOSE + _CHOOSE_PASSES * CHOOSE_PASS)
            + held_warps * CHOOSE_COUNT * reached / 1024,
            3,
            _CHOOSE_PASSES,
        ),
        kernel(
            "gather",
            blocks * plan.parts,
            chosen * ROW + listed * (4 + 4 * GROUP) + slots * 2 * ROW + QUERY_HEADS * n / 4 + 2 * parts,
            WARPS * (blocks * plan.parts * GATHER + listed / gathered * GATHER_TILE + slots / paged * PAGES_TILE),
            6,
        ),
    ]


def block_kernels(n: int, budget: int) -> list[Kernel]:
    """The launches of a step of ``block`` over n keys."""
    size = Block().size
    pages, chosen = KV_HEADS * n / size, KV_HEADS * budget
    scoring, attending, scorers, attenders = decode_tiles(torch.bfloat16, HEAD_DIM, HEAD_DIM)
    score_programs = KV_HEADS * share(scorers, KV_HEADS, -(-n // size // scoring.keys))
    programs = KV_HEADS * share(attenders, KV_HEADS, -(-budget // attending.keys))
    logits = QUERY_HEADS * n / size * 4
    return [
        Kernel(
            "score_pages",
            score_programs,
            (pages * (3 * HEAD_DIM + 12) + logits) / 1e6,
            WARPS * (score_programs * PAGE_SCORE + pages / scoring.keys * PAGE_SCORE_TILE) / 1e3,
            3,
        ),
        Kernel(
            "choose_pages",
            KV_HEADS,
            logits * 1.5 / 1e6,
            8 * KV_HEADS * (PAGE_CHOOSE + n / size / 4096 * PAGE_CHOOSE_TILE * 2) / 1e3,
            3,
            16,
        ),
        Kernel(
            "attend_pages",
            programs,
            (chosen * 2 * ROW + 2 * programs * GROUP * (HEAD_DIM + 2) * 4) / 1e6,
            WARPS * (programs * PAGE_ATTEND + chosen / attending.keys * PAGE_ATTEND_TILE) / 1e3,
            6,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-tb", type=float, default=4.3, help="TB/s of device memory (assumed)")
    parser.add_argument("--clock-ghz", type=float, default=1.755, help="of the multiprocessors (assumed)")
    parser.add_argument("--issue", type=float, default=0.73, help="instructions a scheduler and clock (assumed)")
    parser.add_argument("--launch-us", type=float, default=1.2, help="from one kernel of a graph to the next (assumed)")
    parser.add_argument("--access-us", type=float, default=0.5, help="of an access that others wait for (assumed)")
    parser.add_argument("--step-us", type=float, default=0.25, help="of counting over a program's threads (assumed)")
    parser.add_argument("--out", type=Path, default=_RESULTS / "decode_counts.json")
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    candidates = json.loads((_RESULTS / "candidates.json").read_text())
    rows: list[dict[str, Any]] = []
    for n in sorted({row["n"] for row in candidates["rows"]}):
        of_length = [row for row in candidates["rows"] if row["n"] == n]
        found = {name: statistics.mean(row[name] for row in of_length) for name in of_length[0]}
        dense = 2 * n * KV_HEADS * ROW / (arguments.memory_tb * 1e6)
        budget = budget_of(n, candidates["alpha"], candidates["C"])
        for selection, kernels in (("topk", topk_kernels(n, found)), ("block", block_kernels(n, budget))):
            times = [kernel.microseconds(arguments) for kernel in kernels]
            of_kernels = [{**k._asdict(), "us": us} for k, us in zip(kernels, times, strict=True)]
            row = {"n": n, "selection": selection, "us": sum(times), "dense_us": dense, "kernels": of_kernels}
            row["megabytes"] = sum(kernel.megabytes for kernel in kernels)
            rows.append(row)
            print(
                f"{n:>9,} {selection:5} {sum(times):6.1f} us, {row['megabytes']:.0f} MB, dense {dense:.0f} us;", end=" "
            )
            print(", ".join(f"{k.name} {us:.1f}" for k, us in zip(kernels, times, strict=True)))
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": "none: predicted from counts, not measured",
        "assumed": {name: value for name, value in vars(arguments).items() if name != "out"},
        "law": {"alpha": candidates["alpha"], "C": candidates["C"], "default": [DEFAULT_ALPHA, DEFAULT_C]},
        "geometry": {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

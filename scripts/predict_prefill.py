"""Counts what block-sparse prefill computes and moves, predicts its times, and writes docs/results/prefill_counts.json.

The counts follow the kernels in ``nc_patch.selections.block.prefill``: tiles as they are launched, for the plan that
they are given. The times divide them by rates that are assumptions, given as arguments; nothing runs on a GPU.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.provenance import commit, versions
from nc_patch.common import check_directory
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.ops.problem import Problem, causal_intervals
from nc_patch.selections.block.blocks import BlockOptions, BlockPlan, make_plan
from nc_patch.selections.block.prefill import block_tiles, score_chunks

# Llama-3-8B: one layer of 32, which share a plan; batch 1.
LAYERS = 32
QUERY_HEADS, KV_HEADS, HEAD_DIM, ELEMENT = 32, 8, 128, 2
GROUP = QUERY_HEADS // KV_HEADS
MULTIPROCESSORS, SCHEDULERS = 132, 4
# Scores that a program of ``choose`` looks at in one step of its loop.
CHOICE_TILE = 16 * 128


def plan_of_prompt(n: int, options: BlockOptions, law: NCConfig) -> BlockPlan:
    """The plan of one causal prompt of n tokens; keys have a shape and no memory."""
    visible = causal_intervals(1, n, n, "cpu")
    key = torch.empty(1, KV_HEADS, 1, 1).expand(1, KV_HEADS, n, 1)
    origin = visible[..., 0].contiguous()
    return make_plan(Problem(key, key, key, visible, origin, law.row_budgets(visible, n), scale=1.0), options)


def counts(n: int, options: BlockOptions, law: NCConfig) -> dict[str, float]:
    """FLOPs, bytes and exponentials of the three steps for one causal prompt of n tokens, and of dense attention."""
    tiles = block_tiles("sm_90", torch.bfloat16, HEAD_DIM, HEAD_DIM, options.size)
    plan = plan_of_prompt(n, options, law)
    first, last, high, width, samples = (plan.table[:, column].double() for column in (1, 2, 4, 7, 9))
    chunks = score_chunks(plan, KV_HEADS, GROUP, MULTIPROCESSORS)

    # A tile of scored rows, which begins anew in each chunk, runs over the keys of its last row.
    ends, tile_keys = plan.samples.double() + 1, 0.0
    per_tile = tiles.score.rows // GROUP
    for chunk in chunks:
        if chunk.samples:
            of_chunk = ends[chunk.first_sample : chunk.first_sample + chunk.samples]
            tile_keys += float(of_chunk[per_tile - 1 :: per_tile].sum())
            tile_keys += float(of_chunk[-1]) if len(of_chunk) % per_tile else 0.0
    scored = tiles.score.rows * tile_keys * KV_HEADS
    score_bytes = 4.0 * QUERY_HEADS * float((width * samples).sum())
    # No query block attends more keys than it sees.
    keys = torch.minimum(plan.law[:, 0].double() * options.size, high)
    rows = last - first
    attended = QUERY_HEADS * float((rows * keys).sum())
    row_tiles = -(-options.query_block_size * GROUP // tiles.attend.rows)
    gathered = 2 * HEAD_DIM * ELEMENT * KV_HEADS * float(keys.sum())
    return {
        "dense_flops": 4.0 * HEAD_DIM * QUERY_HEADS * n * (n + 1) / 2,
        "score_flops": 2.0 * HEAD_DIM * scored,
        "score_tiles": scored / (tiles.score.rows * tiles.score.keys),
        "score_key_bytes": HEAD_DIM * ELEMENT * KV_HEADS * tile_keys,
        "scored_share_of_rows": len(plan.samples) / n,
        "scores_written": score_bytes,
        "choose_bytes": score_bytes,
        "choose_tiles": score_bytes / 4 / CHOICE_TILE,
        "attend_flops": 4.0 * HEAD_DIM * attended,
        "attend_tiles": attended / (tiles.attend.rows * tiles.attend.keys),
        "attend_bytes_from_cache": row_tiles * gathered,
        "attend_bytes_from_memory_at_most": gathered,
        "mean_keys": float(keys.mean()),
        "attended_share": attended / (QUERY_HEADS * n * (n + 1) / 2),
        "query_blocks_without_scores": int((samples == 0).sum()),
        "score_chunks": len(chunks),
        "block_indices_bytes": 4.0 * KV_HEADS * len(plan.listed) * plan.capacity,
    }


def times(found: dict[str, float], rates: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each step; each is matrix instructions, others that are issued, and bytes.

    ``sparse`` has them one after the other where a program has a multiprocessor for itself (attend), and side by side
    where two share it (score); ``sparse_at_best`` has them side by side everywhere.
    """
    # Kernels reach the part of what can be issued that the dense one reaches.
    reached = rates.dense_tflops / rates.matrix_tflops
    clock, matrix = reached * rates.clock_ghz * 1e9, rates.dense_tflops * 1e12
    memory, cache = rates.memory_tb * 1e12, rates.cache_tb * 1e12

    def issued(tiles: float, instructions: float, warps: int) -> float:
        return tiles * warps * instructions / (SCHEDULERS * MULTIPROCESSORS * clock)

    score = max(
        found["score_flops"] / matrix,
        issued(found["score_tiles"], rates.score_instructions, 8),
        found["score_key_bytes"] / cache,
    )
    products = found["attend_flops"] / matrix
    others = issued(found["attend_tiles"], rates.attend_instructions, 8)
    moved = max(found["attend_bytes_from_cache"] / cache, found["attend_bytes_from_memory_at_most"] / memory)
    choose = max(
        (found["scores_written"] + found["choose_bytes"]) / memory,
        issued(found["choose_tiles"], rates.choose_instructions, 4),
    )
    fixed = (2 * found["score_chunks"] * rates.launch_us + rates.host_us / LAYERS) * 1e-6
    steps = {"score": score, "choose": choose, "attend": max(products + others, moved), "fixed": fixed}
    milliseconds = {name: 1e3 * x for name, x in steps.items()}
    milliseconds["dense"] = 1e3 * found["dense_flops"] / (rates.dense_tflops * 1e12)
    milliseconds["sparse"] = 1e3 * sum(steps.values())
    at_best = steps | {"attend": max(products, others, moved)}
    milliseconds["sparse_at_best"] = 1e3 * sum(at_best.values())
    for name in ("sparse", "sparse_at_best"):
        milliseconds[name.replace("sparse", "ratio")] = milliseconds["dense"] / milliseconds[name]
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072, 524288, 1048576])
    parser.add_argument("--alpha", type=float, default=12.0)
    parser.add_argument("--C", type=float, default=0.5)
    parser.add_argument("--dense-below", type=int, default=DEFAULT_DENSE_BELOW)
    parser.add_argument("--query-block-size", type=int, default=BlockOptions.query_block_size)
    parser.add_argument("--block-size", type=int, default=BlockOptions.size)
    parser.add_argument("--strides", type=int, nargs="+", default=[0], help="0: as the budget has it")
    parser.add_argument("--dense-tflops", type=float, default=600.0, help="of the fastest dense kernel (assumed)")
    parser.add_argument("--matrix-tflops", type=float, default=989.0, help="of matrix instructions alone")
    parser.add_argument("--clock-ghz", type=float, default=1.755)
    counted = "of a warp in the loop over whole tiles, counted in the code for sm_90 (head_dim 128, 16 keys)"
    parser.add_argument("--score-instructions", type=float, default=333, help=counted)
    parser.add_argument("--choose-instructions", type=float, default=264, help=counted)
    parser.add_argument("--attend-instructions", type=float, default=442, help=counted)
    parser.add_argument("--memory-tb", type=float, default=4.3, help="TB/s of device memory")
    parser.add_argument("--cache-tb", type=float, default=5.5, help="TB/s of the second level cache (assumed)")
    parser.add_argument("--launch-us", type=float, default=3.0, help="of a kernel in a chunk (assumed)")
    parser.add_argument("--host-us", type=float, default=300.0, help="of the plan (assumed)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/prefill_counts.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    rows: list[dict[str, Any]] = []
    law = NCConfig(arguments.alpha, arguments.C, dense_below=arguments.dense_below)
    for stride in arguments.strides:
        options = BlockOptions(arguments.block_size, arguments.query_block_size, stride or None)
        for n in arguments.lengths:
            found = counts(n, options, law)
            predicted = times(found, arguments)
            rows.append({"n": n, "sample_stride": options.sample_stride, "predicted_ms": predicted, "counts": found})
            print(
                f"n {n:>7} stride {stride or 'law':>3}", *(f"{name} {value:.2f}" for name, value in predicted.items())
            )
    assumed = {name: value for name, value in vars(arguments).items() if name not in ("out", "lengths", "strides")}
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": "none: predicted from counts, not measured",
        "assumed": assumed,
        "geometry": {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Counts what block-sparse prefill computes and moves, predicts its times, and writes docs/results/prefill_counts.json.

The counts follow the kernels in ``nc_patch.selections.block.prefill``: tiles as they are launched, budgets as the
law gives them. The times divide them by rates that are assumptions, given as arguments; nothing runs on a GPU.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.provenance import commit, versions
from nc_patch.budget import budgets
from nc_patch.common import check_directory
from nc_patch.selections.block.prefill import block_tiles, score_chunks

# Llama-3-8B: one layer, batch 1.
QUERY_HEADS, KV_HEADS, HEAD_DIM, ELEMENT = 32, 8, 128, 2
GROUP = QUERY_HEADS // KV_HEADS
EXP_PER_CLOCK, MULTIPROCESSORS, CLOCK = 16, 132, 1.7e9


def counts(n: int, alpha: float, C: float, query_block: int, block: int, stride: int) -> dict[str, float]:
    """FLOPs, bytes and exponentials of the three steps for one causal prompt of n tokens, and of dense attention."""
    tiles = block_tiles("sm_90", torch.bfloat16, HEAD_DIM, HEAD_DIM, block)
    ends = torch.arange(query_block, n + query_block, query_block).clamp(max=n)
    widths = (ends + block - 1) // block
    keys_of = torch.from_numpy(budgets(ends.numpy(), alpha, C))
    always = 1 + (query_block + block - 1) // block
    blocks = torch.minimum(torch.maximum((keys_of + block - 1) // block, torch.tensor(always)), widths)
    keys = blocks.double() * block

    slots = query_block // stride
    per_tile = max(1, tiles.score.rows // (slots * GROUP))
    tile_keys = ends[torch.arange(per_tile - 1, len(ends) + per_tile - 1, per_tile).clamp(max=len(ends) - 1)].double()
    scored = tiles.score.rows * float(tile_keys.sum()) * KV_HEADS
    score_bytes = 4.0 * slots * QUERY_HEADS * float(widths.sum())
    row_tiles = -(-query_block * GROUP // tiles.attend.rows)
    attended = query_block * QUERY_HEADS * float(keys.sum())
    gathered = 2 * HEAD_DIM * ELEMENT * KV_HEADS * float(keys.sum())
    chunks = score_chunks(widths.tolist(), KV_HEADS, slots * GROUP, MULTIPROCESSORS)
    return {
        "dense_flops": 4.0 * HEAD_DIM * QUERY_HEADS * n * (n + 1) / 2,
        "score_flops": 2.0 * HEAD_DIM * scored,
        "score_exponentials": scored,
        "score_key_bytes": HEAD_DIM * ELEMENT * KV_HEADS * float(tile_keys.sum()),
        "scores_written": score_bytes,
        "choose_bytes": 3 * score_bytes,
        "attend_flops": 4.0 * HEAD_DIM * attended,
        "attend_bytes_from_cache": row_tiles * gathered,
        "attend_bytes_from_memory_at_most": gathered,
        "mean_keys": float(keys.mean()),
        "attended_share": attended / (QUERY_HEADS * n * (n + 1) / 2),
        "score_chunks": len(chunks),
        "block_indices_bytes": 4.0 * KV_HEADS * len(widths) * int(blocks.max()),
    }


def times(found: dict[str, float], rates: argparse.Namespace, efficiency: float) -> dict[str, float]:
    """Milliseconds of each step where scoring and attending reach ``efficiency`` of the dense kernel's FLOP rate."""
    dense_rate = rates.dense_tflops * 1e12
    reached = efficiency * dense_rate
    memory, cache = rates.memory_tb * 1e12, rates.cache_tb * 1e12
    exp_rate = EXP_PER_CLOCK * MULTIPROCESSORS * CLOCK
    score = max(
        found["score_flops"] / reached,
        found["score_exponentials"] / exp_rate,
        found["score_key_bytes"] / cache,
    )
    attend = max(
        found["attend_flops"] / reached,
        found["attend_bytes_from_cache"] / cache,
        found["attend_bytes_from_memory_at_most"] / memory,
    )
    choose = (found["scores_written"] + found["choose_bytes"]) / memory
    fixed = (2 * found["score_chunks"] * rates.launch_us + rates.host_us) * 1e-6
    milliseconds = {name: 1e3 * x for name, x in (("score", score), ("choose", choose), ("attend", attend))}
    milliseconds |= {"fixed": 1e3 * fixed, "dense": 1e3 * found["dense_flops"] / dense_rate}
    milliseconds["sparse"] = sum(milliseconds[name] for name in ("score", "choose", "attend", "fixed"))
    return milliseconds | {"ratio": milliseconds["dense"] / milliseconds["sparse"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--C", type=float, default=0.6)
    parser.add_argument("--query-block-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--strides", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--dense-tflops", type=float, default=600.0, help="of the fastest dense kernel (assumed)")
    parser.add_argument("--efficiencies", type=float, nargs="+", default=[0.55, 0.7], help="of that (assumed)")
    parser.add_argument("--memory-tb", type=float, default=4.3, help="TB/s of device memory")
    parser.add_argument("--cache-tb", type=float, default=5.5, help="TB/s of the second level cache (assumed)")
    parser.add_argument("--launch-us", type=float, default=3.0, help="of a kernel in a chunk (assumed)")
    parser.add_argument("--host-us", type=float, default=300.0, help="of the table of query blocks (assumed)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/prefill_counts.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    rows: list[dict[str, Any]] = []
    for stride in arguments.strides:
        for n in arguments.lengths:
            found = counts(n, arguments.alpha, arguments.C, arguments.query_block_size, arguments.block_size, stride)
            for efficiency in arguments.efficiencies:
                predicted = times(found, arguments, efficiency)
                rows.append({"n": n, "sample_stride": stride, "efficiency": efficiency, "predicted_ms": predicted})
                print(
                    f"n {n:>7} stride {stride:>2} efficiency {efficiency:.2f}",
                    *(f"{k} {v:.2f}" for k, v in predicted.items()),
                )
            rows[-1]["counts"] = found
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

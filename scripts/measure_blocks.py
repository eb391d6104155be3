"""Compares ways to choose the key blocks of block prefill, and writes docs/results/blocks.json.

The queries, keys and values are those of one dense forward pass of SmolLM2 over each text. Runs of 128 rows that end
at the given lengths choose blocks in every way and attend them; the output error is
``||o - o_dense|| / ||o_dense||`` over the rows and heads of a layer, the kept mass the mean over rows and heads, both
averaged over layers, runs and texts. Attended is the mean number of keys a row attends. What choosing costs is counted
in multiplications relative to the scores of every row against every key.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from operations import torch_topk_attention

from eval_tasks.capture import Captured, capture, token_ids
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch.budget import row_budgets
from nc_patch.common import check_directory
from nc_patch.ops.problem import Problem
from nc_patch.ops.rows import Buffers
from nc_patch.selections.block.blocks import (
    BlockChoice,
    BlockSettings,
    QueryBlocks,
    always_attended,
    block_of_rows,
    law_counts,
    query_block_table,
    sampled_rows,
)
from nc_patch.selections.block.torch_attend import attend_blocks
from nc_patch.selections.block.torch_choose import block_shares

LAYERS = (0, 1, 3, 6, 10, 14, 18, 22, 26, 29)
ALPHAS, EXPONENT = (1.0, 2.0, 4.0, 8.0), 0.6
RUN = 128  # rows that choose at a time, a multiple of every query block size
# The comparisons of one thing at a time are made around this choice.
BASE = BlockSettings()


@dataclass(frozen=True)
class Rows:
    """One run of rows of one layer: query ``[1, Hq, RUN, D]``, key and value ``[1, Hkv, n, D]`` up to the last row."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    visible: torch.Tensor
    dense_output: torch.Tensor
    dense_lse: torch.Tensor


@dataclass(frozen=True)
class Way:
    """A way to choose: how blocks are cut, how many rows are scored, and how their scores make a block's weight."""

    name: str
    settings: BlockSettings
    weigh: str = "sum"
    per_head: bool = False

    def cost(self) -> float:
        """Multiplications to choose by, relative to the scores of every row against every key."""
        return 1.0 / self.settings.sample_stride


def ways() -> list[Way]:
    """What is compared: rows scored at several costs, sizes of blocks, and what makes a weight."""
    found = [Way("every row", replace(BASE, sample_stride=1))]
    for stride in (4, 8, 16, 32, 64):
        found.append(Way("sampled rows", replace(BASE, sample_stride=stride)))
    for query_block_size in (64, 128):
        for block_size in (16, 32, 64, 128):
            settings = replace(BASE, query_block_size=query_block_size, block_size=block_size)
            found += [Way("sizes", settings), Way("sizes, every row", replace(settings, sample_stride=1))]
    found += [Way(f"weight: {name}", BASE, name) for name in WEIGHTS]
    found += [
        Way("per head", BASE, per_head=True),
        Way("per head, every row", replace(BASE, sample_stride=1), "sum", True),
    ]
    return found


# How a block's shares [n, Hkv, G, S, K] become its weight [n, Hkv, K].
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda shares: shares.sum((2, 3)),
    "largest over heads": lambda shares: shares.sum(3).amax(2),
    "largest over rows": lambda shares: shares.sum(2).amax(2),
    "largest over rows and heads": lambda shares: shares.amax((2, 3)),
    "root": lambda shares: shares.sqrt().sum((2, 3)),
    "by the norm of values": lambda shares: shares.sum((2, 3)),
}


def rows_of(captured: Captured, length: int) -> Rows:
    """The run of rows that ends at ``length``, and dense attention of it."""
    query, key, value, scale = captured
    query, key, value = query[:, :, length - RUN : length], key[:, :, :length], value[:, :, :length]
    end = torch.arange(length - RUN + 1, length + 1, dtype=torch.int32)
    visible = torch.stack((torch.zeros_like(end), end), -1)[None]
    group = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(group, 1).mT
    scores.masked_fill_(torch.arange(length) >= end[:, None], -torch.inf)
    output = torch.softmax(scores, -1) @ value.repeat_interleave(group, 1)
    return Rows(query, key, value, scale, visible, output, torch.logsumexp(scores, -1))


def chosen(problem: Problem, rows: Rows, way: Way, table: QueryBlocks) -> BlockChoice:
    """The blocks that query blocks choose; the problem has a key of every query head where they choose apart."""
    settings, size, key = way.settings, way.settings.block_size, problem.key
    Hkv, n = key.shape[1], table.first.shape[0]
    origin = rows.visible[..., 0]
    blocks = -(-key.shape[2] // size)
    sampled = sampled_rows(table, rows.visible, origin, settings.sample_stride)[0].nonzero()[:, 0]
    padded = torch.nn.functional.pad(key[0], (0, 0, 0, blocks * size - key.shape[2]))
    query, seen = rows.query[0, :, sampled], rows.visible[0, sampled]
    if way.weigh == "by the norm of values":
        shares = by_norm(query, padded, seen, rows, size)
    else:
        shares = block_shares(problem, query, padded, seen, size, Buffers(0, key.device))
    # Query blocks follow each other, and every one has as many sampled rows as the others.
    shares = shares.view(Hkv, -1, n, sampled.shape[0] // n, blocks)
    weight = WEIGHTS[way.weigh](shares.permute(2, 0, 1, 3, 4))
    counts = law_counts(problem, table, block_of_rows(table, 1, RUN), size)
    lowest, diagonal, highest = always_attended(table, rows.visible, size)
    block = torch.arange(blocks)
    forced = (block == lowest[:, None]) | ((block >= diagonal[:, None]) & (block <= highest[:, None]))
    weight = weight.masked_fill(forced[:, None], torch.inf).masked_fill((block > highest[:, None])[:, None], -1.0)
    counts = torch.maximum(counts, forced.sum(-1, dtype=torch.int32)[:, None]).minimum(highest[:, None] + 1)
    order = torch.sort(weight, dim=-1, descending=True, stable=True).indices[..., : int(counts.max())]
    order = torch.where(torch.arange(order.shape[-1]) < counts[..., None], order, blocks).sort(-1).values
    return BlockChoice(torch.where(order < blocks, order, -1).int(), counts)


def by_norm(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, rows: Rows, block_size: int) -> torch.Tensor:
    """As ``block_shares``, with each key's share weighed by the norm of its value."""
    group = query.shape[0] // key.shape[0]
    scores = rows.scale * query @ key.repeat_interleave(group, 0).mT
    scores.masked_fill_(torch.arange(key.shape[1]) >= seen[:, 1:], -torch.inf)
    norm = torch.nn.functional.pad(rows.value[0].norm(dim=-1), (0, key.shape[1] - rows.value.shape[2]))
    weights = torch.softmax(scores, -1) * norm.repeat_interleave(group, 0)[:, None]
    return weights.unflatten(-1, (-1, block_size)).sum(-1)


def loss(rows: Rows, way: Way, alpha: float) -> tuple[float, float, float]:
    """Output error, kept mass and attended keys of one way at one budget."""
    group = rows.query.shape[1] // rows.key.shape[1]
    key, value = rows.key, rows.value
    if way.per_head:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    budget = row_budgets(rows.visible, rows.key.shape[2], [alpha], [EXPONENT], 1)
    table = query_block_table(rows.visible, rows.visible[..., 0], way.settings.query_block_size)
    tensors = (rows.query, key, value, rows.visible, rows.visible[..., 0], budget)
    problem = Problem(*tensors, scale=rows.scale, stats=True)
    choice = chosen(problem, rows, way, table)
    result = attend_blocks(problem, table, choice, way.settings.block_size)
    kept = torch.exp(result.lse - rows.dense_lse).mean()
    return error(result.output, rows), float(kept), float(result.attended.float().mean())


def topk_loss(rows: Rows, alpha: float) -> tuple[float, float, float]:
    """The same of exact token-level top-k."""
    budget = row_budgets(rows.visible, rows.key.shape[2], [alpha], [EXPONENT], 1)
    output, _, kept = torch_topk_attention(
        *(rows.query, rows.key, rows.value, rows.visible, budget, None),
        scale=rows.scale,
        softcap=0.0,
        sink_keys=4,
        recent_keys=1,
        want_stats=True,
    )
    return error(output, rows), float(kept.mean()), float(budget.float().mean())


def error(output: torch.Tensor, rows: Rows) -> float:
    return float((output - rows.dense_output).norm() / rows.dense_output.norm())


def measure(runs: Sequence[Rows], length: int) -> list[dict[str, Any]]:
    """A row for each way and budget: means over the runs, which end at ``length``."""
    found = []
    for alpha in ALPHAS:
        for way in [None, *ways()]:
            losses = torch.tensor([topk_loss(rows, alpha) if way is None else loss(rows, way, alpha) for rows in runs])
            mean = losses.mean(0).tolist()
            described = {"way": "exact top-k", "cost": 1.0} if way is None else describe(way)
            found.append(
                {"n": length, "alpha": alpha, "C": EXPONENT, **described}
                | dict(zip(("output_error", "kept_mass", "attended"), mean, strict=True))
                | {"output_error_by_layer": losses[:, 0].tolist()}
            )
    return found


def describe(way: Way) -> dict[str, Any]:
    """What a way is, for a row of the results."""
    settings = way.settings
    return {
        "way": way.name,
        "cost": way.cost(),
        "query_block_size": settings.query_block_size,
        "block_size": settings.block_size,
        "sample_stride": settings.sample_stride,
    }


def show(results: Sequence[dict[str, Any]], alpha: float) -> None:
    """Prints output error and kept mass at one alpha, a length beside the other."""
    lengths = sorted({row["n"] for row in results})
    print(f"{'way':34} {'query':>5} {'block':>5} {'stride':>6}", *(f"{f'n = {n}':>15}" for n in lengths))
    table: dict[tuple[Any, ...], dict[int, list[tuple[float, float]]]] = {}
    for row in results:
        if row["alpha"] == alpha:
            line = (row["way"], *(row.get(name) or "" for name in ("query_block_size", "block_size", "sample_stride")))
            table.setdefault(line, {}).setdefault(row["n"], []).append((row["output_error"], row["kept_mass"]))
    for line, by_length in table.items():
        figures = ("{:7.4f} {:7.4f}".format(*torch.tensor(by_length[n]).mean(0).tolist()) for n in lengths)
        print("{:34} {:>5} {:>5} {:>6}".format(*line), *figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="+", default=["python-reference"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/blocks.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model, "float32", "cpu")
    texts = [load_text(name) for name in arguments.texts]
    results: list[dict[str, Any]] = []
    begin = time.perf_counter()
    with torch.inference_mode():
        for text in texts:
            ids = token_ids(loaded.tokenizer, text, max(arguments.lengths))
            captured = capture(loaded.model, ids, arguments.layers)
            for length in arguments.lengths:
                runs = [rows_of(layer, length) for layer in captured]
                results += [{"text": text.name, **row} for row in measure(runs, length)]
    show(results, 4.0)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "seconds": time.perf_counter() - begin,
        "model": arguments.model,
        "texts": [{"name": text.name, "origin": text.origin, "sha256": text.sha256} for text in texts],
        "layers": arguments.layers,
        "rows": RUN,
        "results": results,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

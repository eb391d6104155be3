"""Measures what decoding by pages loses, as built, and writes docs/results/pages_kept.json.

Three things. The output error of ``sparse_attention`` over a ``KeyIndex`` on the real queries and keys of a model, as
``measure_pages.py`` defines it. The same for statistics like the one that is kept, in 8 and 4 bits, also where three
channels carry a constant as large as those of models with outlier channels: softmax does not see it, codes do. And the
perplexity of a text's second half, decoded 32 tokens at a time after a dense first half.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure_pages import LAYERS, STATISTICS, Layer, Measured, late_rows
from transformers import DynamicCache

from eval_tasks.capture import capture, token_ids
from eval_tasks.models import LoadedModel, load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import KeyIndex, patched, sparse_attention
from nc_patch.common import check_directory
from nc_patch.ops.problem import MAX_DECODE_QUERIES

LAW = (4.0, 0.6)
COMPARED = tuple(name for name in STATISTICS if name == "mean + var/2" or name.startswith("1 key apart: "))
# Channels that get a constant, and its sign.
OFFSET_CHANNELS = {0: 1.0, 1: 1.0, 40: -1.0}


def with_offset(layer: Layer, size: float) -> Layer:
    """The layer with ``size`` standard deviations added to a few channels of its keys."""
    key = layer.key.clone()
    for channel, sign in OFFSET_CHANNELS.items():
        key[:, :, channel] += sign * size * key[:, :, channel].std(1, keepdim=True)
    return Layer(layer.query, key, layer.value, layer.positions, layer.scale)


def operator_output(layer: Layer, block_size: int) -> torch.Tensor:
    """What ``sparse_attention`` makes of the layer's queries with an index of its keys: ``[Hkv, G, Q, Dv]``."""
    query, key, value = (x[None] for x in (layer.query.flatten(0, 1), layer.key, layer.value))
    index = KeyIndex.build(key, "pages", block_size=block_size)
    parts = []
    for first in range(0, len(layer.positions), MAX_DECODE_QUERIES):
        some = slice(first, first + MAX_DECODE_QUERIES)
        end = layer.positions[some].int() + 1
        parts.append(
            sparse_attention(
                *(query[:, :, some], key, value),
                alpha=LAW[0],
                C=LAW[1],
                selection="block",
                scale=layer.scale,
                visible=torch.stack((torch.zeros_like(end), end), -1)[None],
                index=index,
            )
        )
    return torch.cat(parts, 2)[0].unflatten(0, layer.query.shape[:2])


def output_errors(layers: Sequence[Layer], block_size: int, offset: float) -> list[dict[str, Any]]:
    """Mean output error of the operator and of the statistics compared."""
    errors: dict[str, list[float]] = {}
    for layer in layers:
        measured = Measured(with_offset(layer, offset) if offset else layer, block_size)
        error = measured.error(operator_output(measured.layer, block_size))
        errors.setdefault("operator", []).append(float(error.mean()))
        for name in COMPARED:
            loss = measured.loss(measured.chosen(measured.logits(STATISTICS[name]), LAW, "A"))
            errors.setdefault(name, []).append(float(loss[0].mean()))
    head_dim = layers[0].key.shape[-1]
    rows = []
    for name, found in errors.items():
        row = {"block_size": block_size, "offset": offset, "statistic": name, "output_error": sum(found) / len(found)}
        if name in STATISTICS:
            row["bytes_read"] = STATISTICS[name].bytes_read(block_size, head_dim)
        rows.append(row)
    return rows


def perplexity(loaded: LoadedModel, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Perplexity of the second half of ``ids``, read 32 tokens at a time behind a dense first half."""
    half = ids.shape[1] // 2
    cache, total = DynamicCache(), 0.0
    with torch.no_grad():
        loaded.model(ids[:, :half], past_key_values=cache, logits_to_keep=1)
        with patched(loaded.model, **options):
            for first in range(half, ids.shape[1] - 1, MAX_DECODE_QUERIES):
                last = min(first + MAX_DECODE_QUERIES, ids.shape[1] - 1)
                logits = loaded.model(ids[:, first:last], past_key_values=cache).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits, ids[0, first + 1 : last + 1], reduction="sum"))
    return math.exp(total / (ids.shape[1] - 1 - half))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--length", type=int, default=8000)
    parser.add_argument("--queries", type=int, default=48, help="evenly spaced in the last fifth of the text")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--offsets", type=float, nargs="+", default=[0.0, 30.0])
    parser.add_argument("--perplexity-length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("docs/results/pages_kept.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    loaded = load_model(arguments.model, "float32", "cpu")
    text = load_text(arguments.text)
    begin = time.perf_counter()
    ids = token_ids(loaded.tokenizer, text, arguments.perplexity_length)
    perplexities = []
    for options in (
        {"selection": "dense"},
        {"prefill": "dense", "decode": "block"},
        {"prefill": "dense", "decode": "topk"},
    ):
        found = perplexity(loaded, ids, {"alpha": LAW[0], "C": LAW[1], "dense_below": 0, **options})
        perplexities.append({**options, "perplexity": found})
        print(options, f"perplexity {found:.4f}", flush=True)
    ids = token_ids(loaded.tokenizer, text, arguments.length)
    layers = late_rows(capture(loaded.model, ids, LAYERS), arguments.queries)
    rows = []
    with torch.inference_mode():
        for block_size in arguments.block_sizes:
            for offset in arguments.offsets:
                for row in output_errors(layers, block_size, offset):
                    rows.append(row)
                    print("{block_size:4d} {offset:5.0f}  {statistic:40} {output_error:.4f}".format(**row), flush=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "seconds": time.perf_counter() - begin,
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "tokens": arguments.length,
        "layers": LAYERS,
        "queries": arguments.queries,
        "alpha": LAW[0],
        "C": LAW[1],
        "perplexity": {"tokens": arguments.perplexity_length, "scored": "second half", "results": perplexities},
        "results": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

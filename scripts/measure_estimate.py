"""Compares the estimated dropped mass of block prefill with the true one, and writes docs/results/estimate.json.

On the queries and keys of one dense forward pass, α = 4, C = 0.6: per layer the estimate, the truth, the mean standard
error of a head, and the largest error of a head.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from measure_blocks import LAYERS

from eval_tasks.capture import capture, token_ids
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import sparse_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--length", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/estimate.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded, text = load_model(arguments.model, "float32", "cpu"), load_text(arguments.text)
    captured = capture(loaded.model, token_ids(loaded.tokenizer, text, arguments.length), LAYERS)
    rows = []
    for layer, (query, key, value, _) in zip(LAYERS, captured, strict=True):
        with torch.inference_mode():
            result = sparse_attention(query, key, value, alpha=4.0, C=0.6, selection="block", return_stats=True)
        number, kept, squares, *_ = result.block_estimate.double().unbind(-1)
        estimate, true = 1 - kept / number, 1 - result.kept_mass.double().mean((0, 2))
        error = ((squares / number - (kept / number).square()).clamp(min=0) / (number - 1)).sqrt()
        row = {"layer": layer, "estimate": float(estimate.mean()), "true": float(true.mean())}
        row |= {"standard_error": float(error.mean()), "largest_error": float((estimate - true).abs().max())}
        rows.append(row)
        print(layer, *(f"{name} {row[name]:.4f}" for name in list(row)[1:]), flush=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "tokens": arguments.length,
        "results": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Perplexity and recall perplexity of SmolLM2 with block prefill, and writes docs/results/block_quality.json.

The tasks are those of ``nc-patch eval``: the last 256 tokens under a growing context, and a passage of 256 tokens,
filler and the passage again. Every figure is over the same samples for all methods; figures that the file holds already
are kept, so that lengths and methods can be added.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.measure import measure
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.tasks import TASKS, Layout, places, tokenise
from eval_tasks.texts import load_text
from nc_patch import NCConfig
from nc_patch.common import check_directory


def block(**options: Any) -> NCConfig:
    """Block attention at the budget that is measured throughout."""
    return NCConfig(4.0, 0.6, selection="block", dense_below=0, **options)


METHODS: dict[str, NCConfig | None] = {
    "dense": None,
    "block": block(),
    "keys 16": block(block_size=16),
    "keys 64": block(block_size=64),
    "keys 16, queries 128": block(block_size=16, query_block_size=128),
    "keys 16, stride 8": block(block_size=16, sample_stride=8),
    "keys 16, min_mass 0.9": block(block_size=16, min_mass=0.9),
    "min_mass 0.9": block(min_mass=0.9),
    "keys 16, stride 8, min_mass 0.9": block(block_size=16, sample_stride=8, min_mass=0.9),
    "keys 16, min_mass 0.95": block(block_size=16, min_mass=0.95),
    "window, 4 sinks": NCConfig(4.0, 0.6, selection="window", sink_keys=4, dense_below=0),
    "topk": NCConfig(4.0, 0.6, selection="topk", dense_below=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tasks", nargs="+", default=["perplexity", "recall"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/block_quality.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model, "float32", "cpu")
    source = load_text(arguments.text)
    text = tokenise(loaded.tokenizer, source.content)
    record: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "text": {"name": source.name, "origin": source.origin, "sha256": source.sha256},
        "samples": arguments.samples,
        "results": json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else [],
    }
    done = {(row["n"], row["task"], row["method"], row["samples"]) for row in record["results"]}
    for length in arguments.lengths:
        layout = Layout(lengths=(length,), samples=arguments.samples, scored=256, passage=256, seed=0)
        for task in arguments.tasks:
            for name in arguments.methods:
                if (length, task, name, arguments.samples) in done:
                    continue
                config = METHODS[name]
                found = [
                    measure(loaded.model, config, TASKS[task].build(text, place, length, layout))
                    for place in places(text, layout)
                ]
                perplexity = math.exp(sum(m.loss_sum for m in found) / sum(m.tokens for m in found))
                row = {"n": length, "task": task, "method": name, "samples": arguments.samples}
                row |= {"command": shlex.join(["python", *sys.argv]), "commit": commit()}
                row |= {"perplexity": perplexity, "config": None if config is None else config.to_dict()}
                row["attended_fraction"] = sum(m.attended_fraction for m in found) / len(found)
                record["results"].append(row)
                print(f"{length:6d} {task:10} {name:32} {perplexity:8.3f} {row['attended_fraction']:6.3f}", flush=True)
                arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

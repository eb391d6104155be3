"""Measures what the defaults of patch_model rest on, and writes docs/results/defaults.json.

On a real model, at each length: perplexity of the last tokens of a text, recall perplexity (a passage, filler, the
passage again), what was attended, and the time of the forward pass as a ratio to dense attention on the same sample,
run next to it. What is in the file already is not measured again, unless its times are asked for.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from eval_tasks.measure import Measurement, measure, warm_up
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.tasks import TASKS, Layout, places, tokenise
from eval_tasks.texts import load_text
from nc_patch import NCConfig
from nc_patch.common import check_directory

SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "window 4 n^0.6": {"alpha": 4.0, "C": 0.6, "selection": "window"},
    "topk 1 n^0.5, drop": {"alpha": 1.0, "C": 0.5, "tail": "drop"},
    "topk 2 n^0.5, drop": {"alpha": 2.0, "C": 0.5, "tail": "drop"},
    "topk 2 n^0.6, drop": {"alpha": 2.0, "C": 0.6, "tail": "drop"},
    "topk 4 n^0.6, drop": {"alpha": 4.0, "C": 0.6, "tail": "drop"},
    "topk 1 n^0.5, mean": {"alpha": 1.0, "C": 0.5, "tail": "mean"},
    "topk 2 n^0.5, mean": {"alpha": 2.0, "C": 0.5, "tail": "mean"},
    "topk 2 n^0.6, mean": {"alpha": 2.0, "C": 0.6, "tail": "mean"},
    "topk 4 n^0.6, mean": {"alpha": 4.0, "C": 0.6, "tail": "mean"},
    "block 4 n^0.6": {"alpha": 4.0, "C": 0.6, "selection": "block"},
    "block 4 n^0.6, min_mass 0.9": {"alpha": 4.0, "C": 0.6, "selection": "block", "min_mass": 0.9},
}
MEASURED = ("perplexity", "recall")


def row_of(name: str, task: str, length: int, number: int, found: Measurement, dense_seconds: float) -> dict[str, Any]:
    """One line of the results."""
    return {
        "settings": name,
        "task": task,
        "length": length,
        "sample": number,
        "nats": found.loss_sum / found.tokens,
        "attended_fraction": found.attended_fraction,
        "seconds": found.seconds,
        "seconds_of_dense": dense_seconds,
    }


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """The results as Markdown: perplexity and recall perplexity by length, and the median ratio of times."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| |" + "".join(f" {n:,} |" for n in lengths), "|---|" + "---|" * len(lengths)]
    for name in names:
        cells = []
        for length in lengths:
            here = [row for row in rows if row["settings"] == name and row["length"] == length]
            parts = []
            for task in MEASURED:
                nats = [row["nats"] for row in here if row["task"] == task]
                parts.append(f"{math.exp(statistics.fmean(nats)):.2f}" if nats else "-")
            if here:
                parts.append(f"{statistics.median(row['seconds'] / row['seconds_of_dense'] for row in here):.2f}x")
                parts.append(f"{100 * statistics.fmean(row['attended_fraction'] for row in here):.0f} %")
            cells.append(" / ".join(parts))
        lines.append(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--longest", type=int, default=8192, help="decides where samples lie; keep it over runs")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--passage", type=int, default=128)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--times", action="store_true", help="measure again what is there, on a quiet machine")
    parser.add_argument("--out", type=Path, default=Path("docs/results/defaults.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    # Samples lie where the longest length needs them, whatever lengths a run measures.
    layout = Layout((arguments.longest,), arguments.samples, arguments.scored, arguments.passage, 0)
    loaded, text = load_model(arguments.model, "float32", "cpu"), load_text(arguments.text)
    tokens = tokenise(loaded.tokenizer, text.content)
    starts = places(tokens, layout)
    kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows: dict[tuple[str, str, int, int], dict[str, Any]] = {_key(row): row for row in kept}
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "layout": {"longest": arguments.longest, "scored": arguments.scored, "passage": arguments.passage, "seed": 0},
        "settings": SETTINGS,
    }
    for length in sorted(arguments.lengths):
        for task in MEASURED:
            for number, start in enumerate(starts):
                names = [
                    name for name in arguments.settings if arguments.times or (name, task, length, number) not in rows
                ]
                if not names:
                    continue
                sample = TASKS[task].build(tokens, start, length, layout)
                dense = None
                for name in ["dense", *(name for name in names if name != "dense")]:
                    options = SETTINGS[name]
                    config = None if options is None else NCConfig(**{"selection": "topk", "dense_below": 0, **options})
                    warm_up(loaded.model, config)
                    found = measure(loaded.model, config, sample)
                    dense = found.seconds if dense is None else dense
                    rows[name, task, length, number] = row_of(name, task, length, number, found, dense)
                    print(
                        f"{length:6} {task:10} {number} {name:28} {math.exp(found.loss_sum / found.tokens):9.3f}"
                        f" {found.seconds:7.2f} s {found.seconds / dense:6.2f}x",
                        flush=True,
                    )
                    arguments.out.write_text(json.dumps({**record, "rows": list(rows.values())}, indent=1) + "\n")
    print(table(list(rows.values()), [name for name in SETTINGS if any(key[0] == name for key in rows)]))


def _key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["settings"], row["task"], row["length"], row["sample"]


if __name__ == "__main__":
    main()

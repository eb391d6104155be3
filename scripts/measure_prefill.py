"""Measures perplexity and recall of prefill by length, and writes docs/results/prefill.json: what the defaults rest on.

Each row is one forward pass over one stretch of a text: the mean loss of its second half, or of a passage of 256 tokens
that it begins and ends with, and the share of the keys attended, to be compared with dense attention on the same
stretch. Rows that the file holds already are kept, so that lengths, texts and settings can be added. For example:

    python scripts/measure_prefill.py --texts python-reference moby-dick.txt --settings dense default --lengths 2048
"""

import argparse
import json
import math
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import NCConfig, nc_stats, patched
from nc_patch.common import check_directory
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

PASSAGE = 256
TASKS = ("perplexity", "recall")


def default(alpha: float = DEFAULT_ALPHA, C: float = DEFAULT_C, **options: Any) -> NCConfig:
    """The settings of ``patch_model(model)``, but for what is given."""
    return NCConfig(alpha, C, **options)


SETTINGS: dict[str, NCConfig | None] = {
    "dense": None,
    "default": default(),
    "alpha 8": default(8.0),
    "alpha 10": default(10.0),
    "alpha 16": default(16.0),
    "4 n^0.6": default(4.0, 0.6),
    "keys 32": default(block_size=32),
    "queries 32": default(query_block_size=32),
    "queries 128": default(query_block_size=128),
    "stride 1": default(sample_stride=1),
    "stride 4": default(sample_stride=4),
    "stride 8": default(sample_stride=8),
    "stride 16": default(sample_stride=16),
    "local 0": default(local_keys=0),
    "local 128": default(local_keys=128),
    # Weights are shares of softmax mass, as with ``min_mass``, where else the highest score of a block counts.
    "by mass": default(min_mass=1e-6, max_factor=1.0),
    "min_mass 0.9": default(8.0, min_mass=0.9),
    "dense_below 0": default(dense_below=0),
    "dense_below 512": default(dense_below=512),
    "topk 2 n^0.5": default(2.0, 0.5, selection="topk"),
    "topk 2 n^0.5, drop": default(2.0, 0.5, selection="topk", tail="drop"),
    "window": default(selection="window"),
}


def sample_of(tokens: torch.Tensor, task: str, start: int, length: int) -> tuple[torch.Tensor, int]:
    """Tokens ``[1, length]`` of a task, and how many of the last are scored."""
    stretch = tokens[start : start + length]
    if task == "perplexity":
        return stretch[None], length // 2
    passage, filler = stretch[:PASSAGE], stretch[PASSAGE : length - PASSAGE]
    return torch.cat((passage, filler, passage))[None], PASSAGE


@torch.inference_mode()
def measure(model: Any, config: NCConfig | None, ids: torch.Tensor, scored: int) -> dict[str, float]:
    """Nats a token and attended share of one forward pass."""
    with patched(model, config=config) if config else nullcontext():
        logits = model(ids, use_cache=False, logits_to_keep=scored).logits[0, :-1]
        share = nc_stats(model)["attended_fraction"] if config else 1.0
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1 - scored :]).item()
    return {"nats": nats, "attended": share}


def table(rows: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """Markdown: for each setting, task and length the mean and largest loss over dense, and the share."""
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for (settings, task, length, *where), row in rows.items():
        dense = rows.get(("dense", task, length, *where))
        if dense and settings != "dense":
            found.setdefault((task, settings, length), []).append((row["nats"] - dense["nats"], row["attended"]))
    lines = ["| task | settings | tokens | samples | over dense | worst | attended |", "|---|---|" + "---:|" * 5]
    for (task, settings, length), of_samples in sorted(found.items()):
        nats, shares = zip(*of_samples, strict=True)
        mean = math.exp(sum(nats) / len(nats))
        lines.append(
            f"| {task} | {settings} | {length:,} | {len(nats)} | {mean:.3f} | {math.exp(max(nats)):.3f} "
            f"| {sum(shares) / len(shares):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="+", default=["python-reference"], help="names or paths of texts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["dense", "default"], metavar="NAME")
    parser.add_argument("--stretches", type=int, default=4, help="of each text, evenly spaced")
    parser.add_argument("--out", type=Path, default=Path("docs/results/prefill.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    loaded = load_model(arguments.model, "float32", "cpu")
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    keys = ("settings", "task", "length", "text", "stretch", "stretches")
    rows = {tuple(row[key] for key in keys): row for row in record["rows"]}

    def save() -> None:
        record.update(
            command=shlex.join(["python", *sys.argv]),
            commit=commit(),
            versions=versions(),
            hardware=hardware(torch.device("cpu"), torch.get_num_threads()),
            model=arguments.model,
            settings={name: str(config) for name, config in SETTINGS.items()},
            rows=list(rows.values()),
        )
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    for name in arguments.texts:
        source = load_text(name)
        tokens = loaded.tokenizer(source.content, return_tensors="pt").input_ids[0]
        record.setdefault("texts", {})[Path(name).stem] = {"origin": source.origin, "sha256": source.sha256}
        for length in arguments.lengths:
            step = (len(tokens) - length) // arguments.stretches
            for task in arguments.tasks:
                for stretch in range(arguments.stretches):
                    ids, scored = sample_of(tokens, task, stretch * step, length)
                    for settings in arguments.settings:
                        key = (settings, task, length, Path(name).stem, stretch, arguments.stretches)
                        if key in rows:
                            continue
                        rows[key] = dict(zip(keys, key, strict=True)) | measure(
                            loaded.model, SETTINGS[settings], ids, scored
                        )
                        save()
    print(table(rows))


if __name__ == "__main__":
    main()

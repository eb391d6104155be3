"""Measures perplexity and recall of prefill by length, and writes docs/results/prefill.json: what the defaults rest on.

Each row is one forward pass over one stretch of a text: the mean loss of its second half, or of a passage of 256 tokens
that it begins and ends with, and the share of the keys attended, to be compared with dense attention on the same
stretch. Rows that the file holds already are kept, so that lengths, texts and settings can be added. For example:

    python scripts/measure_prefill.py --texts python-reference moby-dick.txt --settings dense default --lengths 2048
"""

import itertools
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from frame import Measurement, read

from eval_tasks.models import load_model
from nc_patch import NCConfig, nc_stats, patched
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

PASSAGE = 256
TASKS = ("perplexity", "recall")
# The settings of ``patch_model(model)``, but for what is given.
default = partial(NCConfig, DEFAULT_ALPHA, DEFAULT_C)
SETTINGS: dict[str, NCConfig | None] = {
    "dense": None,
    "default": default(),
    # Weights are shares of softmax mass, as with ``min_mass``, where else the highest score of a block counts.
    "by mass": default(min_mass=1e-6, max_factor=1.0),
    **{f"alpha {alpha}": NCConfig(float(alpha), DEFAULT_C) for alpha in (8, 10)},
    "4 n^0.6": NCConfig(4.0, 0.6),
    "keys 32": default(block_size=32),
    **{f"queries {size}": default(query_block_size=size) for size in (32, 128)},
    **{f"stride {stride}": default(sample_stride=stride) for stride in (4, 8)},
    "local 0": default(local_keys=0),
    "min_mass 0.9": NCConfig(8.0, DEFAULT_C, min_mass=0.9),
    "dense_below 0": default(dense_below=0),
    "topk 2 n^0.5": NCConfig(2.0, 0.5, selection="topk"),
    "window": default(selection="window"),
}
KEYS = ("settings", "task", "length", "text", "stretch", "stretches")


def main(argv: list[str] | None = None) -> None:
    measurement = Measurement(__doc__, "prefill.json")
    add = measurement.add_argument
    add("--model", default="smollm2")
    add("--texts", nargs="+", default=["python-reference"], help="names or paths of texts")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--settings", nargs="+", choices=SETTINGS, default=["dense", "default"], metavar="NAME")
    add("--stretches", type=int, default=4, help="of each text, evenly spaced")
    arguments, earlier = measurement.start(argv)
    loaded = load_model(arguments.model, "float32", "cpu")
    rows = {tuple(row[key] for key in KEYS): row for row in earlier.get("rows", [])}
    texts = earlier.get("texts", {})
    about = {"model": arguments.model, "settings": {name: str(config) for name, config in SETTINGS.items()}}
    for given in arguments.texts:
        source, (tokens,) = read(loaded, given)
        name = Path(given).stem
        texts[name] = {"origin": source.origin, "sha256": source.sha256}
        for length, task, stretch, settings in itertools.product(
            arguments.lengths, arguments.tasks, range(arguments.stretches), arguments.settings
        ):
            key = (settings, task, length, name, stretch, arguments.stretches)
            if key not in rows:
                start = stretch * ((len(tokens) - length) // arguments.stretches)
                found = measure(loaded.model, SETTINGS[settings], *sample_of(tokens[start : start + length], task))
                rows[key] = dict(zip(KEYS, key, strict=True)) | found
                print(*key, *(f"{value:.4f}" for value in found.values()), flush=True)
                measurement.save(**about, texts=texts, rows=list(rows.values()))


def sample_of(stretch: torch.Tensor, task: str) -> tuple[torch.Tensor, int]:
    """Tokens ``[1, length]`` of a task, and how many of the last are scored."""
    if task == "perplexity":
        return stretch[None], len(stretch) // 2
    passage = stretch[:PASSAGE]
    return torch.cat((stretch[:-PASSAGE], passage))[None], PASSAGE


@torch.inference_mode()
def measure(model: Any, config: NCConfig | None, ids: torch.Tensor, scored: int) -> dict[str, float]:
    """Nats a token and attended share of one forward pass."""
    with patched(model, config=config) if config else nullcontext():
        logits = model(ids, use_cache=False, logits_to_keep=scored).logits[0, :-1]
        share = nc_stats(model)["attended_fraction"] if config else 1.0
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1 - scored :]).item()
    return {"nats": nats, "attended": share}


if __name__ == "__main__":
    main()

"""Times decoding on a real model, dense and patched, and writes docs/results/decode_cpu.json.

Every method decodes the same tokens of the text, from its own copy of one dense prefill, a token of each in turn, so
that whatever else the machine does falls on all of them alike. A patched model builds its key index at its first token,
which is not counted.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import patch_model, unpatch_model
from nc_patch.common import check_directory

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "block": {"selection": "block"},
    "topk": {"selection": "topk", "tail": "drop"},
    "topk by codes": {"selection": "topk", "tail": "drop", "key_index": "always"},
    "topk with means": {"selection": "topk", "tail": "mean"},
    "window": {"selection": "window"},
}


def step(model: Any, token: torch.Tensor, cache: DynamicCache, options: dict[str, Any] | None) -> tuple[float, int]:
    """Seconds of decoding one token, and the most likely next."""
    if options is not None:
        patch_model(model, **options)
    begin = time.perf_counter()
    logits = model(token, past_key_values=cache).logits
    seconds = time.perf_counter() - begin
    if options is not None:
        unpatch_model(model)
    return seconds, int(logits[0, -1].argmax())


def index_bytes(cache: DynamicCache) -> int:
    """Bytes of the key indexes that a cache carries."""
    return sum(index.nbytes() for layer in cache.layers for index in getattr(layer, "nc_indexes", {}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=8128, help="tokens before the first one that is timed")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--C", type=float, default=0.6)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path("docs/results/decode_cpu.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    if "dense" not in arguments.methods:
        parser.error("--methods must hold dense, which the others are compared with")
    loaded = load_model(arguments.model, "float32", "cpu")
    length = arguments.context + arguments.tokens
    ids = loaded.tokenizer(load_text("python-reference").content[: length * 12])["input_ids"][:length]
    if len(ids) < length:
        parser.error(f"the text has {len(ids)} tokens, {length} are needed")
    ids = torch.tensor([ids])
    seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
    same = dict.fromkeys(arguments.methods, 0)
    with torch.no_grad():
        prefilled = DynamicCache()
        loaded.model(ids[:, : arguments.context - 1], past_key_values=prefilled, logits_to_keep=1)
        caches = {method: copy.deepcopy(prefilled) for method in arguments.methods}
        settings = {
            method: None
            if options is None
            else {"alpha": arguments.alpha, "C": arguments.C, "dense_below": 0, **options}
            for method, options in METHODS.items()
        }
        for position in range(arguments.context - 1, length):
            chosen = {}
            for method in arguments.methods:
                taken, chosen[method] = step(
                    loaded.model, ids[:, position : position + 1], caches[method], settings[method]
                )
                if position >= arguments.context:
                    seconds[method].append(taken)
            for method in arguments.methods:
                same[method] += position >= arguments.context and chosen[method] == chosen["dense"]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches["dense"].layers)
    rows = []
    dense = statistics.median(seconds["dense"])
    print(f"{'method':16} {'ms a token':>10} {'of dense':>8} {'same next token':>15} {'index / KV':>10}")
    for method in arguments.methods:
        median = statistics.median(seconds[method])
        row = {
            "method": method,
            "median_seconds": median,
            "median_over_dense": median / dense,
            "same_next_token_as_dense": same[method] / arguments.tokens,
            "index_bytes_over_kv_bytes": index_bytes(caches[method]) / kv_bytes,
            "seconds": [round(value, 6) for value in seconds[method]],
        }
        rows.append(row)
        print(
            f"{method:16} {median * 1e3:10.1f} {median / dense:8.2f} {row['same_next_token_as_dense']:15.2f} "
            f"{row['index_bytes_over_kv_bytes']:10.3f}"
        )
    record = {
        "command": "python scripts/measure_decode.py",
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "results": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

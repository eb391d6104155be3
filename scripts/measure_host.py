"""What the host takes for a decoding step in eager mode, where no GPU is: docs/results/host_time.json.

The model runs on the CPU; kernels of the library are compiled for a pretended GPU, and launches recorded, not run.
Methods take turns, in CPU seconds of one thread. Nothing that a sparse method computes here means anything.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from frame import Measurement
from transformers import DynamicCache

from eval_tasks.errors import EvalError
from eval_tasks.models import load_model
from nc_patch import patched

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from pretended_gpu import pretended_gpu
from tiny_models import tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk, means": {},
    "topk, drop": {"decode": "topk", "tail": "drop"},
    "block": {"selection": "block"},
    "patched, few keys": {"dense_below": 1024},
}
_PROMPT, _UNTIMED = 700, 3


def steps(model: torch.nn.Module, method: str, cache: DynamicCache, count: int, launches: list[str]) -> Iterator[float]:
    """CPU microseconds of further steps of one token; ``launches`` are then those of the last."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    options = {"backend": "triton", "dense_below": 0, "key_index": "always", **METHODS[method]}
    with contextlib.nullcontext() if method == "dense" else patched(model, **options), torch.inference_mode():
        if not cache.get_seq_length():
            model(token.expand(1, _PROMPT), past_key_values=cache, use_cache=True)
        for number in range(count + _UNTIMED):
            launches.clear()
            begin = time.thread_time_ns()
            model(token, past_key_values=cache, use_cache=True)
            if number >= _UNTIMED:
                yield (time.thread_time_ns() - begin) / 1e3


def main() -> None:
    parser = Measurement(__doc__, "host_time.json")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    arguments, _ = parser.start()
    torch.set_num_threads(1)
    models = {"16 small layers": tiny_model("llama", num_hidden_layers=16, hidden_size=64).eval()}
    try:
        models["SmolLM2-135M"] = load_model("smollm2", "float32", "cpu").model.eval()
    except EvalError as error:
        print(f"without SmolLM2: {error}")
    rows = []
    with pretended_gpu() as launches:
        for name, model in models.items():
            layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
            caches = {method: DynamicCache(config=model.config) for method in METHODS}
            times: dict[str, list[float]] = {method: [] for method in METHODS}
            counts = {}
            for _ in range(arguments.rounds):
                for method, cache in caches.items():
                    times[method] += steps(model, method, cache, arguments.steps, launches)
                    counts[method] = len(launches) / layers
            dense = statistics.median(times["dense"])
            for method, each in times.items():
                us = statistics.median(each)
                row = {"us": us / layers, "of_dense": us / dense, "launches": counts[method]}
                rows.append({"model": name, "method": method, **row})
                print(f"{name}, {method}: {us / layers:.0f} us, {us / dense:.2f} of dense, {counts[method]:g} launches")
    parser.save(rows=rows)


if __name__ == "__main__":
    main()

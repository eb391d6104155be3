"""What the host takes for a decoding step in eager mode, where no GPU is: docs/results/host_time.json.

Steps of a model run on the CPU, and what the library launches is compiled for a pretended GPU, recorded, and not run.
So the time of a step is that of Python, of the launches and of the rest of the model on the CPU, whatever attention
would take. Methods take turns, in CPU seconds of one thread; nothing computed by a sparse method means anything.
Models: a Llama of 16 layers so small that Python is nearly all of its time, and SmolLM2-135M where it is installed.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from eval_tasks.errors import EvalError
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from nc_patch import patched
from nc_patch.common import check_directory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from pretended_gpu import pretended_gpu
from tiny_models import tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk, means": {},
    "topk, drop": {"decode": "topk", "tail": "drop"},
    "block": {"selection": "block"},
}
_PROMPT, _UNTIMED = 700, 3


def steps(
    model: torch.nn.Module, method: str, cache: DynamicCache, count: int, launches: list[Any]
) -> Iterator[tuple[float, int]]:
    """CPU microseconds of further steps of one token, and their launches, which appear in ``launches``."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    sparse = method != "dense"
    options = {"backend": "triton", "dense_below": 0, "key_index": "always", **METHODS[method]}
    with patched(model, **options) if sparse else contextlib.nullcontext(), torch.inference_mode():
        if not cache.get_seq_length():
            model(token.expand(1, _PROMPT), past_key_values=cache, use_cache=True)
        for number in range(count + _UNTIMED):
            launches.clear()
            begin = time.thread_time_ns()
            model(token, past_key_values=cache, use_cache=True)
            if number >= _UNTIMED:
                yield (time.thread_time_ns() - begin) / 1e3, len(launches)


def measure(model: torch.nn.Module, rounds: int, count: int, launches: list[Any]) -> dict[str, dict[str, float]]:
    """Microseconds and launches of a layer and step, by method."""
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    caches = {method: DynamicCache(config=model.config) for method in METHODS}
    found: dict[str, list[tuple[float, int]]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, cache in caches.items():
            found[method] += steps(model, method, cache, count, launches)
    times = {method: statistics.median(us for us, _ in each) / layers for method, each in found.items()}
    return {
        method: {"us": us, "of_dense": us / times["dense"], "launches": found[method][-1][1] / layers}
        for method, us in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/results/host_time.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(1)
    models = {"16 small layers": tiny_model("llama", num_hidden_layers=16, hidden_size=64).eval()}
    try:
        models["SmolLM2-135M"] = load_model("smollm2", "float32", "cpu").model.eval()
    except EvalError as error:
        print(f"without SmolLM2: {error}")
    rows = []
    with pretended_gpu() as launches:
        for name, model in models.items():
            for method, row in measure(model, arguments.rounds, arguments.steps, launches).items():
                rows.append({"model": name, "method": method, **row})
                print(f"{name}, {method}: {row['us']:.0f} us, {row['of_dense']:.2f}, {row['launches']:g} launches")
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), 1),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

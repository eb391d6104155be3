"""What the host takes for a decoding step in eager mode, where no GPU is: docs/results/host_time.json.

Steps of a model run on the CPU, and what the library launches is compiled for a pretended GPU, recorded, and not run.
So the time of a step is that of Python, of the launches and of the rest of the model on the CPU, whatever attention
would take. Methods take turns, in CPU seconds of one thread; nothing computed by a sparse method means anything.
Models: a Llama of 16 layers so small that Python is nearly all of its time, and SmolLM2-135M where it is installed.
"""

import contextlib
import statistics
import sys
import time
from typing import Any

import torch
from frame import ROOT, Measurement
from transformers import DynamicCache

from eval_tasks.errors import EvalError
from eval_tasks.models import load_model
from nc_patch import patched

sys.path.insert(0, str(ROOT / "tests"))
from pretended_gpu import pretended_gpu
from tiny_models import tiny_model

METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "topk, means": {},
    "topk, drop": {"decode": "topk", "tail": "drop"},
    "block": {"selection": "block"},
}
_PROMPT, _UNTIMED = 700, 3


def main(argv: list[str] | None = None) -> None:
    measurement = Measurement(__doc__, "host_time.json")
    measurement.add_argument("--rounds", type=int, default=6)
    measurement.add_argument("--steps", type=int, default=20)
    arguments = measurement.start(argv)
    torch.set_num_threads(1)
    models = {"16 small layers": tiny_model("llama", num_hidden_layers=16, hidden_size=64).eval()}
    try:
        models["SmolLM2-135M"] = load_model("smollm2", "float32", "cpu").model.eval()
    except EvalError as error:
        print(f"without SmolLM2: {error}")
    rows = []
    with pretended_gpu() as launches, torch.inference_mode():
        for name, model in models.items():
            for method, row in measure(model, arguments.rounds, arguments.steps, launches).items():
                rows.append({"model": name, "method": method, **row})
                print(f"{name}, {method}: {row['us']:.0f} us, {row['of_dense']:.2f}, {row['launches']:g} launches")
    measurement.save(rows=rows)


def measure(model: Any, rounds: int, steps: int, launches: list[Any]) -> dict[str, dict[str, float]]:
    """Microseconds and launches of a layer and step, by method; ``launches`` is where these appear."""
    layers, token = model.config.num_hidden_layers, torch.zeros(1, 1, dtype=torch.int64)
    caches = {method: DynamicCache(config=model.config) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    counts: dict[str, float] = {}
    for _ in range(rounds):
        for method, cache in caches.items():
            options = METHODS[method]
            always = {"backend": "triton", "dense_below": 0, "key_index": "always"}
            with contextlib.nullcontext() if options is None else patched(model, **always, **options):
                if not cache.get_seq_length():
                    model(token.expand(1, _PROMPT), past_key_values=cache, use_cache=True)
                for number in range(steps + _UNTIMED):
                    launches.clear()
                    begin = time.thread_time_ns()
                    model(token, past_key_values=cache, use_cache=True)
                    if number >= _UNTIMED:
                        times[method].append((time.thread_time_ns() - begin) / 1e3 / layers)
                counts[method] = len(launches) / layers
    medians = {method: statistics.median(each) for method, each in times.items()}
    return {
        method: {"us": us, "of_dense": us / medians["dense"], "launches": counts[method]}
        for method, us in medians.items()
    }


if __name__ == "__main__":
    main()

"""Times attention on this CPU against dense attention, and writes docs/results/cpu.json.

Decoding as an operator, in Llama-3-8B's geometry, against three forms of PyTorch's dense attention; steps of a real
model, each method on its own copy of one prompt's cache; forward passes of prompts, and what those hold at most.
Methods take turns, so that whatever else the machine does falls on all of them alike; figures are medians.
"""

import argparse
import contextlib
import copy
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import KeyIndex, NCConfig, patched
from nc_patch.common import check_directory
from nc_patch.functional import attend, by_index
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import Problem, causal_intervals
from nc_patch.selections import Block, TopK

PARTS = ("operator", "steps", "prompts", "memory")
LAW = {"alpha": 4.0, "C": 0.6}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
STEPS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "topk with means": LAW,
    "topk": LAW | {"tail": "drop"},
    "block": LAW | {"selection": "block"},
    "window": LAW | {"selection": "window"},
}
PROMPTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "dense, patched": {"alpha": 1.0, "C": 1.0},
    "default": {},
    "block": LAW,
    "topk with means": LAW | {"selection": "topk"},
    "topk": LAW | {"selection": "topk", "tail": "drop"},
    "window": LAW | {"selection": "window"},
}


def seconds_of(run: Callable[[], Any]) -> float:
    """How long something takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_turns(methods: dict[str, Callable[[], float]], repeats: int, cold: bool = False) -> dict[str, float]:
    """Median of the seconds that each method returns; the first round is not counted.

    ``cold``: what the caches hold is replaced before each run, as the other layers of a model do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    others = torch.zeros(1 << 26 if cold else 0)
    for _ in range(repeats + 1):
        for name, run in methods.items():
            others.add_(1)
            seconds[name].append(run())
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def decode_operator(keys: int, repeats: int) -> dict[str, float]:
    """Seconds of one query over so many keys."""
    draw = torch.Generator().manual_seed(0)
    query = 1.5 * torch.randn(1, HEADS, 1, HEAD_DIM, generator=draw)
    key, value = (torch.randn(1, KV_HEADS, keys, HEAD_DIM, generator=draw) for _ in range(2))
    codes, pages = KeyIndex.build(key, "codes"), KeyIndex.build(key, "pages")
    means = KeyIndex.build(key, "means", value=value)
    dense = torch.nn.functional.scaled_dot_product_attention
    rows = query.view(1, KV_HEADS, -1, HEAD_DIM)
    group = HEADS // KV_HEADS
    # As a layer of a patched model asks for it: intervals and budgets are worked out once for all layers.
    visible = causal_intervals(1, 1, keys, "cpu")
    budget = NCConfig(**LAW, dense_below=0).row_budgets(visible, keys, 0)
    problem = Problem(query, key, value, visible, visible[..., 0].contiguous(), budget, scale=HEAD_DIM**-0.5)
    by_codes, by_pages = (by_index(problem, index, int(budget.max())) for index in (codes, pages))
    with_means = by_codes._replace(means=PageMeans(*means.tensors()))
    methods: dict[str, Callable[[], Any]] = {
        "dense, a group as rows": lambda: dense(rows, key, value),
        "dense, enable_gqa": lambda: dense(query, key, value, enable_gqa=True),
        "dense, repeated heads": lambda: dense(query, *(t.repeat_interleave(group, 1) for t in (key, value))),
        "topk with means": lambda: attend(with_means, TopK(), "auto"),
        "topk": lambda: attend(by_codes, TopK(tail="drop"), "auto"),
        "block": lambda: attend(by_pages, Block(), "auto"),
    }
    return in_turns({name: functools.partial(seconds_of, run) for name, run in methods.items()}, 3 * repeats, cold=True)


def steps(model: Any, ids: torch.Tensor, context: int, tokens: int) -> dict[str, float]:
    """Seconds of decoding a token after ``context`` others."""
    prompt = DynamicCache()
    model(ids[:, :context], past_key_values=prompt, logits_to_keep=1)
    caches = {name: copy.deepcopy(prompt) for name in STEPS}
    place = dict.fromkeys(STEPS, context)

    def step(name: str) -> float:
        at, cache = place[name], caches[name]
        place[name] += 1
        return patched_seconds(model, STEPS[name], lambda: model(ids[:, at : at + 1], past_key_values=cache))

    return in_turns({name: functools.partial(step, name) for name in STEPS}, tokens)


def patched_seconds(model: Any, options: dict[str, Any] | None, run: Callable[[], Any]) -> float:
    """How long something takes with a patched model, or with the model as it is; patching is not counted."""
    with contextlib.nullcontext() if options is None else patched(model, **options):
        return seconds_of(run)


def prompts(model: Any, ids: torch.Tensor, length: int, repeats: int) -> dict[str, float]:
    """Seconds of a forward pass over ``length`` tokens."""
    forward = lambda: model(ids[:, :length], logits_to_keep=1)  # noqa: E731
    methods = {name: functools.partial(patched_seconds, model, options, forward) for name, options in PROMPTS.items()}
    return in_turns(methods, repeats)


def peak_bytes(name: str, model: str, length: int) -> int:
    """By how many bytes a forward pass raises what a new process holds, at most; on Linux."""
    loaded, ids = loaded_text(model, length)
    status = Path("/proc/self/status")
    held = lambda which: int(status.read_text().split(f"{which}:")[1].split()[0]) * 1024  # noqa: E731
    with torch.inference_mode():
        patched_seconds(loaded.model, PROMPTS[name], lambda: loaded.model(ids[:, :1100], logits_to_keep=1))
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = held("VmRSS")
        patched_seconds(loaded.model, PROMPTS[name], lambda: loaded.model(ids, logits_to_keep=1))
    return held("VmHWM") - before


def loaded_text(model: str, length: int) -> tuple[Any, torch.Tensor]:
    """A model, and so many tokens of a text."""
    loaded = load_model(model, "float32", "cpu")
    ids = loaded.tokenizer(load_text("python-reference").content[: length * 12])["input_ids"][:length]
    if len(ids) < length:
        raise SystemExit(f"the text has {len(ids)} tokens, {length} are needed")
    return loaded, torch.tensor([ids])


def report(title: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Prints seconds and their ratios to the first method's, and returns both."""
    print(title, flush=True)
    first = next(iter(seconds.values()))
    for name, found in seconds.items():
        print(f"  {name:24} {found * 1e3:10.2f} ms  {found / first:6.2f}", flush=True)
    return {name: {"seconds": found, "over_dense": found / first} for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keys", type=int, nargs="*", default=[8192, 32768, 131072], help="of the operator")
    parser.add_argument("--context", type=int, default=8128, help="tokens before the first step that is timed")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192], help="of prompts")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of operators; of prompts half as many")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they were")
    parser.add_argument("--out", type=Path, default=Path("docs/results/cpu.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    record |= {
        "command": "python scripts/measure_cpu.py",
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
    }
    longest = max([*arguments.lengths, arguments.context + 40])
    loaded, ids = loaded_text(arguments.model, longest)
    repeats = arguments.repeats
    with torch.inference_mode():
        if "operator" in arguments.parts:
            record["operator"] = {
                keys: report(f"decoding over {keys:,} keys", decode_operator(keys, repeats)) for keys in arguments.keys
            }
        if "steps" in arguments.parts:
            found = steps(loaded.model, ids, arguments.context, 32)
            record["steps"] = {arguments.context: report(f"a step after {arguments.context:,} tokens", found)}
        if "prompts" in arguments.parts:
            record["prompts"] = {
                length: report(
                    f"a prompt of {length:,} tokens", prompts(loaded.model, ids, length, max(1, repeats // 2))
                )
                for length in arguments.lengths
            }
        if "memory" in arguments.parts:
            record["memory"] = {}
            for name in PROMPTS:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    record["memory"][name] = peak = pool.apply(peak_bytes, (name, arguments.model, longest))
                print(f"{name:24} {peak / 1e6:10.0f} MB for {longest:,} tokens", flush=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

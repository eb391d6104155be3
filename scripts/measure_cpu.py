"""Times attention on this CPU against dense attention, and writes docs/results/cpu.json.

Decoding as an operator, in Llama-3-8B's geometry, against three forms of PyTorch's dense attention; steps of a real
model, each method on its own copy of one prompt's cache; forward passes of prompts; both with the kept mass tracked.
Methods take turns, so that whatever else the machine does falls on all of them alike; figures are medians.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from frame import Measurement, read
from torch.nn.functional import scaled_dot_product_attention as dense
from transformers import DynamicCache

from eval_tasks.models import load_model
from nc_patch import KeyIndex, NCConfig, patched
from nc_patch.functional import attend, by_index
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import Problem, causal_intervals
from nc_patch.selections import Block, TopK

PARTS = ("operator", "steps", "prompts", "track")
DTYPES = ("float32", "bfloat16", "float16")
LAW = {"alpha": 4.0, "C": 0.6}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
Options = dict[str, Any] | None
Methods = dict[str, Callable[[], float]]  # what runs once, and returns its seconds, by name
STEPS: dict[str, Any] = {
    "dense": None,
    "dense, patched": {"alpha": 1.0, "C": 1.0},
    "default": {},
    "topk with means": LAW | {"selection": "topk"},
    "topk": LAW | {"selection": "topk", "tail": "drop"},
    "block": LAW | {"selection": "block"},
    "window": LAW | {"selection": "window"},
}
# Prompts by blocks are followed by decoding by top-k, as by default.
PROMPTS = {**STEPS, "block": LAW}
TRACKED = {"topk": LAW | {"selection": "topk"}, "window": STEPS["window"], "block": STEPS["block"]}


def main(argv: list[str] | None = None) -> None:
    measurement = Measurement(__doc__, "cpu.json")
    add = measurement.add_argument
    add("--model", default="smollm2")
    add("--keys", type=int, nargs="*", default=[8192, 32768, 131072], help="of the operator")
    add("--context", type=int, default=8128, help="tokens before the first step that is timed")
    add("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192], help="of prompts")
    add("--repeats", type=int, default=5, help="timed rounds of operators; of prompts half as many")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the model; what is not float32 is recorded by this name")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they were")
    arguments, whole = measurement.start(argv)
    record = whole if arguments.dtype == DTYPES[0] else whole.setdefault(arguments.dtype, {})
    loaded = load_model(arguments.model, arguments.dtype, "cpu")
    _, ids = read(loaded, "python-reference", max([*arguments.lengths, arguments.context + 40]))
    model, repeats = loaded.model, arguments.repeats
    with torch.inference_mode():
        if "operator" in arguments.parts:
            found = {keys: in_turns(decoding(keys, model.dtype), 3 * repeats, cold=True) for keys in arguments.keys}
            record["operator"] = over_dense("decoding over {:,} keys", found)
        if "steps" in arguments.parts:
            found = {arguments.context: in_turns(steps(model, ids, arguments.context, STEPS), 32)}
            record["steps"] = over_dense("a step after {:,} tokens", found)
        if "prompts" in arguments.parts:
            rounds = max(1, repeats // 2)
            found = {length: in_turns(prompts(model, ids[:, :length], PROMPTS), rounds) for length in arguments.lengths}
            record["prompts"] = over_dense("a prompt of {:,} tokens", found)
        if "track" in arguments.parts:
            context, rounds = arguments.context, max(1, repeats // 2)
            record["track"] = {
                "prompt": tracked(partial(prompts, model, ids[:, :context]), rounds),
                "decoding": tracked(partial(steps, model, ids, context), 32),
            }
            print("with track=True over without", record["track"])
    measurement.save(**{part: whole[part] for part in (*PARTS, *DTYPES) if part in whole})


def seconds_of(run: Callable[[], Any], model: Any = None, options: Options = None) -> float:
    """How long something takes, with a patched model where there are options; patching is not counted."""
    with contextlib.nullcontext() if options is None else patched(model, **options):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def in_turns(methods: Methods, repeats: int, cold: bool = False) -> dict[str, float]:
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


def over_dense(title: str, found: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Prints seconds and their ratios to the first method's, by size, and returns both."""
    rows: dict[str, Any] = {}
    for size, seconds in found.items():
        print(title.format(size), flush=True)
        first = next(iter(seconds.values()))
        rows[str(size)] = {name: {"seconds": each, "over_dense": each / first} for name, each in seconds.items()}
        for name, each in seconds.items():
            print(f"  {name:24} {each * 1e3:10.2f} ms  {each / first:6.2f}", flush=True)
    return rows


def decoding(keys: int, dtype: torch.dtype) -> Methods:
    """Attention of one query over so many keys, by name."""
    draw = torch.Generator().manual_seed(0)
    query = (1.5 * torch.randn(1, HEADS, 1, HEAD_DIM, generator=draw)).to(dtype)
    key, value = (torch.randn(1, KV_HEADS, keys, HEAD_DIM, generator=draw).to(dtype) for _ in range(2))
    rows = query.view(1, KV_HEADS, -1, HEAD_DIM)
    # As a layer of a patched model asks for it: intervals and budgets are worked out once for all layers.
    visible = causal_intervals(1, 1, keys, "cpu")
    budget = NCConfig(**LAW, dense_below=0).row_budgets(visible, keys, 0)
    problem = Problem(query, key, value, visible, visible[..., 0].contiguous(), budget, scale=HEAD_DIM**-0.5)
    indexes = (KeyIndex.build(key, "codes"), KeyIndex.build(key, "pages"))
    by_codes, by_pages = (by_index(problem, index, int(budget.max())) for index in indexes)
    with_means = by_codes._replace(means=PageMeans(*KeyIndex.build(key, "means", value=value).tensors()))
    methods: dict[str, Callable[[], Any]] = {
        "dense, a group as rows": lambda: dense(rows, key, value),
        "dense, enable_gqa": lambda: dense(query, key, value, enable_gqa=True),
        "dense, repeated heads": lambda: dense(
            query, *(t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (key, value))
        ),
        "topk with means": lambda: attend(with_means, TopK(), "auto"),
        "topk": lambda: attend(by_codes, TopK(tail="drop"), "auto"),
        "block": lambda: attend(by_pages, Block(), "auto"),
    }
    return {name: partial(seconds_of, run) for name, run in methods.items()}


def tracked(make: Callable[[dict[str, Options]], Methods], repeats: int) -> dict[str, float]:
    """The time of each method with its kept mass tracked, over that without."""
    found = {}
    for name, options in TRACKED.items():
        plain, tracking = in_turns(make({"plain": options, "tracked": options | {"track": True}}), repeats).values()
        found[name] = tracking / plain
    return found


def steps(model: Any, ids: torch.Tensor, context: int, methods: dict[str, Options]) -> Methods:
    """Decoding of a token after ``context`` others, by name."""
    prompt = DynamicCache()
    model(ids[:, :context], past_key_values=prompt, logits_to_keep=1)

    def step(options: Options, cache: DynamicCache, tokens: Iterable[torch.Tensor]) -> float:
        token = next(iter(tokens))
        return seconds_of(lambda: model(token, past_key_values=cache), model, options)

    return {
        name: partial(step, options, copy.deepcopy(prompt), iter(ids[:, context:].split(1, 1)))
        for name, options in methods.items()
    }


def prompts(model: Any, ids: torch.Tensor, methods: dict[str, Options]) -> Methods:
    """A forward pass, by name."""
    forward = partial(model, ids, logits_to_keep=1)
    return {name: partial(seconds_of, forward, model, options) for name, options in methods.items()}


if __name__ == "__main__":
    main()

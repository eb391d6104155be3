"""Times what knowing the kept mass costs on the CPU, and writes docs/results/certificates.json.

One decoder layer of SmolLM2's shape (9 / 3 heads of 64), float32, random weights: a prompt, and single steps after it,
with ``track`` and without, in turn on the same inputs; and of prefill by blocks the attention alone, on random queries
and keys, with its audit and without. Processor time, so that other work on the machine disturbs less;
only the ratios mean something.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval_tasks.provenance import commit, hardware, versions
from nc_patch import NCConfig, nc_stats, patch_model
from nc_patch.bench.prompts import PromptInputs
from nc_patch.common import check_directory
from nc_patch.functional import attend
from nc_patch.selections import Block

# (name, phase, options of patch_model)
WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("topk", "prefill", {"selection": "topk"}),
    ("window", "prefill", {"selection": "window"}),
    ("block", "prefill", {"selection": "block"}),
    ("topk, every score", "decode", {"prefill": "window", "key_index": "never"}),
    ("topk by codes", "decode", {"prefill": "window", "key_index": "always"}),
    ("window", "decode", {"prefill": "window", "decode": "window"}),
    ("block by pages", "decode", {"prefill": "window", "decode": "block"}),
)
STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="of attention alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/certificates.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    small = {"vocab_size": 97, "intermediate_size": 64, "num_hidden_layers": 1}
    positions = arguments.prompt + 2 * STEPS
    model = LlamaForCausalLM(LlamaConfig(**shape, **small, max_position_embeddings=positions)).eval()
    ids = torch.randint(1, 97, (1, arguments.prompt))
    rows = []
    for name, phase, options in WAYS:
        times: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(arguments.repeats + 1):
            for track in (False, True):
                patch_model(model, 4.0, 0.6, track=track, dense_below=0, **options)
                took = _time(model, ids, phase)
                if repeat:
                    times[track].append(took)
                elif track:
                    assert nc_stats(model)["kept_mass"][phase] is not None
        ratios = [on / off for off, on in zip(times[False], times[True], strict=True)]
        rows.append(
            {
                "selection": name,
                "phase": phase,
                "milliseconds": 1e3 * statistics.median(times[False]),
                "ratio": statistics.median(ratios),
                "ratio_of_fastest": min(times[True]) / min(times[False]),
            }
        )
        print(rows[-1], flush=True)
    alone = [_attention_alone(length, 3 * arguments.repeats) for length in arguments.lengths]
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "prompt": arguments.prompt,
        "law": "4 n^0.6",
        "results": rows,
        "attention_alone": alone,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _time(model: LlamaForCausalLM, ids: torch.Tensor, phase: str) -> float:
    """Processor seconds of a prompt, or of one step after it on average."""
    with torch.inference_mode():
        begin = time.process_time()
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        if phase == "prefill":
            return time.process_time() - begin
        for step in range(2 + STEPS):
            if step == 2:
                begin = time.process_time()
            model(ids[:, :1], past_key_values=cache)
        return (time.process_time() - begin) / STEPS


def _attention_alone(length: int, repeats: int) -> dict[str, float]:
    """What the audit of prefill by blocks adds to attention, as a ratio of processor times."""
    tensors = (torch.randn(1, heads, length, 64) for heads in (9, 3, 3))
    problem = PromptInputs(*tensors).problem(NCConfig(4.0, 0.6, dense_below=0))
    ratios, spent = [], []
    for repeat in range(repeats + 1):
        times = []
        for seed in (-1, repeat):
            begin = time.process_time()
            attend(problem._replace(audit_seed=seed), Block(), "auto")
            times.append(time.process_time() - begin)
        if repeat:
            ratios.append(times[1] / times[0])
            spent.append(times[0])
    row = {"n": length, "milliseconds": 1e3 * statistics.median(spent), "ratio": statistics.median(ratios)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()

"""Measures what a calibrated profile is worth against one law for all heads, and writes docs/results/profile.json.

The profile is calibrated on the first half of a text; everything is scored on stretches of the second half. At each
length and each share of attended keys: the loss of every token, over dense attention on the same tokens, with exact
top-k (tail="drop") under the profile's budgets and under uniform laws alpha * n^C of several C, whose alpha spends the
same number of keys. What is in the file already is not measured again.
"""

import argparse
import contextlib
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.store import write_atomically
from eval_tasks.tasks import tokenise
from eval_tasks.texts import load_text
from nc_patch import NCConfig, Profile, calibrate, nc_stats, patched
from nc_patch.budget import budgets
from nc_patch.common import check_directory

DENSE = "dense"
PROFILE = "profile"


TOPK: dict[str, Any] = {"selection": "topk", "tail": "drop", "dense_below": 0}


def uniform_law(fraction: float, C: float, length: int) -> NCConfig:
    """The law ``alpha * n^C`` under which the queries of a sequence attend a share of the keys they see."""
    visible = length * (length + 1) / 2
    low, high = 1e-4, float(length)
    for _ in range(60):
        alpha = math.sqrt(low * high)
        attended = int(budgets(np.arange(1, length + 1), alpha, C).sum())
        low, high = (alpha, high) if attended < fraction * visible else (low, alpha)
    return NCConfig(high, C, **TOPK)


def token_losses(model: Any, ids: torch.Tensor, config: NCConfig | None) -> tuple[np.ndarray, float]:
    """-ln p of every token but the first, in nats, and the share of keys attended."""
    with torch.inference_mode(), patched(model, config=config) if config else contextlib.nullcontext():
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        attended = 1.0 if config is None else nc_stats(model)["attended_fraction"]
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
    return losses.double().numpy(), attended


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: perplexity, and the profile's excess as a share of the best uniform law's."""
    lines = [
        "| tokens | keys | samples | dense | best uniform | profile | share of its excess | second half |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in summaries(rows):
        lines.append(
            f"| {one['length']:,} | {100 * one['fraction']:g} % | {one['samples']} | {one['dense']:.3f} "
            f"| {one['uniform']:.3f} (C = {one['uniform_C']:g}) | {one['profile']:.3f} | {one['share']:.2f} "
            f"| {one['share_second_half']:.2f} |"
        )
    return "\n".join(lines)


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every length and share of keys: perplexities over the samples that every method has, and their excesses."""
    found = []
    for length, fraction in sorted({(row["length"], row["fraction"]) for row in rows if row["method"] == PROFILE}):
        here = [row for row in rows if row["length"] == length and row["fraction"] in (fraction, 1.0)]
        methods = sorted({row["method"] for row in here})
        if len(methods) < 3:  # no uniform law is there to compare with yet
            continue
        samples = set.intersection(*({r["sample"] for r in here if r["method"] == name} for name in methods))

        def perplexity(name: str, part: str, here: Any = here, samples: Any = samples) -> float:
            return math.exp(np.mean([r[part] for r in here if r["method"] == name and r["sample"] in samples]))

        excess = {
            (name, part): perplexity(name, part) - perplexity(DENSE, part)
            for name in methods
            for part in ("nats", "nats_second_half")
        }
        uniform = [name for name in methods if name not in (DENSE, PROFILE)]
        best = min(uniform, key=lambda name: excess[name, "nats"])
        best_late = min(uniform, key=lambda name: excess[name, "nats_second_half"])
        found.append(
            {
                "length": length,
                "fraction": fraction,
                "samples": len(samples),
                "dense": perplexity(DENSE, "nats"),
                "profile": perplexity(PROFILE, "nats"),
                "uniform": perplexity(best, "nats"),
                "uniform_C": float(best.removeprefix("C=")),
                "share": excess[PROFILE, "nats"] / excess[best, "nats"],
                "dense_second_half": perplexity(DENSE, "nats_second_half"),
                "profile_second_half": perplexity(PROFILE, "nats_second_half"),
                "uniform_second_half": perplexity(best_late, "nats_second_half"),
                "uniform_C_second_half": float(best_late.removeprefix("C=")),
                "share_second_half": excess[PROFILE, "nats_second_half"] / excess[best_late, "nats_second_half"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--calibration", type=Path, required=True, help="directory of the profile")
    parser.add_argument("--calibrated", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--pieces", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.05, 0.14])
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--out", type=Path, default=Path("docs/results/profile.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    loaded, text = load_model(arguments.model, "float32", "cpu"), load_text(arguments.text)
    ids = tokenise(loaded.tokenizer, text.content).ids
    half = len(ids) // 2
    begun = time.perf_counter()
    path = arguments.calibration / "profile.json"
    if path.exists():
        profile = Profile.load(path)
    else:
        arguments.calibration.mkdir(parents=True, exist_ok=True)
        texts = [ids[:half].tolist()]
        profile = calibrate(loaded.model, None, texts, arguments.calibrated, pieces=arguments.pieces)
        profile.save(path)
        print(f"Calibrated in {time.perf_counter() - begun:.0f} s.", flush=True)
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256, "tokens": len(ids)},
        "calibrated": {"lengths": profile.lengths, "pieces": profile.pieces, "tokens": [0, half]},
    }
    # Samples end the text's second half in equal steps, whatever the length.
    stretch = (len(ids) - half - 1) // max(arguments.samples, 2)
    for length in arguments.lengths:
        for sample in range(arguments.samples):
            start = half + sample * stretch
            stretch_ids = torch.from_numpy(ids[start : start + length + 1])
            jobs: list[tuple[str, float, NCConfig | None]] = [(DENSE, 1.0, None)]
            for fraction in arguments.fractions:
                law = profile.at_budget(fraction, n=length, dense_below=0).config(**TOPK)
                jobs.append((PROFILE, fraction, law))
                jobs += [(f"C={C:g}", fraction, uniform_law(fraction, C, length)) for C in arguments.exponents]
            for method, fraction, config in jobs:
                key = {"length": length, "sample": sample, "start": start, "method": method, "fraction": fraction}
                if any(all(row[name] == value for name, value in key.items()) for row in rows):
                    continue
                losses, attended = token_losses(loaded.model, stretch_ids, config)
                late = losses[length // 2 :]
                rows.append({**key, "attended": attended, "nats": losses.mean(), "nats_second_half": late.mean()})
                print(f"{length:6} {sample} {method:8} {fraction:5} {attended:.4f} {math.exp(losses.mean()):9.4f} "
                      f"{math.exp(late.mean()):9.4f}", flush=True)  # fmt: skip
                content = {**record, "summary": summaries(rows), "rows": rows}
                write_atomically(arguments.out, (json.dumps(content, indent=1) + "\n").encode())
    print(table(rows))


if __name__ == "__main__":
    main()

"""Measures what a calibrated profile is worth against one law for all heads, and writes docs/results/profile.json.

The profile is calibrated on the first half of a text; everything is scored on stretches of the second half. At each
length and each share of attended keys: the loss of every token, over dense attention on the same tokens, with exact
top-k (tail="drop") under the profile's budgets and under uniform laws alpha * n^C of several C, whose alpha spends the
same number of keys. What is in the file already is not measured again.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from frame import Measurement

from eval_tasks.models import load_model
from eval_tasks.tasks import tokenise
from eval_tasks.texts import load_text
from nc_patch import NCConfig, Profile, calibrate, nc_stats, patched
from nc_patch.budget import budgets

TOPK: dict[str, Any] = {"selection": "topk", "tail": "drop", "dense_below": 0}


def main(argv: list[str] | None = None) -> None:
    measurement = Measurement(__doc__, "profile.json")
    add = measurement.add_argument
    add("--model", default="smollm2")
    add("--text", default="python-reference")
    add("--calibration", type=Path, required=True, help="directory of the profile, which is made where it is missing")
    add("--calibrated", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    add("--pieces", type=int, default=3)
    add("--lengths", type=int, nargs="+", default=[2048])
    add("--samples", type=int, default=2)
    add("--fractions", type=float, nargs="+", default=[0.1, 0.05, 0.14])
    add("--exponents", type=float, nargs="+", default=[0.3, 0.5])
    arguments = measurement.start(argv)
    loaded, text = load_model(arguments.model, "float32", "cpu"), load_text(arguments.text)
    ids = tokenise(loaded.tokenizer, text.content).ids
    half = len(ids) // 2
    path = arguments.calibration / "profile.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [ids[:half].tolist()]
        calibrate(loaded.model, None, texts, arguments.calibrated, pieces=arguments.pieces).save(path)
    profile = Profile.load(path)
    about = {
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256, "tokens": len(ids)},
        "calibrated": {"lengths": profile.lengths, "pieces": profile.pieces, "tokens": [0, half]},
    }
    rows = measurement.earlier().get("rows", [])
    # Samples end the text's second half in equal steps, whatever the length.
    step = (len(ids) - half - 1) // max(arguments.samples, 2)
    for length in arguments.lengths:
        configs: dict[tuple[str, float], NCConfig | None] = {("dense", 1.0): None}
        for fraction in arguments.fractions:
            law = profile.at_budget(fraction, n=length, dense_below=0).config(**TOPK)
            configs |= {("profile", fraction): law}
            configs |= {(f"C={C:g}", fraction): uniform_law(fraction, C, length) for C in arguments.exponents}
        for sample in range(arguments.samples):
            start = half + sample * step
            stretch = torch.from_numpy(ids[start : start + length + 1])
            for (method, fraction), config in configs.items():
                key = {"length": length, "sample": sample, "start": start, "method": method, "fraction": fraction}
                if not any(key.items() <= row.items() for row in rows):
                    rows.append(key | token_losses(loaded.model, stretch, config))
                    print(rows[-1], flush=True)
                    measurement.save(**about, summary=summaries(rows), rows=rows)


def uniform_law(fraction: float, C: float, length: int) -> NCConfig:
    """The law ``alpha * n^C`` under which the queries of a sequence attend a share of the keys they see."""
    visible = length * (length + 1) / 2
    low, high = 1e-4, float(length)
    for _ in range(60):
        alpha = math.sqrt(low * high)
        attended = int(budgets(np.arange(1, length + 1), alpha, C).sum())
        low, high = (alpha, high) if attended < fraction * visible else (low, alpha)
    return NCConfig(high, C, **TOPK)


def token_losses(model: Any, ids: torch.Tensor, config: NCConfig | None) -> dict[str, float]:
    """Nats a token, of all but the first and of the second half, and the share of keys attended."""
    with torch.inference_mode(), patched(model, config=config) if config else contextlib.nullcontext():
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        attended = 1.0 if config is None else nc_stats(model)["attended_fraction"]
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none").double()
    late = losses[len(losses) // 2 :]
    return {"attended": attended, "nats": losses.mean().item(), "nats_second_half": late.mean().item()}


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every length and share of keys: perplexities over the samples that every method has, and their excesses."""
    table = pd.DataFrame(rows)
    found = []
    for (length, fraction), _ in table[table.method == "profile"].groupby(["length", "fraction"]):
        here = table[(table.length == length) & table.fraction.isin((fraction, 1.0))]
        summary: dict[str, Any] = {"length": int(length), "fraction": fraction}
        for part, ending in (("nats", ""), ("nats_second_half", "_second_half")):
            # One row a sample, one column a method; samples that a method lacks are left out.
            nats = here.pivot(index="sample", columns="method", values=part).dropna()
            perplexity = np.exp(nats.mean())
            uniform = perplexity.filter(like="C=")
            if "dense" not in perplexity or uniform.empty:  # nothing is there to compare with yet
                break
            dense, profile, best = perplexity["dense"], perplexity["profile"], uniform.min()
            summary |= {"samples": len(nats), f"dense{ending}": dense, f"profile{ending}": profile}
            summary |= {f"uniform{ending}": best, f"uniform_C{ending}": float(uniform.idxmin().removeprefix("C="))}
            summary[f"share{ending}"] = (profile - dense) / (best - dense)
        else:
            found.append(summary)
    return found


if __name__ == "__main__":
    main()

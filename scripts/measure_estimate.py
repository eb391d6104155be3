"""Compares the estimated dropped mass of block prefill with the true one, and writes docs/results/estimate.json.

On the queries and keys of one dense forward pass, α = 4, C = 0.6. Per layer: the truth; what the rows that chose the
blocks drop; the audited estimate of one call, as ``nc_stats`` has it, with half the width of its 95 % interval; the
mean of many such audits; and how often their intervals hold the truth, of the layer and of single heads.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from measure_blocks import LAYERS

from eval_tasks.capture import capture, token_ids
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch import NCConfig
from nc_patch.bench.prompts import PromptInputs
from nc_patch.common import check_directory
from nc_patch.functional import attend
from nc_patch.selections import Block
from nc_patch.selections.block.audit import audited_rows
from nc_patch.stats import MassCounts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="python-reference")
    parser.add_argument("--length", type=int, default=1536)
    parser.add_argument("--audits", type=int, default=40, help="how many audits show the spread")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/estimate.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(arguments.threads)
    loaded, text = load_model(arguments.model, "float32", "cpu"), load_text(arguments.text)
    captured = capture(loaded.model, token_ids(loaded.tokenizer, text, arguments.length), LAYERS)
    rows = []
    for layer, (query, key, value, _) in zip(LAYERS, captured, strict=True):
        problem = PromptInputs(query, key, value).problem(NCConfig(4.0, 0.6))
        with torch.inference_mode():
            exact = attend(problem._replace(stats=True), Block(), "auto")
            seeds = range(arguments.audits)
            audits = [attend(problem._replace(audit_seed=seed), Block(), "auto").audit for seed in seeds]
        found = []
        for audit in audits:
            counts = MassCounts()
            counts.add_audit(audit, None)
            found.append(counts.summary())
        assert exact.estimate is not None
        number, kept = exact.estimate.double()[:, :2].unbind(-1)
        by_head = exact.kept_mass.double().mean((0, 2))
        true = float(by_head.mean())
        lower, upper = (torch.tensor([one[f"{edge}_by_head"] for one in found]) for edge in ("lower", "upper"))
        row = {
            "layer": layer,
            "true": 1 - true,
            "rows_that_chose": float((1 - kept / number).mean()),
            "largest_error_of_a_head": float((kept / number - by_head).abs().max()),
            "audited": 1 - found[0]["mean"],
            "audited_half_width": (found[0]["upper"] - found[0]["lower"]) / 2,
            "mean_of_audits": 1 - sum(one["mean"] for one in found) / len(found),
            "intervals_that_hold": sum(one["lower"] <= true <= one["upper"] for one in found) / len(found),
            "intervals_of_heads_that_hold": float(((lower <= by_head) & (by_head <= upper)).double().mean()),
            "half_width_of_a_head": float((upper - lower).mean() / 2),
        }
        rows.append(row)
        print(layer, *(f"{name} {row[name]:.4f}" for name in list(row)[1:]), flush=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "model": arguments.model,
        "text": {"name": text.name, "origin": text.origin, "sha256": text.sha256},
        "tokens": arguments.length,
        "audits": arguments.audits,
        "audited_rows": audited_rows(arguments.length),
        "results": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

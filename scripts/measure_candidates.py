"""How many keys each stage of decoding by codes leaves, on the benchmark's keys; writes docs/results/candidates.json.

The keys and queries are those of ``nc-patch bench decode``: random, with clusters, channels that carry an offset, and
heads of a group that share half of their direction. One key/value head is drawn for each length and seed. What the
kernels do is done here in PyTorch: the sample and its guess, bounds by codes, and exact scores. With real keys heads of
a group may agree more or less: ``union`` says how much these do.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path

import torch

from eval_tasks.provenance import commit, hardware, versions
from nc_patch.bench.inputs import GEOMETRIES, make_inputs
from nc_patch.budget import budget_of
from nc_patch.common import check_directory
from nc_patch.selections.topk.codes import channel_moments, encode_keys
from nc_patch.selections.topk.plan import Sizes, plan_for

_KEYS_AT_ONCE = 1 << 16


def guess_of(samples: torch.Tensor, budget: int, keys: int) -> torch.Tensor:
    """The guess ``[R, 1]`` of each row from its sampled scores ``[R, S]``; as ``guess_kernel``, to its resolution."""
    share = budget * samples.shape[1] / keys
    place = math.ceil(share + 5.0 * share**0.5 + 4.0)
    return samples.topk(place, -1).values[:, -1:]


def measure(n: int, alpha: float, C: float, seed: int) -> dict[str, float]:
    """Of one key/value head of Llama-3-8B: counts per key of the budget, and shares of all keys."""
    geometry = dataclasses.replace(GEOMETRIES["llama3-8b"], heads=4, kv_heads=1)
    inputs = make_inputs(geometry, 1, n, torch.bfloat16, torch.device("cpu"), [], seed)
    query = inputs.query[0, :, 0].float()
    budget = budget_of(n, alpha, C)
    center, spread = channel_moments(inputs.key, torch.zeros(1), torch.full((1,), n))
    weighted, at_center = query * spread[0], (query @ center[0, 0])[:, None]
    size = weighted.norm(dim=-1)[:, None]
    scores, errors, exact = [], [], []
    for begin in range(0, n, _KEYS_AT_ONCE):
        key = inputs.key[:, :, begin : begin + _KEYS_AT_ONCE]
        codes, scale, residual = (t[0, 0] for t in encode_keys(key, center, spread))
        scores.append(weighted @ codes.float().T * scale + at_center)
        errors.append(size * residual)
        exact.append(query @ key[0, 0].float().T)
    score, error, truth = (torch.cat(t, -1) for t in (scores, errors, exact))
    samples = plan_for(Sizes(1, 8, 4, 1, n, 128, 128), budget).samples
    at = n * (2 * torch.arange(samples) + 1) // (2 * samples)
    guess = guess_of(score[:, at], budget, n)
    chosen = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, truth.topk(budget, -1).indices, True)
    listed, sure = ~(score + error < guess), score - error >= guess
    return {
        "n": n,
        "seed": seed,
        "budget": budget,
        "samples": samples,
        "listed_per_row": float(listed.sum() / 4 / budget),
        "listed_union": float(listed.any(0).sum() / budget),
        "reached_per_row": float((truth >= guess).sum() / 4 / budget),
        "chosen_union": float(chosen.any(0).sum() / budget),
        "sure_per_row": float(sure.sum() / 4 / budget),
        "guess_is_proved": bool((sure.sum(-1) >= budget).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--alpha", type=float, default=12.0)
    parser.add_argument("--C", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/results/candidates.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    torch.set_num_threads(1)
    rows = []
    for n in arguments.lengths:
        for seed in range(arguments.seeds):
            rows.append(measure(n, arguments.alpha, arguments.C, seed))
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), 1),
        "alpha": arguments.alpha,
        "C": arguments.C,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

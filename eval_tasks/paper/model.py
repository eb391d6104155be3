"""The same on a model's own queries, keys and values, of one dense forward pass over each sample.

At every length n, a few queries evenly spaced over the last sixteenth before it stand for a context of n. What they
attend is computed by ``nc_patch`` as the paper's top-k: no key for its place, and the others are dropped.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eval_tasks.capture import capture
from eval_tasks.paper.laws import Law, compare, equal_in_mean, estimate, estimates, exponents, gather
from eval_tasks.paper.theory import mass_share
from nc_patch.functional import attend
from nc_patch.ops.problem import Problem
from nc_patch.selections import Dense, Selection, TopK

MEASURES = ("kept_mass", "output_error", "relative_error")


def positions_before(n: int, rows: int) -> torch.Tensor:
    """Positions of the queries that stand for a context of n, ``[rows]``, the last at n − 1."""
    return torch.linspace(n - 1 - n // 16, n - 1, rows).round().long()


def count_keys(captured: Problem, positions: torch.Tensor) -> dict[str, np.ndarray]:
    """What each row's exact weights hold, in float64; ``[Hq, rows]`` each.

    ``mass 0.95`` is the number of keys that hold 95 % of the mass, ``sigma`` the standard deviation of the scores of
    visible keys, ``normal 0.95`` how many keys would hold as much if scores were independent and normal with it.
    """
    query, key, length = captured.query, captured.key, int(positions[-1]) + 1
    keys = key[0, :, :length].double().repeat_interleave(query.shape[1] // key.shape[1], 0)
    scores = captured.scale * query[0, :, positions].double() @ keys.mT
    hidden = torch.arange(length) > positions[:, None]
    n = positions + 1
    mean = scores.masked_fill(hidden, 0.0).sum(-1, keepdim=True) / n[:, None]
    sigma = ((scores - mean).masked_fill(hidden, 0.0).square().sum(-1) / n).sqrt().numpy()
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    cumulative = weights.sort(-1, descending=True).values.cumsum(-1)
    counts = ((cumulative < 0.95).sum(-1) + 1).minimum(n).numpy()
    expected = np.maximum(1.0, mass_share(sigma, 0.05) * n.numpy())
    return {"sigma": sigma, "mass 0.95": counts, "normal 0.95": expected}


def losses(captured: Problem, positions: torch.Tensor, laws: Sequence[Law]) -> dict[str, np.ndarray]:
    """What each law's top-k loses, ``[laws, rows]`` for each of ``MEASURES``.

    The kept mass is the mean over heads. Outputs are those of all heads side by side: ``output_error`` is the largest
    difference of any of their channels, ``relative_error`` is ‖o − o_dense‖ / ‖o_dense‖.
    """
    n = positions + 1
    visible = torch.stack((torch.zeros_like(n), n), -1)[None].int()
    query, key, value = captured.query[:, :, positions], captured.key[:, :, : n[-1]], captured.value[:, :, : n[-1]]
    budgets, origin = n.int()[None, None], visible[..., 0].contiguous()
    every = Problem(query, key, value, visible, origin, budgets, captured.scale, stats=True)

    def attended(selection: Selection, budget: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of all heads ``[rows, Hq·D]``, and the kept mass ``[rows]``."""
        result = attend(every._replace(budget=torch.from_numpy(budget).int()[None, None]), selection, "auto")
        assert result.kept_mass is not None
        return result.output[0].transpose(0, 1).flatten(1).double(), result.kept_mass[0].double().mean(0)

    dense, _ = attended(Dense(), n.numpy())
    found = []
    for law in laws:
        output, kept = attended(TopK(sink_keys=0, recent_keys=0, tail="drop"), law.budgets(n.numpy()))
        difference = output - dense
        relative = difference.norm(dim=-1) / dense.norm(dim=-1)
        found.append(dict(zip(MEASURES, (kept, difference.abs().amax(-1), relative), strict=True)))
    return gather(found)


def measure(
    model: PreTrainedModel,
    samples: Sequence[torch.Tensor],
    layers: Sequence[int],
    lengths: Sequence[int],
    laws: Sequence[Law],
    mixed_keys: int,
    rows: int = 8,
) -> dict[str, Any]:
    """All samples (token ids ``[1, L]``, L at least the longest length), layers, rising lengths and laws.

    ``heads`` has by layer and head the counts of ``count_keys``, medians over rows and samples, and their exponents;
    ``errors`` by length and law the estimates of ``MEASURES``; ``slopes`` by law those of log loss against log n;
    ``mixed`` the losses of α·n^C by C at a mean cost of ``mixed_keys``.
    """
    of_mean = equal_in_mean(mixed_keys, lengths)
    counted, lost = [], []
    positions = [positions_before(n, rows) for n in lengths]
    for ids in samples:
        captured = capture(model, ids[:, : max(lengths)], layers)
        counted.append([[count_keys(one, at) for one in captured] for at in positions])
        lost.append([[losses(one, at, [*laws, *of_mean]) for one in captured] for at in positions])
    table = {name: x.swapaxes(0, 1) for name, x in gather(lost).items()}  # [lengths, samples, layers, laws, rows]
    means = {name: x.mean((2, 4)) for name, x in table.items()}
    errors = estimates(lengths, laws, means)
    for by_name in (table, means):
        by_name["dropped_mass"] = 1 - by_name.pop("kept_mass")
    slopes = [
        {"law": law.name} | {name: estimate(exponents(lengths, x[..., k])) for name, x in means.items()}
        for k, law in enumerate(laws)
    ]
    documents = np.repeat(np.arange(len(samples)), len(layers) * rows).tolist()
    mixed = {}
    for name, x in table.items():
        flat = np.moveaxis(x[:, :, :, len(laws) :], 3, -1).reshape(len(lengths), -1, len(of_mean))
        mixed[name] = compare(of_mean, lengths, flat, documents)
    heads = _heads(gather(counted), layers, lengths)
    return {"heads": heads, "errors": errors, "slopes": slopes, "mixed": {"rows": mixed}}


def _heads(counts: dict[str, np.ndarray], layers: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Medians and exponents of counts ``[samples, lengths, layers, heads, rows]``."""
    # The median over rows is what a budget must serve; a mean would follow the few rows that spread far.
    middle = {name: np.median(x, axis=(0, -1)) for name, x in counts.items()}
    by_sample = {name: np.median(x, axis=-1) for name, x in counts.items()}
    return [
        {
            "layer": layer,
            "head": head,
            "counts": {name: x[:, place, head].tolist() for name, x in middle.items()},
            "exponents": {name: estimate(exponents(lengths, x[:, :, place, head].T)) for name, x in by_sample.items()},
        }
        for place, layer in enumerate(layers)
        for head in range(middle["sigma"].shape[-1])
    ]

"""The same on a model's own queries, keys and values, of one dense forward pass over each sample.

At every length n, a few queries evenly spaced over the last sixteenth before it stand for a context of n. What they
attend is computed by ``nc_patch`` as the paper's top-k: no key for its place, and the others are dropped.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from eval_tasks.capture import attend_rows, receive
from eval_tasks.errors import EvalError
from eval_tasks.paper.laws import Law, compare, equal_in_mean, errors, estimate, estimates, exponents
from eval_tasks.paper.synthetic import mass_share
from nc_patch.ops.problem import Problem
from nc_patch.selections import Dense, TopK


def capture(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Problem]:
    """``receive`` for layers of plain causal attention, which query, key, value and scale say everything about.

    Raises EvalError for a layer that slides, goes by chunks, has a soft-cap or sinks.
    """
    received = receive(model, ids, layers)
    for layer, p in zip(layers, received, strict=True):
        extras = {"a window": p.visible[..., 0].any(), "a soft-cap": p.softcap, "sinks": p.sinks is not None}
        if found := [name for name, there in extras.items() if there]:
            said = f"layer {layer} has {' and '.join(found)}, and this measurement is of plain causal attention"
            raise EvalError(f"{said}: choose other layers, or another model")
    return received


def positions_before(n: int, rows: int) -> torch.Tensor:
    """Positions of the queries that stand for a context of n, ``[rows]``, the last at n − 1."""
    return torch.linspace(n - 1 - n // 16, n - 1, rows).round().long()


def count_keys(captured: Problem, positions: torch.Tensor) -> pd.DataFrame:
    """What the exact weights of each head and row hold, in float64.

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
    index = pd.MultiIndex.from_product(list(map(range, sigma.shape)), names=["head", "row"])
    columns = {"sigma": sigma, "mass 0.95": counts, "normal 0.95": expected}
    return pd.DataFrame({name: x.ravel() for name, x in columns.items()}, index)


def losses(captured: Problem, positions: torch.Tensor, laws: Sequence[Law]) -> pd.DataFrame:
    """What each law's top-k loses of each row: ``kept_mass``, the mean over heads, and errors of outputs.

    Outputs are those of all heads side by side: ``output_error`` is the largest difference of any of their channels,
    ``relative_error`` is ‖o − o_dense‖ / ‖o_dense‖.
    """
    n, selection = positions + 1, TopK(sink_keys=0, recent_keys=0, tail="drop")
    everything = attend_rows(captured, positions, int(n[-1]), n.int()[None, None], Dense(), "auto")
    dense, found = everything.output[0].transpose(0, 1).flatten(1).double(), {}
    for law in laws:
        budget = torch.from_numpy(law.budgets(n.numpy())).int()[None, None]
        result = attend_rows(captured, positions, int(n[-1]), budget, selection, "auto")
        assert result.kept_mass is not None
        difference = result.output[0].transpose(0, 1).flatten(1).double() - dense
        relative = difference.norm(dim=-1) / dense.norm(dim=-1)
        columns = (result.kept_mass[0].double().mean(0), difference.abs().amax(-1), relative)
        found[law.name] = pd.DataFrame(dict(zip(("kept_mass", "output_error", "relative_error"), columns, strict=True)))
    return pd.concat(found, names=["law", "row"])


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
    ``errors`` by length and law the estimates of ``losses``; ``slopes`` by law those of log loss against log n;
    ``mixed`` the losses of α·n^C by C at a mean cost of ``mixed_keys``.
    """
    of_mean, counted, lost = equal_in_mean(mixed_keys, lengths), {}, {}
    for sample, ids in enumerate(samples):
        received = zip(layers, capture(model, ids[:, : max(lengths)], layers), strict=True)
        for (layer, problem), n in product(received, lengths):
            at = positions_before(n, rows)
            counted[sample, layer, n] = count_keys(problem, at)
            lost[sample, layer, n] = losses(problem, at, [*laws, *of_mean])
    # The median over rows is what a budget must serve; a mean would follow the few rows that spread far.
    counts, cell = pd.concat(counted, names=["sample", "layer", "n"]), ["layer", "head", "n"]
    slopes = exponents(counts.groupby([*cell, "sample"]).median())
    heads = [
        {"layer": layer, "head": head, "counts": own.to_dict("list")}
        | {"exponents": {name: estimate(x) for name, x in slopes.loc[layer, head].items()}}
        for (layer, head), own in counts.groupby(cell).median().groupby(["layer", "head"])
    ]
    table = pd.concat(lost, names=["sample", "layer", "n"])
    found = {"heads": heads, "errors": errors(table.groupby(["n", "law", "sample"]).mean(), laws, ["n", "law"])}
    table["dropped_mass"] = 1 - table.pop("kept_mass")
    means = table.groupby(["n", "law", "sample"]).mean()
    found["slopes"] = estimates(exponents(means[means.index.isin([x.name for x in laws], level="law")]), ["law"])
    return found | {"mixed": {"rows": {name: compare(of_mean, table[name]) for name in table}}}

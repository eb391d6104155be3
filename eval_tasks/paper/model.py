"""The same on a model's own queries, keys and values: how many keys hold the mass, and what a budget law loses.

They come from one dense forward pass over each sample. At every length n, ``ROWS`` queries evenly spaced over the last
sixteenth before it stand for a context of n; what they attend is computed by ``nc_patch`` as the paper's top-k: no key
is attended but for its score, and the others are dropped.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eval_tasks.capture import Captured, capture
from eval_tasks.paper.estimates import estimate, exponents
from eval_tasks.paper.laws import DENSE, Law, topk_attention
from eval_tasks.paper.theory import mass_share

ROWS = 8
EPSILONS = (0.2, 0.05)
MEASURES = ("kept_mass", "output_error", "relative_error")


def positions_before(n: int, rows: int) -> torch.Tensor:
    """Positions of the queries that stand for a context of n, ``[rows]``, the last at n − 1."""
    return torch.linspace(n - 1 - n // 16, n - 1, rows).round().long()


def count_keys(captured: Captured, positions: torch.Tensor) -> dict[str, np.ndarray]:
    """What each row's exact weights hold, in float64; ``[Hq, rows]`` each.

    Returns:
        ``mass …``: for each of ``EPSILONS`` the number of keys that hold 1 − ε of the mass; ``entropy``: the support
        exp(H); ``sigma``: the standard deviation of the visible keys' scores; ``normal …``: how many keys would hold
        1 − ε if the scores were independent and normal with that deviation.
    """
    query, key, _, scale = captured
    group, length = query.shape[1] // key.shape[1], int(positions[-1]) + 1
    keys = key[0, :, :length].double().repeat_interleave(group, 0)
    scores = scale * query[0, :, positions].double() @ keys.mT
    seen = torch.arange(length) <= positions[:, None]
    n = positions + 1
    mean = scores.masked_fill(~seen, 0.0).sum(-1) / n
    sigma = ((scores - mean[..., None]).masked_fill(~seen, 0.0).square().sum(-1) / n).sqrt()
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    found = {"sigma": sigma.numpy(), "entropy": torch.special.entr(weights).sum(-1).exp().numpy()}
    cumulative = weights.sort(-1, descending=True).values.cumsum(-1)
    for epsilon in EPSILONS:
        counts = ((cumulative < 1 - epsilon).sum(-1) + 1).minimum(n)
        found[f"mass {1 - epsilon:g}"] = counts.numpy()
        shares = np.vectorize(lambda s, epsilon=epsilon: mass_share(s, epsilon))(sigma.numpy())
        found[f"normal {1 - epsilon:g}"] = np.maximum(1.0, shares * n.numpy())
    return found


def losses(captured: Captured, positions: torch.Tensor, laws: Sequence[Law]) -> dict[str, dict[str, np.ndarray]]:
    """What each law's top-k loses: law → measure of ``MEASURES`` → ``[rows]``.

    The kept mass is the mean over heads. Outputs are those of all heads side by side: ``output_error`` is the largest
    difference of any of their channels, ``relative_error`` is ‖o − o_dense‖ / ‖o_dense‖.
    """
    length = int(positions[-1]) + 1
    query, key, value = captured.query[:, :, positions], captured.key[:, :, :length], captured.value[:, :, :length]
    end = positions.int() + 1
    options: dict[str, Any] = {"visible": torch.stack((torch.zeros_like(end), end), -1)[None], "scale": captured.scale}
    dense = topk_attention(query, key, value, DENSE, **options).output
    found = {}
    for law in laws:
        result = topk_attention(query, key, value, law, **options)
        assert result.kept_mass is not None
        difference, whole = (x[0].transpose(0, 1).flatten(1).double() for x in (result.output - dense, dense))
        found[law.name] = {
            "kept_mass": result.kept_mass[0].double().mean(0).numpy(),
            "output_error": difference.abs().amax(-1).numpy(),
            "relative_error": (difference.norm(dim=-1) / whole.norm(dim=-1)).numpy(),
        }
    return found


def measure(
    model: PreTrainedModel,
    samples: Sequence[torch.Tensor],
    layers: Sequence[int],
    lengths: Sequence[int],
    laws: Sequence[Law],
    mixed: Sequence[Law],
    rows: int = ROWS,
) -> dict[str, Any]:
    """All samples, layers, lengths and laws.

    Args:
        model: any that ``nc_patch`` takes.
        samples: token ids ``[1, L]`` each, L at least the longest length.
        layers: of the model.
        lengths: contexts, rising.
        laws: compared at every length.
        mixed: more laws, for ``rows``.
        rows: queries at each length.

    Returns:
        ``heads``: for each layer and head the exponents of ``count_keys`` over the lengths, and its counts, medians
        over rows and samples. ``errors``: for each length and law the estimates over samples of ``MEASURES``, and
        ``relative_error_by_layer``. ``slopes``: for each law the slopes of log loss against log n, estimates over
        samples. ``rows``: law of ``mixed`` → measure → ``[lengths, samples·layers·rows]``, with
        ``documents``, the sample of each.
    """
    counted: dict[str, list[Any]] = {}
    lost: dict[str, dict[str, list[Any]]] = {}
    for ids in samples:
        captured = capture(model, ids[:, : max(lengths)], layers)
        by_layer = [[count_keys(one, positions_before(n, rows)) for n in lengths] for one in captured]
        for name in by_layer[0][0]:
            counted.setdefault(name, []).append([[at[name] for at in one] for one in by_layer])
        for n in lengths:
            found = [losses(one, positions_before(n, rows), [*laws, *mixed]) for one in captured]
            for law in [*laws, *mixed]:
                for name in MEASURES:
                    lost.setdefault(law.name, {}).setdefault(name, []).append([one[law.name][name] for one in found])
    counts = {name: np.array(values) for name, values in counted.items()}  # [samples, layers, lengths, heads, rows]
    shape = (len(samples), len(lengths), len(layers), rows)
    errors = {law: {name: np.array(x).reshape(shape) for name, x in own.items()} for law, own in lost.items()}
    return {
        "heads": _heads(counts, layers, lengths),
        "errors": [
            {"n": n, "law": law.name, "budget": law.budget(n)}
            | {name: estimate(errors[law.name][name][:, place].mean((1, 2))) for name in MEASURES}
            | {"relative_error_by_layer": errors[law.name]["relative_error"][:, place].mean((0, 2)).tolist()}
            for place, n in enumerate(lengths)
            for law in laws
        ],
        "slopes": [
            {"law": law.name} | {name: estimate(slopes) for name, slopes in _slopes(errors[law.name], lengths).items()}
            for law in laws
        ],
        "rows": {
            law.name: {name: np.moveaxis(x, 1, 0).reshape(len(lengths), -1) for name, x in errors[law.name].items()}
            for law in mixed
        },
        "documents": np.repeat(np.arange(len(samples)), len(layers) * rows).tolist(),
    }


def _slopes(errors: dict[str, np.ndarray], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """Slopes of each sample, of losses ``[samples, lengths, layers, rows]``; the kept mass counts as the dropped."""
    means = {name: x.mean((2, 3)).T for name, x in errors.items()}
    means["dropped_mass"] = 1 - means.pop("kept_mass")
    return {name: exponents(lengths, x) for name, x in means.items()}


def _heads(counts: dict[str, np.ndarray], layers: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    # The median over rows is what a budget must serve; a mean would follow the few rows that spread far.
    middle = {name: np.median(np.moveaxis(x, 0, -1), axis=(-2, -1)) for name, x in counts.items()}
    by_sample = {name: np.median(x, axis=-1) for name, x in counts.items()}  # [samples, layers, lengths, heads]
    return [
        {
            "layer": layer,
            "head": head,
            "counts": {name: x[place, :, head].tolist() for name, x in middle.items()},
            "exponents": {name: estimate(exponents(lengths, x[:, place, :, head].T)) for name, x in by_sample.items()},
        }
        for place, layer in enumerate(layers)
        for head in range(middle["sigma"].shape[-1])
    ]

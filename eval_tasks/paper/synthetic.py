"""One query row over n Gaussian keys, in float64: what attention over its k highest scores loses.

Inputs x_j ~ N(0, I) in ``CHANNELS`` dimensions are the keys; a query of length σ along a random unit vector u gives
independent scores σ·z_j with z_j = u·x_j ~ N(0, 1). Values are ``independent`` of the keys, N(0, I), or ``shared``: the
inputs themselves, as in self-attention with W_V = I. Rows are drawn one at a time, of any length, and never n × n.

Since σ only scales the scores, one sorted row serves every σ; since attention over the k highest scores is a ratio of
partial sums in that order, one pass over the row serves every budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from eval_tasks.paper.estimates import estimate, exponents, geometric
from eval_tasks.paper.laws import Law, topk_attention
from eval_tasks.paper.theory import growing_spread

CHANNELS = 16
VALUES = ("independent", "shared")
EPSILONS = (0.2, 0.05)


@dataclass(frozen=True)
class Spread:
    """The standard deviation of the scores: ``fixed`` at sigma, or growing so that σ² = s²·2·ln n.

    Attributes:
        name: in results.
        sigma: the fixed σ, or None.
        s: of the growing σ, or None.
    """

    name: str
    sigma: float | None = None
    s: float | None = None

    def at(self, n: int) -> float:
        """σ of a row over n keys."""
        if self.sigma is not None:
            return self.sigma
        assert self.s is not None
        return growing_spread(n, self.s)


SPREADS = tuple(Spread(f"sigma={sigma:g}", sigma=sigma) for sigma in (1.0, 2.0, 4.0)) + tuple(
    Spread(f"s={s:g}", s=s) for s in (0.3, 0.5, 0.707, 0.866, 1.0, 1.2)
)


@dataclass(frozen=True)
class Row:
    """One row, highest score first.

    Attributes:
        z: float64 ``[n]``, the scores at σ = 1, falling.
        values: float64 ``[n, CHANNELS]``, independent of z.
        direction: float64 ``[CHANNELS]``, the unit vector u.
    """

    z: np.ndarray
    values: np.ndarray
    direction: np.ndarray

    def inputs(self) -> np.ndarray:
        """The inputs x_j, ``[n, CHANNELS]``: the independent values with their component along u replaced by z."""
        return self.values + np.outer(self.z - self.values @ self.direction, self.direction)


def draw(n: int, seed: int) -> Row:
    """The row of n keys of a seed; rows of different lengths are independent too."""
    random = np.random.default_rng([seed, n])
    direction = random.standard_normal(CHANNELS)
    z = np.sort(random.standard_normal(n))[::-1].copy()
    return Row(z, random.standard_normal((n, CHANNELS)), direction / np.linalg.norm(direction))


@dataclass(frozen=True)
class Attended:
    """Attention of one row over its k highest scores, for several k and, last, for all keys.

    Attributes:
        kept: ``[K + 1]``, the mass kept.
        outputs: for each of ``VALUES``, ``[K + 1, CHANNELS]``.
        highest, following: the highest weight, and ``[K]`` the weight of the first key that is left out.
    """

    kept: np.ndarray
    outputs: dict[str, np.ndarray]
    highest: float
    following: np.ndarray


def attend(row: Row, sigma: float, budgets: Sequence[int]) -> Attended:
    """Attends the k highest scores for each k of ``budgets``, in [0, n]; k = 0 gives zero."""
    n = len(row.z)
    weights = np.exp(sigma * (row.z - row.z[0]))
    weights /= weights.sum()
    cuts = np.unique([0, *budgets, n])
    spans = [slice(a, b) for a, b in pairwise(cuts)]
    summed = partial(_partial_sums, spans=spans, weights=weights)
    mass, moment, noise = summed(np.ones((n, 1))), summed(row.z[:, None]), summed(row.values)
    some = np.maximum(mass, np.finfo(np.float64).tiny)  # sums over no key are zero, and so is what they are divided to
    independent, mean_score = noise / some, moment / some
    shared = independent + (mean_score - independent @ row.direction[:, None]) * row.direction
    at = np.append(np.searchsorted(cuts, budgets), len(cuts) - 1)
    outputs = dict(zip(VALUES, (independent[at], shared[at]), strict=True))
    return Attended(mass[at, 0], outputs, float(weights[0]), np.append(weights, 0.0)[np.asarray(budgets)])


def losses(row: Row, sigma: float, budgets: Sequence[int]) -> dict[str, np.ndarray]:
    """What attention over the k highest scores loses, for each k of ``budgets``; k = 0 stands for answering zero.

    Returns:
        float64 ``[len(budgets)]`` each: ``kept_mass``; ``weight_error``, the largest difference of an attention weight;
        for each of ``VALUES``, ``output_error.…``, the largest difference of an output channel, and
        ``relative_error.…``, ‖o − o_dense‖ / ‖o_dense‖.
    """
    attended = attend(row, sigma, budgets)
    kept = attended.kept[:-1]
    # The weights of keys that are kept grow by 1 / kept, those of the others become zero.
    raised = attended.highest * np.divide(1.0 - kept, kept, out=np.zeros_like(kept), where=kept > 0)
    found = {"kept_mass": kept, "weight_error": np.maximum(raised, attended.following)}
    for name, output in attended.outputs.items():
        difference = output[:-1] - output[-1]
        found[f"output_error.{name}"] = np.abs(difference).max(-1)
        found[f"relative_error.{name}"] = np.linalg.norm(difference, axis=-1) / np.linalg.norm(output[-1])
    return found


def _partial_sums(values: np.ndarray, spans: Sequence[slice], weights: np.ndarray) -> np.ndarray:
    """The weighted sums of values ``[n, c]`` up to each span's end, the empty sum first: ``[len(spans) + 1, c]``."""
    by_span = [weights[span] @ values[span] for span in spans]
    return np.concatenate((np.zeros((1, values.shape[1])), np.cumsum(by_span, axis=0)))


def supports(row: Row, sigma: float) -> dict[str, float]:
    """The entropy support exp(H), and for each of ``EPSILONS`` the number of keys that hold 1 − ε of the mass."""
    logits = sigma * (row.z - row.z[0])
    weights = np.exp(logits)
    total = weights.sum()
    cumulative = np.cumsum(weights) / total
    found = {"entropy": float(np.exp(np.log(total) - weights @ logits / total))}
    for epsilon in EPSILONS:
        found[f"mass {1 - epsilon:g}"] = min(len(weights), int(np.searchsorted(cumulative, 1 - epsilon)) + 1)
    return found


def measure(lengths: Sequence[int], seeds: Sequence[int], laws: Sequence[Law], mixed: Sequence[Law]) -> dict[str, Any]:
    """All rows of all lengths, every spread and law.

    Args:
        lengths, seeds: the rows.
        laws: compared at every length.
        mixed: more laws, for ``rows``.

    Returns:
        ``errors``: a dict for each spread, length and law, of estimates over the seeds.
        ``supports``: one for each spread and length, of geometric means over the seeds.
        ``exponents``: one for each spread, of the slopes of the supports over all lengths.
        ``rows``: spread → law of ``mixed`` → measure → ``[lengths, seeds]``.
    """
    zero = Law("zero", 1.0, 0.0)
    every = [zero, *laws, *mixed]
    found: dict[tuple[str, int], list[dict[str, np.ndarray]]] = {}
    counted: dict[tuple[str, int], list[dict[str, float]]] = {}
    for n in lengths:
        budgets = [0, *(law.budget(n) for law in every[1:])]
        for seed in seeds:
            row = draw(n, seed)
            for spread in SPREADS:
                found.setdefault((spread.name, n), []).append(losses(row, spread.at(n), budgets))
                counted.setdefault((spread.name, n), []).append(supports(row, spread.at(n)))
    table = {
        key: {name: np.array([one[name] for one in rows]) for name in rows[0]} for key, rows in found.items()
    }  # measure -> [seeds, laws]
    errors = [
        {"spread": spread, "n": n, "law": law.name, "budget": 0 if law is zero else law.budget(n)}
        | {name: estimate(values[:, place]) for name, values in measures.items()}
        for (spread, n), measures in table.items()
        for place, law in enumerate(every[: 1 + len(laws)])
    ]
    support_rows = [
        {"spread": spread, "n": n} | {name: geometric([one[name] for one in rows]) for name in rows[0]}
        for (spread, n), rows in counted.items()
    ]
    slopes = []
    for spread in SPREADS:
        names = counted[spread.name, lengths[0]][0]
        counts = {name: np.array([[one[name] for one in counted[spread.name, n]] for n in lengths]) for name in names}
        slopes.append(
            {"spread": spread.name} | {name: estimate(exponents(lengths, values)) for name, values in counts.items()}
        )
    rows = {
        spread.name: {
            law.name: {
                name: np.array([table[spread.name, n][name][:, place] for n in lengths])
                for name in table[spread.name, lengths[0]]
            }
            for place, law in enumerate(mixed, 1 + len(laws))
        }
        for spread in SPREADS
    }
    return {"errors": errors, "supports": support_rows, "exponents": slopes, "rows": rows}


def library_difference(n: int, seed: int, sigma: float, law: Law) -> dict[str, float]:
    """How far ``nc_patch``, whose scores and softmax are float32, is from ``attend`` on one row.

    Returns:
        ``kept_mass``: the difference of the kept mass. ``independent``, ``shared``: the largest of an output channel.
    """
    row = draw(n, seed)
    exact = attend(row, sigma, [law.budget(n)])
    tensor = lambda x: torch.from_numpy(x).float().view(1, 1, -1, CHANNELS)  # noqa: E731
    query, inputs = tensor(sigma * row.direction), tensor(row.inputs())
    found = {}
    for name, value in zip(VALUES, (tensor(row.values), inputs), strict=True):
        result = topk_attention(query, inputs, value, law, scale=1.0)
        assert result.kept_mass is not None
        found[name] = float(np.abs(result.output.flatten().numpy() - exact.outputs[name][0]).max())
        found["kept_mass"] = abs(float(result.kept_mass) - float(exact.kept[0]))
    return found

"""One query row over n Gaussian keys, in float64: what attention over its k highest scores loses.

Inputs x_j ~ N(0, I) in ``CHANNELS`` dimensions are the keys and the values, as in self-attention with W_V = I. A query
of length σ along a random unit vector u gives independent scores σ·z_j with z_j = u·x_j ~ N(0, 1). Since σ only scales
the scores, one sorted row serves every σ; since attention over the k highest scores is a ratio of partial sums in that
order, one pass serves every budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from eval_tasks.paper.laws import Law, compare, equal_in_mean, errors, estimates, exponents

CHANNELS = 16
SPREADS = tuple(f"sigma={sigma:g}" for sigma in (1, 2, 4)) + tuple(f"s={s:g}" for s in (0.3, 0.5, 0.707, 0.866, 1, 1.2))
"""Standard deviations of the scores: σ at every n, or growing so that σ² = s²·2·ln n."""


def mass_share(sigma: Any, epsilon: float) -> Any:
    """The share of the keys, from the largest down, that hold 1 − ε of the mass of scores N(0, σ²): Φ(−σ − Φ⁻¹(ε)).

    Tilting a normal density by exp(σ z) shifts it by σ: the mass above a threshold t, in units of σ, is Φ(σ − t), the
    share of keys above it Φ(−t). That holds while σ² < 2 ln n; beyond, the few largest keys hold the mass (the frozen
    phase of Derrida's random energy model).
    """
    return ndtr(-sigma - ndtri(epsilon))


def sigma_of(spread: str, n: float) -> float:
    """σ of one of ``SPREADS`` over n keys.

    Where it grows, the entropy support n·exp(−σ²/2) is n^(1 − s²), for s up to 1.
    """
    kind, _, value = spread.partition("=")
    return float(value) * (1.0 if kind == "sigma" else math.sqrt(2.0 * math.log(n)))


@dataclass(frozen=True)
class Row:
    """One row in float64, highest score first: the scores z ``[n]`` at σ = 1, and the inputs x_j ``[n, CHANNELS]``.

    ``direction`` ``[CHANNELS]`` is the unit vector u.
    """

    z: np.ndarray
    inputs: np.ndarray
    direction: np.ndarray


def draw(n: int, seed: int) -> Row:
    """The row of n keys of a seed; rows of different lengths are independent too."""
    random = np.random.default_rng([seed, n])
    direction = random.standard_normal(CHANNELS)
    direction /= np.linalg.norm(direction)
    z = np.sort(random.standard_normal(n))[::-1].copy()
    inputs = random.standard_normal((n, CHANNELS))
    return Row(z, inputs + np.outer(z - inputs @ direction, direction), direction)  # of which z are the components


def losses(row: Row, sigma: float, budgets: Sequence[int]) -> dict[str, np.ndarray]:
    """What attention over the k highest scores loses, for each k of ``budgets``; k = 0 stands for answering zero.

    ``weight_error`` is the largest difference of an attention weight, ``relative_error.shared`` ‖o − o_dense‖ /
    ‖o_dense‖ where keys and values share their inputs.
    """
    n = len(row.z)
    weights = np.exp(sigma * (row.z - row.z[0]))
    weights /= weights.sum()
    cuts = np.unique([0, *budgets, n])
    columns = np.column_stack((np.ones(n), row.inputs))
    by_span = [weights[begin:end] @ columns[begin:end] for begin, end in pairwise(cuts)]
    sums = np.cumsum([np.zeros(1 + CHANNELS), *by_span], axis=0)
    kept, outputs = np.split(sums[np.searchsorted(cuts, budgets)], [1], axis=1)
    dense = sums[-1, 1:] / sums[-1, 0]
    # Sums over no key are zero, and so is what they are divided to.
    errors = outputs / np.maximum(kept, np.finfo(np.float64).tiny) - dense
    kept = kept[:, 0]
    # The weights of keys that are kept grow by 1 / kept, those of the others become zero.
    raised = weights[0] * np.divide(1.0 - kept, kept, out=np.zeros_like(kept), where=kept > 0)
    return {
        "kept_mass": kept,
        "weight_error": np.maximum(raised, np.append(weights, 0.0)[np.asarray(budgets)]),
        "relative_error.shared": np.linalg.norm(errors, axis=-1) / np.linalg.norm(dense),
    }


def supports(row: Row, sigma: float) -> dict[str, float]:
    """The ``entropy`` support exp(H), and the number of keys that hold 95 % of the mass, ``mass 0.95``."""
    logits = sigma * (row.z - row.z[0])
    weights = np.exp(logits)
    total = weights.sum()
    count = np.searchsorted(np.cumsum(weights) / total, 0.95) + 1
    return {"entropy": np.exp(np.log(total) - weights @ logits / total), "mass 0.95": min(len(weights), count)}


def measure(
    lengths: Sequence[int], seeds: int, laws: Sequence[Law], mixed_lengths: Sequence[int], mixed_keys: int
) -> dict[str, Any]:
    """Rows of all lengths and of the seeds 0, 1, 2 …, every spread and law.

    ``errors`` has estimates over the seeds by spread, length and law; ``exponents`` the slopes of the supports;
    ``mixed`` by spread the dropped mass of α·n^C by C at a mean cost of ``mixed_keys`` over ``mixed_lengths``.
    """
    shown, of_mean = [Law("zero", 0.0, 0.0), *laws], equal_in_mean(mixed_keys, mixed_lengths)
    lost, held, names = {}, {}, [law.name for law in [*shown, *of_mean]]
    for n, seed in product(lengths, range(seeds)):
        row, budgets = draw(n, seed), [round(law.mean(n)) for law in [*shown, *of_mean]]
        for spread in SPREADS:
            sigma = sigma_of(spread, n)
            lost[spread, n, seed] = pd.DataFrame(losses(row, sigma, budgets), names)
            held[spread, n, seed] = supports(row, sigma)
    table, levels = pd.concat(lost, names=["spread", "n", "seed", "law"]), ["spread", "n", "seed"]
    slopes = exponents(pd.DataFrame.from_dict(held, orient="index").rename_axis(levels))
    dropped = 1 - table.loc[table.index.isin(mixed_lengths, level="n"), "kept_mass"]
    return {
        "errors": errors(table, shown, ["spread", "n", "law"]),
        "exponents": estimates(slopes, ["spread"]),
        "mixed": {"rows": {spread: {"dropped_mass": compare(of_mean, dropped.xs(spread))} for spread in SPREADS}},
    }

"""One query row over n Gaussian keys, in float64: what attention over its k highest scores loses.

Inputs x_j ~ N(0, I) in ``CHANNELS`` dimensions are the keys; a query of length σ along a random unit vector u gives
independent scores σ·z_j with z_j = u·x_j ~ N(0, 1). Values are ``independent`` of the keys, N(0, I), or ``shared``: the
inputs themselves, as in self-attention with W_V = I. Since σ only scales the scores, one sorted row serves every σ;
since attention over the k highest scores is a ratio of partial sums in that order, one pass serves every budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from eval_tasks.paper.laws import Law, compare, equal_in_mean, estimate, estimates, exponents, gather
from eval_tasks.paper.theory import growing_spread

CHANNELS = 16
VALUES = ("independent", "shared")
SPREADS = tuple(f"sigma={sigma:g}" for sigma in (1, 2, 4)) + tuple(f"s={s:g}" for s in (0.3, 0.5, 0.707, 0.866, 1, 1.2))
"""Standard deviations of the scores: σ at every n, or growing so that σ² = s²·2·ln n."""


def sigma_of(spread: str, n: float) -> float:
    """σ of one of ``SPREADS`` over n keys."""
    kind, _, value = spread.partition("=")
    return float(value) if kind == "sigma" else growing_spread(n, float(value))


@dataclass(frozen=True)
class Row:
    """One row in float64, highest score first: the scores z ``[n]`` at σ = 1, and values ``[n, CHANNELS]``.

    Values are independent of z; ``direction`` ``[CHANNELS]`` is the unit vector u.
    """

    z: np.ndarray
    values: np.ndarray
    direction: np.ndarray

    @cached_property
    def inputs(self) -> np.ndarray:
        """The inputs x_j, ``[n, CHANNELS]``: the independent values with their component along u replaced by z."""
        return self.values + np.outer(self.z - self.values @ self.direction, self.direction)


def draw(n: int, seed: int) -> Row:
    """The row of n keys of a seed; rows of different lengths are independent too."""
    random = np.random.default_rng([seed, n])
    direction = random.standard_normal(CHANNELS)
    z = np.sort(random.standard_normal(n))[::-1].copy()
    return Row(z, random.standard_normal((n, CHANNELS)), direction / np.linalg.norm(direction))


def attend(row: Row, sigma: float, budgets: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Attends the k highest scores for each of K budgets in [0, n], and last all keys; k = 0 gives zero.

    Returns the mass kept ``[K + 1]``, for each of ``VALUES`` the outputs ``[K + 1, CHANNELS]``, all weights ``[n]``.
    """
    n = len(row.z)
    weights = np.exp(sigma * (row.z - row.z[0]))
    weights /= weights.sum()
    cuts = np.unique([0, *budgets, n])
    columns = np.column_stack((np.ones(n), row.values, row.inputs))
    by_span = [weights[begin:end] @ columns[begin:end] for begin, end in pairwise(cuts)]
    sums = np.cumsum([np.zeros(1 + 2 * CHANNELS), *by_span], axis=0)[np.searchsorted(cuts, [*budgets, n])]
    mass = sums[:, :1]
    # Sums over no key are zero, and so is what they are divided to.
    outputs = np.split(sums[:, 1:] / np.maximum(mass, np.finfo(np.float64).tiny), 2, axis=1)
    return mass[:, 0], dict(zip(VALUES, outputs, strict=True)), weights


def losses(row: Row, sigma: float, budgets: Sequence[int]) -> dict[str, np.ndarray]:
    """What attention over the k highest scores loses, for each k of ``budgets``; k = 0 stands for answering zero.

    ``kept_mass``; ``weight_error``, the largest difference of an attention weight; of each of ``VALUES`` the largest
    difference of an output channel, ``output_error.…``, and ``relative_error.…``, ‖o − o_dense‖ / ‖o_dense‖.
    """
    mass, outputs, weights = attend(row, sigma, budgets)
    kept = mass[:-1]
    # The weights of keys that are kept grow by 1 / kept, those of the others become zero.
    raised = weights[0] * np.divide(1.0 - kept, kept, out=np.zeros_like(kept), where=kept > 0)
    found = {"kept_mass": kept, "weight_error": np.maximum(raised, np.append(weights, 0.0)[np.asarray(budgets)])}
    for name, output in outputs.items():
        difference = output[:-1] - output[-1]
        found[f"output_error.{name}"] = np.abs(difference).max(-1)
        found[f"relative_error.{name}"] = np.linalg.norm(difference, axis=-1) / np.linalg.norm(output[-1])
    return found


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

    ``errors`` has estimates over the seeds by spread, length and law; ``supports`` geometric means by spread and
    length; ``exponents`` the slopes of the supports; ``mixed`` by spread the dropped mass of α·n^C by C at a mean cost
    of ``mixed_keys`` over ``mixed_lengths``.
    """
    shown, of_mean = [Law("zero", 0.0, 0.0), *laws], equal_in_mean(mixed_keys, mixed_lengths)

    def measured(n: int, seed: int) -> list[dict[str, Any]]:
        row, budgets = draw(n, seed), [law.budget(n) for law in [*shown, *of_mean]]
        return [losses(row, sigma_of(s, n), budgets) | supports(row, sigma_of(s, n)) for s in SPREADS]

    # [lengths, seeds, spreads], and laws behind them where it is a loss.
    table = gather([[measured(n, seed) for seed in range(seeds)] for n in lengths])
    found: dict[str, Any] = {"errors": [], "supports": [], "exponents": []}
    mixed, places = {}, [list(lengths).index(n) for n in mixed_lengths]
    for s, spread in enumerate(SPREADS):
        lost = {name: x[:, :, s] for name, x in table.items() if x.ndim == 4}
        counts = {name: x[:, :, s] for name, x in table.items() if x.ndim == 3}
        found["errors"] += [{"spread": spread} | row for row in estimates(lengths, shown, lost)]
        for i, n in enumerate(lengths):
            means = {name: np.exp(estimate(np.log(x[i]))).tolist() for name, x in counts.items()}
            found["supports"].append({"spread": spread, "n": n} | means)
        slopes = {name: estimate(exponents(lengths, x)) for name, x in counts.items()}
        found["exponents"].append({"spread": spread} | slopes)
        dropped = 1 - lost["kept_mass"][places, :, len(shown) :]
        mixed[spread] = {"dropped_mass": compare(of_mean, mixed_lengths, dropped)}
    return found | {"mixed": {"rows": mixed}}

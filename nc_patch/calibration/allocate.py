"""Sharing a number of keys among layers and heads so that the sum of their predicted losses is least.

There one more key is worth the same to every head: each takes the keys at which its slope is one common price, and its
law runs through what it takes at each length. The price is sought that spends the budget.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nc_patch.budget import budgets
from nc_patch.calibration.fit import theil_sen
from nc_patch.common import ProfileError

_ROWS = 64  # queries on which the price is sought; the last step counts every one
_TRACE = 1e-6  # by which laws that are alike differ
_DENSE_SHARE = 0.9  # of the keys: a law that gives as many at every length is made dense


class Laws(NamedTuple):
    """Budget laws ``alpha * n**C`` of all heads, float64 ``[M, H]``."""

    alpha: np.ndarray
    C: np.ndarray

    def where(self, sparse: np.ndarray) -> "Laws":
        """These laws where ``sparse``, bool ``[M, H]``, and every key elsewhere."""
        return Laws(*(np.where(sparse, values, 1.0) for values in self))

    def attend_all(self, lengths: Sequence[int]) -> np.ndarray:
        """Which laws give nearly every key at the first and the last of the lengths, bool ``[M, H]``."""
        ends = np.array((lengths[0], lengths[-1]), dtype=float)
        return np.all(budgets(ends, self.alpha[..., None], self.C[..., None]) >= _DENSE_SHARE * ends, -1)


class Demand:
    """How many keys each head takes at each length, by the price of a key.

    ``keys`` are ``[G]``, ascending; ``visible [L, M]`` is how many the rows of each length see, ``cost [L, M, H, G]``
    what heads lose with so many keys.
    """

    def __init__(self, keys: np.ndarray, visible: np.ndarray, cost: np.ndarray) -> None:
        self.visible = visible
        seen = visible[..., None, None]
        cost = np.where(keys >= seen, 0.0, np.maximum(cost, 0.0))
        keys = np.broadcast_to(np.minimum(keys, seen), cost.shape)
        slopes = -_hull_slopes(keys, cost)
        tiny = max(float(slopes.max(where=np.isfinite(slopes), initial=0.0)), 1e-300) * 1e-12
        self.log_slopes = np.log(np.fmax(slopes, tiny))
        # A slope between two numbers of keys belongs to their geometric mean.
        self._log_keys = np.log(np.sqrt(keys[..., 1:] * keys[..., :-1]))
        self._log_least, self._log_most = np.log(keys[..., :1]), np.log(seen)

    def price_range(self) -> tuple[float, float]:
        """Prices at which every head takes all keys, and at which every head takes fewest."""
        return float(np.exp(self.log_slopes.min())) / 2, float(np.exp(self.log_slopes.max())) * 2

    def at(self, price: float) -> np.ndarray:
        """Keys of every head at a price, ``[L, M, H]``: the fewest above its first slope, all below its last one."""
        wanted, slopes = np.log(price), self.log_slopes
        above = (slopes > wanted).sum(-1, keepdims=True)
        after = np.clip(above, 1, slopes.shape[-1] - 1)
        high, low, fewer, more = (
            np.take_along_axis(of, place, -1) for of in (slopes, self._log_keys) for place in (after - 1, after)
        )
        between = fewer + (high - wanted) / np.maximum(high - low, 1e-300) * (more - fewer)
        found = np.where(above == 0, self._log_least, np.where(above == slopes.shape[-1], self._log_most, between))
        return np.exp(found[..., 0])


def allocate(
    demand: Demand,
    rows: np.ndarray,
    windows: np.ndarray,
    fraction: float,
    dense_layers: Sequence[int],
    limits: tuple[int, int],
    lengths: Sequence[int],
) -> Laws:
    """The laws under which heads lose least while they attend ``fraction`` of the keys that ``rows`` see.

    ``rows``, ``windows`` and ``limits`` are as in ``attended_fraction``. ``dense_layers`` attend every key, which
    counts too; so do heads that attend nearly all at the first and the last of the calibrated ``lengths``.

    Raises:
        ProfileError: no laws spend that little or that much.
    """
    coarse = rows[np.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).round().astype(int)]
    log_n = np.log(demand.visible)
    first = demand.log_slopes[-1, ..., 0]  # what the first further key is worth at the longest length
    sparse = np.ones(first.shape, dtype=bool)
    sparse[list(dense_layers)] = False

    def laws_at(price: float) -> Laws:
        C, intercept = theil_sen(log_n, np.log(demand.at(price)))
        return Laws(np.exp(intercept), C).where(sparse)

    def scaled(factor: float) -> Laws:
        return laws._replace(alpha=laws.alpha * factor).where(sparse)

    def spent(laws: Laws, rows: np.ndarray = rows) -> float:
        return attended_fraction(laws, rows, windows, *limits)

    price = _first(lambda price: spent(laws_at(price), coarse) <= fraction, *demand.price_range())
    laws = laws_at(price)
    sparse &= ~laws.attend_all(lengths)
    # Budgets are whole numbers, and heads of one law would all take a key more at once: they differ by a trace, by
    # which those to which it is worth most come first.
    rank = np.argsort(np.argsort(first, axis=None, kind="stable")).reshape(first.shape)
    laws = laws._replace(alpha=laws.alpha * (1 + _TRACE * rank / rank.size))
    over = _first(lambda factor: spent(scaled(factor)) > fraction, 1e-6, 1e6)
    # On either side of the step, a little away from it, where the last bit would decide.
    away = _TRACE / (4 * rank.size)
    found = min((scaled(over * (1 - away)), scaled(over * (1 + away))), key=lambda laws: abs(spent(laws) - fraction))
    if abs(spent(found) - fraction) > 0.01 * fraction:
        raise ProfileError(
            f"no budgets attend {fraction:.4g} of the keys: with min_keys={limits[0]}, dense_below={limits[1]} and the "
            f"dense layers {list(dense_layers)} they attend {spent(scaled(1e-9)):.4g} to "
            f"{spent(scaled(1e9)):.4g}; the nearest is {spent(found):.4g}"
        )
    return found


def attended_fraction(
    laws: Laws, rows: np.ndarray, windows: np.ndarray, min_keys: int = 1, dense_below: int = 0
) -> float:
    """Attended keys / visible keys, over the queries at ``rows``, int64 ``[R]`` from 1, of all layers and heads.

    ``windows [M]`` are the most keys that a layer's queries see, 0 where there is no such limit.
    """
    attended = seen = 0.0
    for window, alpha, C in zip(windows, *laws, strict=True):
        n, count = np.unique(np.minimum(rows, window) if window else rows, return_counts=True)
        attended += float((budgets(n, alpha[:, None], C[:, None], min_keys, dense_below) * count).sum())
        seen += float((n * count).sum()) * len(alpha)
    return attended / seen


def _hull_slopes(keys: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Slopes ``[..., G - 1]`` of the lower convex hull of curves ``[..., G]`` over keys; NaN where keys repeat."""
    slopes = np.full((*curves.shape[:-1], curves.shape[-1] - 1), np.nan)
    for first in range(slopes.shape[-1]):
        rise, run = (values[..., first + 1 :] - values[..., first, None] for values in (curves, keys))
        chords = np.divide(rise, run, out=np.full_like(rise, np.nan), where=run > 0)
        lowest = np.fmin.accumulate(chords[..., ::-1], -1)[..., ::-1]  # of those that end at each key or beyond
        slopes[..., first:] = np.fmax(slopes[..., first:], lowest)
    return np.where(np.diff(keys) > 0, slopes, np.nan)


def _first(reached: Callable[[float], bool], low: float, high: float) -> float:
    """The least argument between two, on a log scale, from which on something is reached."""
    a, b = np.log(low), np.log(high)
    for _ in range(60):
        middle = (a + b) / 2
        a, b = (a, middle) if reached(float(np.exp(middle))) else (middle, b)
    return float(np.exp(b))

"""Sharing a number of keys among layers and heads so that what is lost in all of them together is least.

Each head's cost falls with its keys. Where the sum of costs is least for a given sum of keys, one more key is worth the
same everywhere; so every head takes the keys at which its own slope is one common price, and the price is sought that
spends the budget. Heads keep a power law each, through what they take at the calibrated lengths.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nc_patch.budget import budgets_for
from nc_patch.common import ProfileError

# Queries at which the keys of a whole sequence are counted while the price is sought; the last step counts every one.
_ROWS = 64
_STEPS = 60
_MARGIN = 1e-6
# Shares of the keys seen above which a law at every length counts as dense.
_DENSE_SHARE = 0.9


class Laws(NamedTuple):
    """Budget laws of all heads: ``alpha * n**C``, arrays ``[M, H]``."""

    alpha: np.ndarray
    C: np.ndarray


class Demand:
    """How many keys each head takes at each length, by the price of a key.

    L lengths, M layers, H query heads, G numbers of keys.

    Attributes:
        steepest: ``[M, H]``, the logarithm of what a first key more is worth to each head at the longest length.

    Args:
        keys: ``[G]``, ascending.
        visible: ``[L, M]``, how many keys the rows of each length see; less than the length where layers slide.
        cost: ``[L, M, H, G]``, what heads lose with so many keys.
    """

    def __init__(self, keys: np.ndarray, visible: np.ndarray, cost: np.ndarray) -> None:
        self.visible = visible
        seen = visible[..., None, None]
        cost = np.where(keys >= seen, 0.0, np.maximum(cost, 0.0))
        keys = np.broadcast_to(np.minimum(keys, seen), cost.shape)
        with np.errstate(divide="ignore", invalid="ignore"):  # the keys end where all are attended
            slopes = -np.diff(_convex(keys, cost)) / np.diff(keys)
        tiny = max(float(slopes.max(where=np.isfinite(slopes), initial=0.0)), 1e-300) * 1e-12
        slopes = np.log(np.minimum.accumulate(np.where(np.isfinite(slopes), np.maximum(slopes, tiny), tiny), -1))
        self._log_slopes = slopes
        # Between two numbers of keys the slope belongs to their geometric mean.
        self._log_keys = np.log(np.sqrt(keys[..., 1:] * keys[..., :-1]))
        self._log_least, self._log_most = np.log(keys[..., :1]), np.log(seen)
        self.steepest = slopes[-1, ..., 0]

    def price_range(self) -> tuple[float, float]:
        """Prices at which every head takes all keys, and at which every head takes fewest."""
        return float(np.exp(self._log_slopes.min())) / 2, float(np.exp(self._log_slopes.max())) * 2

    def at(self, price: float) -> np.ndarray:
        """Keys of every head at a price, ``[L, M, H]``: the fewest above its first slope, all below its last one."""
        wanted, slopes = np.log(price), self._log_slopes
        above = (slopes > wanted).sum(-1, keepdims=True)
        after = np.clip(above, 1, slopes.shape[-1] - 1)
        (high, low), (fewer, more) = (
            [np.take_along_axis(values, place, -1) for place in (after - 1, after)]
            for values in (slopes, self._log_keys)
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
    ends: tuple[int, int],
) -> Laws:
    """The laws under which heads lose least while they attend ``fraction`` of all the keys that ``rows`` see.

    Heads that would attend nearly all keys at both ``ends`` attend all of them.

    Args:
        demand: of every head.
        rows, windows, limits: of which keys are counted; as in ``attended_fraction``.
        fraction: of all keys seen, in (0, 1].
        dense_layers: layers that attend every key, which counts too.
        ends: the shortest and the longest calibrated length.

    Raises:
        ProfileError: no laws spend that little or that much.
    """
    coarse = rows if len(rows) <= _ROWS else rows[np.linspace(0, len(rows) - 1, _ROWS).round().astype(int)]
    weights = _level_weights(demand.visible, rows)
    sparse = np.ones(demand.steepest.shape, dtype=bool)
    sparse[list(dense_layers)] = False

    def spent(laws: Laws, rows: np.ndarray = rows) -> float:
        return attended_fraction(laws, rows, windows, *limits)

    def laws_at(price: float) -> Laws:
        alpha, C = _power_laws(demand.at(price), demand.visible, weights)
        return Laws(np.where(sparse, alpha, 1.0), np.where(sparse, C, 1.0))

    price = _closest(lambda price: spent(laws_at(price), coarse) <= fraction, *demand.price_range())[1]
    laws = laws_at(price)
    sparse = sparse & ~attends_all(laws, *ends)
    scaled = lambda factor: Laws(np.where(sparse, laws.alpha * factor, 1.0), np.where(sparse, laws.C, 1.0))  # noqa: E731

    # Budgets are whole numbers, so all of them together go in steps. Between two steps some heads take the upper one.
    low, high = _closest(lambda factor: spent(scaled(factor)) > fraction, 1e-6, 1e6)
    # Away from the step itself, where the last bit would decide.
    lower, upper = scaled(low * (1 - _MARGIN)), scaled(high * (1 + _MARGIN))
    order = np.argsort(-np.where(sparse, demand.steepest, -np.inf), axis=None, kind="stable")
    place = np.argsort(order).reshape(sparse.shape)
    mixed = lambda count: Laws(np.where(place < count, upper.alpha, lower.alpha), lower.C)  # noqa: E731
    few, many = 0, sparse.size
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if spent(mixed(middle)) > fraction else (middle, many)
    found = min(mixed(few), mixed(many), key=lambda laws: abs(spent(laws) - fraction))
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
    """Attended keys / visible keys, over the queries at ``rows`` of all layers and heads.

    Args:
        laws: of every head.
        rows: int64 ``[R]``, the positions of the queries, from 1.
        windows: ``[M]``, the most keys that a layer's queries see, 0 where there is no such limit.
        min_keys, dense_below: as in ``NCConfig``.
    """
    attended = seen = 0.0
    for window, alpha, C in zip(windows, *laws, strict=True):
        n, count = np.unique(np.minimum(rows, window) if window else rows, return_counts=True)
        attended += float((budgets_for(n, alpha[:, None], C[:, None], min_keys, dense_below) * count).sum())
        seen += float((n * count).sum()) * len(alpha)
    return attended / seen


def attends_all(laws: Laws, shortest: int, longest: int) -> np.ndarray:
    """Which laws give nearly every key at both ends of a range of lengths, bool ``[M, H]``."""
    ends = np.array((shortest, longest), dtype=float)
    return np.all(budgets_for(ends, laws.alpha[..., None], laws.C[..., None]) >= _DENSE_SHARE * ends, -1)


def _convex(keys: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """The lower convex hull of falling curves ``[..., G]`` over keys of the same shape."""
    hull = np.minimum.accumulate(curves, -1)
    for at in np.ndindex(*hull.shape[:-1]):
        x, y = keys[at], hull[at]
        kept = [0]
        for i in (np.flatnonzero(np.diff(x)) + 1).tolist():
            while len(kept) > 1:
                a, b = kept[-2:]
                if (y[b] - y[a]) * (x[i] - x[a]) <= (y[i] - y[a]) * (x[b] - x[a]):
                    break
                kept.pop()
            kept.append(i)
        hull[at] = np.interp(x, x[kept], y[kept])
    return hull


def _level_weights(visible: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How much each calibrated length counts for rows: ``[L, M]``, the rows that lie nearest to it on a log scale."""
    weights = np.empty(visible.shape)
    for layer, n in enumerate(visible.T):
        edges = np.concatenate(([0.0], np.sqrt(n[1:] * n[:-1]), [np.inf]))
        weights[:, layer] = np.histogram(np.minimum(rows, n[-1]), edges)[0]
    return np.maximum(weights, 1e-3 * len(rows))


def _power_laws(keys: np.ndarray, visible: np.ndarray, weights: np.ndarray) -> Laws:
    """The laws nearest to keys ``[L, M, H]``: weighted least squares of the logarithms."""
    x, w = np.log(visible)[..., None], weights[..., None] / weights.sum(0)[..., None]
    y = np.log(keys)
    mx, my = (w * x).sum(0), (w * y).sum(0)
    variance = (w * (x - mx) ** 2).sum(0)
    slope = (w * (x - mx) * (y - my)).sum(0) / np.maximum(variance, 1e-12)
    C = np.clip(np.where(variance > 1e-6, slope, 0.0), 0.0, 1.0)
    return Laws(np.exp(my - C * mx), C)


def _closest(reached: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The two nearest arguments, on a log scale, of which only the second one has reached something."""
    a, b = np.log(low), np.log(high)
    for _ in range(_STEPS):
        middle = (a + b) / 2
        a, b = (a, middle) if reached(float(np.exp(middle))) else (middle, b)
    return float(np.exp(a)), float(np.exp(b))

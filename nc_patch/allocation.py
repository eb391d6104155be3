"""Sharing a number of keys among layers and heads so that what is lost in all of them together is least.

Each head's cost falls with its keys. Where the sum of costs is least for a given sum of keys, one more key is worth the
same everywhere; so every head takes the keys at which its own slope is one common price, and the price is sought that
spends the budget. Heads keep a power law each, through what they take at the calibrated lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nc_patch.budget import budget_of
from nc_patch.common import ProfileError

# Queries at which the keys of a whole sequence are counted while the price is sought; the last step counts every one.
_ROWS = 64
_STEPS = 60
_MARGIN = 1e-6
# Shares of the keys seen above which a law at every length counts as dense.
_DENSE_SHARE = 0.9


@dataclass(frozen=True)
class Costs:
    """What heads lose by attending few keys; L lengths, M layers, H query heads, G numbers of keys.

    Attributes:
        keys: ``[G]``, ascending.
        visible: ``[L, M]``, how many keys the rows of each length see; less than the length where layers slide.
        cost: ``[L, M, H, G]``, falling with the keys; 0 where a head attends all.
        windows: ``[M]``, the most keys a layer's queries ever see, 0 where there is no such limit.
    """

    keys: np.ndarray
    visible: np.ndarray
    cost: np.ndarray
    windows: np.ndarray


@dataclass(frozen=True)
class Laws:
    """Budget laws of all heads: ``alpha * n**C``, arrays ``[M, H]``."""

    alpha: np.ndarray
    C: np.ndarray


def allocate(
    costs: Costs,
    rows: np.ndarray,
    fraction: float,
    dense_layers: tuple[int, ...],
    min_keys: int,
    ends: tuple[int, int],
) -> Laws:
    """The laws under which heads lose least while they attend ``fraction`` of all the keys that ``rows`` see.

    Heads that would attend nearly all keys at both ``ends`` attend all of them.

    Args:
        costs: of every head.
        rows: int64 ``[R]``, the positions of the queries over which keys are counted, from 1.
        fraction: of all keys seen, in (0, 1].
        dense_layers: layers that attend every key, which count too.
        min_keys: lower limit of every budget.
        ends: the shortest and the longest calibrated length.

    Raises:
        ProfileError: no laws spend that little or that much.
    """
    demand = Demand(costs)
    M, H = costs.cost.shape[1:3]
    sparse = np.repeat([[layer not in dense_layers] for layer in range(M)], H, 1)
    coarse = rows if len(rows) <= _ROWS else rows[np.linspace(0, len(rows) - 1, _ROWS).round().astype(int)]
    weights = _level_weights(costs.visible, rows)

    def laws_at(price: float) -> Laws:
        alpha, C = _power_laws(demand.at(price), costs.visible, weights)
        return Laws(np.where(sparse, alpha, 1.0), np.where(sparse, C, 1.0))

    spent = lambda price: attended_fraction(laws_at(price), coarse, costs.windows, min_keys)  # noqa: E731
    price = _bisect(spent, fraction, *demand.price_range())
    laws = laws_at(price)
    for layer, head in np.argwhere(sparse):
        sparse[layer, head] = not attends_all(laws.alpha[layer, head], laws.C[layer, head], *ends)
    laws = Laws(laws.alpha, np.where(sparse, laws.C, 1.0))

    def scaled(factor: float) -> Laws:
        return Laws(np.where(sparse, laws.alpha * factor, 1.0), laws.C)

    # Budgets are whole numbers, so all of them together go in steps. Between two steps some heads take the upper one.
    above = lambda f: attended_fraction(scaled(f), rows, costs.windows, min_keys) > fraction  # noqa: E731
    low, high = _closest(above, 1e-6, 1e6)
    # Away from the step itself, where the last bit would decide.
    lower, upper = scaled(low * (1 - _MARGIN)), scaled(high * (1 + _MARGIN))
    order = np.argsort(-(demand.steepest() * sparse), axis=None, kind="stable")

    def mixed(count: int) -> Laws:
        first = np.zeros(M * H, dtype=bool)
        first[order[:count]] = True
        return Laws(np.where(first.reshape(M, H), upper.alpha, lower.alpha), lower.C)

    few, many = 0, M * H
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if attended_fraction(mixed(middle), rows, costs.windows, min_keys) > fraction else (
            middle, many
        )  # fmt: skip
    found, reached = min(
        ((laws, attended_fraction(laws, rows, costs.windows, min_keys)) for laws in (mixed(few), mixed(many))),
        key=lambda pair: abs(pair[1] - fraction),
    )
    if abs(reached - fraction) > 0.01 * fraction:
        limits = [attended_fraction(scaled(f), rows, costs.windows, min_keys) for f in (1e-9, 1e9)]
        raise ProfileError(
            f"no budgets attend {fraction:.4g} of the keys: with min_keys={min_keys} and the dense layers "
            f"{list(dense_layers)} they attend {limits[0]:.4g} to {limits[1]:.4g}; the nearest is {reached:.4g}"
        )
    return found


class Demand:
    """How many keys each head takes at each length, by the price of a key."""

    def __init__(self, costs: Costs) -> None:
        L, M, H, _ = costs.cost.shape
        self.shape = (L, M, H)
        self._visible = np.repeat(costs.visible[:, :, None], H, -1).astype(float)
        keys = np.minimum(costs.keys[None, None, None], self._visible[..., None])
        curves = np.where(costs.keys >= self._visible[..., None], 0.0, np.maximum(costs.cost, 0.0))
        # Between two numbers of keys the slope belongs to their geometric mean.
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = -np.diff(_convex(keys, curves), axis=-1) / np.diff(keys, axis=-1)
        self._middle = np.log(np.sqrt(keys[..., 1:] * keys[..., :-1]))
        tiny = max(float(np.nanmax(np.where(np.isfinite(slopes), slopes, 0.0))), 1e-300) * 1e-12
        slopes = np.where(np.isfinite(slopes), np.maximum(slopes, tiny), tiny)
        self._slopes = np.log(np.minimum.accumulate(slopes, -1))
        self._least = np.log(keys[..., 0])

    def steepest(self) -> np.ndarray:
        """What a first key more is worth to each head at the longest length, ``[M, H]``."""
        return np.asarray(np.exp(self._slopes[-1, ..., 0]))

    def price_range(self) -> tuple[float, float]:
        """Prices at which every head takes all keys, and at which every head takes fewest."""
        return float(np.exp(self._slopes.min())) / 2, float(np.exp(self._slopes.max())) * 2

    def at(self, price: float) -> np.ndarray:
        """Keys of every head at a price, ``[L, M, H]``."""
        wanted = np.log(price)
        falling, middle = self._slopes, self._middle
        # How many slopes lie above the price; the keys lie between that middle and the next.
        above = (falling > wanted).sum(-1)
        pad = lambda a, first, last: np.concatenate((first[..., None], a, last[..., None]), -1)  # noqa: E731
        points = pad(middle, self._least, np.log(self._visible))
        heights = pad(falling, falling[..., 0] + 1e-9, falling[..., -1] - 1e-9)
        lower, upper = above[..., None], above[..., None] + 1
        take = lambda a, i: np.take_along_axis(a, i, -1)[..., 0]  # noqa: E731
        y0, y1, x0, x1 = take(heights, lower), take(heights, upper), take(points, lower), take(points, upper)
        share = np.clip(np.where(y0 > y1, (y0 - wanted) / np.maximum(y0 - y1, 1e-300), 0.0), 0.0, 1.0)
        share = np.where(above == 0, 0.0, np.where(above == falling.shape[-1], 1.0, share))
        return np.asarray(np.exp(x0 + share * (x1 - x0)))


def attended_fraction(laws: Laws, rows: np.ndarray, windows: np.ndarray, min_keys: int) -> float:
    """Attended keys / visible keys, over the queries at ``rows`` of all layers and heads."""
    M, H = laws.alpha.shape
    attended = seen = 0.0
    for layer in range(M):
        n = np.minimum(rows, windows[layer]) if windows[layer] else rows
        n, count = np.unique(n, return_counts=True)
        raw = laws.alpha[layer][:, None] * n.astype(float) ** laws.C[layer][:, None]
        attended += float((np.minimum(n, np.maximum(min_keys, np.ceil(raw))) * count).sum())
        seen += float((n * count).sum()) * H
    return attended / seen


def attends_all(alpha: float, C: float, shortest: int, longest: int) -> bool:
    """Whether a law gives nearly every key at both ends of a range of lengths."""
    return all(budget_of(n, alpha, C) >= _DENSE_SHARE * n for n in (shortest, longest))


def _convex(keys: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """The lower convex hull of falling curves ``[..., G]`` over keys of the same shape."""
    flat_keys, flat = keys.reshape(-1, keys.shape[-1]), np.minimum.accumulate(curves, -1).reshape(-1, keys.shape[-1])
    hull = np.empty_like(flat)
    for row, (x, y) in enumerate(zip(flat_keys, flat, strict=True)):
        kept = [0]
        for i in range(1, len(x)):
            if x[i] == x[kept[-1]]:
                continue
            while len(kept) > 1:
                a, b = kept[-2], kept[-1]
                if (y[b] - y[a]) * (x[i] - x[a]) <= (y[i] - y[a]) * (x[b] - x[a]):
                    break
                kept.pop()
            kept.append(i)
        hull[row] = np.interp(x, x[kept], y[kept])
    return hull.reshape(curves.shape)


def _level_weights(visible: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How much each calibrated length counts for rows: ``[L, M]``, the rows that lie nearest to it on a log scale."""
    weights = np.empty(visible.shape)
    for layer in range(visible.shape[1]):
        n = visible[:, layer].astype(float)
        edges = np.concatenate(([0.0], np.sqrt(n[1:] * n[:-1]), [np.inf]))
        counts = np.histogram(np.minimum(rows, n[-1]), edges)[0] if len(n) > 1 else np.array([len(rows)])
        weights[:, layer] = np.maximum(counts, 1e-3 * len(rows))
    return weights


def _power_laws(keys: np.ndarray, visible: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and C ``[M, H]`` of the laws nearest to keys ``[L, M, H]``: weighted least squares of the logarithms."""
    x, w = np.log(visible)[..., None], weights[..., None] / weights.sum(0)[..., None]
    y = np.log(keys)
    mx, my = (w * x).sum(0), (w * y).sum(0)
    variance = (w * (x - mx) ** 2).sum(0)
    slope = (w * (x - mx) * (y - my)).sum(0) / np.maximum(variance, 1e-12)
    C = np.clip(np.where(variance > 1e-6, slope, 0.0), 0.0, 1.0)
    return np.exp(my - C * mx), C


def _bisect(falling: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a function that falls with the logarithm of its argument meets a value."""
    return _closest(lambda x: falling(x) <= wanted, low, high)[1]


def _closest(reached: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """The two nearest arguments, on a log scale, of which only the second one has reached something."""
    a, b = np.log(low), np.log(high)
    for _ in range(_STEPS):
        middle = (a + b) / 2
        a, b = (a, middle) if reached(float(np.exp(middle))) else (middle, b)
    return float(np.exp(a)), float(np.exp(b))

"""Random inputs of attention that a user may hand over: layouts, lengths, intervals, values that are no numbers.

Everything follows from a seed. Values come in two kinds: free ones, and a grid on which every score is exact in
float32, so that ties are ties in every arithmetic and the attended set is certain.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
LAYOUTS = (
    *("contiguous", "transposed", "columns apart", "rows apart", "inside a buffer", "columns first"),
    *("batch expanded", "heads expanded", "rows expanded", "columns expanded"),
)


@dataclass
class Inputs:
    """Tensors of one call, and what else its reference needs to know.

    Attributes:
        exact: whether all scores are exact in float32.
        described: how the tensors were made, for the message of a mismatch.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None
    origin: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float | None
    softcap: float | None
    exact: bool
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, Hq, Hkv, Lq and Lk."""
        B, Hq, Lq, _ = self.query.shape
        return B, Hq, self.key.shape[1], Lq, self.key.shape[2]


def random_inputs(rng: random.Random, *, values: str = "moderate", queries: int = 150, longest: int = 150) -> Inputs:
    """Inputs of one call.

    Args:
        rng: everything is drawn from.
        values: ``"moderate"``; ``"extreme"``, from denormals to what float32 or float16 can just hold; or ``"broken"``,
            moderate with NaN and infinities in places.
        queries, longest: the most queries and keys.
    """
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = rng.choice(DTYPES)
    B = rng.choice((0, 1, 1, 1, 2, 2, 3)) if values == "moderate" else rng.choice((1, 1, 2))
    Hkv, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 5, 7, 8))
    D = rng.choice((*HEAD_DIMS, *(rng.randint(1, 40) for _ in range(14))))
    Dv = rng.choice((D, D, rng.randint(1, 24)))
    Lk = rng.choice((0, 1, 2, 15, 16, 17, 63, 64, 65, *(rng.randint(1, longest) for _ in range(20))))
    kind = rng.choice(("causal", "causal", "padded", "sliding", "packed", "any", "any", "empty", "full"))
    Lq = rng.choice((0, 1, Lk, rng.randint(1, max(1, Lk)), rng.randint(1, max(1, Lk))))
    if kind in ("any", "empty", "full"):
        Lq = rng.choice((Lq, rng.randint(1, 40)))
    Lq = min(Lq, queries)
    exact = rng.random() < 0.5 or values == "extreme"
    query, key, value = (
        _values(g, (B, heads, length, width), exact)
        for heads, length, width in ((Hkv * group, Lq, D), (Hkv, Lk, D), (Hkv, Lk, Dv))
    )
    scale = rng.choice((None, None, 0.125, 0.3, 1.0))
    if values == "extreme":
        query, key, value, scale = _extreme(rng, query, key, value, dtype, scale)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    if values == "broken":
        for tensor in rng.sample((query, key, value), rng.randint(1, 3)):
            _break_(rng, tensor)
    layouts = [rng.choice(LAYOUTS) if rng.random() < 0.7 else "contiguous" for _ in range(3)]
    if layouts[1] == "rows expanded" and not exact:
        layouts[1] = "contiguous"  # equal keys tie, and rounding would decide which of them come first
    query, key, value = (laid_out(t, layout) for t, layout in zip((query, key, value), layouts, strict=True))
    visible, origin = _intervals(rng, g, kind, B, Lq, Lk)
    sinks = None
    if rng.random() < 0.3:
        sinks = torch.randn(2 * Hkv * group, generator=g)[::2].to(rng.choice((torch.float32, dtype)))
    described = {
        "dtype": dtype, "query": tuple(query.shape), "key": tuple(key.shape), "Dv": Dv, "layouts": layouts,
        "intervals": kind, "exact": exact, "scale": scale, "sinks": sinks is not None,
    }  # fmt: skip
    softcap = rng.choice((None, None, None, 3.0, 50.0))
    return Inputs(query, key, value, visible, origin, sinks, scale, softcap, exact, described | {"softcap": softcap})


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, or for an expanded layout some of them repeated, as a view of another layout.

    What lies around the view in memory is NaN, so that reading beyond it shows.
    """
    B, H, L, D = tensor.shape
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout in ("columns apart", "rows apart", "inside a buffer"):
        columns, rows = 2 if layout == "columns apart" else 1, 3 if layout == "rows apart" else 1
        around = torch.full((B + 1, H + 1, rows * L + 2, columns * D + 3), torch.nan, dtype=tensor.dtype)
        view = around[1:, 1:, 1 : 1 + rows * L : rows, 2 : 2 + columns * D : columns]
        view.copy_(tensor)
        return view
    expanded = {"batch expanded": 0, "heads expanded": 1, "rows expanded": 2, "columns expanded": 3}.get(layout)
    if expanded is None or not tensor.numel():
        return tensor
    return tensor.narrow(expanded, 0, 1).expand(tensor.shape)


def _values(g: torch.Generator, shape: tuple[int, ...], exact: bool) -> torch.Tensor:
    values = torch.randn(shape, generator=g)
    return (2 * values).round().clamp(-7, 7) / 2 if exact else values


def _extreme(
    rng: random.Random, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, scale: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """Grid values times powers of two, with scores that float32 holds exactly."""
    # The powers by which values from 0.5 to 3.5 can be multiplied in a dtype, down to denormals.
    low, high = {torch.float16: (-23, 14), torch.bfloat16: (-132, 120), torch.float32: (-148, 120)}[dtype]
    power = lambda: rng.choice((low, high, 0, rng.randint(low, high)))  # noqa: E731
    of_query, of_scores = power(), rng.choice((0, rng.randint(-100, 100)))
    of_key = min(max(of_scores - of_query, low), high)
    of_query = min(max(of_query, -110 - of_key, low), 110 - of_key, high)
    if rng.random() < 0.5 and -100 < of_query + of_key < 100:
        scale = 2.0 ** -(of_query + of_key + 3)
    exponents = torch.full((key.shape[2], 1), of_key)
    if rng.random() < 0.5:  # a few keys of ordinary size among them
        # Not so small that a product of two elements, a quarter at least, falls below the smallest float32.
        exponents[:: rng.randint(2, 9)] = max(min(max(of_key, -110 - of_query), 0), -147 - of_query)
    powers = 2.0 ** exponents.double()
    return query.double() * 2.0**of_query, key.double() * powers, value.double() * 2.0 ** power(), scale


def _break_(rng: random.Random, tensor: torch.Tensor) -> None:
    for _ in range(rng.randint(1, 3) if tensor.numel() else 0):
        place = tuple(rng.randrange(size) for size in tensor.shape)
        tensor[place] = rng.choice((torch.nan, torch.inf, -torch.inf))
        if rng.random() < 0.2:
            tensor[place[:3]] = torch.nan


def _intervals(
    rng: random.Random, g: torch.Generator, kind: str, B: int, Lq: int, Lk: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Visible intervals and origins such that every interval lies within its own sequence."""
    end = torch.arange(Lk - Lq + 1, Lk + 1, dtype=torch.int32).clamp(0, Lk).expand(B, Lq)
    zero = torch.zeros_like(end)
    if kind == "causal":
        return (None, None) if Lq <= Lk else (torch.stack((zero, end), -1), None)
    if kind == "padded":
        first = torch.randint(0, Lk + 1, (B, 1), generator=g, dtype=torch.int32).expand(B, Lq)
        return torch.stack((torch.minimum(first, end), end), -1), first
    if kind == "sliding":
        start = (end - rng.randint(1, 60)).clamp(min=0)
        return torch.stack((start, end), -1), zero - rng.choice((0, 0, rng.randint(0, 70)))
    if kind == "packed":
        border = torch.tensor(sorted(rng.randrange(max(Lk, 1)) for _ in range(2)), dtype=torch.int32)
        begin = torch.where(end > border[1], border[1], torch.where(end > border[0], border[0], 0)).to(torch.int32)
        return torch.stack((torch.minimum(begin, end), end), -1), begin
    if kind == "empty":
        place = torch.randint(0, Lk + 1, (B, Lq, 1), generator=g, dtype=torch.int32)
        return place.expand(B, Lq, 2), zero
    if kind == "full":
        return torch.tensor([0, Lk], dtype=torch.int32).expand(B, Lq, 2), zero
    visible = torch.randint(0, Lk + 1, (B, Lq, 2), generator=g).sort(-1).values.to(torch.int32)
    visible[:, ::5] = Lk // 2
    return visible, zero - rng.choice((0, rng.randint(0, 40)))

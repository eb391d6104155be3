"""Random inputs of attention that a user may hand over: layouts, lengths, intervals, values that are no numbers.

Everything follows from a seed. Values come in two kinds: free ones, and a grid on which every score is exact in
float32, so that ties are ties in every arithmetic and the attended set is certain.
"""

import random
from typing import NamedTuple

import torch

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
LAYOUTS = ("contiguous", "transposed", "rows apart", "expanded 0", "expanded 1", "expanded 2")
# What the Triton kernels refuse by name: columns that do not lie side by side.
COLUMN_LAYOUTS = ("columns apart", "columns first", "expanded 3")


class Inputs(NamedTuple):
    """Tensors of one call, and what else its reference needs to know; ``exact``: all scores are, in float32."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor | None
    origin: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: float | None
    softcap: float | None
    exact: bool

    @property
    def has_one_origin(self) -> bool:
        """Whether an index can be of these keys: of one sequence a row, which begins among its keys."""
        origin = self.origin
        return origin is None or bool(((origin == origin[:, :1]) & (origin >= 0)).all())


def random_inputs(
    rng: random.Random, queries: int, longest: int, *, broken: bool = False, layouts: tuple[str, ...] = LAYOUTS
) -> Inputs:
    """Inputs of one call, of so many queries and keys at most; ``broken``: with NaN and infinities in places."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    B = rng.choice((1, 1, 2)) if broken else rng.choice((0, 1, 1, 1, 2, 2, 3))
    Hkv, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 5, 7, 8))
    D = rng.choice((*HEAD_DIMS, *(rng.randint(1, 40) for _ in range(14))))
    Dv = rng.choice((D, D, rng.randint(1, 24)))
    Lk = rng.choice((0, 1, 2, 15, 16, 17, 63, 64, 65, *(rng.randint(1, longest) for _ in range(20))))
    kind = rng.choice(("causal", "causal", "padded", "sliding", "packed", "any", "any", "empty", "full"))
    Lq = rng.choice((0, 1, Lk, *(rng.randint(1, max(1, Lk)) for _ in range(2))))
    if kind in ("any", "empty", "full"):
        Lq = rng.choice((Lq, rng.randint(1, 40)))
    Lq = min(Lq, queries)
    exact = rng.random() < 0.5
    tensors = []
    for heads, length, width in ((Hkv * group, Lq, D), (Hkv, Lk, D), (Hkv, Lk, Dv)):
        values = torch.randn((B, heads, length, width), generator=g)
        tensor = ((2 * values).round().clamp(-7, 7) / 2 if exact else values).to(dtype)
        for _ in range(rng.randint(0, 3) if broken and tensor.numel() else 0):
            tensor[tuple(rng.randrange(size) for size in tensor.shape)] = rng.choice((torch.nan, torch.inf, -torch.inf))
        layout = rng.choice(layouts)
        # Equal keys tie, and with free values rounding would decide which of them come first.
        tensors.append(tensor if layout == "expanded 2" and not exact else laid_out(tensor, layout))
    visible, origin = _intervals(rng, g, kind, B, Lq, Lk)
    sinks = torch.randn(2 * Hkv * group, generator=g)[::2].to(rng.choice((torch.float32, dtype)))
    # Among broken values scores stay so small that no weight vanishes in float32.
    scale = rng.choice((None, 0.02)) if broken else rng.choice((None, None, 0.125, 0.3, 1.0))
    softcap = None if broken else rng.choice((None, None, None, 3.0, 50.0))
    return Inputs(*tensors, visible, origin, sinks if rng.random() < 0.3 else None, scale, softcap, exact)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, or for an expanded layout some of them repeated, as a view of another layout.

    What lies around the view in memory is NaN, so that reading beyond it shows.
    """
    B, H, L, D = tensor.shape
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "contiguous" or not tensor.numel():
        return tensor
    if layout.startswith("expanded"):
        return tensor.narrow(int(layout[-1]), 0, 1).expand(tensor.shape)
    columns, rows = 2 if layout == "columns apart" else 1, 3 if layout == "rows apart" else 1
    around = torch.full((B + 1, H + 1, rows * L + 2, columns * D + 3), torch.nan, dtype=tensor.dtype)
    view = around[1:, 1:, 1 : 1 + rows * L : rows, 2 : 2 + columns * D : columns]
    view.copy_(tensor)
    return view


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
        first, second = sorted(rng.randrange(max(Lk, 1)) for _ in range(2))
        begin = torch.where(end > second, second, torch.where(end > first, first, 0)).to(torch.int32)
        return torch.stack((torch.minimum(begin, end), end), -1), begin
    if kind == "empty":
        place = torch.randint(0, Lk + 1, (B, Lq, 1), generator=g, dtype=torch.int32)
        return place.expand(B, Lq, 2), zero
    if kind == "full":
        return torch.tensor([0, Lk], dtype=torch.int32).expand(B, Lq, 2), zero
    visible = torch.randint(0, Lk + 1, (B, Lq, 2), generator=g).sort(-1).values.to(torch.int32)
    return visible, zero - rng.choice((0, rng.randint(0, 40)))

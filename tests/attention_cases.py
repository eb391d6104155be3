"""Random attention problems of every shape, made from a seed; the same for the PyTorch and the Triton operations."""

from dataclasses import dataclass
from typing import Any

import torch
from operations import reference_attention

from nc_patch.ops.problem import AttentionResult, causal_intervals


@dataclass
class Case:
    """Inputs of an operation, and the settings that go with them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    budget: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    softcap: float
    sink_keys: int
    recent_keys: int
    block_size: int = 16
    query_block_size: int = 64
    sample_stride: int | None = 16
    local_keys: int = 0
    min_mass: float | None = None
    max_factor: float = 4.0

    def reference(self, selection: str, tail: bool = False) -> AttentionResult:
        """What the float64 definition makes of the case."""
        return reference_attention(
            self.query,
            self.key,
            self.value,
            visible=self.visible,
            budget=self.budget,
            selection=selection,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            sink_keys=self.sink_keys,
            recent_keys=self.recent_keys,
            origin=self.origin,
            **self.block_settings(),
            tail=tail,
        )

    def block_settings(self) -> dict[str, Any]:
        """The options of ``block``: how blocks are cut and chosen."""
        return {
            "block_size": self.block_size,
            "query_block_size": self.query_block_size,
            "sample_stride": self.sample_stride,
            "local_keys": self.local_keys,
            "min_mass": self.min_mass,
            "max_factor": self.max_factor,
        }

    def row_settings(self, want_stats: bool) -> dict[str, Any]:
        """The keyword arguments of the ``topk`` and ``window`` operations."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_keys": self.sink_keys,
            "recent_keys": self.recent_keys,
            "want_stats": want_stats,
        }


def random_case(seed: int, longest: int = 150, dtype: torch.dtype = torch.float32) -> Case:
    """A case in which everything may vary: lengths, heads, intervals, budgets, ties, soft-cap, sinks, block options.

    In some, rows that see few keys have a budget of all of them.
    """
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    B, Hkv, group, D, Dv = pick(1, 3), pick(1, 3), pick(1, 5), pick(1, 20), pick(1, 20)
    Lk = pick(1, longest)
    Lq = pick(1, Lk)
    Hq = Hkv * group
    query, key, value = (
        torch.randn(B, heads, length, width, generator=g)
        for heads, length, width in ((Hq, Lq, D), (Hkv, Lk, D), (Hkv, Lk, Dv))
    )
    if pick(0, 2) == 0:  # scores on a grid: many ties, and none of them by rounding
        query, key = query.round(), key.round()
    query, key, value = (t.to(dtype) for t in (query, key, value))

    visible = causal_intervals(B, Lq, Lk, "cpu").clone()
    origin = visible[..., 0].clone()
    kind = pick(0, 3)
    if kind == 1:  # left padding
        first = torch.randint(0, Lk + 1, (B, 1), generator=g, dtype=torch.int32)
        visible[..., 0] = torch.minimum(first, visible[..., 1])
        origin = first.expand(B, Lq).contiguous()
    elif kind == 2:  # sliding window
        visible[..., 0] = (visible[..., 1] - pick(1, 60)).clamp(min=0)
    elif kind == 3:  # any interval, empty ones too
        visible = torch.randint(0, Lk + 1, (B, Lq, 2), generator=g).sort(-1).values.to(torch.int32)
        origin = visible[..., 0].clone()
    n = (visible[..., 1] - visible[..., 0])[:, None]
    share = torch.rand(B, Hq if pick(0, 3) == 0 else 1, Lq, generator=g)
    budget = (share * (n + 1)).floor().clamp(min=1).minimum(n).to(torch.int32)
    sinks = torch.randn(Hq, generator=g) if pick(0, 2) == 0 else None
    scale, softcap = (0.125, 0.3)[pick(0, 1)], (0.0, 3.0)[pick(0, 1)]
    case = Case(
        query, key, value, visible, origin, budget, sinks, scale, softcap, pick(0, 5), pick(0, 5), (16, 32)[pick(0, 1)]
    )
    if pick(0, 2) == 0:
        case.budget = torch.where(n <= pick(1, longest), n, budget)
    case.query_block_size = (32, 64, 64, 128)[pick(0, 3)]
    case.sample_stride = (None, None, 1, 4, 16, 64)[pick(0, 5)]
    case.local_keys = (0, 16, 64, 100)[pick(0, 3)]
    return case


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ in float64; NaN where either is."""
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))

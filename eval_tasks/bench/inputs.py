"""What is timed: shapes of known models, and random queries and keys whose attention is local, has sinks, and seeks.

**Keys** of a head are ``offset + spread * (z @ basis + noise)``: ``spread`` is log-normal by channel, and four channels
carry large offsets. In the space of ``basis``, which queries look into, ``z`` is content (rank 16, 85 % common to runs
of 40 keys) and whether the key is one of the first four, the sinks, whose values are small.

**Scores.** Query i over its n = i + 1 keys has ``a(n) <content> + S(n) [j < 4]``. ``a(n)`` is the standard deviation
for which 95 % of the softmax of the content lie in the n^c best keys, c of each head between 0.6 and 0.95; what a query
seeks is in part common to a run of 40 queries, in part the head's own, in part the content of its own key, which makes
attention local. ``S(n)`` gives the sinks a share of each head between 0.15 and 0.55.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

SINKS = 4
_CONTENT_RANK, _RUN, _NOISE = 16, 40, 0.3
_OUTLIERS, _OUTLIER_OFFSET, _SPREAD = 4, 8.0, 0.5
_MASS, _FEWEST_KEYS, _SINK_VALUE = 0.95, 64, 0.1
# Of the variance of what keys hold and queries seek: common to a run, and the content of the query's own key.
_KEY_RUN, _QUERY_RUN, _OWN_KEY = 0.85, 0.35, 0.5
_EXPONENTS, _SINK_SHARE = (0.6, 0.95), (0.15, 0.55)


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder's attention."""

    heads: int
    kv_heads: int
    head_dim: int


# The first is that of Qwen3 8B and Mistral 7B, too.
GEOMETRIES = {"llama3-8b": Geometry(32, 8, 128), "smollm2": Geometry(9, 3, 64)}


@dataclass(frozen=True)
class Inputs:
    """Attention of one layer: all queries ``[B, Hq, Lq, D]``, or in decoding the last, of n keys ``[B, Hkv, n, D]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @cached_property
    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values repeated for every head of a group, ``[B, Hq, n, D]``; made once, and kept."""
        group = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(group, 1), self.value.repeat_interleave(group, 1)


def make_inputs(
    geometry: Geometry, batch: int, length: int, queries: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """Draws the keys of sequences, and their last ``queries`` queries, on the generator's device."""
    D, group, device = geometry.head_dim, geometry.heads // geometry.kv_heads, generator.device
    rank, own_share = min(_CONTENT_RANK, D // 4), 1 - _OWN_KEY - _QUERY_RUN
    query = torch.empty(batch, geometry.kv_heads, group, queries, D, dtype=dtype, device=device)
    key = torch.empty(batch, geometry.kv_heads, length, D, dtype=dtype, device=device)
    value = torch.empty_like(key)
    is_sink = (torch.arange(length, device=device) < SINKS).float()[:, None]
    n = torch.arange(length - queries + 1, length + 1, dtype=torch.float64, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def content_of_runs(rows: int) -> torch.Tensor:
        return normal(-(-rows // _RUN), rank).repeat_interleave(_RUN, 0)[:rows]

    for head in range(geometry.kv_heads):  # one at a time, which bounds the memory
        spread, offset = (_SPREAD * normal(D)).exp(), normal(D)
        offset[torch.randperm(D, generator=generator, device=device)[:_OUTLIERS]] *= _OUTLIER_OFFSET
        basis = torch.linalg.qr(normal(D, rank + 1)).Q.T
        content_weight, sink_weight = _weights(group, n, generator)
        for b in range(batch):
            content = _KEY_RUN**0.5 * content_of_runs(length) + (1 - _KEY_RUN) ** 0.5 * normal(length, rank)
            content *= 1 - is_sink
            noise = _NOISE * normal(length, D)
            noise -= noise @ basis.T @ basis
            key[b, head] = offset + spread * (torch.cat((content, is_sink), -1) @ basis + noise)
            value[b, head] = normal(length, D) * (1 - (1 - _SINK_VALUE) * is_sink)
            direction = _OWN_KEY**0.5 * content[-queries:] + _QUERY_RUN**0.5 * content_of_runs(queries)
            direction = direction + own_share**0.5 * normal(group, queries, rank)
            direction = torch.nn.functional.normalize(direction, dim=-1) * content_weight
            query[b, head] = torch.cat((direction, sink_weight), -1) @ (basis / spread) * D**0.5
    return Inputs(query.flatten(1, 2), key, value)


def _weights(heads: int, n: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """How much content and sinks count in rows that see n keys, float64 ``[R]``: a and S, float32 ``[heads, R, 1]``."""

    def draw(low: float, high: float) -> torch.Tensor:
        uniform = torch.rand(heads, 1, generator=generator, device=n.device, dtype=torch.float64)
        return low + (high - low) * uniform

    n = n.clamp(min=_FEWEST_KEYS)
    level, sink_share = torch.tensor(_MASS, dtype=torch.float64, device=n.device), draw(*_SINK_SHARE)
    # Softmax tilts scores N(0, a^2) to N(a^2, a^2): 95 % lie above a^2 - 1.645 a, as a share Q(a - 1.645) of keys does.
    content = torch.special.ndtri(level) + torch.special.ndtri(1 - n ** (draw(*_EXPONENTS) - 1))
    # The sum over n keys of exp(content) is about this; the last term is what n draws lack of the tail.
    mass = n.log() + content.square() / 2 + torch.special.log_ndtr((2 * n.log()).sqrt() - content)
    return content.float()[..., None], (mass + (sink_share / (1 - sink_share) / SINKS).log()).float()[..., None]

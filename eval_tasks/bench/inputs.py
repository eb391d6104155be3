"""What is timed: shapes of known models, and random queries and keys whose attention is local, has sinks, and seeks.

**Keys** are ``offset + spread * (basis z + noise)``, channel by channel: ``spread`` is log-normal, and four channels
carry large offsets, as keys of real models do. In the space of ``basis``, which queries look into, ``z`` is content
(rank 16, 85 % common to runs of 40 keys, which are the borders of no block), the position, as cosines and sines of
geometrically spaced frequencies like those of rotary embeddings, and whether the key is one of the first four.

**Scores.** Query i over its n = i + 1 keys has ``a(n) <content> + A(n) mean_f cos(w_f (i - j)) + S(n) [j < 4]``.

- ``a(n)`` is the standard deviation for which 95 % of the softmax of the content alone lie in the n^c best keys, with
  an exponent c of each head between 0.6 and 0.98. What a query seeks is for 60 % common to the heads of a key/value
  head and a run of 40 queries, for 25 % the head's own in that run, and the rest the row's own: neighbours attend to
  similar keys, never to the same.
- ``A(n)`` gives the nearest 512 keys a head's share of the softmax, between 0.1 and 0.4, with a peak at the row itself.
- ``S(n)`` gives the four sinks a head's share between 0.15 and 0.55. Their values are small, as in real models.

Shares are expectations, set so that at 8,192 keys of SmolLM2's shape the best 2 and 4 n^0.6 keys keep about what they
keep in SmolLM2 (0.90 and 0.94), and blocks and recent keys less. Kept masses are measured in every case.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from nc_patch.config import NCConfig
from nc_patch.ops.problem import Problem, causal_intervals

SINKS = 4
_CONTENT_RANK, _RUN, _NOISE = 16, 40, 0.3
_OUTLIERS, _OUTLIER_OFFSET, _SPREAD = 4, 8.0, 0.5
_MASS, _FEWEST_KEYS, _SINK_VALUE = 0.95, 64, 0.1
_PERIODS = (8.0, 2048.0)
_NEAR_KEYS = 512
# Of the variance of what keys hold and queries seek: common to a run, and to a head and a run.
_KEY_RUN, _QUERY_RUN, _HEAD_RUN = 0.85, 0.6, 0.25
_EXPONENTS = (0.6, 0.98)
_LOCAL_SHARE, _SINK_SHARE = (0.1, 0.4), (0.15, 0.55)
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder: of its attention, and what a model with random weights needs besides."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int


# Llama 3 8B, Qwen3 8B and Mistral 7B have the same attention, and differ in what is around it.
GEOMETRIES = {
    "llama3-8b": Geometry(32, 8, 128, 4096, 14336),
    "qwen3-8b": Geometry(32, 8, 128, 4096, 12288),
    "mistral-7b": Geometry(32, 8, 128, 4096, 14336),
    "smollm2": Geometry(9, 3, 64, 576, 1536),
}


@dataclass(frozen=True)
class Inputs:
    """Attention of one layer: the last Lq queries of sequences of n keys.

    Attributes:
        query: ``[B, Hq, Lq, D]``; Lq is n for a prompt, and 1 for a decoding step. key, value: ``[B, Hkv, n, D]``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def visible(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Causal intervals int32 ``[B, Lq, 2]``, of the queries ``rows`` alone, int64 ``[R]``, where they are given."""
        found = causal_intervals(len(self.query), self.query.shape[2], self.key.shape[2], self.query.device)
        return found if rows is None else found[:, rows.to(found.device)].contiguous()

    def problem(self, config: NCConfig) -> Problem:
        """Causal attention by the budgets of a config."""
        visible = self.visible()
        tensors = (self.query, self.key, self.value, visible, visible[..., 0].contiguous())
        return Problem(*tensors, config.row_budgets(visible, self.key.shape[2], 0), scale=self.query.shape[-1] ** -0.5)

    @cached_property
    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values repeated for every head of a group, ``[B, Hq, n, D]``; made once, and kept."""
        group = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(group, 1), self.value.repeat_interleave(group, 1)


def make_inputs(
    geometry: Geometry,
    batch: int,
    length: int,
    queries: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Inputs:
    """Draws the keys of sequences, and their last ``queries`` queries, on the generator's device."""
    device = generator.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    Hq, Hkv, D = geometry.heads, geometry.kv_heads, geometry.head_dim
    group, rank, before = Hq // Hkv, min(_CONTENT_RANK, D // 4), length - queries
    # Radians a key, one frequency for every four channels.
    frequency = 2 * torch.pi / _PERIODS[0] / torch.logspace(0, 1, D // 4, _PERIODS[1] / _PERIODS[0], device=device)
    spread, offset = (_SPREAD * normal(Hkv, 1, D)).exp(), normal(Hkv, 1, D)
    outliers = torch.randint(D, (Hkv, 1, min(_OUTLIERS, D)), generator=generator, device=device)
    offset.scatter_(2, outliers, _OUTLIER_OFFSET * normal(Hkv, 1, outliers.shape[-1]).sign())
    basis = torch.linalg.qr(normal(Hkv, D, rank + 2 * len(frequency) + 1)).Q.transpose(1, 2)
    seen = torch.arange(before + 1, length + 1, dtype=torch.float64, device=device)
    weights = [of_heads.view(Hkv, group, queries, 1) for of_heads in _weights(Hq, seen, frequency, generator)]
    query = torch.empty(batch, Hq, queries, D, dtype=dtype, device=device)
    key = torch.empty(batch, Hkv, length, D, dtype=dtype, device=device)
    value = torch.empty_like(key)
    for b in range(batch):
        for begin in range(0, length, _ROWS_AT_ONCE):
            rows = torch.arange(begin, min(begin + _ROWS_AT_ONCE, length), device=device)
            count, run = len(rows), torch.arange(len(rows), device=device) // _RUN
            is_sink = (rows < SINKS).float()[:, None]
            own = (1 - _KEY_RUN) ** 0.5 * normal(Hkv, count, rank)
            content = _KEY_RUN**0.5 * normal(Hkv, count // _RUN + 1, rank)[:, run] + own
            position = _positions(rows, frequency)
            held = (content * (1 - is_sink), position.expand(Hkv, -1, -1), is_sink.expand(Hkv, -1, -1))
            noise = _NOISE * normal(Hkv, count, D)
            noise -= noise @ basis.transpose(1, 2) @ basis
            key[b, :, rows] = (offset + spread * (torch.cat(held, -1) @ basis + noise)).to(dtype)
            value[b, :, rows] = (normal(Hkv, count, D) * (1 - (1 - _SINK_VALUE) * is_sink)).to(dtype)
            if (asking := rows[rows >= before]).numel() == 0:
                continue
            count, run = len(asking), run[: len(asking)]
            common = normal(Hkv, 1, count // _RUN + 1, rank)[:, :, run]
            of_head = normal(Hkv, group, count // _RUN + 1, rank)[:, :, run]
            own = (1 - _QUERY_RUN - _HEAD_RUN) ** 0.5 * normal(Hkv, group, count, rank)
            direction = torch.nn.functional.normalize(_QUERY_RUN**0.5 * common + _HEAD_RUN**0.5 * of_head + own, dim=-1)
            content_weight, local, sink = (of_rows[:, :, asking - before] for of_rows in weights)
            sought = (direction * content_weight, _positions(asking, frequency) * local, sink)
            found = torch.cat(sought, -1).flatten(1, 2) @ (basis / spread) * D**0.5
            query[b, :, asking - before] = found.view(Hq, count, D).to(dtype)
    return Inputs(query, key, value)


def _positions(rows: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """Cosines and sines float32 ``[R, 2 F]`` whose products are the mean of ``cos(w_f (i - j))``."""
    angle = rows.double()[:, None] * frequency.double()
    return torch.cat((angle.cos(), angle.sin()), -1).float() * len(frequency) ** -0.5


def _weights(
    heads: int, n: torch.Tensor, frequency: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much content, position and sinks count in rows that see n keys, float64 ``[R]``: a, A and S ``[Hq, R]``."""
    device = frequency.device

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(heads, 1, generator=generator, device=device, dtype=torch.float64)

    n = n.clamp(min=_FEWEST_KEYS)
    local_share, sink_share = draw(*_LOCAL_SHARE), draw(*_SINK_SHARE)
    rest = 1 - local_share - sink_share
    level = torch.tensor(_MASS, dtype=torch.float64, device=device)
    # Softmax tilts scores N(0, a^2) to N(a^2, a^2): 95 % lie above a^2 - 1.645 a, where a share Q(a - 1.645) of keys is.
    content = torch.special.ndtri(level) + torch.special.ndtri(1 - n ** (draw(*_EXPONENTS) - 1))
    # The sum over n keys of exp(content) is about this; the last term is what n draws lack of the tail.
    mass = n.log() + content.square() / 2 + torch.special.log_ndtr((2 * n.log()).sqrt() - content)
    sink = mass + (sink_share / rest / SINKS).log()
    # A is where the nearest keys' sum of exp(A kernel) - 1 is their share, between trials; negative lobes of the kernel
    # may outweigh its peak for small A.
    trials = torch.linspace(0, 24, 97, dtype=torch.float64, device=device)
    kernel = (torch.arange(_NEAR_KEYS, device=device)[:, None] * frequency).cos().mean(-1)
    sums = torch.expm1(trials[:, None] * kernel).sum(-1).cummax(0).values
    wanted = local_share / rest * n
    above = torch.searchsorted(sums, wanted).clamp(1, len(trials) - 1)
    part = (wanted - sums[above - 1]) / (sums[above] - sums[above - 1]).clamp(min=1e-12)
    local = trials[above - 1] + part.clamp(0, 1) * trials[1]
    return content.float(), local.float(), sink.float()

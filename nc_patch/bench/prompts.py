"""Whole prompts to time prefill on: random queries and keys whose attention is local, has sinks, and seeks content.

**Keys** have channels as in ``inputs``: an offset, large in four channels, and a log-normal spread. In the space that
queries look into, a key is content (rank 16, 85 % common to runs of 40 keys, which are the borders of no block),
its position, as cosines and sines of geometrically spaced frequencies like those of rotary embeddings, and whether it
is one of the first four. All other variance of keys is orthogonal to that.

**Scores.** Query i over its n = i + 1 keys has ``a(n) <content> + A(n) mean_f cos(w_f (i - j)) + S(n) [j < 4]``.

- ``a(n)`` is the standard deviation for which 95 % of the softmax of the content alone lie in the n^c best keys, with
  an exponent c of each head between 0.6 and 0.98. What a query seeks is for 60 % common to the heads of a key/value
  head and a run of 40 queries, for 25 % the head's own in that run, and the rest the row's own: neighbours attend to
  similar keys, never to the same.
- ``A(n)`` gives the nearest 512 keys a head's share of the softmax, between 0.1 and 0.4, with a peak at the row itself.
- ``S(n)`` gives the four sinks a head's share between 0.15 and 0.55. Their values are small, as in real models.

Shares are expectations. The ranges are set so that, at 8,192 keys of SmolLM2's shape, the best 2 and 4 n^0.6 keys keep
0.90 and 0.95 of the mass, as they do in SmolLM2 (0.90 and 0.94, 64 late queries of 10 layers of a text); 4 first and
the most recent keys, 2 n^0.6 in all, keep 0.47, less than there (0.53), and 4 n^0.6 keys in blocks 0.75 late in
the prompt (0.88): harder for blocks than a real model. What came of it is measured in every case and written beside
the times (``prompt_concentration``).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from nc_patch.bench.inputs import MASS, Geometry, draw_channels
from nc_patch.config import NCConfig
from nc_patch.ops.problem import Problem, causal_intervals

SINKS, LOCAL_KEYS = 4, 64
_CONTENT_RANK, _RUN, _NOISE = 16, 40, 0.3
_FEWEST_KEYS, _SINK_VALUE = 64, 0.1
_PERIODS = (8.0, 2048.0)
_NEAR_KEYS = 512
# Of the variance of what keys hold and queries seek: common to a run, and to a head and a run.
_KEY_RUN, _QUERY_RUN, _HEAD_RUN = 0.85, 0.6, 0.25
_EXPONENTS = (0.6, 0.98)
_LOCAL_SHARE, _SINK_SHARE = (0.1, 0.4), (0.15, 0.55)
_ROWS_AT_ONCE = 1 << 15
_MEASURED_ROWS = 8


@dataclass(frozen=True)
class PromptInputs:
    """A prompt of n tokens at one layer.

    Attributes:
        query: ``[B, Hq, n, D]``. key, value: ``[B, Hkv, n, D]``. All contiguous.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def problem(self, config: NCConfig, rows: torch.Tensor | None = None) -> Problem:
        """Causal attention as a problem; ``rows``, int64 ``[R]``, are the positions of the queries where not all."""
        n, device = self.key.shape[2], self.query.device
        visible = causal_intervals(len(self.query), n, n, device)
        if rows is not None:
            visible = visible[:, rows.to(device)].contiguous()
        tensors = (self.query, self.key, self.value, visible, visible[..., 0].contiguous())
        return Problem(*tensors, config.row_budgets(visible, n, 0), scale=self.query.shape[-1] ** -0.5)

    @cached_property
    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values repeated for every head of a group, ``[B, Hq, n, D]``; made once, and kept."""
        group = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(group, 1), self.value.repeat_interleave(group, 1)


@dataclass(frozen=True)
class _Weights:
    """How much each part of the scores counts, by number of keys.

    Attributes:
        content, local, sink: float32 ``[Hkv, G, n, 1]``.
    """

    content: torch.Tensor
    local: torch.Tensor
    sink: torch.Tensor


def make_prompt(
    geometry: Geometry, batch: int, length: int, dtype: torch.dtype, device: torch.device, seed: int
) -> PromptInputs:
    """Draws a prompt; the same for the same seed, device and PyTorch."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    Hq, Hkv, D = geometry.heads, geometry.kv_heads, geometry.head_dim
    group, rank = Hq // Hkv, min(_CONTENT_RANK, D // 4)
    frequency = _frequencies(D, device)
    drawn, spread, offset = draw_channels(geometry, rank + 2 * len(frequency) + 1, generator)
    basis = torch.linalg.qr(drawn.transpose(1, 2)).Q.transpose(1, 2)
    weights = _weights(geometry, length, frequency, generator)
    query = torch.empty(batch, Hq, length, D, dtype=dtype, device=device)
    key = torch.empty(batch, Hkv, length, D, dtype=dtype, device=device)
    value = torch.empty_like(key)
    for b in range(batch):
        for begin in range(0, length, _ROWS_AT_ONCE):
            rows = slice(begin, min(begin + _ROWS_AT_ONCE, length))
            count = rows.stop - begin
            runs, run = -(-count // _RUN), torch.arange(count, device=device) // _RUN
            position = _positions(begin, count, frequency)
            is_sink = (torch.arange(begin, rows.stop, device=device) < SINKS).float()[:, None]

            content = _mixed(normal(Hkv, runs, rank)[:, run], normal(Hkv, count, rank), _KEY_RUN) * (1 - is_sink)
            sought = torch.cat((content, position.expand(Hkv, -1, -1), is_sink.expand(Hkv, -1, -1)), -1)
            noise = _NOISE * normal(Hkv, count, D)
            noise -= noise @ basis.transpose(1, 2) @ basis
            key[b, :, rows] = offset + spread * (sought @ basis + noise)
            value[b, :, rows] = normal(Hkv, count, D) * (1 - (1 - _SINK_VALUE) * is_sink)

            common, own = normal(Hkv, 1, runs, rank)[:, :, run], normal(Hkv, group, runs, rank)[:, :, run]
            direction = _QUERY_RUN**0.5 * common + _HEAD_RUN**0.5 * own
            direction = direction + (1 - _QUERY_RUN - _HEAD_RUN) ** 0.5 * normal(Hkv, group, count, rank)
            direction = direction / direction.norm(dim=-1, keepdim=True)
            parts = (
                direction * weights.content[:, :, rows],
                position * weights.local[:, :, rows],
                weights.sink[:, :, rows],
            )
            seeks = torch.cat(parts, -1).flatten(1, 2) @ (basis / spread)
            query[b, :, rows] = seeks.view(Hq, count, D) * D**0.5
    return PromptInputs(query, key, value)


def prompt_concentration(inputs: PromptInputs, budgets: torch.Tensor) -> dict[str, float]:
    """What the scores of the first sequence are like, as means over all heads and eight rows, the last one among them.

    Args:
        budgets: integers ``[n]``, k(n) of each row.

    Returns:
        ``best_keys_mass``: how much of the softmax a row's budget of best keys holds; ``keys_of_mass``: how many of the
        best keys hold 0.95 of it; ``sink_mass`` and ``local_mass``: how much the first 4 and the last 64 keys hold.
    """
    n, D = inputs.key.shape[2:]
    group = inputs.query.shape[1] // inputs.key.shape[1]
    found: dict[str, list[torch.Tensor]] = {}
    for row in sorted({max(1, n * (i + 1) // _MEASURED_ROWS) - 1 for i in range(_MEASURED_ROWS)}):
        for h in range(inputs.key.shape[1]):
            query = inputs.query[0, h * group : (h + 1) * group, row].float()
            softmax = torch.softmax(query @ inputs.key[0, h, : row + 1].float().T * D**-0.5, -1)
            total = softmax.sort(-1, descending=True).values.cumsum(-1)
            of_row = {
                "best_keys_mass": total[:, int(budgets[row]) - 1],
                "keys_of_mass": (total < MASS).sum(-1).clamp(max=row) + 1,
                "sink_mass": softmax[:, :SINKS].sum(-1),
                "local_mass": softmax[:, -LOCAL_KEYS:].sum(-1),
            }
            for name, of_heads in of_row.items():
                found.setdefault(name, []).append(of_heads.float())
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def _frequencies(head_dim: int, device: torch.device) -> torch.Tensor:
    """Frequencies of positions in radians a key, one for every four channels."""
    count = head_dim // 4
    exponent = torch.linspace(0, 1, count, device=device)
    return 2 * torch.pi / (_PERIODS[0] ** (1 - exponent) * _PERIODS[1] ** exponent)


def _positions(begin: int, count: int, frequency: torch.Tensor) -> torch.Tensor:
    """Cosines and sines float32 ``[count, 2 F]`` whose products are the mean of ``cos(w_f (i - j))``."""
    position = torch.arange(begin, begin + count, dtype=torch.float64, device=frequency.device)
    angle = position[:, None] * frequency.double()
    return torch.cat((angle.cos(), angle.sin()), -1).float() * len(frequency) ** -0.5


def _mixed(common: torch.Tensor, own: torch.Tensor, share: float) -> torch.Tensor:
    return share**0.5 * common + (1 - share) ** 0.5 * own


def _weights(geometry: Geometry, length: int, frequency: torch.Tensor, generator: torch.Generator) -> _Weights:
    """The weights of rows with 1 to ``length`` keys."""
    device, heads = frequency.device, geometry.heads

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(heads, 1, generator=generator, device=device)

    local_share, sink_share = draw(*_LOCAL_SHARE), draw(*_SINK_SHARE)
    rest = 1 - local_share - sink_share
    n = torch.arange(1, length + 1, dtype=torch.float64, device=device).clamp(min=_FEWEST_KEYS)
    level = torch.tensor(MASS, dtype=torch.float64, device=device)
    content = torch.special.ndtri(level) + torch.special.ndtri(1 - n ** (draw(*_EXPONENTS).double() - 1))
    # The sum over n keys of exp(content) is about this; the last term is what n draws lack of the tail.
    mass = n.log() + content.square() / 2 + torch.special.log_ndtr((2 * n.log()).sqrt() - content)
    content, sink = content.float(), (mass + (sink_share / rest / SINKS).log()).float()
    local = _local_weights(local_share / rest, length, frequency)
    return _Weights(*(of_heads.view(geometry.kv_heads, -1, length, 1) for of_heads in (content, local, sink)))


def _local_weights(share: torch.Tensor, length: int, frequency: torch.Tensor) -> torch.Tensor:
    """Weights A float32 ``[Hq, n]`` with ``sum_d (exp(A kernel(d)) - 1) = share * n`` over the nearest 512 keys.

    Solved by interpolation in A for lengths that are powers of two, and in the logarithm of n between them.
    """
    device = share.device
    trials = torch.linspace(0, 24, 97, device=device)
    lengths = [_FEWEST_KEYS]
    while lengths[-1] < length:
        lengths.append(2 * lengths[-1])
    distance = torch.arange(_NEAR_KEYS, device=device)
    kernel = (distance[:, None] * frequency).cos().mean(-1)
    near = torch.expm1(trials[:, None] * kernel).cumsum(-1, dtype=torch.float64)
    ends = torch.tensor(lengths, device=device)
    found = near[:, ends.clamp(max=_NEAR_KEYS) - 1] / ends
    # Negative lobes of the kernel may outweigh its peak for small weights; what counts is where the share is reached.
    found = found.cummax(0).values.T.contiguous()
    place = torch.searchsorted(found, share.double().T.expand(len(lengths), -1).contiguous()).clamp(1, len(trials) - 1)
    low, high = found.gather(1, place - 1), found.gather(1, place)
    part = ((share.double().T - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    solved = (trials[place - 1] + part * (trials[1] - trials[0])).float().T
    octave = (torch.arange(1, length + 1, device=device).clamp(min=_FEWEST_KEYS) / _FEWEST_KEYS).log2()
    below = octave.floor().long().clamp(max=max(0, len(lengths) - 2))
    above = (below + 1).clamp(max=len(lengths) - 1)
    between = octave - below
    return solved[:, below] * (1 - between) + solved[:, above] * between

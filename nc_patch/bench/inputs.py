"""What a decoding step is timed on: the shapes of known models, and random keys whose scores are not flat.

**The model of the keys.** A key is ``offset + spread * (basis z + noise)``, channel by channel: ``spread`` is
log-normal, four channels carry large offsets, as keys of real models do, and most of the variance lies in a space of
rank 16. Half of ``z`` is shared by runs of 64 keys, so that what is wanted comes in clusters. Queries point into the
same space; those of one key/value head share half of their direction.

**The model of the scores.** Over many keys the scores of a query are then near normal, and its length is set so that
their standard deviation is ``score_deviation(n)``, for which 95 % of the softmax lie in the n^0.5 best keys (arXiv
2404.02690 finds Ω(n^C)). Clusters and finite lengths make that about twice as many keys; what came of it is measured in
every case and written beside the times.
"""

import statistics
from dataclasses import dataclass

import torch

from nc_patch.selections import selection_class
from nc_patch.selections.index import KeyIndex

# Part of the softmax that lies in the best n**CONCENTRATION keys.
MASS, CONCENTRATION = 0.95, 0.5
_RANK, _CLUSTER, _NOISE = 16, 64, 0.3
_OUTLIERS, _OUTLIER_OFFSET, _SPREAD = 4, 8.0, 0.5
_KEYS_AT_ONCE = 1 << 16
_SAMPLED_KEYS = 8192


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder: of its attention, and what a model with random weights needs besides."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    layers: int


# Llama 3 8B, Qwen3 8B and Mistral 7B have the same attention, and differ in what is around it.
GEOMETRIES = {
    "llama3-8b": Geometry(32, 8, 128, 4096, 14336, 32),
    "qwen3-8b": Geometry(32, 8, 128, 4096, 12288, 36),
    "mistral-7b": Geometry(32, 8, 128, 4096, 14336, 32),
    "smollm2": Geometry(9, 3, 64, 576, 1536, 30),
}


@dataclass(frozen=True)
class DecodeInputs:
    """One decoding step of one layer.

    Attributes:
        query: ``[B, Hq, 1, D]``. key, value: ``[B, Hkv, n, D]``, contiguous.
        end: int32 ``[B]``, n everywhere.
        indexes: by selection, the index of the keys where the selection decodes by one.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    end: torch.Tensor
    indexes: dict[str, KeyIndex]


def score_deviation(n: int) -> float:
    """Standard deviation of n normal scores for which ``MASS`` of their softmax lies in the best ``n**CONCENTRATION``.

    Softmax tilts scores N(0, s^2) to N(s^2, s^2): a share 0.95 of the mass lies above s^2 - 1.645 s, where a share
    Q(s - 1.645) of the keys is.
    """
    normal = statistics.NormalDist()
    return normal.inv_cdf(MASS) + normal.inv_cdf(1 - n ** (CONCENTRATION - 1))


def make_inputs(
    geometry: Geometry,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    selections: list[str],
    seed: int,
) -> DecodeInputs:
    """Draws one set of inputs and builds the indexes that the selections decode by; the same for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    Hq, Hkv, D = geometry.heads, geometry.kv_heads, geometry.head_dim
    rank = min(_RANK, D)
    basis, spread, offset = draw_channels(geometry, rank, generator)
    key = torch.empty(batch, Hkv, length, D, dtype=dtype, device=device)
    value = torch.empty(batch, Hkv, length, D, dtype=dtype, device=device)
    for b in range(batch):
        for begin in range(0, length, _KEYS_AT_ONCE):
            count = min(_KEYS_AT_ONCE, length - begin)
            clusters = normal(Hkv, -(-count // _CLUSTER), rank).repeat_interleave(_CLUSTER, 1)[:, :count]
            z = (clusters + normal(Hkv, count, rank)) * 0.5**0.5
            key[b, :, begin : begin + count] = offset + spread * (z @ basis + _NOISE * normal(Hkv, count, D))
            value[b, :, begin : begin + count] = normal(Hkv, count, D)
    direction = normal(batch, Hkv, 1, rank) + normal(batch, Hkv, Hq // Hkv, rank)
    query = (direction @ basis) / spread
    sample = key[:, :, :: max(1, length // _SAMPLED_KEYS)].float()
    scores = (query @ (sample - sample.mean(2, keepdim=True)).transpose(2, 3)) * D**-0.5
    query = query * (score_deviation(length) / scores.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6))
    kinds = {name: selection_class(name).index_kind for name in selections}
    indexes = {name: KeyIndex.build(key, kind) for name, kind in kinds.items() if kind}
    end = torch.full((batch,), length, dtype=torch.int32, device=device)
    return DecodeInputs(query.reshape(batch, Hq, 1, D).to(dtype), key, value, end, indexes)


def draw_channels(
    geometry: Geometry, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the channels of keys are like: a basis ``[Hkv, rank, D]``, spread and offset ``[Hkv, 1, D]``; float32."""
    device, Hkv, D = generator.device, geometry.kv_heads, geometry.head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    basis = normal(Hkv, rank, D) / rank**0.5
    spread = (_SPREAD * normal(Hkv, 1, D)).exp()
    offset = normal(Hkv, 1, D)
    outliers = torch.randint(D, (Hkv, 1, min(_OUTLIERS, D)), generator=generator, device=device)
    offset.scatter_(2, outliers, _OUTLIER_OFFSET * normal(Hkv, 1, outliers.shape[-1]).sign())
    return basis, spread, offset


def concentration(inputs: DecodeInputs, budget: int) -> dict[str, float]:
    """What the scores of the first sequence are like, in float32, as means over its heads.

    Returns:
        ``best_keys_mass``: how much of the softmax the ``budget`` best keys hold; ``keys_of_mass``: how many of the
        best keys hold ``MASS`` of it.
    """
    Hkv = inputs.key.shape[1]
    query = inputs.query[0].float().reshape(Hkv, -1, inputs.query.shape[-1])
    masses, counts = [], []
    for h in range(Hkv):
        scores = query[h] @ inputs.key[0, h].float().T * query.shape[-1] ** -0.5
        total = torch.softmax(scores, -1).sort(-1, descending=True).values.cumsum(-1)
        masses.append(total[:, budget - 1])
        counts.append((total < MASS).sum(-1) + 1)
    return {
        "best_keys_mass": float(torch.cat(masses).mean()),
        "keys_of_mass": float(torch.cat(counts).float().mean()),
    }

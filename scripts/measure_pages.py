"""Compares statistics from which decoding chooses its pages, and writes docs/results/pages.json.

The queries, keys and values are those of one dense forward pass. Every late query chooses, for each key/value head, as
many pages as its budget fills: the first, its own, and the best of the others. Per layer and query the output error is
``||o - o_dense|| / ||o_dense||`` over the concatenated heads; it and the kept mass are averaged over layers, queries
and texts. What a statistic reads is counted per key, relative to the key and value themselves in bfloat16.

The King James text is that of Debian's package bible-kjv: ``bible -f gen1:1-rev22:21 | sed 's/^[^ ]* //'``.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval_tasks.capture import Captured, capture, token_ids
from eval_tasks.models import load_model
from eval_tasks.provenance import commit, hardware, versions
from eval_tasks.texts import load_text
from nc_patch.budget import budget_of
from nc_patch.common import check_directory
from nc_patch.selections.block.pages import page_logits, summarize

LAWS = ((2.0, 0.6), (4.0, 0.6))
LAYERS = (0, 1, 3, 6, 10, 14, 18, 22, 26, 29)
# The comparison of shared weights is made with this statistic at this page size.
SHARED_LOGIT, SHARED_BLOCK_SIZE = "mean + var/2", 32
# A statistic's page logits: (query [Hkv, R, D], keys by page [Hkv, P, block_size, D], scale) -> [Hkv, R, P].
PageLogits = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """What one layer's attention received.

    Attributes:
        query: ``[Hkv, G, Q, D]``, the late queries only.
        key, value: ``[Hkv, N, D]``.
        positions: ``[Q]``, of the queries.
        scale: factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    scale: float


def late_rows(captured: Sequence[Captured], queries: int) -> list[Layer]:
    """The captured layers with ``queries`` evenly spaced in the last fifth of the text."""
    length = captured[0].key.shape[2]
    positions = torch.linspace(round(length * 0.8125), length - 1, queries).round().long()
    return [
        Layer(query[0, :, positions].unflatten(0, (key.shape[1], -1)), key[0], value[0], positions, scale)
        for query, key, value, scale in captured
    ]


def by_page(key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Keys ``[Hkv, N, D]`` as ``[Hkv, P, block_size, D]``; the last page is filled up with zeros."""
    pages = -(-key.shape[1] // block_size)
    return torch.nn.functional.pad(key, (0, 0, 0, pages * block_size - key.shape[1])).unflatten(1, (pages, block_size))


def log_sum_exp(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The page's true log-sum-exp, or that of approximate keys."""
    return torch.logsumexp((scale * query @ keys.flatten(1, 2).mT).unflatten(-1, keys.shape[1:3]), -1)


def box_bound(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest score that the box around the keys admits (Quest, arXiv 2406.10774, section 3)."""
    bound = query.clamp(min=0) @ keys.amax(2).mT + query.clamp(max=0) @ keys.amin(2).mT
    return scale * bound + math.log(keys.shape[2])


def normal(
    query: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, count: int, scale: float, factor: float = 0.5
) -> torch.Tensor:
    """Log of ``count`` times the mean of ``exp(score)`` where keys are normal and channels independent."""
    return math.log(count) + scale * query @ mean.mT + factor * scale**2 * query.square() @ variance.mT


def mean_variance(factor: float = 0.5) -> PageLogits:
    """The score of the mean plus ``factor`` times the variance of the scores, channels independent."""
    return lambda query, keys, scale: normal(
        query, keys.mean(2), keys.var(2, correction=0), keys.shape[2], scale, factor
    )


def quantised(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` through signed codes of ``bits`` bits with one scale for each vector of the last dimension."""
    largest = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
    return (x / step).round() * step


def coded(bits: int, normalised: bool = True) -> PageLogits:
    """``mean_variance`` from codes with one scale for each page and statistic.

    ``normalised``: keys are first centred and divided by their standard deviation per head and channel, and each page's
    standard deviations are stored in place of variances.
    """

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        mean, variance = keys.mean(2), keys.var(2, correction=0)
        # Variances are not negative, so the sign's bit counts too.
        if not normalised:
            return normal(query, quantised(mean, bits), quantised(variance, bits + 1), keys.shape[2], scale)
        center, spread = channel_moments(keys)
        mean = quantised((mean - center) / spread, bits) * spread + center
        deviation = quantised(variance.sqrt() / spread, bits + 1) * spread
        return normal(query, mean, deviation.square(), keys.shape[2], scale)

    return logits


def channel_moments(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per head and channel, ``[Hkv, 1, D]`` each, of keys by page."""
    flat = keys.flatten(1, 2)
    return flat.mean(1, keepdim=True), flat.std(1, keepdim=True).clamp(min=1e-4)


def quantised_keys(bits: int) -> PageLogits:
    """Log-sum-exp over the codes of the keys, normalised per head and channel, with one scale for each key."""

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        center, spread = (x[:, None] for x in channel_moments(keys))
        return log_sum_exp(query, quantised((keys - center) / spread, bits) * spread + center, scale)

    return logits


def halved(inner: PageLogits) -> PageLogits:
    """Both halves of a page have statistics of their own, and their logits are added up."""

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        halves = keys.unflatten(2, (2, -1)).flatten(1, 2)
        return torch.logsumexp(inner(query, halves, scale).unflatten(-1, (-1, 2)), -1)

    return logits


def box_codes(bits: int) -> PageLogits:
    """Log-sum-exp over keys of few bits a channel, levels evenly spaced from the page's least to its largest."""

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        least, largest = keys.amin(2, keepdim=True), keys.amax(2, keepdim=True)
        step = ((largest - least) / (2**bits - 1)).clamp(min=1e-30)
        return log_sum_exp(query, least + ((keys - least) / step).round() * step, scale)

    return logits


def apart(count: int, inner: PageLogits, bits: int | None = None, normalised: bool = True) -> PageLogits:
    """The ``count`` keys farthest from the page's mean enter with their own scores, ``inner`` is of the others.

    ``bits``: the keys apart are codes, with one scale for each. ``normalised``: per head and channel.
    """

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        distance = (keys - keys.mean(2, keepdim=True)).square().sum(-1)
        order = distance.argsort(-1)[..., None].expand_as(keys)
        others, far = keys.gather(2, order).split((keys.shape[2] - count, count), 2)
        if bits is not None and not normalised:
            far = quantised(far, bits)
        elif bits is not None:
            center, spread = (x[:, None] for x in channel_moments(keys))
            far = quantised((far - center) / spread, bits) * spread + center
        return torch.logaddexp(log_sum_exp(query, far, scale), inner(query, others, scale))

    return logits


def kept(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """What the key index holds: the key apart, mean and variance of the others, in 8 bits, of each page alone."""
    return page_logits(query, summarize(keys), keys.shape[2], scale, 0.0)


def rotated(inner: PageLogits) -> PageLogits:
    """In the basis that makes a head's average covariance within pages diagonal."""

    def logits(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        centred = (keys - keys.mean(2, keepdim=True)).flatten(1, 2)
        basis = torch.linalg.eigh(centred.mT @ centred)[1]
        return inner(query @ basis, keys @ basis[:, None], scale)

    return logits


@dataclass(frozen=True)
class Statistic:
    """A page's statistic: its logits, and bits read per channel, by page and by key, and scales of 32 bits likewise."""

    logits: PageLogits
    page_bits: float = 0
    key_bits: float = 0
    page_scales: int = 0
    key_scales: int = 0

    def bytes_read(self, block_size: int, head_dim: int) -> float:
        """Bytes read per key relative to the 4 D bytes of a key and value in bfloat16."""
        page = self.page_bits * head_dim + 32 * self.page_scales
        key = self.key_bits * head_dim + 32 * self.key_scales
        return (page / block_size + key) / (32 * head_dim)


STATISTICS = {
    "oracle": Statistic(log_sum_exp, key_bits=16),
    "int8 keys": Statistic(quantised_keys(8), key_bits=8, key_scales=1),
    "int4 keys": Statistic(quantised_keys(4), key_bits=4, key_scales=1),
    "int3 keys": Statistic(quantised_keys(3), key_bits=3, key_scales=1),
    "2-bit keys in the page's box": Statistic(box_codes(2), 32, key_bits=2),
    "1-bit keys in the page's box": Statistic(box_codes(1), 32, key_bits=1),
    "min/max box": Statistic(box_bound, 32),
    "mean": Statistic(mean_variance(0.0), 16),
    "mean + var/4": Statistic(mean_variance(0.25), 32),
    "mean + var/2": Statistic(mean_variance(), 32),
    "mean + var": Statistic(mean_variance(1.0), 32),
    "mean + var/2, int8": Statistic(coded(8, normalised=False), 16, page_scales=2),
    "mean + var/2, int4": Statistic(coded(4, normalised=False), 8, page_scales=2),
    "mean + std, int8, normalised": Statistic(coded(8), 16, page_scales=2),
    "mean + std, int4, normalised": Statistic(coded(4), 8, page_scales=2),
    "mean + std, int3, normalised": Statistic(coded(3), 6, page_scales=2),
    "2 halves: mean": Statistic(halved(mean_variance(0.0)), 32),
    "2 halves: mean + var/2": Statistic(halved(mean_variance()), 64),
    "2 halves: mean + std, int4": Statistic(halved(coded(4)), 16, page_scales=4),
    "4 quarters: mean + var/2": Statistic(halved(halved(mean_variance())), 128),
    "4 quarters: mean + std, int4": Statistic(halved(halved(coded(4))), 32, page_scales=8),
    "1 key apart: mean": Statistic(apart(1, mean_variance(0.0)), 32),
    "1 key apart: mean + var/2": Statistic(apart(1, mean_variance()), 48),
    "1 key apart: mean + var/2, int8 (kept)": Statistic(kept, 24, page_scales=3),
    "1 key apart: mean + var/2, int4": Statistic(apart(1, coded(4, normalised=False), 4, False), 12, page_scales=3),
    "1 key apart: mean + std, int8": Statistic(apart(1, coded(8), 8), 24, page_scales=3),
    "1 key apart: mean + std, int4": Statistic(apart(1, coded(4), 4), 12, page_scales=3),
    "2 keys apart: mean + var/2": Statistic(apart(2, mean_variance()), 64),
    "2 keys apart: mean + std, int8": Statistic(apart(2, coded(8), 8), 32, page_scales=4),
    "2 keys apart: mean + std, int4": Statistic(apart(2, coded(4), 4), 16, page_scales=4),
    "4 keys apart: mean + std, int8": Statistic(apart(4, coded(8), 8), 48, page_scales=6),
    "4 keys apart: mean + std, int4": Statistic(apart(4, coded(4), 4), 24, page_scales=6),
    "rotated: mean + var/2": Statistic(rotated(mean_variance()), 32),
    "rotated: mean + std, int4": Statistic(rotated(coded(4)), 8, page_scales=2),
    "rotated: 1 key apart, int4": Statistic(rotated(apart(1, coded(4), 4)), 12, page_scales=3),
}

SHARED_WEIGHTS = {
    "A": "sum of softmax over all pages, the query's own by its exact log-sum-exp",
    "B": "sum of softmax over all pages but the query's own",
    "C": "sum of softmax over the rivals: neither the first page nor the query's own",
    "D": "largest over the heads of the logit less the log-sum-exp over all pages",
    "E": "sum over the heads of the logits less the log-sum-exp over all pages",
    "per head": "as A, but every query head chooses its own pages",
}


def shared_weight(logits: torch.Tensor, rival: torch.Tensor, own: torch.Tensor, variant: str) -> torch.Tensor:
    """Weight of each page, ``[Hkv, G or 1, Q, P]``, of which only the order among rivals counts.

    Args:
        logits: ``[Hkv, G, Q, P]``, -inf after the query's own page.
        rival, own: bool ``[Q, P]``, pages that compete, and the query's own page.
    """
    if variant in ("A", "per head"):
        weight = torch.softmax(logits, -1)
        return weight if variant == "per head" else weight.sum(1, keepdim=True)
    if variant in ("B", "C"):
        out = own if variant == "B" else ~rival
        return torch.softmax(logits.masked_fill(out, -torch.inf), -1).sum(1, keepdim=True)
    relative = logits - torch.logsumexp(logits, -1, keepdim=True)
    return relative.amax(1, keepdim=True) if variant == "D" else relative.sum(1, keepdim=True)


class Measured:
    """One layer at one page size: dense attention of its late queries, and what attending only pages loses."""

    def __init__(self, layer: Layer, block_size: int) -> None:
        self.layer, self.block_size = layer, block_size
        self.query = layer.query.flatten(1, 2)
        self.pages = by_page(layer.key, block_size)
        count = self.pages.shape[1]
        page = torch.arange(count)
        own_page = layer.positions // block_size
        self.own, self.later = page == own_page[:, None], page > own_page[:, None]
        self.rival = (page > 0) & (page < own_page[:, None])
        position = torch.arange(count * block_size)
        scores = (layer.scale * self.query @ self.pages.flatten(1, 2).mT).view(*layer.query.shape[:3], -1)
        self.scores = scores.masked_fill(position > layer.positions[:, None], -torch.inf)
        self.exact = torch.logsumexp(self.scores.unflatten(-1, (count, block_size)), -1)
        self.value = by_page(layer.value, block_size).flatten(1, 2)[:, None]

    @cached_property
    def weights(self) -> torch.Tensor:
        """Weights of dense attention, ``[Hkv, G, Q, N]``."""
        return torch.softmax(self.scores, -1)

    @cached_property
    def dense(self) -> torch.Tensor:
        """Output of dense attention, ``[Hkv, G, Q, Dv]``."""
        return self.weights @ self.value

    def logits(self, statistic: Statistic) -> torch.Tensor:
        """Page logits ``[Hkv, G, Q, P]``: the statistic's before the query's own page, which is exact."""
        estimate = statistic.logits(self.query, self.pages, self.layer.scale).view_as(self.exact)
        return torch.where(self.own, self.exact, estimate).masked_fill(self.later, -torch.inf)

    def chosen(self, logits: torch.Tensor, law: tuple[float, float], variant: str) -> torch.Tensor:
        """Pages attended, bool ``[Hkv, G or 1, Q, P]``."""
        weight = shared_weight(logits, self.rival, self.own, variant).masked_fill(~self.rival, -torch.inf)
        always = ~self.rival & ~self.later
        budgets = [budget_of(position + 1, *law) for position in self.layer.positions.tolist()]
        count = -(-torch.tensor(budgets) // self.block_size) - always.sum(-1)
        rank = torch.sort(weight, dim=-1, descending=True, stable=True).indices.argsort(-1)
        return always | (self.rival & (rank < count[:, None]))

    def loss(self, attended: torch.Tensor) -> torch.Tensor:
        """Output error and kept mass of every query, ``[2, Q]``."""
        kept = self.weights * attended.repeat_interleave(self.block_size, -1)
        mass = kept.sum(-1, keepdim=True)
        return torch.stack((self.error((kept @ self.value) / mass), mass[..., 0].mean((0, 1))))

    def error(self, output: torch.Tensor) -> torch.Tensor:
        """Output error of every query, ``[Q]``, heads concatenated."""
        return (output - self.dense).square().sum((0, 1, 3)).sqrt() / self.dense.square().sum((0, 1, 3)).sqrt()


def measure(layers: Sequence[Layer], block_size: int) -> list[dict[str, Any]]:
    """One row for each law, statistic and, where they are compared, shared weight: means over layers and queries."""
    losses: dict[tuple[tuple[float, float], str, str], list[torch.Tensor]] = {}
    for layer in layers:
        measured = Measured(layer, block_size)
        for name, statistic in STATISTICS.items():
            logits = measured.logits(statistic)
            compared = block_size == SHARED_BLOCK_SIZE and name in (SHARED_LOGIT, "oracle")
            for variant in SHARED_WEIGHTS if compared else ("A",):
                for law in LAWS:
                    loss = measured.loss(measured.chosen(logits, law, variant))
                    losses.setdefault((law, name, variant), []).append(loss.mean(-1))
    head_dim = layers[0].key.shape[-1]
    rows = []
    for (law, name, variant), found in losses.items():
        per_layer = torch.stack(found)
        error, mass = per_layer.mean(0).tolist()
        row = {"block_size": block_size, "alpha": law[0], "C": law[1], "statistic": name, "shared_weight": variant}
        row |= {"bytes_read": STATISTICS[name].bytes_read(block_size, head_dim)}
        row |= {"output_error": error, "kept_mass": mass, "output_error_by_layer": per_layer[:, 0].tolist()}
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints output error and kept mass, averaged over texts, a law beside the other."""
    print(f"page  {'statistic':33} {'weight':8} {'read %':>7}", *(f"{f'a={a} C={C}':>15}" for a, C in LAWS))
    lines: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in rows:
        line = "{block_size:4d}  {statistic:33} {shared_weight:8} {bytes_read:7.2%}".format(**row)
        lines.setdefault(line, {}).setdefault(row["alpha"], []).append((row["output_error"], row["kept_mass"]))
    for line, found in lines.items():
        print(line, *("{:7.4f} {:7.4f}".format(*torch.tensor(found[a]).mean(0).tolist()) for a, _ in LAWS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="+", default=["python-reference"])
    parser.add_argument("--length", type=int, default=8000)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--queries", type=int, default=48, help="evenly spaced in the last fifth of the text")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--out", type=Path, default=Path("docs/results/pages.json"))
    arguments = parser.parse_args()
    check_directory(arguments.out.parent, [arguments.out.name])
    loaded = load_model(arguments.model, "float32", "cpu")
    texts = [load_text(name) for name in arguments.texts]
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for text in texts:
        ids = token_ids(loaded.tokenizer, text, arguments.length)
        layers = late_rows(capture(loaded.model, ids, arguments.layers), arguments.queries)
        with torch.inference_mode():
            for block_size in arguments.block_sizes:
                rows += [{"text": text.name, **row} for row in measure(layers, block_size)]
    show(rows)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(torch.device("cpu"), torch.get_num_threads()),
        "seconds": time.perf_counter() - begin,
        "model": arguments.model,
        "texts": [{"name": text.name, "origin": text.origin, "sha256": text.sha256} for text in texts],
        "tokens": arguments.length,
        "layers": arguments.layers,
        "queries": arguments.queries,
        "shared_weights": SHARED_WEIGHTS,
        "results": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

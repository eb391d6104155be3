"""Perplexity by position in the context as an ``evaluate.Metric``; this file needs nothing else of its package."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
Perplexity of the tokens at each range of positions in the context. It falls with the position where a model uses its
context, and rises where the model loses hold of it. Log-likelihoods are given, so any model can be measured."""
_INPUTS = """
Args:
    predictions: for each document a list of log-likelihoods (natural logarithm, at most 0), in order: of single tokens,
        or of runs of tokens.
    references: for each document, how many tokens each log-likelihood covers: 1 for single tokens.
    edges: ascending positions, in tokens, between which tokens are taken together, the first of them included: [0, 512,
        1024] gives 0 to 511 and 512 to 1,023. By default 0, 1, 2, 4, 8 and so on to the end of the longest document.
        Tokens outside are left out of every range.
    first_position: position of each document's first token.
    tolerance: how many tokens of a run may lie across an edge; it counts where its middle lies.
Returns:
    edges: as used.
    perplexity: of each range, exp of the mean negative log-likelihood of its tokens; None where there are none.
    loss: that mean, in nats per token; None where there are none.
    tokens: how many tokens each range holds.
    overall: perplexity of all tokens in the ranges.
Raises:
    ValueError: a run of tokens lies across an edge by more than the tolerance, the lists differ in length, or the edges
        do not ascend.
"""


def by_position(
    loglikelihoods: Sequence[Sequence[float]],
    counts: Sequence[Sequence[int]],
    edges: Sequence[int] | None = None,
    first_position: int = 0,
    tolerance: int = 0,
) -> dict[str, Any]:
    """What ``PerplexityByPosition`` computes, from the same arguments."""
    totals = [first_position + sum(document) for document in counts]
    edges = _doubling(max(totals, default=0)) if edges is None else list(edges)
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges must be two or more ascending positions, got {list(edges)}")
    sums, tokens = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for number, (values, sizes) in enumerate(zip(loglikelihoods, counts, strict=True)):
        if len(values) != len(sizes):
            raise ValueError(
                f"document {number} has {len(values)} log-likelihoods and {len(sizes)} counts of tokens; give one each"
            )
        position = first_position
        for value, size in zip(values, sizes, strict=True):
            if size < 1:
                raise ValueError(f"document {number} has a log-likelihood of {size} tokens; each covers at least one")
            bucket = bisect_right(edges, position + (size - 1) // 2) - 1
            if _across(edges, bucket, position, position + size) > tolerance:
                raise ValueError(
                    f"document {number}: the {size} tokens from position {position} on lie across an edge of"
                    f" {list(edges)}; split them, or move the edge"
                )
            position += size
            if 0 <= bucket < len(sums):
                sums[bucket] += value
                tokens[bucket] += size
    losses = [-total / count if count else None for total, count in zip(sums, tokens, strict=True)]
    return {
        "edges": list(edges),
        "perplexity": [None if loss is None else _exp(loss) for loss in losses],
        "loss": losses,
        "tokens": tokens,
        "overall": _exp(-sum(sums) / sum(tokens)) if sum(tokens) else None,
    }


def _across(edges: Sequence[int], bucket: int, begin: int, end: int) -> int:
    """How many tokens of a run lie outside the range that holds its middle."""
    before = max(0, edges[bucket] - begin) if bucket >= 0 else 0
    behind = max(0, end - edges[bucket + 1]) if bucket + 1 < len(edges) else 0
    return before + behind


def _doubling(end: int) -> list[int]:
    edges = [0, 1]
    while edges[-1] < end:
        edges.append(2 * edges[-1])
    return edges


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PerplexityByPosition(evaluate.Metric):
    """Perplexity of the tokens at each range of positions in the context."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[int]],
        edges: Sequence[int] | None = None,
        first_position: int = 0,
        tolerance: int = 0,
    ) -> dict[str, Any]:
        return by_position(predictions, references, edges, first_position, tolerance)

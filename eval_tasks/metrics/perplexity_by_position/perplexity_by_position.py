"""Perplexity by position in the context as an ``evaluate.Metric``; this file needs nothing else of its package."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import datasets
import evaluate
import numpy as np

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
        Tokens outside are left out.
Returns:
    edges: as used.
    perplexity: of each range, exp of the mean negative log-likelihood of its tokens; None where there are none.
    loss: that mean, in nats per token; None where there are none.
    tokens: how many tokens each range holds.
    overall: perplexity of all tokens in the ranges.
Raises:
    ValueError: a run of tokens lies across an edge, the lists differ in length, or the edges do not ascend.
"""


def by_position(
    loglikelihoods: Sequence[Sequence[float]], counts: Sequence[Sequence[int]], edges: Sequence[int] | None = None
) -> dict[str, Any]:
    """What ``PerplexityByPosition`` computes, from the same arguments."""
    if edges is None:
        longest = max(map(sum, counts), default=0)
        edges = [0, *(2**power for power in range(max(0, longest - 1).bit_length() + 1))]
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges must be two or more ascending positions, got {list(edges)}")
    sums, tokens = np.zeros(len(edges) + 1), np.zeros(len(edges) + 1, dtype=int)
    for number, (values, given) in enumerate(zip(loglikelihoods, counts, strict=True)):
        who, sizes = f"document {number}", np.array(given, dtype=int)
        if len(values) != len(sizes):
            raise ValueError(
                f"{who} has {len(values)} log-likelihoods and {len(sizes)} counts of tokens; give one each"
            )
        if np.any(sizes < 1):
            raise ValueError(f"{who} has a log-likelihood of {sizes.min()} tokens; each covers at least one")
        ends = np.cumsum(sizes)
        # The range before the first edge is 0, the one behind the last the last.
        ranges, last = (np.searchsorted(edges, position, side="right") for position in (ends - sizes, ends - 1))
        if np.any(ranges != last):
            run = np.argmax(ranges != last)
            said = f"{who}: the {sizes[run]} tokens from position {ends[run] - sizes[run]} on lie across an edge of"
            raise ValueError(f"{said} {list(edges)}; split them, or move the edge")
        np.add.at(sums, ranges, values)
        np.add.at(tokens, ranges, sizes)
    sums, tokens = sums[1:-1], tokens[1:-1]
    losses = [-total / count if count else None for total, count in zip(sums.tolist(), tokens.tolist(), strict=True)]
    with np.errstate(over="ignore"):
        return {
            "edges": list(edges),
            "perplexity": [None if loss is None else float(np.exp(loss)) for loss in losses],
            "loss": losses,
            "tokens": tokens.tolist(),
            "overall": float(np.exp(-sums.sum() / tokens.sum())) if tokens.any() else None,
        }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PerplexityByPosition(evaluate.Metric):
    """Perplexity of the tokens at each range of positions in the context."""

    def _info(self) -> Any:
        kinds = {"predictions": "float64", "references": "int64"}
        lists = {name: datasets.Sequence(datasets.Value(kind)) for name, kind in kinds.items()}
        return evaluate.MetricInfo(_DESCRIPTION, "", datasets.Features(lists), _INPUTS)

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return by_position(predictions, references, **options)

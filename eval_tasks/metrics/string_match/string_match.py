"""RULER's string match as an ``evaluate.Metric``; this file needs nothing else of its package."""

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "Which of the expected strings an answer holds, upper and lower case alike, as in RULER."
_CITATION = "Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, arXiv 2404.06654"
_INPUTS = """
Args:
    predictions: the answers, one string each.
    references: for each answer a list of the strings that are searched for in it.
    match: "all" scores the share of these strings that the answer holds, "part" whether it holds any of them.
Returns:
    string_match: mean score in [0, 1].
    scores: score of each answer.
"""


def score(prediction: str, references: Sequence[str], match: str = "all") -> float:
    """Score of one answer in [0, 1]; raises ValueError where ``match`` is unknown, or there are no references."""
    if match not in ("all", "part"):
        raise ValueError(f"match must be 'all' (share of the strings) or 'part' (any of them), got {match!r}")
    if not references:
        raise ValueError("an answer needs at least one string to search for, got none")
    # Control characters become line ends, so that a string is not found across them.
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [reference.lower() in text for reference in references]
    return sum(found) / len(found) if match == "all" else float(any(found))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class StringMatch(evaluate.Metric):
    """Which of the expected strings an answer holds."""

    def _info(self) -> Any:
        texts = {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        return evaluate.MetricInfo(_DESCRIPTION, _CITATION, datasets.Features(texts), _INPUTS)

    def _compute(self, predictions: Any, references: Any, match: str = "all") -> dict[str, Any]:
        scores = [score(*pair, match) for pair in zip(predictions, references, strict=True)]
        return {"string_match": sum(scores) / len(scores), "scores": scores}

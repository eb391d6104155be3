"""The lm-eval task ``nc_document``: perplexity along documents, by the position in the context (loss curves).

A document is cut at the context lengths asked for, and each part is scored under all that goes before it: lengths of
1,024, 2,048 and 4,096 give the perplexity of the positions 0 to 1,023, 1,024 to 2,047 and 2,048 to 4,095. Parts that
double in size cost twice one forward pass over the document.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.registry import get_aggregation

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub
from eval_tasks.lm_eval.by_length import ByLengthTask, Samples, WordText
from eval_tasks.lm_eval.settings import Settings
from eval_tasks.synthetic.fitting import TOLERANCE
from eval_tasks.tasks import tokenise
from eval_tasks.texts import Text, load_text

# No tokenizer makes fewer tokens of so many characters; saves tokenising whole books.
_CHARACTERS_PER_TOKEN = 12
# Documents looked through for ones that are long enough.
_MOST_ROWS = 2000


class PerplexityByPosition(ByLengthTask):
    """Perplexity of each part over all documents, ``exp(-Σll / Σtokens)``, and of the whole.

    Documents are stretches of one text that do not overlap, or, where the YAML names a ``dataset_path`` of the hub, the
    starts of the first documents in its column ``text`` that are long enough; ``dataset_kwargs`` go to
    ``datasets.load_dataset``.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 8}

    def make_samples(self) -> Samples:
        name = self.config.dataset_path
        if name is None:
            source = load_text(self.settings.text)
            texts, origin, sha256 = _stretches(source, self.settings), source.origin, source.sha256
        else:
            found = load_hub(name, copies=self.settings.hub_copies, **(self.config.dataset_kwargs or {}))
            texts, origin, sha256 = _long_enough(found, self.settings, name), f"the data set {name}", ""
        return [_cut(text, self.settings) for text in texts], origin, sha256

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> list[tuple[str, str]]:
        return [("".join(doc["parts"][:index]), part) for index, part in enumerate(doc["parts"])]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        scores = [(found, tokens) for (found, _), tokens in zip(results, doc["tokens"], strict=True)]
        whole = (sum(found for found, _ in scores), sum(doc["tokens"]))
        return dict(zip(self.aggregation(), [*scores, whole], strict=True))

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        parts = [f"perplexity_{begin}_{end}" for begin, end in pairwise([0, *self.settings.lengths])]
        return dict.fromkeys([*parts, "perplexity"], get_aggregation("weighted_perplexity"))


def _stretches(source: Text, settings: Settings) -> list[str]:
    """Stretches of a text, chosen by the seed and somewhat too long, each from the start of a word on."""
    tokens = tokenise(settings.tokenizer, source.content)
    size = settings.lengths[-1] + 1
    slots = len(tokens.ids) // size
    if slots < settings.samples:
        raise EvalError(
            f"the text has {len(tokens.ids):,} tokens; {settings.samples} documents of {size - 1:,} tokens need"
            f" {settings.samples * size:,}. Ask for fewer samples or shorter lengths, or give more text (text in"
            " --metadata)."
        )
    content = source.content.encode("utf-8")
    pieces = []
    for slot in np.random.default_rng(settings.seed).permutation(slots)[: settings.samples]:
        start = int(tokens.byte_ends[slot * size - 1]) if slot else 0
        piece = content[start : start + _CHARACTERS_PER_TOKEN * size].decode("utf-8", "ignore")
        space = re.search(r"\s", piece)
        pieces.append(piece[space.start() :].lstrip() if space else piece)
    return pieces


def _long_enough(rows: Iterable[Mapping[str, Any]], settings: Settings, name: str) -> list[str]:
    texts: list[str] = []
    length, longest = settings.lengths[-1], 0
    for row in islice(rows, _MOST_ROWS):
        if "text" not in row:
            raise EvalError(f"the data set {name} has no column 'text'; it has {', '.join(sorted(row))}")
        text = row["text"][: _CHARACTERS_PER_TOKEN * length].strip()
        tokens = settings.count(text)
        longest = max(longest, tokens)
        if tokens >= length:
            texts.append(text)
        if len(texts) == settings.samples:
            return texts
    raise EvalError(
        f"the data set {name} has {len(texts)} documents of {length:,} tokens or more among its first {_MOST_ROWS}, and"
        f" {settings.samples} are asked for (the longest has {longest:,}); ask for fewer samples or shorter lengths"
    )


def _cut(text: str, settings: Settings) -> dict[str, Any]:
    """A document's parts, which end at the last word before each length, and the tokens of each."""
    words = WordText(text[: _CHARACTERS_PER_TOKEN * settings.lengths[-1]], settings.tokenizer)
    # Special tokens are read, and none is scored.
    special = settings.count("a") - len(settings.tokenizer.encode("a", add_special_tokens=False))
    parts: list[str] = []
    counts: list[int] = []
    begin = 0
    for length in settings.lengths:
        border = bisect_right(words.borders, words.starts[min(length - special, len(words.tokens.ids))]) - 1
        while (total := settings.count(words.part(0, words.borders[border]))) > length and border:
            border -= 1
        if not (1 - TOLERANCE) * length <= total <= length:
            raise EvalError(
                f"a document cannot be cut at {length} tokens: its words end at {total}. Give a text with words, or"
                " other lengths"
            )
        end = words.borders[border]
        parts.append(words.part(begin, end))
        counts.append(total - special - sum(counts))
        begin = end
    return {"parts": parts, "tokens": counts}

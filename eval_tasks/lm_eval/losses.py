"""The lm-eval tasks that score a text: ``nc_perplexity``, ``nc_recall`` and ``nc_document``, as perplexities.

``nc_perplexity`` scores the same last tokens under a growing left context, ``nc_recall`` a passage that the model has
read at the start of its context, behind filler, and ``nc_document`` the parts of a document between the context
lengths, each under all that goes before it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice, pairwise
from typing import Any, ClassVar

import numpy as np
from lm_eval.api.registry import get_aggregation
from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub
from eval_tasks.lm_eval.by_length import ByLengthTask, Samples
from eval_tasks.lm_eval.settings import Settings
from eval_tasks.synthetic.fitting import TOLERANCE, fill
from eval_tasks.synthetic.haystack import Prose, load_prose
from eval_tasks.synthetic.sample import Material, Request
from eval_tasks.tasks import TASKS, Layout, check_lengths, places, tokenise
from eval_tasks.texts import load_text

# Words before the passage of recall, whose own start would otherwise serve as attention sink.
_LEAD = 24
# No tokenizer makes fewer tokens of so many characters; saves tokenising whole books.
_CHARACTERS_PER_TOKEN = 12
# Documents looked through for ones that are long enough.
_MOST_ROWS = 2000


class PerplexityByLength(ByLengthTask):
    """``nc_perplexity``: per length ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)`` over all passages."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "scored": 256}

    def make_samples(self) -> Samples:
        given = self.settings
        layout = Layout(given.lengths, given.samples, given.scored, passage=0, seed=given.seed)
        source = load_text(given.text)
        text = WordText(source.content, given.tokenizer)
        check_lengths([TASKS["perplexity"]], layout, len(text.tokens.prefix))
        ends = (place + given.lengths[-1] + 1 for place in places(text.tokens, layout))
        return [_passage(text, end, given) for end in ends], source.origin, source.sha256

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> list[tuple[str, str]]:
        return [(context, doc["continuation"]) for context in doc["contexts"]]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        size, scores = len(doc["continuation"].encode("utf-8")), dict[str, Any]()
        for length, tokens, (loglikelihood, _) in zip(doc["lengths"], doc["scored_tokens"], results, strict=True):
            scores[f"perplexity_{length}"] = (loglikelihood, tokens)
            scores[f"bits_per_byte_{length}"] = (loglikelihood, size)
        return scores

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        rules = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
        lengths = self.settings.lengths
        return {f"{name}_{length}": get_aggregation(rule) for length in lengths for name, rule in rules.items()}


class RecallByLength(PerplexityByLength):
    """``nc_recall``: the same metrics of a passage that stands at the start of the context too."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "passage": 128}

    def make_samples(self) -> Samples:
        prose = load_prose(self.settings.text)
        rows = [_recalled(prose, self.settings, index) for index in range(self.settings.samples)]
        return rows, prose.origin, prose.sha256


class PerplexityByPosition(ByLengthTask):
    """Perplexity of each part over all documents, ``exp(-Σll / Σtokens)``, and of the whole.

    Documents are stretches of one text that do not overlap, or, where the YAML names a ``dataset_path`` of the hub, the
    starts of the first documents in its column ``text`` that are long enough.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 8}

    def make_samples(self) -> Samples:
        name = self.config.dataset_path
        if name is None:
            source = load_text(self.settings.text)
            texts, origin, sha256 = _stretches(source.content, self.settings), source.origin, source.sha256
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


class WordText:
    """A text that is cut before whitespace, where a tokenizer yields the same tokens for the parts as for the whole.

    ``starts`` are the bytes at which tokens begin, and the text's end; ``borders``, ascending, those at which a cut may
    fall: the starts of whitespace, and the text's ends.
    """

    def __init__(self, content: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._content = content.encode("utf-8")
        self.tokens = tokenise(tokenizer, content)
        self.starts = [0, *self.tokens.byte_ends.tolist()]
        inner = (match.start() for match in re.finditer(rb"\s+(?=\S)", self._content) if match.start())
        self.borders = [0, *inner, len(self._content)]

    def part(self, begin: int, end: int) -> str:
        """The text from one byte to another, which are borders."""
        return self._content[begin:end].decode("utf-8")


def _passage(text: WordText, end_token: int, settings: Settings) -> dict[str, Any]:
    """The passage that ends at the last border before a token, and its left contexts, each the end of the next.

    Cuts fall at the borders of words, so lengths are reached from below, within a few tokens.
    """

    def border_from(token: int) -> int:
        return text.borders[bisect_left(text.borders, text.starts[max(0, token)])]

    end = text.borders[bisect_right(text.borders, text.starts[end_token]) - 1]
    last = bisect_left(text.starts, end)
    cut = border_from(last - settings.scored)
    contexts, read, scored = [], [], []
    for length in settings.lengths:
        begin = border_from(last - length - 1 + len(text.tokens.prefix))
        total = settings.count(text.part(begin, end))
        # Cut off from what stood before it, the first word can take more tokens than it did in place.
        while total > length + 1 and begin < cut:
            begin = text.borders[bisect_right(text.borders, begin)]
            total = settings.count(text.part(begin, end))
        contexts.append(text.part(begin, cut))
        # The last token is predicted and not read.
        read.append(total - 1)
        scored.append(total - settings.count(contexts[-1]))
        for tokens, wanted in ((read[-1], length), (scored[-1], settings.scored)):
            if not wanted - max(8, wanted // 10) <= tokens <= wanted:
                raise EvalError(
                    f"the text has too few spaces near byte {end} to score {settings.scored} tokens under a context of"
                    f" {length}: got {scored[-1]} and {read[-1]}; give a text with words, or larger lengths"
                )
    continuation = text.part(cut, end)
    return {"contexts": contexts, "continuation": continuation, "context_tokens": read, "scored_tokens": scored}


def _recalled(prose: Prose, settings: Settings, index: int) -> dict[str, Any]:
    count = settings.count
    start = Request(0, settings.seed, index, Material(), "recall").random().choice(prose.sentence_starts)
    size = fill(cache(lambda words: count(" ".join(prose.stretch(start, words)))), settings.passage)
    if size + 2 * _LEAD > len(prose.words) // 2:
        raise EvalError(
            f"the text holds {len(prose.words)} words of prose, too few for a passage of {settings.passage} tokens and"
            " filler; ask for a shorter passage, or give more text"
        )
    repeated = " ".join(prose.stretch(start, size))
    lead = " ".join(prose.stretch((start - _LEAD) % len(prose.words), _LEAD))
    # The rest of the text from behind the passage on, round to the lead.
    rest = prose.stretch((start + size) % len(prose.words), len(prose.words) - size - _LEAD)

    def context(words: int) -> str:
        whole, part = divmod(words, len(rest))
        return " ".join([lead, repeated, *(rest * whole), *rest[:part]])

    total = cache(lambda words: count(f"{context(words)} {repeated}"))
    sizes = [fill(total, length) for length in settings.lengths]
    read = [total(words) for words in sizes]
    for length, tokens in zip(settings.lengths, read, strict=True):
        if tokens < (1 - TOLERANCE) * length:
            raise EvalError(f"a word of the text {prose.origin} is too long to fill {length} tokens; got {tokens}")
    contexts = [context(words) for words in sizes]
    scored = [tokens - count(text) for tokens, text in zip(read, contexts, strict=True)]
    return {"contexts": contexts, "continuation": f" {repeated}", "context_tokens": read, "scored_tokens": scored}


def _stretches(text: str, settings: Settings) -> list[str]:
    """Stretches of a text, chosen by the seed and somewhat too long, each from the start of a word on."""
    tokens = tokenise(settings.tokenizer, text)
    size = settings.lengths[-1] + 1
    slots = len(tokens.ids) // size
    if slots < settings.samples:
        raise EvalError(
            f"the text has {len(tokens.ids):,} tokens; {settings.samples} documents of {size - 1:,} tokens need"
            f" {settings.samples * size:,}. Ask for fewer or shorter ones, or give more text (text in --metadata)."
        )
    content = text.encode("utf-8")
    pieces = []
    for slot in np.random.default_rng(settings.seed).permutation(slots)[: settings.samples]:
        start = int(tokens.byte_ends[slot * size - 1]) if slot else 0
        piece = content[start : start + _CHARACTERS_PER_TOKEN * size].decode("utf-8", "ignore")
        space = re.search(r"\s", piece)
        pieces.append(piece[space.start() :].lstrip() if space else piece)
    return pieces


def _long_enough(rows: Iterable[Mapping[str, Any]], settings: Settings, name: str) -> list[str]:
    texts, length, longest = list[str](), settings.lengths[-1], 0
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
    parts, counts, begin = list[str](), list[int](), 0
    for length in settings.lengths:
        border = bisect_right(words.borders, words.starts[min(length - special, len(words.tokens.ids))]) - 1
        while (total := settings.count(words.part(0, words.borders[border]))) > length and border:
            border -= 1
        if not (1 - TOLERANCE) * length <= total <= length:
            advice = "Give a text with words, or other lengths"
            raise EvalError(f"a document cannot be cut at {length} tokens: its words end at {total}. {advice}")
        end = words.borders[border]
        parts.append(words.part(begin, end))
        counts.append(total - special - sum(counts))
        begin = end
    return {"parts": parts, "tokens": counts}

"""The lm-eval tasks ``nc_perplexity``, the same last tokens under a growing left context, and ``nc_recall``.

Lengths are compared on the same tokens. ``nc_perplexity`` places its passages as the harness's own task ``perplexity``
does. ``nc_recall`` is the harness's ``recall`` at any length: a passage that the model has read at the start of its
context is scored behind filler, prose that repeats where the text ends, always without the passage.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from lm_eval.api.registry import get_aggregation

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.by_length import ByLengthTask, Samples, WordText
from eval_tasks.lm_eval.settings import Settings
from eval_tasks.synthetic.fitting import TOLERANCE, fill
from eval_tasks.synthetic.haystack import Prose, load_prose
from eval_tasks.synthetic.sample import Material, Request
from eval_tasks.tasks import TASKS, Layout, check_lengths, places
from eval_tasks.texts import load_text

# Words before the passage of recall, whose own start would otherwise serve as attention sink.
_LEAD = 24


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
        size = len(doc["continuation"].encode("utf-8"))
        scores: dict[str, Any] = {}
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
    return _row(contexts, text.part(cut, end), read, scored)


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
    return _row(contexts, f" {repeated}", read, [n - count(text) for n, text in zip(read, contexts, strict=True)])


def _row(contexts: list[str], continuation: str, read: list[int], scored: list[int]) -> dict[str, Any]:
    """A document: per length a left context, the tokens that the model reads, and those of the scored continuation."""
    return {"contexts": contexts, "continuation": continuation, "context_tokens": read, "scored_tokens": scored}

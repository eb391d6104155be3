"""The lm-eval tasks that score a text: ``nc_perplexity``, ``nc_recall`` and ``nc_document``, as perplexities.

Texts are cut before whitespace, where a tokenizer yields the same tokens for the parts as for the whole, so lengths are
reached from below, within a few tokens.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import cycle, islice, pairwise
from typing import Any, ClassVar

from lm_eval.api.registry import get_aggregation

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.by_length import ByLengthTask, Samples
from eval_tasks.lm_eval.settings import Settings
from eval_tasks.synthetic.fitting import TOLERANCE, fill
from eval_tasks.synthetic.haystack import Prose, load_prose
from eval_tasks.tasks import TASKS, Layout, check_lengths, places, tokenise
from eval_tasks.texts import load_text

# The context and the continuation of each request.
Pairs = list[tuple[str, str]]
# Words before the passage of recall, whose own start would otherwise serve as attention sink.
_LEAD = 24
# What the passage of nc_perplexity and its contexts may lack of their lengths, which code and tables need.
_LACKING = 0.1


class PerplexityByLength(ByLengthTask):
    """``nc_perplexity``: the same last tokens under a growing left context.

    The metrics are, per length, ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)`` over all passages.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "scored": 256}

    def make_samples(self) -> Samples:
        source = load_text(self.settings.text)
        rows = [self._row(self.cut(words)) for words in _stretches(source.content, self.settings)]
        return rows, source

    def cut(self, words: Sequence[str]) -> Pairs:
        """What is read and scored of a stretch: its last words, under contexts each of which is the end of the next."""

        def last(count: int) -> str:
            return "".join(words[len(words) - count :])

        filled = partial(self._filled, last, most=len(words), lacking=_LACKING)
        begin = len(words) - filled(self.settings.scored + self.settings.count(""))
        # The last token is predicted and not read.
        starts = (len(words) - filled(length + 1) for length in self.settings.lengths)
        return [("".join(words[start:begin]), "".join(words[begin:])) for start in starts]

    def stages(self) -> list[str]:
        """What the requests of a document are called in the names of metrics."""
        return [str(length) for length in self.settings.lengths]

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> list[tuple[str, str]]:
        return list(zip(doc["contexts"], doc["continuations"], strict=True))

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        scores = dict[str, Any]()
        columns = (self.stages(), doc["tokens"], doc["continuations"], results)
        for stage, tokens, scored, (loglikelihood, _) in zip(*columns, strict=True):
            scores[f"perplexity_{stage}"] = (loglikelihood, tokens)
            scores[f"bits_per_byte_{stage}"] = (loglikelihood, len(scored.encode("utf-8")))
        return scores

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        rules = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}.items()
        return {f"{name}_{stage}": get_aggregation(rule) for stage in self.stages() for name, rule in rules}

    def _row(self, pairs: Pairs) -> dict[str, Any]:
        """A document for lm-eval; its tokens are those that are scored, which special ones are not."""
        contexts, continuations = zip(*pairs, strict=True)
        count = self.settings.count
        tokens = [count(context + scored) - count(context) for context, scored in pairs]
        return {"contexts": contexts, "continuations": continuations, "tokens": tokens}

    def _filled(
        self, text_of: Callable[[int], str], room: int, most: int | None = None, lacking: float = TOLERANCE
    ) -> int:
        """How many words, up to ``most``, fill the room; raises EvalError where a share of it is lacking."""
        counted = cache(lambda words: self.settings.count(text_of(words)))
        words = fill(counted, room, most)
        if counted(words) < room - max(8, lacking * room):
            advice = "give a text with more spaces, or other lengths"
            raise EvalError(f"the text cannot be cut at {room} tokens: its words end at {counted(words)}; {advice}")
        return words


class RecallByLength(PerplexityByLength):
    """``nc_recall``: the same metrics of a passage that the model has read at the start of its context too."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "passage": 128}

    def make_samples(self) -> Samples:
        prose, seed = load_prose(self.settings.text), self.settings.seed
        drawn = (random.Random(f"recall/{seed}/{index}/") for index in range(self.settings.samples))
        rows = [self._row(self._recalled(prose, draw.choice(prose.sentence_starts))) for draw in drawn]
        return rows, prose.text

    def _recalled(self, prose: Prose, start: int) -> Pairs:
        """The passage from the word ``start`` on, behind itself and filler of growing length."""
        count = self.settings.count
        size = fill(cache(lambda words: count(" ".join(prose.stretch(start, words)))), self.settings.passage)
        if size + 2 * _LEAD > len(prose.words) // 2:
            raise EvalError(
                f"the text holds {len(prose.words)} words of prose, too few for a passage of {self.settings.passage} "
                "tokens and filler; ask for a shorter passage, or give more text"
            )
        passage, lead = prose.stretch(start, size), prose.stretch((start - _LEAD) % len(prose.words), _LEAD)
        # The rest of the text from behind the passage on, round to the lead.
        rest = prose.stretch((start + size) % len(prose.words), len(prose.words) - size - _LEAD)
        scored = f" {' '.join(passage)}"

        def context(words: int) -> str:
            return " ".join([*lead, *passage, *islice(cycle(rest), words)])

        sizes = (self._filled(lambda words: context(words) + scored, length) for length in self.settings.lengths)
        return [(context(words), scored) for words in sizes]


class PerplexityByPosition(PerplexityByLength):
    """``nc_document``: the same metrics of the parts of documents between the lengths, and perplexity of the whole.

    Documents are stretches of the text that do not overlap.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 8}

    def cut(self, words: Sequence[str]) -> Pairs:
        """The parts of a document, each under all that goes before it."""
        first = lambda count: "".join(words[:count])  # noqa: E731
        ends = [self._filled(first, length, len(words)) for length in self.settings.lengths]
        return [(first(begin), "".join(words[begin:end])) for begin, end in pairwise([0, *ends])]

    def stages(self) -> list[str]:
        return [f"{begin}_{end}" for begin, end in pairwise([0, *self.settings.lengths])]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        whole = (sum(found for found, _ in results), sum(doc["tokens"]))
        return super().process_results(doc, results) | {"perplexity": whole}

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        return super().aggregation() | {"perplexity": get_aggregation("weighted_perplexity")}


def _stretches(text: str, settings: Settings) -> list[list[str]]:
    """Stretches of a text that do not overlap, chosen by the seed, as words with the whitespace before each."""
    tokens, content = tokenise(settings.tokenizer, text), text.encode("utf-8")
    layout = Layout(settings.lengths, settings.samples, settings.scored, passage=0, seed=settings.seed)
    check_lengths([TASKS["perplexity"]], layout, len(tokens.prefix))
    ends, length = [0, *tokens.byte_ends.tolist()], settings.lengths[-1]
    pieces = (content[ends[place] : ends[place + length + 1]] for place in places(tokens, layout))
    return [re.findall(r"\s*\S+", piece.decode("utf-8", "ignore")) for piece in pieces]

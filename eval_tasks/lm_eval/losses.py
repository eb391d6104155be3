"""The lm-eval tasks that score a text: ``nc_perplexity``, ``nc_recall`` and ``nc_document``, as perplexities.

Texts are cut before whitespace, where a tokenizer yields the same tokens for the parts as for the whole, so lengths are
reached from below, within a few tokens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
from lm_eval.api.registry import get_aggregation

from eval_tasks.errors import EvalError
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
# What the passage of nc_perplexity and its contexts may lack of their lengths, which code and tables need.
_LACKING = 0.1
# Documents looked through for ones that are long enough.
_MOST_ROWS = 2000


class PerplexityByLength(ByLengthTask):
    """``nc_perplexity``: the same last tokens under a growing left context.

    The metrics are, per length, ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)`` over all passages.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "scored": 256}

    def make_samples(self) -> Samples:
        found, origin, sha256 = _stretches(self.settings)
        return [_passage(words, self.settings) for words in found], origin, sha256

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


class RecallByLength(PerplexityByLength):
    """``nc_recall``: the same metrics of a passage that the model has read at the start of its context too."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "passage": 128}

    def make_samples(self) -> Samples:
        prose = load_prose(self.settings.text)
        rows = [_recalled(prose, self.settings, index) for index in range(self.settings.samples)]
        return rows, prose.origin, prose.sha256


class PerplexityByPosition(PerplexityByLength):
    """``nc_document``: the same metrics of the parts of documents between the lengths, and perplexity of the whole.

    Documents are stretches of one text that do not overlap, or, where the YAML names a ``dataset_path`` of the hub, the
    starts of the first documents in its column ``text`` that are long enough.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 8}

    def make_samples(self) -> Samples:
        name, options = self.config.dataset_path, self.config.dataset_kwargs or {}
        found = _stretches(self.settings) if name is None else _hub_documents(name, self.settings, **options)
        return [_document(words, self.settings) for words in found[0]], *found[1:]

    def stages(self) -> list[str]:
        return [f"{begin}_{end}" for begin, end in pairwise([0, *self.settings.lengths])]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        whole = (sum(found for found, _ in results), sum(doc["tokens"]))
        return super().process_results(doc, results) | {"perplexity": whole}

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        return super().aggregation() | {"perplexity": get_aggregation("weighted_perplexity")}


def _stretches(settings: Settings) -> tuple[list[list[str]], str, str]:
    """The words of stretches of the text that do not overlap, chosen by the seed; origin and digest of the text."""
    source = load_text(settings.text)
    tokens, content = tokenise(settings.tokenizer, source.content), source.content.encode("utf-8")
    layout = Layout(settings.lengths, settings.samples, settings.scored, passage=0, seed=settings.seed)
    check_lengths([TASKS["perplexity"]], layout, len(tokens.prefix))
    ends, length = [0, *tokens.byte_ends.tolist()], settings.lengths[-1]
    pieces = (content[ends[place] : ends[place + length + 1]] for place in places(tokens, layout))
    return [_words(piece.decode("utf-8", "ignore")) for piece in pieces], source.origin, source.sha256


def _hub_documents(name: str, settings: Settings, **options: Any) -> tuple[list[list[str]], str, str]:
    """The words of the starts of documents; raises EvalError where there is no such data set, or it is too small."""
    path, length = name if settings.hub_copies is None else f"{settings.hub_copies}/{name}", settings.lengths[-1]
    try:
        rows = islice(datasets.load_dataset(str(Path(path).expanduser()), **options), _MOST_ROWS)
        texts = (row["text"][: _CHARACTERS_PER_TOKEN * length].strip() for row in rows)
        found = list(islice((text for text in texts if settings.count(text) >= length), settings.samples))
    except Exception as error:  # `datasets` raises its own, its file systems' and its HTTP client's exceptions
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise EvalError(
            f"the data set {name} could not be loaded ({reason}). Where the hub cannot be reached, download it before"
            f" (hf download --repo-type dataset {name} --local-dir DIR/{name}) and give lm-eval"
            ' --metadata \'{"hub_copies": "DIR"}\''
        ) from error
    if len(found) < settings.samples:
        raise EvalError(
            f"the data set {name} has {len(found)} documents of {length:,} tokens or more among its first {_MOST_ROWS},"
            f" and {settings.samples} are asked for; ask for fewer samples or shorter lengths"
        )
    return [_words(text) for text in found], f"the data set {name}", ""


def _passage(words: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The last words of a stretch, and their left contexts, each the end of the next."""

    def last(count: int) -> str:
        return "".join(words[len(words) - count :])

    filled = partial(_filled, last, settings=settings, most=len(words), lacking=_LACKING)
    scored, _ = filled(settings.scored + settings.count(""))
    # The last token is predicted and not read.
    sizes = [filled(length + 1) for length in settings.lengths]
    contexts = ["".join(words[len(words) - size : len(words) - scored]) for size, _ in sizes]
    tokens = [total - settings.count(context) for (_, total), context in zip(sizes, contexts, strict=True)]
    return {"contexts": contexts, "continuations": [last(scored)] * len(contexts), "tokens": tokens}


def _recalled(prose: Prose, settings: Settings, index: int) -> dict[str, Any]:
    start = Request(0, settings.seed, index, Material(), "recall").random().choice(prose.sentence_starts)
    size = fill(cache(lambda words: settings.count(" ".join(prose.stretch(start, words)))), settings.passage)
    if size + 2 * _LEAD > len(prose.words) // 2:
        raise EvalError(
            f"the text holds {len(prose.words)} words of prose, too few for a passage of {settings.passage} tokens and"
            " filler; ask for a shorter passage, or give more text"
        )
    passage, lead = prose.stretch(start, size), prose.stretch((start - _LEAD) % len(prose.words), _LEAD)
    # The rest of the text from behind the passage on, round to the lead.
    rest = prose.stretch((start + size) % len(prose.words), len(prose.words) - size - _LEAD)
    scored = f" {' '.join(passage)}"

    def context(words: int) -> str:
        return " ".join([*lead, *passage, *islice(cycle(rest), words)])

    sizes = [_filled(lambda words: context(words) + scored, length, settings) for length in settings.lengths]
    contexts = [context(words) for words, _ in sizes]
    tokens = [total - settings.count(text) for (_, total), text in zip(sizes, contexts, strict=True)]
    return {"contexts": contexts, "continuations": [scored] * len(contexts), "tokens": tokens}


def _document(words: Sequence[str], settings: Settings) -> dict[str, Any]:
    """A document's parts, each under all that goes before it; special tokens are read, and none is scored."""
    first = lambda count: "".join(words[:count])  # noqa: E731
    ends, read = zip(*(_filled(first, length, settings, len(words)) for length in settings.lengths), strict=True)
    contexts = [first(begin) for begin in (0, *ends[:-1])]
    continuations = ["".join(words[begin:end]) for begin, end in pairwise([0, *ends])]
    tokens = [total - before for before, total in pairwise([settings.count(""), *read])]
    return {"contexts": contexts, "continuations": continuations, "tokens": tokens}


def _words(text: str) -> list[str]:
    """The words, each with the whitespace before it."""
    return re.findall(r"\s*\S+", text)


def _filled(
    text_of: Callable[[int], str], room: int, settings: Settings, most: int | None = None, lacking: float = TOLERANCE
) -> tuple[int, int]:
    """How many words, up to ``most``, fill the room, and their tokens; raises EvalError where a share is lacking."""
    counted = cache(lambda words: settings.count(text_of(words)))
    words = fill(counted, room, most)
    if counted(words) < room - max(8, lacking * room):
        advice = "give a text with more spaces, or other lengths"
        raise EvalError(f"the text cannot be cut at {room} tokens: its words end at {counted(words)}; {advice}")
    return words, counted(words)

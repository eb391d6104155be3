"""This package's tasks in lm-eval: one document is one sample, scored once per context length.

So ``--limit N`` takes N samples at every length, where lm-eval's own tasks list all samples of the shortest length
first. Any of lm-eval's models can run the tasks. ``--metadata`` and ``--model_args`` are read before a model is loaded.
"""

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import cycle, islice
from typing import Any, ClassVar

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.registry import get_aggregation
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.model import located
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.models import ModelSource, tokenizer_fingerprint
from eval_tasks.synthetic import GENERATORS, synthesize
from eval_tasks.synthetic.haystack import Prose, load_prose
from eval_tasks.synthetic.sample import TOLERANCE, Count, counter, fill
from eval_tasks.tasks import TASKS, Layout, ascending, check_lengths, places, tokenise
from eval_tasks.texts import PYTHON_REFERENCE, Text, load_text
from nc_patch.calibration.profile import checked_count

# The context and the continuation of each request.
Pairs = list[tuple[str, str]]
# Documents, and the text that they are of.
Samples = tuple[Iterable[Mapping[str, Any]], Text]
# Words before the passage of recall, whose own start would otherwise serve as attention sink.
_LEAD = 24
# What the passage of nc_perplexity and its contexts may lack of their lengths, which code and tables need.
_LACKING = 0.1
_METRIC = "string_match"
# What a group of generated tasks takes the mean of, each task counting the same: lm-eval wants the names in advance.
GROUP_METRICS = [
    {"metric": name, "weight_by_size": False} for name in (_METRIC, *(f"{_METRIC}_{512 << i}" for i in range(12)))
]


class ByLengthTask(ConfigurableTask):
    """A task whose documents hold the same sample at several context lengths, as ``--metadata`` asks for them.

    ``layout`` has the lengths and numbers, ``text`` is a name as ``load_text`` takes it; lengths are in tokens of the
    ``tokenizer`` of the model under test.
    """

    numbers: ClassVar[dict[str, int]] = {}  # the positive integers that a task takes, with their defaults
    layout: Layout
    text: str
    tokenizer: PreTrainedTokenizerBase
    count_tokens: Count

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def make_samples(self) -> Samples:
        """The documents, and what they are of; raises EvalError where the text does not serve."""
        raise NotImplementedError

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> Iterable[tuple[Any, ...]]:
        """What a document asks the model: the arguments of one request of lm-eval after the other."""
        raise NotImplementedError

    def download(self, *_: Any, **__: Any) -> None:
        """Makes the documents, by ``--metadata`` and ``--model_args``, which lm-eval merges.

        Raises EvalError or ProfileError where a value is out of range, both names of the lengths are given, or no
        tokenizer is named.
        """
        metadata = self.config.metadata or {}
        numbers = {name: checked_count(name, metadata.get(name, default)) for name, default in self.numbers.items()}
        seed, model = checked_count("seed", metadata.get("seed", 0), least=0), located(metadata)
        self.text, self.tokenizer = metadata.get("text", PYTHON_REFERENCE), _tokenizer_of(model, self.config.task)
        self.count_tokens = counter(self.tokenizer, model.get("add_bos_token"))
        lengths = _lengths_of(metadata, _max_length_of(model, self.tokenizer))
        self.layout = Layout(lengths, **{"scored": 0, "passage": 0, "seed": seed, **numbers})
        rows, text = self.make_samples()
        described = {"lengths": list(lengths), "text_origin": text.origin, "text_sha256": text.sha256}
        shared = {**described, "tokenizer": tokenizer_fingerprint(self.tokenizer)}
        self.dataset = {"test": Dataset.from_list([{**row, **shared} for row in rows])}
        # lm-eval writes the metadata beside the results; defaults and the text's hash belong there too.
        self.config.metadata = {**metadata, **described, "samples": len(self.dataset["test"])}

    def construct_requests(self, doc: Mapping[str, Any], ctx: Any, **options: Any) -> list[Instance]:
        asked = enumerate(self.requests(doc, ctx))
        return [Instance(self.OUTPUT_TYPE, doc, given, i, metadata=options["metadata"]) for i, given in asked]

    def higher_is_better(self) -> dict[str, bool]:
        return dict.fromkeys(self.aggregation(), self.OUTPUT_TYPE == "generate_until")

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; lm-eval's cache of built requests is told these documents from others'."""
        ignored = options.get("apply_chat_template") or options.get("system_instruction")
        if ignored and self.OUTPUT_TYPE == "loglikelihood":
            logging.getLogger(__name__).warning(
                "%s scores plain text: no chat template and no system instruction is applied", self.config.task
            )
        content = json.dumps([*self.dataset["test"], self.config.generation_kwargs], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{digest}", **options)


class PerplexityByLength(ByLengthTask):
    """``nc_perplexity``: the same last tokens under a growing left context.

    The metrics are, per length, ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)`` over all passages.
    """

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "scored": 256}

    def make_samples(self) -> Samples:
        source = load_text(self.text)
        return [self._row(self.cut(words)) for words in self._stretches(source.content)], source

    def cut(self, words: Sequence[str]) -> Pairs:
        """What is read and scored of a stretch: its last words, under contexts each of which is the end of the next."""

        def last(count: int) -> str:
            return "".join(words[len(words) - count :])

        filled = partial(self._filled, last, most=len(words), lacking=_LACKING)
        begin = len(words) - filled(self.layout.scored + self.count_tokens(""))
        # The last token is predicted and not read.
        starts = (len(words) - filled(length + 1) for length in self.layout.lengths)
        return [("".join(words[start:begin]), "".join(words[begin:])) for start in starts]

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> list[tuple[str, str]]:
        return list(zip(doc["contexts"], doc["continuations"], strict=True))

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        scores = dict[str, Any]()
        columns = (self.layout.lengths, doc["tokens"], doc["continuations"], results)
        for length, tokens, scored, (loglikelihood, _) in zip(*columns, strict=True):
            scores[f"perplexity_{length}"] = (loglikelihood, tokens)
            scores[f"bits_per_byte_{length}"] = (loglikelihood, len(scored.encode("utf-8")))
        return scores

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        rules = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}.items()
        return {f"{name}_{length}": get_aggregation(rule) for length in self.layout.lengths for name, rule in rules}

    def _stretches(self, text: str) -> list[list[str]]:
        """Stretches of a text that do not overlap, chosen by the seed, as words with the whitespace before each."""
        tokens, content = tokenise(self.tokenizer, text), text.encode("utf-8")
        check_lengths([TASKS["perplexity"]], self.layout, len(tokens.prefix))
        ends, length = [0, *tokens.byte_ends.tolist()], self.layout.lengths[-1]
        pieces = (content[ends[place] : ends[place + length + 1]] for place in places(tokens, self.layout))
        return [re.findall(r"\s*\S+", piece.decode("utf-8", "ignore")) for piece in pieces]

    def _row(self, pairs: Pairs) -> dict[str, Any]:
        """A document for lm-eval; its tokens are those that are scored, which special ones are not."""
        contexts, continuations = zip(*pairs, strict=True)
        count = self.count_tokens
        tokens = [count(context + scored) - count(context) for context, scored in pairs]
        return {"contexts": contexts, "continuations": continuations, "tokens": tokens}

    def _filled(
        self, text_of: Callable[[int], str], room: int, most: int | None = None, lacking: float = TOLERANCE
    ) -> int:
        """How many words, up to ``most``, fill the room; raises EvalError where a share of it is lacking."""
        counted = cache(lambda words: self.count_tokens(text_of(words)))
        words = fill(counted, room, most)
        if counted(words) < room - max(8, lacking * room):
            advice = "give a text with more spaces, or other lengths"
            raise EvalError(f"the text cannot be cut at {room} tokens: its words end at {counted(words)}; {advice}")
        return words


class RecallByLength(PerplexityByLength):
    """``nc_recall``: the same metrics of a passage that the model has read at the start of its context too."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16, "passage": 128}

    def make_samples(self) -> Samples:
        prose, seed = load_prose(self.text), self.layout.seed
        drawn = (random.Random(f"recall/{seed}/{index}/") for index in range(self.layout.samples))
        rows = [self._row(self._recalled(prose, draw.choice(prose.sentence_starts))) for draw in drawn]
        return rows, prose.text

    def _recalled(self, prose: Prose, start: int) -> Pairs:
        """The passage from the word ``start`` on, behind itself and filler of growing length."""
        count = self.count_tokens
        size = fill(cache(lambda words: count(" ".join(prose.stretch(start, words)))), self.layout.passage)
        if size + 2 * _LEAD > len(prose.words) // 2:
            raise EvalError(
                f"the text holds {len(prose.words)} words of prose, too few for a passage of {self.layout.passage} "
                "tokens and filler; ask for a shorter passage, or give more text"
            )
        passage, lead = prose.stretch(start, size), prose.stretch((start - _LEAD) % len(prose.words), _LEAD)
        # The rest of the text from behind the passage on, round to the lead.
        rest = prose.stretch((start + size) % len(prose.words), len(prose.words) - size - _LEAD)
        scored = f" {' '.join(passage)}"

        def context(words: int) -> str:
            return " ".join([*lead, *passage, *islice(cycle(rest), words)])

        sizes = (self._filled(lambda words: context(words) + scored, length) for length in self.layout.lengths)
        return [(context(words), scored) for words in sizes]


class RetrievalByLength(ByLengthTask):
    """String match of answers, one metric per context length and their mean, for the generator in the task's name."""

    numbers: ClassVar[dict[str, int]] = {"samples": 100}

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._generator = GENERATORS[config["task"].removeprefix("nc_")]
        generation = dict(config.get("generation_kwargs", {}))
        generation.setdefault("max_gen_toks", self._generator.new_tokens)
        super().__init__({**config, "generation_kwargs": generation})

    def make_samples(self) -> Samples:
        seed, samples = self.layout.seed, range(self.layout.samples)
        answers = (list(self._generator.answers(seed, i, self.text)) for i in samples)
        rows = [{"sample": i, "answers": found, "seed": seed, "question": ""} for i, found in enumerate(answers)]
        return rows, load_prose(self.text).text

    def fewshot_context(self, doc: Mapping[str, Any], num_fewshot: int = 0, **options: Any) -> list[str]:
        """The prompts of a sample, one per context length; each with what the model is to generate fits its length."""
        options.pop("gen_prefix", None)
        plain_context = super().fewshot_context

        def render(question: str, prefix: str) -> str:
            return str(plain_context({**doc, "question": question}, num_fewshot=0, gen_prefix=prefix, **options))

        ways: dict[str, Any] = {"text": self.text, "render": render, "count": self.count_tokens}
        ways["new_tokens"] = self.config.generation_kwargs["max_gen_toks"]
        sample = (self.layout.seed, doc["sample"])
        return [synthesize(self._generator, self.tokenizer, n, *sample, **ways).prompt for n in doc["lengths"]]

    def requests(self, doc: Mapping[str, Any], ctx: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        return [(prompt, deepcopy(self.config.generation_kwargs)) for prompt in ctx]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        scores = [score(answer, doc["answers"]) for answer in results]
        return dict(zip(self.aggregation(), [*scores, mean(scores)], strict=True))

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        return dict.fromkeys([*(f"{_METRIC}_{length}" for length in self.layout.lengths), _METRIC], mean)


def _tokenizer_of(model: Mapping[str, Any], task: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's model would load from the same arguments; raises EvalError where there is none."""
    given = model.get("tokenizer") or model.get("pretrained") or model.get("model")
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None:
        raise EvalError(
            f"{task} measures context in tokens: give pretrained=... in --model_args, or tokenizer=... in --metadata"
        )
    name = given if isinstance(given, str) else given.name_or_path
    options = {"trust_remote_code": False, **_loading(model, "add_bos_token")}
    if model.get("tokenizer"):
        options.pop("gguf_file", None)
    try:
        return ModelSource(name, name, options).load(AutoTokenizer)
    except EvalError as error:
        raise EvalError(f"no tokenizer: {error} Or give another's, as tokenizer=... in --metadata") from error


def _max_length_of(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The length at which lm-eval's Hugging Face model would cut contexts off; None for other kinds of model."""
    if model.get("max_length") is not None:
        return int(model["max_length"])
    given = model.get("pretrained")
    config = AutoConfig.from_pretrained(given, **_loading(model)) if isinstance(given, str) else given and given.config
    return resolve_max_length(config, tokenizer) if config else None


def _lengths_of(given: Mapping[str, Any], limit: int | None) -> tuple[int, ...]:
    """The lengths in ascending order, or the defaults; raises for one beyond the model's positions."""
    listed = [given[name] for name in ("lengths", "max_seq_lengths") if given.get(name) is not None]
    if len(listed) > 1:
        raise EvalError("lengths and max_seq_lengths mean the same: give one of them")
    default = [length for length in (512, 1024, 2048, 4096) if limit is None or length <= limit]
    found = listed[0] if listed else default
    if not found:
        raise EvalError(f"lengths must be a list of integers, of at most the {limit} positions of the model")
    each = found if isinstance(found, list | tuple) else [found]
    lengths = ascending([checked_count("lengths", n, least=2) for n in each])
    if limit is not None and lengths[-1] > limit:
        raise EvalError(f"lengths {[n for n in lengths if n > limit]} exceed the {limit} positions of the model")
    return lengths


def _loading(model: Mapping[str, Any], *further: str) -> dict[str, Any]:
    names = ("revision", "trust_remote_code", "gguf_file", "subfolder", *further)
    return {name: model[name] for name in names if model.get(name) is not None}

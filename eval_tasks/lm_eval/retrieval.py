"""The generated tasks in lm-eval: RULER's and the passkey, at any context length.

Prompts are made when lm-eval asks for them, so that ``--limit`` saves the making, and a chat template and a system
instruction count towards the length.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

from lm_eval.api.metrics import mean

from eval_tasks.lm_eval.by_length import ByLengthTask, Samples
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.synthetic import GENERATORS, synthesize
from eval_tasks.synthetic.haystack import load_prose

METRIC = "string_match"
# What a group of these tasks takes the mean of, each task counting the same: lm-eval wants the names in advance.
_NAMES = (METRIC, *(f"{METRIC}_{512 << doubling}" for doubling in range(12)))
GROUP_METRICS = [{"metric": name, "weight_by_size": False} for name in _NAMES]


class RetrievalByLength(ByLengthTask):
    """String match of answers, one metric per context length and their mean, for the generator in the task's name."""

    numbers: ClassVar[dict[str, int]] = {"samples": 100}

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._generator = GENERATORS[config["task"].removeprefix("nc_")]
        generation = dict(config.get("generation_kwargs", {}))
        generation.setdefault("max_gen_toks", self._generator.new_tokens)
        super().__init__({**config, "generation_kwargs": generation})

    def make_samples(self) -> Samples:
        seed, text = self.settings.seed, self.settings.text
        answers = (list(self._generator.answers(seed, i, text)) for i in range(self.settings.samples))
        rows = [{"sample": i, "answers": found, "seed": seed, "question": ""} for i, found in enumerate(answers)]
        return rows, load_prose(text).text

    def fewshot_context(self, doc: Mapping[str, Any], num_fewshot: int = 0, **options: Any) -> list[str]:
        """The prompts of a sample, one per context length; each with what the model is to generate fits its length."""
        options.pop("gen_prefix", None)
        plain_context, given = super().fewshot_context, self.settings

        def render(question: str, prefix: str) -> str:
            return str(plain_context({**doc, "question": question}, num_fewshot=0, gen_prefix=prefix, **options))

        ways: dict[str, Any] = {"text": given.text, "render": render, "count": given.count}
        ways["new_tokens"] = self.config.generation_kwargs["max_gen_toks"]
        make = partial(synthesize, self._generator, given.tokenizer, seed=given.seed, index=doc["sample"], **ways)
        return [make(length=length).prompt for length in doc["lengths"]]

    def requests(self, doc: Mapping[str, Any], ctx: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
        return [(prompt, deepcopy(self.config.generation_kwargs)) for prompt in ctx]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        scores = [score(answer, doc["answers"]) for answer in results]
        return dict(zip(self.aggregation(), [*scores, mean(scores)], strict=True))

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        return dict.fromkeys([*(f"{METRIC}_{length}" for length in self.settings.lengths), METRIC], mean)

"""The generated tasks in lm-eval: RULER's, the passkey, and facts in a haystack, at any context length.

Prompts are made when lm-eval asks for them, so that ``--limit`` saves the making, and a chat template and a system
instruction count towards the length. Nothing here needs ``nc_patch``: any of lm-eval's models can run the tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.by_length import ByLengthTask
from eval_tasks.lm_eval.settings import Settings, read_settings
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.models import tokenizer_fingerprint
from eval_tasks.synthetic import GENERATORS, Material, synthesize
from eval_tasks.synthetic.fitting import counter
from eval_tasks.texts import PYTHON_REFERENCE

SAMPLES = 100
# As lm-eval's own ruler; models with fewer positions are measured at what they have.
LENGTHS = (512, 1024, 2048, 4096)
METRIC = "string_match"


class RetrievalByLength(ByLengthTask):
    """String match of what a model answers, one metric per context length and their mean.

    Args:
        config: the YAML's settings, as lm-eval's task manager hands them over; ``dataset_kwargs`` names the generator.
    """

    plain_text = False

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = dict(config or {})
        self._generator = GENERATORS[config["dataset_kwargs"]["generator"]]
        config["generation_kwargs"] = {
            "do_sample": False,
            "temperature": 0.0,
            "until": [],
            "max_gen_toks": self._generator.new_tokens,
            **config.get("generation_kwargs", {}),
        }
        given = {**config.get("metadata", {}), **config["dataset_kwargs"]}
        self._settings, self._material = _read(**given)
        super().__init__(config)

    def fewshot_context(self, doc: Mapping[str, Any], num_fewshot: int = 0, **options: Any) -> list[str]:
        """The prompts of a sample, one per context length; each with what the model is to generate fits its length."""
        options.pop("gen_prefix", None)
        plain_context = super().fewshot_context

        def render(question: str, prefix: str) -> str:
            filled = {**doc, "question": question}
            prompt: str = plain_context(filled, num_fewshot=0, gen_prefix=prefix or None, **options)
            return prompt

        settings = self._settings
        return [
            synthesize(
                self._generator,
                settings.tokenizer,
                length,
                settings.seed,
                doc["sample"],
                material=self._material,
                new_tokens=self.config.generation_kwargs["max_gen_toks"],
                render=render,
                count=counter(settings.tokenizer, settings.add_bos_token),
            ).prompt
            for length in doc["lengths"]
        ]

    def construct_requests(self, doc: Mapping[str, Any], ctx: Sequence[str], **options: Any) -> list[Instance]:
        """One request to generate per context length."""
        return [
            Instance(
                request_type="generate_until",
                doc=doc,
                arguments=(prompt, deepcopy(self.config.generation_kwargs)),
                idx=index,
                metadata=options["metadata"],
            )
            for index, prompt in enumerate(ctx)
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """Score per length, and their mean."""
        scores = [score(answer, doc["answers"], self._generator.match) for answer in results]
        by_length = zip(doc["lengths"], scores, strict=True)
        return {**{f"{METRIC}_{length}": found for length, found in by_length}, METRIC: mean(scores)}

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        """The mean over samples of every metric."""
        return dict.fromkeys([*(f"{METRIC}_{length}" for length in self.lengths), METRIC], mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Every metric is better when higher."""
        return dict.fromkeys(self.aggregation(), True)


def documents(**arguments: Any) -> dict[str, Dataset]:
    """The samples of a generated task, without their prompts; arguments are ``--metadata`` and ``--model_args``.

    Args:
        arguments: ``generator``, by its name in ``eval_tasks.synthetic.GENERATORS``; ``lengths`` in tokens of the
            model's tokenizer, those included that it generates (or ``max_seq_lengths``, as for lm-eval's ruler); by
            default those of 512, 1024, 2048 and 4096 that the model has positions for; ``samples`` at each length, by
            default 100; ``seed``; ``text``, the prose that hides the facts; ``hub_copies``, a directory with copies of
            data sets; and the model's, of which ``tokenizer`` or ``pretrained`` names the tokenizer.

    Returns:
        ``{"test": Dataset}``, one row per sample.

    Raises:
        EvalError: a setting is out of range, no tokenizer is named, or data are missing.
    """
    settings, material = _read(**arguments)
    generator = GENERATORS[arguments["generator"]]
    shared = {
        "lengths": list(settings.lengths),
        "seed": settings.seed,
        "text_origin": material.prose.origin,
        "text_sha256": material.prose.sha256,
        "tokenizer": tokenizer_fingerprint(settings.tokenizer),
        "question": "",
    }
    answers = (list(generator.answers(settings.seed, i, material)) for i in range(settings.samples))
    return {"test": Dataset.from_list([{"sample": i, "answers": found, **shared} for i, found in enumerate(answers)])}


def _read(
    *,
    generator: str,
    lengths: Sequence[int] | int | None = None,
    max_seq_lengths: Sequence[int] | int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    text: str = PYTHON_REFERENCE,
    hub_copies: str | None = None,
    **model: Any,
) -> tuple[Settings, Material]:
    if hub_copies is not None and not isinstance(hub_copies, str):
        raise EvalError(f"hub_copies must name a directory, got {hub_copies!r}")
    settings = read_settings(
        f"nc_{generator}", LENGTHS, samples, lengths=lengths, max_seq_lengths=max_seq_lengths, seed=seed, model=model
    )
    return settings, Material(text, hub_copies)

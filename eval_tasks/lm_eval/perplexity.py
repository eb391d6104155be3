"""The lm-eval task ``nc_perplexity``: the same last tokens under a growing left context.

One document is one passage scored once per context length, so ``--limit N`` takes N passages at every length, and the
lengths are compared on the same tokens, placed as in the harness's own task ``perplexity``. Nothing here needs
``nc_patch``: any of lm-eval's models can run the task.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_aggregation

from eval_tasks.lm_eval.by_length import ByLengthTask
from eval_tasks.lm_eval.passages import cut_passages
from eval_tasks.lm_eval.settings import LENGTHS, positive, read_settings
from eval_tasks.tasks import TASKS, Layout, check_lengths, tokenise
from eval_tasks.texts import PYTHON_REFERENCE, load_text

SCORED = 256
SAMPLES = 16


class PerplexityByLength(ByLengthTask):
    """Perplexity and bits per byte of each passage's end, one metric per context length."""

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **options: Any) -> list[Instance]:
        """One log-likelihood request per context length."""
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(context, doc["continuation"]),
                idx=index,
                metadata=options["metadata"],
            )
            for index, context in enumerate(doc["contexts"])
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Per length, the log-likelihood with the number of tokens and of bytes that it covers."""
        size = len(doc["continuation"].encode("utf-8"))
        scores: dict[str, Any] = {}
        for length, tokens, (loglikelihood, _) in zip(doc["lengths"], doc["scored_tokens"], results, strict=True):
            scores[f"perplexity_{length}"] = (loglikelihood, tokens)
            scores[f"bits_per_byte_{length}"] = (loglikelihood, size)
        return scores

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        """How each metric is taken over passages: ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)``."""
        rules = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
        return {f"{name}_{length}": get_aggregation(rule) for length in self.lengths for name, rule in rules.items()}

    def higher_is_better(self) -> dict[str, bool]:
        """Every metric is better when lower."""
        return dict.fromkeys(self.aggregation(), False)


def documents(
    *,
    lengths: Sequence[int] | int | None = None,
    max_seq_lengths: Sequence[int] | int | None = None,
    scored: int = SCORED,
    samples: int = SAMPLES,
    seed: int = 0,
    text: str = PYTHON_REFERENCE,
    **model: Any,
) -> dict[str, Dataset]:
    """The passages of ``nc_perplexity``; its arguments are lm-eval's ``--metadata``, merged with ``--model_args``.

    Args:
        lengths: context lengths in tokens of the model's tokenizer; by default those of 512, 1024, 2048 and 4096 that
            the model has positions for.
        max_seq_lengths: the same under the name that lm-eval's own tasks have for it.
        scored: tokens scored at the end of each context.
        samples: how many passages.
        seed: of their places in the text.
        text: where they come from: ``python-reference``, a file or a data set, as ``eval_tasks.texts.load_text`` says.
        model: the model's arguments: ``tokenizer`` or ``pretrained`` names the tokenizer, ``pretrained`` and
            ``max_length`` limit the lengths.

    Returns:
        ``{"test": Dataset}``, one row per passage.

    Raises:
        EvalError: no tokenizer is named, a setting is out of range, or the text is too short.
    """
    positive(scored=scored)
    settings = read_settings(
        "nc_perplexity",
        LENGTHS,
        samples,
        lengths=lengths,
        max_seq_lengths=max_seq_lengths,
        seed=seed,
        model=model,
    )
    layout = Layout(settings.lengths, samples, scored, passage=0, seed=seed)
    source = load_text(text)
    tokens = tokenise(settings.tokenizer, source.content)
    check_lengths([TASKS["perplexity"]], layout, len(tokens.prefix))
    cut = cut_passages(source.content, tokens, layout, settings.encode)
    origin = {"lengths": layout.lengths, "text_origin": source.origin, "text_sha256": source.sha256}
    return {"test": Dataset.from_list([dataclasses.asdict(passage) | origin for passage in cut])}

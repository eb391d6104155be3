"""The common ground of this package's lm-eval tasks: one document is one sample, scored once per context length.

So ``--limit N`` takes N samples at every length, where lm-eval's own tasks list all samples of the shortest length
first. Any of lm-eval's models can run the tasks.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from eval_tasks.lm_eval.settings import Settings, read_settings
from eval_tasks.models import tokenizer_fingerprint
from eval_tasks.texts import Text

Samples = tuple[Iterable[Mapping[str, Any]], Text]
"""Documents, and the text that they are of."""


class ByLengthTask(ConfigurableTask):
    """A task whose documents hold the same sample at several context lengths, which the settings describe."""

    numbers: ClassVar[dict[str, int]] = {"samples": 16}  # the settings that are positive integers, with their defaults
    settings: Settings

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def make_samples(self) -> Samples:
        """The documents that the settings describe; raises EvalError where the text does not serve."""
        raise NotImplementedError

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> Iterable[tuple[Any, ...]]:
        """What a document asks the model: the arguments of one request of lm-eval after the other."""
        raise NotImplementedError

    def download(self, *_: Any, **__: Any) -> None:
        """Makes the documents, by ``--metadata`` and ``--model_args``, which lm-eval merges."""
        metadata = self.config.metadata or {}
        self.settings = read_settings(self.config.task, metadata, **self.numbers)
        rows, text = self.make_samples()
        described = {"lengths": list(self.settings.lengths), "text_origin": text.origin, "text_sha256": text.sha256}
        shared = {**described, "tokenizer": tokenizer_fingerprint(self.settings.tokenizer)}
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

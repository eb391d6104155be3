"""The common ground of this package's lm-eval tasks: one document is one sample, scored once per context length.

So ``--limit N`` takes N samples at every length, where lm-eval's own tasks list all samples of the shortest length
first. Nothing here needs ``nc_patch``: any of lm-eval's models can run the tasks.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from eval_tasks.lm_eval.settings import Settings, read_settings
from eval_tasks.models import tokenizer_fingerprint

_log = logging.getLogger(__name__)

Samples = tuple[Iterable[Mapping[str, Any]], str, str]
"""Rows of a data set, where they come from in words, and the hash of that text."""


class ByLengthTask(ConfigurableTask):
    """A task whose documents hold the same sample at several context lengths.

    Args:
        config: the YAML's settings, as lm-eval's task manager hands them over.

    Raises:
        EvalError: no tokenizer is named, a setting is out of range, or the text does not serve.
    """

    # The settings that are positive integers, with their defaults.
    numbers: ClassVar[dict[str, int]] = {"samples": 16}
    # Whether the task scores plain text, to which no chat template belongs.
    plain_text: ClassVar[bool] = True
    more_is_better: ClassVar[bool] = False
    settings: Settings

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"})

    def download(self, *_: Any, **__: Any) -> None:
        """Makes the documents, by ``--metadata`` and ``--model_args``, which lm-eval merges."""
        self.settings = read_settings(self.config.task, self.config.metadata or {}, **self.numbers)
        rows, origin, sha256 = self.make_samples()
        described = {"lengths": list(self.settings.lengths), "text_origin": origin, "text_sha256": sha256}
        shared = {**described, "tokenizer": tokenizer_fingerprint(self.settings.tokenizer)}
        self.dataset = {"test": Dataset.from_list([{**row, **shared} for row in rows])}
        # lm-eval writes the metadata beside the results; defaults and the text's hash belong there too.
        self.config.metadata = {**(self.config.metadata or {}), **described, "samples": len(self.dataset["test"])}

    def make_samples(self) -> Samples:
        """The documents that the settings describe."""
        raise NotImplementedError

    def requests(self, doc: Mapping[str, Any], ctx: Any) -> Iterable[tuple[Any, ...]]:
        """What a document asks the model, request by request, as arguments of lm-eval's request type."""
        raise NotImplementedError

    def construct_requests(self, doc: Mapping[str, Any], ctx: Any, **options: Any) -> list[Instance]:
        """The document's requests in lm-eval's form."""
        return [
            Instance(self.OUTPUT_TYPE, doc, arguments, index, metadata=options["metadata"])
            for index, arguments in enumerate(self.requests(doc, ctx))
        ]

    def higher_is_better(self) -> dict[str, bool]:
        """The same for every metric."""
        return dict.fromkeys(self.aggregation(), self.more_is_better)

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; lm-eval's cache of built requests is told these documents from others'."""
        if self.plain_text and (options.get("apply_chat_template") or options.get("system_instruction")):
            _log.warning(
                "%s scores plain text: no chat template and no system instruction is applied", self.config.task
            )
        content: Sequence[Any] = [*self.dataset["test"], self.config.generation_kwargs]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{digest[:16]}", **options)

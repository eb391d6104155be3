"""The common ground of this package's lm-eval tasks: one document is one sample, scored once per context length.

So ``--limit N`` takes N samples at every length, where lm-eval's own tasks list all samples of the shortest length
first.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask

_log = logging.getLogger(__name__)
# Columns that are the same in every row and belong beside the results.
_SHARED = ("lengths", "text_origin", "text_sha256")


class ByLengthTask(ConfigurableTask):
    """A task whose documents hold the same sample at several context lengths.

    Args:
        config: the YAML's settings, as lm-eval's task manager hands them over.
    """

    # Whether the task scores plain text, to which no chat template belongs.
    plain_text = True

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"})
        # lm-eval writes the metadata beside the results; defaults and the text's hash belong there too.
        row = self.dataset["test"][0]
        resolved = {name: row[name] for name in _SHARED if name in row}
        self.config.metadata = {**(self.config.metadata or {}), **resolved, "samples": len(self.dataset["test"])}

    @property
    def lengths(self) -> list[int]:
        """The context lengths, ascending, in tokens."""
        lengths: list[int] = self.dataset["test"][0]["lengths"]
        return lengths

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; lm-eval's cache of built requests is told these documents from others'."""
        if self.plain_text and (options.get("apply_chat_template") or options.get("system_instruction")):
            _log.warning(
                "%s scores plain text: no chat template and no system instruction is applied", self.config.task
            )
        digest = hashlib.sha256()
        for row in self.dataset["test"]:
            digest.update(json.dumps(row, sort_keys=True).encode())
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{digest.hexdigest()[:16]}", **options)

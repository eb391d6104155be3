"""lm-eval's own long-context suites, whose data come from the hub, with one line that says what is missing.

The groups in ``eval_tasks/yaml/hub`` name ``HubTask`` as the class of lm-eval's tasks. Prompts, scores and settings are
lm-eval's; what is added is where the data are looked for, and the error when they are not there.
"""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import cache_only_where_offline, load_hub
from eval_tasks.lm_eval.options import located


class HubTask(ConfigurableTask):
    """One of lm-eval's tasks with data from the hub, its cache, or copies (``hub_copies`` in ``--metadata``)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = {name: value for name, value in config.items() if name != "class"}
        # Tasks that count tokens load the tokenizer themselves, and know no other names than those of the hub.
        config["metadata"] = located(config.get("metadata", {}))
        super().__init__(config=config)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Loads the data set, or generates it as the task does; ``datasets.load_dataset`` reads copies meanwhile."""
        original, copies = datasets.load_dataset, (self.config.metadata or {}).get("hub_copies")

        def load(path: str, name: str | None = None, **options: Any) -> Any:
            return load_hub(path, name, copies=copies, loader=original, **options)

        datasets.load_dataset = load
        try:
            with cache_only_where_offline():
                super().download(*args, **kwargs)
        except EvalError as error:
            raise EvalError(f"the task {self.config.task} cannot run: {error}") from error
        except (OSError, LookupError) as error:  # files that tasks fetch on their own: JSON of SQuAD, NLTK's sentences
            reason = next((line for line in str(error).split("\n") if line.strip(" *")), type(error).__name__)
            raise EvalError(
                f"the task {self.config.task} cannot run, because what it downloads on its own is missing"
                f" ({type(error).__name__}: {reason.strip()}). Run it once where there is a network."
            ) from error
        finally:
            datasets.load_dataset = original


def misses_a_package(error: ImportError) -> bool:
    """Whether a task of lm-eval asks for a package that is not installed, rather than something being broken here."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parts[-4:-2] == ("lm_eval", "tasks") for frame in frames)

"""lm-eval's tasks as tasks of a sweep: its evaluator runs in this process, a document at a time, on the loaded model.

``lm-eval:NAME`` in ``nc-patch eval --tasks`` is any task or group that lm-eval knows, or that this package adds to it.
At each length of the sweep its prompts are made for that length where it can (``max_seq_lengths`` in
its metadata), and cut to it on the left where it cannot, as lm-eval does at a model's longest context.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from eval_tasks.answers import KEPT_LETTERS
from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.hub import misses_a_package
from eval_tasks.lm_eval.settings import TASKS_DIRECTORY


@dataclass
class LmEvalTasks:
    """Tasks of lm-eval by name, loaded when they are asked for.

    Attributes:
        pretrained: where the tokenizer lies, for tasks that count tokens themselves.
        options: further arguments of ``from_pretrained`` with which it is loaded.
        samples: how many documents are made by tasks that generate them.
        seed: of what they draw.
        text: the prose of this package's own tasks.
        answer_tokens: the most tokens of an answer, in place of each task's own number.
        hub_copies: a directory with copies of the hub's data sets.
    """

    pretrained: str
    options: Mapping[str, Any]
    samples: int
    seed: int
    text: str
    answer_tokens: int | None = None
    hub_copies: str | None = None
    _loaded: dict[tuple[str, int], dict[str, Task]] = field(default_factory=dict, init=False)
    _managers: dict[tuple[int, bool], TaskManager] = field(default_factory=dict, init=False)

    def members(self, name: str, length: int) -> list[str]:
        """The tasks that a name stands for: itself, or those of a group.

        Raises:
            EvalError: there is no such task, or its data or a package are missing.
        """
        return list(self._load(name, length))

    def ask(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str, length: int, document: int
    ) -> dict[str, Any]:
        """Asks a model one document of a task, as lm-eval does by default: without a chat template.

        Args:
            model: a causal language model of ``transformers``, patched or not.
            tokenizer: of the model.
            name: of a task, not of a group.
            length: tokens to which contexts are cut.
            document: its place among the task's documents.

        Returns:
            ``score`` in [0, 1], the task's metric for this length where it has one, else its first; ``metric``, its
            name; ``metrics``, all of them that are numbers; and ``said``.

        Raises:
            EvalError: the task has fewer documents, or its metric is no score in [0, 1] where more is better.
        """
        task = self._load(name, length)[name]
        count = len(list(task.eval_docs))
        if document >= count:
            raise EvalError(f"{name} has {count} documents; ask for fewer --samples, or seeds")
        with _quiet():
            found = evaluate(
                _QuietHFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=1),
                {"tasks": {name: task}, "groups": {}, "group_map": {}},
                samples={name: [document]},
                bootstrap_iters=0,
            )
        assert found is not None
        logged = found["samples"][name][0]
        metrics = {metric: logged[metric] for metric in logged["metrics"]}
        # Tasks with a metric for every length give -1 for those that a document does not have.
        metrics = {name: value for name, value in metrics.items() if not (name.isdecimal() and value == -1)}
        numbers = {metric: float(value) for metric, value in metrics.items() if isinstance(value, (bool, int, float))}
        chosen = str(length) if str(length) in numbers else next(iter(metrics), None)
        better = task.higher_is_better().get(chosen, True)
        if chosen not in numbers or not 0 <= numbers[chosen] <= 1 or not better:
            raise EvalError(
                f"{name} scores by {chosen}, which gave {metrics.get(chosen)!r}; a sweep takes tasks with a score in "
                "[0, 1] of which more is better. Run it with python -m eval_tasks.lm_eval"
            )
        said = str(logged["filtered_resps"][0])[:KEPT_LETTERS]
        return {"score": numbers[chosen], "metric": chosen, "metrics": numbers, "said": said}

    def _load(self, name: str, length: int) -> dict[str, Task]:
        if (name, length) not in self._loaded:
            tasks = self._load_now(name, length)
            self._loaded[name, length] = tasks
            self._loaded.update({(member, length): {member: task} for member, task in tasks.items()})
        return self._loaded[name, length]

    def _load_now(self, name: str, length: int) -> dict[str, Task]:
        # Indexing lm-eval's thousands of tasks takes seconds, which this package's own do without.
        manager = next((m for m in self._indexes(length) if name in m.all_tasks), None)
        if manager is None:
            known = self._managers[length, True].all_tasks
            near = [other for other in known if name in other][:8]
            raise EvalError(
                f"lm-eval knows no task or group {name!r}" + (f"; near it are {', '.join(near)}" if near else "")
            )
        try:
            with _quiet():
                tasks: dict[str, Task] = manager.load(name)["tasks"]
        except EvalError:
            raise
        except ImportError as error:
            if not misses_a_package(error):
                raise
            raise EvalError(f"the task {name} of lm-eval needs a package that is missing: {error}") from error
        except (OSError, ValueError, LookupError) as error:
            reason = str(error).strip().split("\n")[0]
            raise EvalError(f"the task {name} of lm-eval cannot be loaded: {reason}") from error
        if self.answer_tokens is not None:
            for task in tasks.values():
                if task.get_config("output_type") == "generate_until":
                    task.set_config("generation_kwargs", {"max_gen_toks": self.answer_tokens}, update=True)
        return tasks

    def _indexes(self, length: int) -> Iterator[TaskManager]:
        for include_defaults in (False, True):
            if (length, include_defaults) not in self._managers:
                metadata: dict[str, Any] = {
                    **self.options,
                    "pretrained": self.pretrained,
                    "max_seq_lengths": [length],
                    "samples": self.samples,
                    "seed": self.seed,
                    "text": self.text,
                    **({} if self.hub_copies is None else {"hub_copies": self.hub_copies}),
                }
                with _quiet():
                    self._managers[length, include_defaults] = TaskManager(
                        include_path=[str(TASKS_DIRECTORY)], include_defaults=include_defaults, metadata=metadata
                    )
            yield self._managers[length, include_defaults]


class _QuietHFLM(HFLM):
    """lm-eval's model without its progress bars: a sweep shows its own."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within, lm-eval says only what is wrong."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar over one document
            yield
    finally:
        logger.setLevel(level)

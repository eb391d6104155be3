"""One cell of a sweep: what is planned, and the row that measuring it gives."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from eval_tasks.answers import Question, answer, build_question
from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.measure import DENSE_COUNTS, Attention, Peak, attending, measure, memory_watched
from eval_tasks.methods import budget_at, find_method
from eval_tasks.presses import Press
from eval_tasks.progress import Step
from eval_tasks.tasks import LM_EVAL, TASKS

if TYPE_CHECKING:
    from eval_tasks.ingredients import Ingredients
    from eval_tasks.sweep import Sweep


@dataclass(frozen=True)
class Planned:
    """One measurement to make."""

    length: int
    sample: int  # over all seeds
    seed: int
    index: int  # among the samples of its seed
    task: str
    method: str
    key: str

    @property
    def step(self) -> Step:
        """What the forecast needs to know."""
        return Step(self.method, self.length)


@dataclass(frozen=True)
class Measurer:
    """Makes the rows of planned measurements with one model, which each of them patches and unpatches."""

    sweep: "Sweep"
    model: Any
    ingredients: "Ingredients"

    def row(self, planned: Planned) -> dict[str, Any]:
        """The row of one measurement; where memory runs out, one that says so."""
        sweep, what = self.sweep, f"{planned.task} with {planned.method} at {planned.length:,} tokens"
        try:
            measured = self._measured(planned)
        except MemoryRanOut as error:
            if sweep.tp_plan is not None:  # the other processes still wait for this one's part of a layer
                raise EvalError(f"{what}: {error}") from error
            print(f"{what}: {error}. It is recorded, and the run goes on.", file=sys.stderr)
            measured = {"failed": "out of memory", "error": str(error)}
        except EvalError as error:
            raise EvalError(f"{what}: {error}") from error
        return {
            "key": planned.key,
            "model": sweep.model,
            "method": planned.method,
            "task": planned.task,
            "length": planned.length,
            "sample": planned.sample,
            "seed": planned.seed,
            "index": planned.index,
            **self._place(planned),
            "phase": sweep.phase,
            "budget": budget_at(planned.method, sweep.budgets, planned.length),
            **measured,
        }

    def _place(self, planned: Planned) -> dict[str, Any]:
        """Where in the text a sample lies; two seeds that choose the same stretch have one document between them."""
        if planned.task not in TASKS:
            return {"place": None}
        start = self.ingredients.starts[planned.seed][planned.index]
        return {"place": start, "document": str(start)}

    def _measured(self, planned: Planned) -> dict[str, Any]:
        sweep, attention = self.sweep, self._attention(planned)
        if planned.task in TASKS:
            start = self.ingredients.starts[planned.seed][planned.index]
            sample = TASKS[planned.task].build(self.ingredients.tokens, start, planned.length, sweep.layout)
            return measure(self.model, attention, sample, sweep.phase).to_dict()
        if planned.task.startswith(LM_EVAL):
            return self._foreign(planned, attention)
        question = self._question(planned.task, planned.length, planned.seed, planned.index)
        return answer(self.model, self.ingredients.tokenizer, attention, question, sweep.phase)

    def _foreign(self, planned: Planned, attention: Attention) -> dict[str, Any]:
        """A document of one of lm-eval's tasks; its samples go on over the seeds."""
        foreign, tokenizer = self.ingredients.foreign, self.ingredients.tokenizer
        assert foreign is not None
        name, length = planned.task.removeprefix(LM_EVAL), planned.length
        with (
            memory_watched(length),
            torch.inference_mode(),
            Peak(self.model) as peak,
            attending(self.model, attention, 1) as count,
        ):
            said = foreign.ask(self.model, tokenizer, name, length, planned.sample)
            what = count()
        return {**said, **(what or DENSE_COUNTS), **peak.of(attention)}

    @cached_property
    def _question(self) -> Callable[[str, int, int, int], Question]:
        """Builds a question; the last one is kept, since all methods are asked the same."""

        @lru_cache(maxsize=1)
        def build(task: str, length: int, seed: int, index: int) -> Question:
            new_tokens, parts = self.sweep.answer_tokens, self.ingredients
            return build_question(task, parts.tokenizer, length, seed, index, parts.material, new_tokens)

        return build

    def _attention(self, planned: Planned) -> Attention:
        method = find_method(planned.method)
        if method.press is None:
            return method.config(self.sweep.budgets.at(planned.length))
        return Press(method.press, budget_at(planned.method, self.sweep.budgets, planned.length))

"""What a sweep measures, cell by cell, in an order in which a part is already of use."""

import itertools
from typing import TYPE_CHECKING, Any

from eval_tasks.cells import Planned
from eval_tasks.methods import DENSE, budget_at, find_method
from eval_tasks.store import measurement_key
from eval_tasks.sweep import Sweep
from eval_tasks.tasks import LM_EVAL, TASKS

if TYPE_CHECKING:
    from eval_tasks.lm_eval.in_sweep import LmEvalTasks


def plan_of(sweep: Sweep, foreign: "LmEvalTasks | None", constants: dict[str, Any]) -> list[Planned]:
    """The cells of a sweep: short lengths first, at each length task by task, and each sample with all methods.

    Args:
        sweep: what to measure.
        foreign: what runs the tasks of lm-eval, where there are any.
        constants: what all cells share and a result depends on, for their keys.
    """
    plan = []
    layout = sweep.layout
    tasks = _single_tasks(sweep, foreign)
    drawn = [(seed, index) for seed in sweep.seeds for index in range(layout.samples)]
    for length, task, (sample, (seed, index)) in itertools.product(layout.lengths, tasks, enumerate(drawn)):
        for method in sweep.methods_at(length):
            if task in TASKS and TASKS[task].dense_only and method != DENSE:
                continue
            config = find_method(method).config(sweep.budgets.at(length))
            key = measurement_key(
                constants
                | {"method": method, "config": config and config.to_dict(), "task": task, "length": length}
                | {"sample": index, "samples_of": max(layout.lengths), "seed": seed, "phase": sweep.phase}
                | {"scored": layout.scored, "passage": layout.passage, "device": sweep.device}
                | ({} if task in TASKS else {"answer_tokens": sweep.answer_tokens})
                | ({"budget": budget_at(method, sweep.budgets, length)} if find_method(method).press else {})
            )
            plan.append(Planned(length, sample, seed, index, task, method, key))
    return plan


def groups_of(todo: list[Planned]) -> list[list[Planned]]:
    """Measurements that only make sense together: all methods on one sample of one task and length."""
    return [list(group) for _, group in itertools.groupby(todo, lambda p: (p.length, p.sample, p.task))]


def _single_tasks(sweep: Sweep, foreign: "LmEvalTasks | None") -> list[str]:
    """The tasks, with the members of lm-eval's groups in place of the groups."""
    found = []
    for name in sweep.tasks:
        if foreign is None or not name.startswith(LM_EVAL):
            found.append(name)
        else:
            members = foreign.members(name.removeprefix(LM_EVAL), min(sweep.layout.lengths))
            found.extend(LM_EVAL + member for member in members)
    return list(dict.fromkeys(found))

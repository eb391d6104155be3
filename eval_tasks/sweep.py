"""The settings of a sweep, and what follows from them: every cell to measure, in an order in which a part is of use."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval_tasks.matching import Budgets, load_profile
from eval_tasks.measure import Phase
from eval_tasks.methods import DENSE, budget_at, find_method, with_keys
from eval_tasks.store import measurement_key
from eval_tasks.tasks import TASKS, Layout


@dataclass(frozen=True)
class Sweep:
    """What to measure: ``model``, ``text``, ``methods`` and ``tasks`` by name, and lengths and samples in a ``layout``.

    How the model runs is said as ``load_model`` takes it; ``threads`` are PyTorch's on the CPU. ``phase`` is as
    ``measure`` takes it, ``iso_keys`` are the budgets that ``match="iso"`` tries, ``answer_tokens`` the most tokens of
    an answer (None: each task's own number). Each of the ``seeds`` draws as many samples; the first is the layout's.
    """

    model: str
    text: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budgets: Budgets
    layout: Layout
    seeds: tuple[int, ...]
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    device_map: str | None = None
    phase: Phase = "all"
    iso_keys: tuple[int, ...] = ()
    answer_tokens: int | None = None
    retry_failed: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def methods_at(self, length: int) -> tuple[str, ...]:
        """The names of what is measured at a length: the methods, or for ``iso`` each with every budget."""
        if self.budgets.match != "iso":
            return self.methods
        sparse = [name for name in self.methods if name != DENSE]
        return (DENSE, *(with_keys(name, keys) for name in sparse for keys in self.iso_keys if keys < length))

    def identity(self) -> dict[str, Any]:
        """What must be the same in every session that adds to one directory."""
        own = ("model", "text", "dtype", "device", "threads", "device_map", "phase", "answer_tokens")
        found = {name: getattr(self, name) for name in own}
        found |= {name: list(getattr(self, name)) for name in ("methods", "tasks", "iso_keys")}
        found |= {"lengths": list(self.layout.lengths), "seed": list(self.seeds) if self.seeds[1:] else self.seeds[0]}
        found |= {name: getattr(self.layout, name) for name in ("samples", "scored", "passage")}
        found |= {name: getattr(self.budgets, name) for name in ("alpha", "C", "equal_at", "backend", "match")}
        if self.budgets.profile is not None:  # what it holds, wherever its file lies
            found["profile"] = measurement_key(load_profile(self.budgets.profile).to_dict())
        return found if self.revision is None else found | {"revision": self.revision}


@dataclass(frozen=True)
class Cells:
    """What all methods are measured on together: one sample of one task and length.

    It is number ``index`` of its ``seed``, and number ``sample`` over all; ``keys`` are those of rows, by method.
    """

    length: int
    task: str
    seed: int
    index: int
    sample: int
    keys: Mapping[str, str]

    @property
    def cost(self) -> float:
        """Relative cost of a forward pass, of linear layers and attention: what a forecast of its time goes by."""
        return self.length * (1 + self.length / 2048)

    def without(self, done: set[str]) -> "Cells":
        """What is left when rows of these keys are there."""
        return replace(self, keys={method: key for method, key in self.keys.items() if key not in done})


def plan_of(sweep: Sweep, constants: Mapping[str, Any]) -> list[Cells]:
    """The cells of a sweep, short lengths first, at each length task by task.

    ``constants`` are what all cells share and a result depends on, for their keys.
    """
    drawn = [(seed, index) for seed in sweep.seeds for index in range(sweep.layout.samples)]
    plan = []
    for length, task in itertools.product(sweep.layout.lengths, sweep.tasks):
        methods = sweep.methods_at(length) if task not in TASKS or not TASKS[task].dense_only else (DENSE,)
        for sample, (seed, index) in enumerate(drawn):
            shared = {**constants, "task": task, "length": length, "sample": index, "seed": seed}
            keys = {name: measurement_key(shared | _cell(sweep, name, task, length)) for name in methods}
            plan.append(Cells(length, task, seed, index, sample, keys))
    return plan


def total(plan: Sequence[Cells]) -> int:
    """How many rows they give."""
    return sum(len(cells.keys) for cells in plan)


def _cell(sweep: Sweep, name: str, task: str, length: int) -> dict[str, Any]:
    """What a row depends on beside the sample."""
    method, layout = find_method(name), sweep.layout
    config = method.config(sweep.budgets.at(length))
    return {
        "method": name,
        "config": config and config.to_dict(),
        "samples_of": max(layout.lengths),
        "phase": sweep.phase,
        "scored": layout.scored,
        "passage": layout.passage,
        "device": sweep.device,
        **({} if task in TASKS else {"answer_tokens": sweep.answer_tokens}),
        **({"budget": budget_at(name, sweep.budgets, length)} if method.press else {}),
    }

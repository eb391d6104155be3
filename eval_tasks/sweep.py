"""The settings of a sweep, and what follows from them: every cell to measure, in an order in which a part is of use."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

from eval_tasks.matching import Budgets, load_profile
from eval_tasks.measure import Phase
from eval_tasks.methods import DENSE, with_keys
from eval_tasks.store import Cell
from eval_tasks.tasks import TASKS, Layout


@dataclass(frozen=True)
class Sweep:
    """What to measure: ``model``, ``text``, ``methods`` and ``tasks`` by name, and lengths and samples in a ``layout``.

    How the model runs is said as ``load_model`` takes it; ``threads`` are PyTorch's on the CPU. ``phase`` is as
    ``measure`` takes it, ``iso_keys`` are the budgets that ``match="iso"`` tries, ``answer_tokens`` the most tokens of
    an answer (None: each task's own number).
    """

    model: str
    text: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    budgets: Budgets
    layout: Layout
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
        found = asdict(self)
        found |= found.pop("budgets") | found.pop("layout")
        if self.budgets.profile is not None:  # what it holds, wherever its file lies
            content = json.dumps(load_profile(self.budgets.profile).to_dict(), sort_keys=True)
            found["profile"] = hashlib.sha256(content.encode()).hexdigest()[:20]
        return {name: value for name, value in found.items() if name not in ("retry_failed", "trust_remote_code")}

    def plan(self) -> list[Cell]:
        """Every cell, short lengths first, at each length task by task, with all methods of a sample together."""
        plan: list[Cell] = []
        for length, task in itertools.product(self.layout.lengths, self.tasks):
            methods = (DENSE,) if task in TASKS and TASKS[task].dense_only else self.methods_at(length)
            places = itertools.product(range(self.layout.samples), methods)
            plan += [Cell(task, length, sample, method) for sample, method in places]
        return plan

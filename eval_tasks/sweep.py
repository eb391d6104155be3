"""The settings of a sweep: which tasks and methods, at which lengths, on which model and text."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from eval_tasks.matching import Budgets, load_profile
from eval_tasks.measure import Phase
from eval_tasks.methods import DENSE, with_keys
from eval_tasks.tasks import Layout


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        model: a name as ``find_model`` takes it.
        text: a name as ``load_text`` takes it.
        methods, tasks: names of ``METHODS`` and ``TASKS``.
        budgets: of the methods.
        layout: lengths, samples and seed.
        dtype, device: as ``load_model`` takes them.
        threads: of PyTorch on the CPU; None leaves its choice.
        minutes: after the first, no sample is begun that is not expected to end within so many minutes; None for no
            limit.
        device_map, tp_plan: how one model is spread over devices or processes; as ``load_model`` takes them.
        phase: which part of a forward pass is sparse; as ``measure`` takes it.
        iso_keys: budgets that ``match="iso"`` tries.
        answer_tokens: the most tokens of an answer to a generated task; None for each task's own number.
        retry_failed: whether cells that failed in an earlier session are measured again.
        more_seeds: seeds beside that of the layout; every one of them has as many samples.
        revision, trust_remote_code: of the model; as ``load_model`` takes them.
        hub_copies: a directory with copies of the hub's data sets, as ``Material`` takes it.
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
    minutes: float | None = None
    device_map: str | None = None
    tp_plan: str | None = None
    phase: Phase = "all"
    iso_keys: tuple[int, ...] = ()
    answer_tokens: int | None = None
    retry_failed: bool = False
    more_seeds: tuple[int, ...] = ()
    revision: str | None = None
    trust_remote_code: bool = False
    hub_copies: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds; each draws its own samples."""
        return (self.layout.seed, *self.more_seeds)

    def methods_at(self, length: int) -> tuple[str, ...]:
        """The names of what is measured at a length: the methods, or for ``iso`` each with every budget."""
        if self.budgets.match != "iso":
            return self.methods
        sparse = [name for name in self.methods if name != DENSE]
        return (DENSE, *(with_keys(name, keys) for name in sparse for keys in self.iso_keys if keys < length))

    def identity(self) -> dict[str, Any]:
        """What must be the same in every session that adds to one directory."""
        return {
            "model": self.model,
            "text": self.text,
            "methods": list(self.methods),
            "tasks": list(self.tasks),
            "lengths": list(self.layout.lengths),
            "samples": self.layout.samples,
            "seed": list(self.seeds) if self.more_seeds else self.layout.seed,
            "scored": self.layout.scored,
            "passage": self.layout.passage,
            "alpha": self.budgets.alpha,
            "C": self.budgets.C,
            "equal_at": self.budgets.equal_at,
            "block_size": self.budgets.block_size,
            "backend": self.budgets.backend,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "device_map": self.device_map,
            "tp_plan": self.tp_plan,
            "match": self.budgets.match,
            "phase": self.phase,
            "iso_keys": list(self.iso_keys),
            "answer_tokens": self.answer_tokens,
            **({} if self.budgets.profile is None else {"profile": _profile_digest(self.budgets.profile)}),
            **({} if self.revision is None else {"revision": self.revision}),
        }


def _profile_digest(path: str) -> str:
    """What a profile holds, in short, wherever its file lies."""
    return hashlib.sha256(json.dumps(load_profile(path).to_dict(), sort_keys=True).encode()).hexdigest()[:20]

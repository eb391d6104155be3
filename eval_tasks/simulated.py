"""Attention that is simulated, by a mask over dense attention: a floor and a ceiling to compare with, never timed.

``random``: the law's budget filled without looking at the scores. ``top-p``: of every query and head the fewest keys
that hold a share of its softmax, which no budget can know beforehand. Every score is computed, so their time would mean
nothing.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from eval_tasks.errors import EvalError
from nc_patch.attention import PATCH_ATTRIBUTE
from nc_patch.config import NCConfig
from nc_patch.functional import check_scale
from nc_patch.masks import interval_mask
from nc_patch.selections import TopK
from nc_patch.stats import LayerCounters, tally, total
from nc_patch.visibility import visibility_of

IMPLEMENTATION = "nc_simulated"
# Scores held at a time, in elements.
_CHUNK = 1 << 25


@dataclass(frozen=True)
class Simulated:
    """Which keys a simulated method attends.

    ``config`` is the law of the budget of random keys, and in ``TopK`` the first and last keys that are in it always;
    ``mass`` the share of the softmax that top-p holds, in (0, 1).
    """

    choice: Literal["random", "top-p"]
    config: NCConfig | None = None
    mass: float | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What distinguishes its measurements, as JSON holds it."""
        config = self.config and self.config.to_dict()
        return {"simulated": self.choice, "config": config, "mass": self.mass, "seed": self.seed}


@dataclass
class _Active:
    simulated: Simulated
    tail: int | None
    generator: torch.Generator
    counters: list[LayerCounters] = field(default_factory=list)


_ACTIVE: ContextVar[_Active | None] = ContextVar("nc_simulated", default=None)


@contextlib.contextmanager
def simulating(model: Any, simulated: Simulated, tail: int | None) -> Iterator[list[LayerCounters]]:
    """Lets a model attend as ``simulated`` says within the block; yields the counters of its calls.

    So many (``tail``) of the last queries of each call are counted apart. Raises EvalError for a patched model.
    """
    if any(PATCH_ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise EvalError("a patched model cannot simulate other attention; unpatch it first")
    before = model.config._attn_implementation
    active = _Active(simulated, tail, torch.Generator(model.device).manual_seed(simulated.seed))
    token = _ACTIVE.set(active)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield active.counters
    finally:
        model.set_attn_implementation(before)
        _ACTIVE.reset(token)


def counted(counters: list[LayerCounters]) -> dict[str, Any]:
    """What was attended, with the names that ``nc_stats`` gives it; without the kept mass, which is not measured."""
    return {name: value for name, value in total(counters).items() if name != "kept_mass"}


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    active = _ACTIVE.get()
    if active is None:
        raise EvalError(f'the attention "{IMPLEMENTATION}" runs within simulating(...) alone')
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    visibility = visibility_of(attention_mask, B, Lq, Lk, type(module).__name__)
    visible, key, value = visibility.visible, visibility.take(key), visibility.take(value)
    scale, config = check_scale(scaling, softcap, D), active.simulated.config
    layer = int(getattr(module, "layer_idx", 0) or 0)
    budget = None if config is None else config.row_budgets(visible, Lk, layer).expand(B, Hq, Lq)
    keys, values = (tensor.float().repeat_interleave(Hq // Hkv, 1) for tensor in (key, value))
    position = torch.arange(Lk, device=query.device)
    outputs, attended = [], []
    for part in torch.arange(Lq).split(max(1, _CHUNK // (B * Hq * Lk))):
        scores = query[:, :, part].float() @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = (position >= visible[:, part, None, 0]) & (position < visible[:, part, None, 1])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        chosen = _chosen(active, scores, visible[:, part], None if budget is None else budget[:, :, part])
        attended.append(chosen.sum(-1, dtype=torch.int32))
        scores = scores.masked_fill(~chosen, -torch.inf)
        if s_aux is not None:
            scores = torch.cat((scores, s_aux.float().view(1, -1, 1, 1).expand(B, -1, len(part), 1)), -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :Lk]
        outputs.append((weights @ values).to(query.dtype))
    counters = LayerCounters()
    counters.add(tally(torch.cat(attended, -1), visible, active.tail), None)
    active.counters.append(counters)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _chosen(active: _Active, scores: torch.Tensor, visible: torch.Tensor, budget: torch.Tensor | None) -> torch.Tensor:
    """Bool ``[B, Hq, R, Lk]``: the keys that are attended, among those whose score is not -inf."""
    seen = scores > -torch.inf
    if budget is None:
        weights, order = torch.softmax(scores, -1).nan_to_num(0.0).sort(-1, descending=True)
        # A key is in while those before it hold less than the mass.
        needed = weights.cumsum(-1) - weights < (active.simulated.mass or 0.0)
        return torch.zeros_like(seen).scatter_(-1, order, needed) & seen
    always = active.simulated.config and active.simulated.config.prefill
    assert isinstance(always, TopK)
    drawn = torch.rand(scores.shape, generator=active.generator, device=scores.device)
    position = torch.arange(scores.shape[-1], device=scores.device)
    start, end = visible[:, None, :, 0, None], visible[:, None, :, 1, None]
    drawn = drawn + (position < start + always.sink_keys) + 2 * (position >= end - always.recent_keys)
    rank = drawn.masked_fill(~seen, -1.0).argsort(-1, descending=True).argsort(-1)
    return (rank < budget[..., None]) & seen


AttentionInterface.register(IMPLEMENTATION, _forward)
AttentionMaskInterface.register(IMPLEMENTATION, interval_mask)

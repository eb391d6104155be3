"""What the attention of some layers receives in one dense forward pass."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from eval_tasks.errors import EvalError
from nc_patch import AttentionResult
from nc_patch.functional import attend
from nc_patch.layers import Observed
from nc_patch.ops.backends import Backend
from nc_patch.ops.problem import Problem
from nc_patch.patch import observed
from nc_patch.selections import Selection


def receive(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Problem]:
    """What ``layers`` compute when the model reads ``ids``, one sequence ``[1, L]`` without padding, densely.

    Raises EvalError where the model has no attention in such a layer, and what ``observed`` raises.
    """
    found: dict[int, Problem] = {}

    def take(call: Observed) -> None:
        if call.layer in layers:
            p = call.problem
            sinks = None if p.sinks is None else p.sinks.detach()  # a parameter of the model
            query, key, value = p.query.clone(), p.key.clone(), p.value.clone()
            found[call.layer] = Problem(query, key, value, p.visible, p.origin, p.budget, p.scale, p.softcap, sinks)

    with torch.inference_mode(), observed(model, take):
        model(ids, use_cache=False, logits_to_keep=1)
    if missing := [layer for layer in layers if layer not in found]:
        raise EvalError(f"the attention of layers {missing} was not called; the model has {sorted(found)} of those")
    return [found[layer] for layer in layers]


def attend_rows(
    received: Problem, rows: torch.Tensor, length: int, budget: torch.Tensor, selection: Selection, backend: Backend
) -> AttentionResult:
    """What some of the queries, int64 ``[R]``, attend of the first ``length`` keys, with what it kept."""
    query, visible = received.query[:, :, rows], received.visible[:, rows].contiguous()
    key, value, origin = received.key[:, :, :length], received.value[:, :, :length], torch.zeros_like(visible[..., 0])
    problem = received._replace(query=query, key=key, value=value, visible=visible, origin=origin)
    return attend(problem._replace(budget=budget, stats=True), selection, backend)

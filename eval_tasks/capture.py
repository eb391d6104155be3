"""What the attention of some layers receives in one dense forward pass."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.texts import Text
from nc_patch.layers import Observed
from nc_patch.ops.problem import Problem
from nc_patch.patch import observed


def receive(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Problem]:
    """What ``layers`` compute when the model reads ``ids``, one sequence ``[1, L]`` without padding, densely.

    Raises ValueError where the model has no attention in such a layer, and what ``observed`` raises.
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
        raise ValueError(f"the attention of layers {missing} was not called; the model has {sorted(found)} of those")
    return [found[layer] for layer in layers]


def capture(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Problem]:
    """``receive`` for layers of plain causal attention, which query, key, value and scale say everything about.

    Raises EvalError for a layer that slides, goes by chunks, has a soft-cap or sinks.
    """
    received = receive(model, ids, layers)
    for layer, p in zip(layers, received, strict=True):
        extras = {"a window": p.visible[..., 0].any(), "a soft-cap": p.softcap, "sinks": p.sinks is not None}
        if found := [name for name, there in extras.items() if there]:
            said = f"layer {layer} has {' and '.join(found)}, and this measurement is of plain causal attention"
            raise EvalError(f"{said}: choose other layers, or another model")
    return received


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text, length: int) -> torch.Tensor:
    """The first ``length`` tokens of a text, ``[1, length]``; raises EvalError where it is shorter."""
    # Tokenising a text of millions of characters to its end would take longer than the forward pass.
    ids = tokenizer(text.content[: length * 12])["input_ids"][:length]
    if len(ids) < length:
        raise EvalError(f"the text {text.name} has {len(ids)} tokens, {length} are needed: ask for a smaller length")
    return torch.tensor([ids])

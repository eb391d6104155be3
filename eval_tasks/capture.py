"""What the attention of some layers receives in one dense forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.texts import Text
from nc_patch.attention import Observed
from nc_patch.ops.problem import Problem
from nc_patch.patch import observed


class Captured(NamedTuple):
    """A layer's query ``[1, Hq, L, D]``, key ``[1, Hkv, L, D]``, value ``[1, Hkv, L, Dv]``; the scores' factor."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


def receive(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Problem]:
    """What ``layers`` compute when the model reads ``ids``, one sequence ``[1, L]`` without padding, densely.

    Raises:
        UnsupportedModelError: the model's attention is not called by ``AttentionInterface``, or cannot be patched.
        ValueError: the model has no attention in such a layer.
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
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"the attention of layers {missing} was not called; the model has {sorted(found)} of those")
    return [found[layer] for layer in layers]


def capture(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Captured]:
    """``receive`` for layers of plain causal attention, which query, key, value and scale say everything about.

    Raises:
        EvalError: a layer slides, goes by chunks, has a soft-cap or sinks.
        ValueError: as in ``receive``.
    """
    plain = []
    for layer, p in zip(layers, receive(model, ids, layers), strict=True):
        extras = {"a window": p.visible[..., 0].any(), "a soft-cap": p.softcap, "sinks": p.sinks is not None}
        found = [name for name, there in extras.items() if there]
        if found:
            raise EvalError(
                f"layer {layer} has {' and '.join(found)}, and this measurement is of plain causal attention: choose "
                "other layers, or another model"
            )
        plain.append(Captured(p.query, p.key, p.value, p.scale))
    return plain


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text, length: int) -> torch.Tensor:
    """The first ``length`` tokens of a text, ``[1, length]``.

    Raises:
        EvalError: the text is shorter.
    """
    # Tokenising a text of millions of characters to its end would take longer than the forward pass.
    ids = tokenizer(text.content[: length * 12])["input_ids"][:length]
    if len(ids) < length:
        raise EvalError(f"the text {text.name} has {len(ids)} tokens, {length} are needed: ask for a smaller length")
    return torch.tensor([ids])

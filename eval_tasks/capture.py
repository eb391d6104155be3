"""What the attention of some layers receives in one dense forward pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eval_tasks.errors import EvalError
from eval_tasks.texts import Text

_NAME = "nc_capture"


class Captured(NamedTuple):
    """A layer's query ``[1, Hq, L, D]``, key ``[1, Hkv, L, D]``, value ``[1, Hkv, L, Dv]``; the scores' factor."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


def capture(model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int]) -> list[Captured]:
    """What ``layers`` receive when the model reads ``ids``, one sequence ``[1, L]`` without padding, densely.

    Raises:
        ValueError: the model has no such layer, or its attention is not called by ``AttentionInterface``.
    """
    found: dict[int, Captured] = {}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module.layer_idx in layers:
            found[module.layer_idx] = Captured(query.clone(), key.clone(), value.clone(), kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, record)
    model.set_attn_implementation(_NAME)
    try:
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise ValueError(f"the attention of layers {missing} was not called; the model has {sorted(found)} of those")
    return [found[layer] for layer in layers]


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

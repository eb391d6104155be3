"""The layers of a decoding step repeat what its first layer has worked out, where that holds for them too."""

from collections import Counter

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from nc_patch import attention, nc_stats, patch_model, steps

LAYERS, PROMPT, STEPS = 4, 40, 6
BY_HEAD = {"alpha": [[1.0, 2.0, 1.5, 3.0], [2.0, 1.0, 2.5, 1.5], 2.0, 1.0], "C": [0.5, 0.5, 0.6, 1.0]}


def decode(model, monkeypatch, repeats, static, count):
    """Logits of the steps, and how often each layer was worked out and not repeated, the prompt's aside."""
    worked_out = Counter()
    first = attention._attention

    def counted(module, *arguments):
        worked_out[module.layer_idx] += 1
        return first(module, *arguments)

    monkeypatch.setattr(attention, "_attention", counted)
    if not repeats:
        monkeypatch.setattr(steps, "repeat", lambda *arguments: None)
    torch.manual_seed(0)
    ids = random_ids(2, PROMPT + STEPS * count)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        worked_out.clear()
        pieces = ids[:, PROMPT:].split(count, 1)
        logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    monkeypatch.undo()
    return torch.cat(logits, 1), [worked_out[layer] // STEPS for layer in range(LAYERS)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("settings", "scaling", "expected"),
    [
        ({}, 1.0, [1, 0, 0, 0]),
        ({"tail": "drop"}, 1.0, [1, 0, 0, 0]),
        ({"key_index": "never"}, 1.0, [1, 0, 0, 0]),
        ({"decode": "block", "prefill": "topk"}, 1.0, [1, 0, 0, 0]),
        ({"selection": "window"}, 1.0, [1, 0, 0, 0]),
        ({"backend": "torch", "key_index": "always"}, 1.0, [1, 0, 0, 0]),
        ({"dense_layers": (0, 2)}, 1.0, [1, 1, 0, 0]),
        ({"dense_below": 60}, 1.0, [1, 0, 0, 0]),
        ({"decode": "dense"}, 1.0, [1, 0, 0, 0]),
        (BY_HEAD, 1.0, [1, 0, 1, 1]),
        ({"track": True}, 1.0, [1, 1, 1, 1]),
        ({}, 0.5, [1, 0, 1, 1]),  # and leaves a step that does not fit the next layer
    ],
    ids=str,
)
def test_layers_that_repeat_a_step_change_no_number(monkeypatch, settings, scaling, expected, static, count):
    settings = {"alpha": 2.0, "C": 0.5, "dense_below": 0, **settings}
    models = [patch_model(tiny_model("llama", num_hidden_layers=LAYERS), **settings) for _ in range(2)]
    for model in models:
        model.model.layers[2].self_attn.scaling *= scaling
    found, layers = decode(models[0], monkeypatch, True, static, count)
    every, _ = decode(models[1], monkeypatch, False, static, count)
    assert torch.equal(found, every)
    assert nc_stats(models[0])["layers"] == nc_stats(models[1])["layers"]
    assert layers == expected

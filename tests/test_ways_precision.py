"""``torch.autocast``, and a default dtype that is not float32: the numbers of dense attention, and full precision."""

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache
from ways import CHOICES, EACH_FAMILY, TOPK, UNASKED, full, small

from nc_patch import KeyIndex, forget_index, nc_stats, sparse_attention

SELECTIONS = {
    "topk": TOPK,
    "topk by codes": TOPK | {"key_index": "always", "track": True},
    "window": {"selection": "window"},
    "block": {"selection": "block", "block_size": 16, "track": True},
    "unasked": UNASKED | {"track": True},
}


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


def gradient(model, ids, *, backward_inside=False):
    """The gradient of one weight of the first layer after a step under autocast."""
    model.zero_grad()
    with autocast():
        loss = model(ids, labels=ids, use_cache=False).loss
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return next(p.grad.clone() for name, p in model.named_parameters() if name.endswith("q_proj.weight"))


def relative_error(found, expected):
    return float((found - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [each for each in EACH_FAMILY if each.id != "gpt_oss"])
def test_a_full_budget_under_autocast_is_dense_attention_under_autocast(family, dtype):
    ids = random_ids(2, 40)
    with torch.inference_mode(), autocast(dtype):
        dense = tiny_model(family)(ids).logits
        found = full(family)(ids).logits
    assert found.dtype == dense.dtype
    assert relative_error(found, dense) < 0.02


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_a_small_budget_under_autocast_generates_and_trains_alike_in_every_way(options):
    ids, model, how = random_ids(2, 70), small(**options), {"max_new_tokens": 6, "do_sample": False}
    with autocast():
        text = model.generate(ids, **how)
        assert torch.equal(model.generate(ids, use_cache="block" in str(options), **how), text)
    expected = gradient(model, ids)
    assert relative_error(gradient(full(**options), ids), gradient(tiny_model("llama"), ids)) < 0.02
    assert torch.equal(gradient(model, ids, backward_inside=True), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradient(model.train(), ids), expected)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_a_cache_filled_under_autocast_goes_on_outside_it_with_an_index_of_its_keys(options):
    model, ids, cache = small(**options), random_ids(1, 73), DynamicCache()
    with torch.no_grad():
        with autocast(torch.float16):
            model(ids[:, :70], past_key_values=cache)
        fresh = copy.deepcopy(cache)
        forget_index(fresh)
        found = [model(step, past_key_values=cache).logits for step in ids[:, 70:].split([2, 1], 1)]
        expected = [model(step, past_key_values=fresh).logits for step in ids[:, 70:].split([2, 1], 1)]
    assert all(map(torch.equal, found, expected))
    assert {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)} == {torch.float32}


def test_the_function_under_autocast_is_that_of_the_lower_dtype():
    query, key, value = (torch.randn(1, heads, 50, 16) for heads in (4, 2, 2))
    lower = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = sparse_attention(*lower, alpha=2.0, C=0.5)
    index = KeyIndex.build(lower[1], "codes")
    with autocast():
        assert torch.equal(sparse_attention(query, key, lower[2], alpha=2.0, C=0.5), expected)
        for tensor, same in zip(KeyIndex.build(lower[1], "codes").tensors(), index.tensors(), strict=True):
            assert torch.equal(tensor, same)
        with pytest.raises(ValueError, match=r"of other keys than bfloat16 .* of torch.float32"):
            sparse_attention(query[:, :, -1:], key, value, alpha=2.0, index=KeyIndex.build(key, "codes"))


def numbers(model, ids):
    """Logits of a prompt and of steps, the gradient of a weight, and the mean kept mass of both phases."""
    cache = DynamicCache()
    logits = [model(ids, use_cache=False).logits.float()]
    with torch.no_grad():
        logits += [model(piece, past_key_values=cache).logits.float() for piece in ids.split([64, 5, 1], 1)]
    kept = nc_stats(model)["kept_mass"]
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    mass = [kept[phase]["mean"] if kept[phase] else 0.0 for phase in ("prefill", "decode")]
    return [*logits, model.model.layers[0].self_attn.q_proj.weight.grad, torch.tensor(mass, dtype=torch.float64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_the_default_dtype_changes_nothing(options, dtype):
    ids, expected = random_ids(2, 70), None
    try:
        for default in (torch.float32, dtype):
            model = small(**options)
            torch.set_default_dtype(default)
            found = numbers(model, ids)
            expected = expected or found
            torch.set_default_dtype(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))

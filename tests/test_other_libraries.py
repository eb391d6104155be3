"""What other libraries put into a model beside the patch is honoured or refused, whatever the order of imports."""

import functools
import itertools
import types

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nc_patch import BrokenCacheError, UnsupportedModelError, patch_model
from nc_patch.layers import IMPLEMENTATION

LENGTH = 40
DENSE, ALL_KEYS, SPARSE = ({"alpha": alpha, "C": C} for alpha, C in ((1.0, 1.0), (1e6, 0.0), (2.0, 0.5)))


def attention_patch(attend):
    """What kvpress puts around the attention functions that there are when it is imported.

    In decoding the keys at ``module.masked_key_indices`` become ones that no query gives any weight.
    """

    def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
        if query.shape[2] == key.shape[2]:
            module.masked_key_indices = None
        elif getattr(module, "masked_key_indices", None) is not None:
            by_group = query.reshape(key.shape[0], key.shape[1], -1, query.shape[-1])
            unseen = torch.linalg.lstsq(by_group, torch.full_like(by_group[..., :1], -1e5)).solution[..., 0]
            batch, head, place = module.masked_key_indices
            key[batch, head, place] = unseen[batch, head]
        return attend(module, query, key, value, attention_mask, dropout, **kwargs)

    return wrapper


@pytest.fixture
def imported(monkeypatch):
    """``imported(*names)``: kvpress is imported when the attention functions of these names are registered."""

    def imported(*names):
        for name in names:
            wrapper = attention_patch(ALL_ATTENTION_FUNCTIONS[name])
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, wrapper)

    return imported


@torch.no_grad()
def decoded(compress, options=None):
    """Logits of three tokens after a prefill whose cache ``compress(attention modules, cache)`` has changed."""
    model = tiny_model("llama") if options is None else patch_model(tiny_model("llama"), **options)
    torch.manual_seed(3)
    ids, cache = random_ids(1, LENGTH + 3), DynamicCache(config=model.config)
    model(ids[:, :LENGTH], past_key_values=cache)
    compress([layer.self_attn for layer in model.model.layers], cache)
    steps = zip(ids[:, LENGTH:].split(1, 1), torch.arange(LENGTH, LENGTH + 3)[:, None, None], strict=True)
    return torch.cat([model(step, past_key_values=cache, position_ids=at).logits for step, at in steps], 1)


def by_head(modules, cache):
    """Masks half of the keys, others in each head, as AdaKV of kvpress does."""
    for module in modules:
        masked = torch.rand(1, 2, LENGTH, generator=torch.Generator().manual_seed(module.layer_idx)) < 0.5
        module.masked_key_indices = masked.nonzero(as_tuple=True)


def to_lengths(*lengths):
    """Keeps so many of the last keys of each layer, as the presses of kvpress do."""

    def compress(modules, cache):
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, -length:], layer.values[:, :, -length:]

    return compress


def test_keys_masked_by_head_are_not_attended_where_all_others_are(imported):
    imported("sdpa", IMPLEMENTATION)
    expected = decoded(by_head)
    for options in (DENSE, SPARSE | {"selection": "dense"}):
        torch.testing.assert_close(decoded(by_head, options), expected)
    unmasked = decoded(lambda modules, cache: None)
    assert not torch.allclose(unmasked, expected, atol=0.1), "they make a difference"


BEFORE, AMONG = r"imported before nc_patch.*Import nc_patch first", "sparse attention would choose among these keys"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("sdpa",), DENSE, BEFORE),
        (("sdpa",), SPARSE, BEFORE),
        *((("sdpa", IMPLEMENTATION), SPARSE | {"selection": name}, AMONG) for name in ("topk", "block", "window")),
    ],
)
def test_keys_masked_by_head_are_refused_where_nothing_masks_them_or_attention_is_sparse(
    imported, names, options, message
):
    imported(*names)
    with pytest.raises(UnsupportedModelError, match=message):
        decoded(by_head, options)


def test_keys_dropped_alike_in_every_layer_are_dropped_and_other_numbers_of_keys_are_refused():
    dense = decoded(to_lengths(20, 20, 20))
    for options in (DENSE, ALL_KEYS, ALL_KEYS | {"selection": "block"}):
        torch.testing.assert_close(decoded(to_lengths(20, 20, 20), options), dense)
    for lengths, options in itertools.product(((10, 20, 30), (30, 20, 10), (20, 20, 21)), (DENSE, SPARSE)):
        with pytest.raises(BrokenCacheError, match="drops keys layer by layer, let it keep as many in every layer"):
            decoded(to_lengths(*lengths), options)


def test_a_forward_that_another_library_has_wrapped_is_patched_and_one_that_it_has_replaced_is_refused(monkeypatch):
    ids, model = random_ids(1, 30), tiny_model("llama")
    expected = patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk")  # the class has been seen before
    call = lambda forward, *args, **kwargs: forward(*args, **kwargs)  # noqa: E731
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(call, layer.self_attn.forward)
    assert torch.equal(patch_model(model, 2.0, 0.5, selection="topk")(ids).logits, expected(ids).logits)

    def own_attention(self, hidden_states, **_):
        return hidden_states, None

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(own_attention, layer.self_attn)
    with pytest.raises(UnsupportedModelError, match=r"put \S*own_attention in the place of forward of LlamaAttention"):
        patch_model(model, 2.0, 0.5)
    monkeypatch.setattr(type(layer.self_attn), "forward", own_attention)
    with pytest.raises(UnsupportedModelError, match="does not go through transformers' AttentionInterface"):
        patch_model(tiny_model("llama"), 2.0, 0.5)

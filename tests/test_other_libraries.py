"""What other libraries put into a model beside the patch is honoured or refused, whatever the order of imports."""

import functools
import types

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nc_patch import BrokenCacheError, UnsupportedModelError, patch_model
from nc_patch.hooks import IMPLEMENTATION

LENGTH = 40


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
def decoded(model, compress):
    """Logits of three tokens after a prefill whose cache ``compress(attention modules, cache)`` has changed."""
    torch.manual_seed(3)
    ids, cache = random_ids(1, LENGTH + 3), DynamicCache(config=model.config)
    model(ids[:, :LENGTH], past_key_values=cache)
    compress([layer.self_attn for layer in model.model.layers], cache)
    steps = [
        model(ids[:, n : n + 1], past_key_values=cache, position_ids=torch.tensor([[n]])).logits
        for n in range(LENGTH, LENGTH + 3)
    ]
    return torch.cat(steps, 1)


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


DENSE, ALL_KEYS = {"alpha": 1.0, "C": 1.0}, {"alpha": 1e6, "C": 0.0}
SPARSE = {"alpha": 2.0, "C": 0.5}


def by_patched(options, compress):
    return decoded(patch_model(tiny_model("llama"), **options), compress)


@pytest.mark.parametrize("options", [DENSE, SPARSE | {"selection": "dense"}], ids=str)
def test_keys_masked_by_head_are_not_attended_where_all_others_are(imported, options):
    imported("sdpa", IMPLEMENTATION)
    expected = decoded(tiny_model("llama"), by_head)
    torch.testing.assert_close(by_patched(options, by_head), expected)
    unmasked = decoded(tiny_model("llama"), lambda modules, cache: None)
    assert not torch.allclose(unmasked, expected, atol=0.1), "they make a difference"


BEFORE, AMONG = r"imported before nc_patch.*Import nc_patch first", "sparse attention would choose among these keys"
BOTH = ("sdpa", IMPLEMENTATION)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("sdpa",), DENSE, BEFORE),
        (("sdpa",), SPARSE, BEFORE),
        (BOTH, SPARSE | {"selection": "topk"}, AMONG),
        (BOTH, SPARSE | {"selection": "block"}, AMONG),
        (BOTH, SPARSE | {"selection": "window"}, AMONG),
    ],
)
def test_keys_masked_by_head_are_refused_where_nothing_masks_them_or_attention_is_sparse(
    imported, names, options, message
):
    imported(*names)
    model = patch_model(tiny_model("llama"), **options)
    with pytest.raises(UnsupportedModelError, match=message):
        decoded(model, by_head)
    model(random_ids(1, 20))  # a prefill masks none


@pytest.mark.parametrize("options", [DENSE, ALL_KEYS, ALL_KEYS | {"selection": "block"}], ids=str)
def test_keys_dropped_alike_in_every_layer_are_dropped(options):
    compress = to_lengths(20, 20, 20)
    torch.testing.assert_close(by_patched(options, compress), decoded(tiny_model("llama"), compress))


@pytest.mark.parametrize("lengths", [(10, 20, 30), (30, 20, 10), (20, 20, 21)], ids=str)
@pytest.mark.parametrize("options", [DENSE, SPARSE], ids=str)
def test_other_numbers_of_keys_in_each_layer_are_refused(lengths, options):
    with pytest.raises(BrokenCacheError, match="drops keys layer by layer, let it keep as many in every layer"):
        by_patched(options, to_lengths(*lengths))


def closed_over(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


def partly(forward):
    return functools.partial(lambda call, *args, **kwargs: call(*args, **kwargs), closed_over(forward))


def marked(forward):
    return functools.update_wrapper(lambda *args, held=[forward], **kwargs: held[0](*args, **kwargs), forward)


def own_attention(self, hidden_states, **_):
    return hidden_states, None


def test_a_model_whose_attention_another_library_has_replaced_is_refused(monkeypatch):
    patch_model(tiny_model("llama"), 2.0, 0.5)  # the class has been seen before
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(own_attention, layer.self_attn)
    with pytest.raises(UnsupportedModelError, match=r"put own_attention in the place of forward of LlamaAttention"):
        patch_model(model, 2.0, 0.5)
    monkeypatch.setattr(type(layer.self_attn), "forward", own_attention)
    with pytest.raises(UnsupportedModelError, match="does not go through transformers' AttentionInterface"):
        patch_model(tiny_model("llama"), 2.0, 0.5)


def test_a_forward_that_another_library_has_wrapped_is_patched():
    ids, model = random_ids(1, 30), tiny_model("llama")
    expected = patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk")
    for wrap, layer in zip((closed_over, partly, marked), model.model.layers, strict=True):
        layer.self_attn.forward = wrap(layer.self_attn.forward)
    assert torch.equal(patch_model(model, 2.0, 0.5, selection="topk")(ids).logits, expected(ids).logits)

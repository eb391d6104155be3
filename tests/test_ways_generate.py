"""Ways to generate: every cache, every decoding strategy, a cache that goes on from call to call."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache
from ways import (
    CHOICES,
    EACH_FAMILY,
    EACH_SELECTION,
    SMALL,
    attended_fraction,
    full,
    full_and_small,
    left_padded,
    no_streams,
    right_padded,
    rows_of,
    small,
)

from nc_patch import UnsupportedMaskError, patch_model

__all__ = ["no_streams"]  # a fixture

NEW = 6
CACHES = ("dynamic", "static", "offloaded", "offloaded_static")
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several sequences": {"num_beams": 3, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}
# What transformers itself cannot do, with dense attention either.
NOT_DENSE_EITHER = {
    ("gpt_oss", "early exit"): "the skipped layers' kinds are looked up by place",
    ("mistral", "offloaded_static"): "a static cache whose layers all slide has nothing to offload",
}
if Version(transformers.__version__) < Version("5.23"):
    NOT_DENSE_EITHER["gemma2", "early exit"] = "layers of a cache that nothing has run yet are cropped"


def skip_what_dense_cannot(family, way):
    if (family, way) in NOT_DENSE_EITHER:
        pytest.skip(f"transformers cannot: {NOT_DENSE_EITHER[family, way]}")


def generated(model, ids, **options):
    torch.manual_seed(5)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, "disable_compile": True} | options
    if isinstance(ids, dict):
        return model.generate(**ids, **options)
    return model.generate(ids, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_full_budget_generates_as_dense_by_every_strategy(family, strategy):
    skip_what_dense_cannot(family, strategy)
    repeated = random_ids(1, 9).repeat(1, 4)  # so that there is something to look up
    ids = repeated if strategy in ("prompt lookup", "early exit") else left_padded(rows_of(3))
    expected = generated(tiny_model(family), ids, **STRATEGIES[strategy])
    model = full(family)
    assert torch.equal(generated(model, ids, **STRATEGIES[strategy]), expected)
    assert attended_fraction(model) == 1.0


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_assistant_proposes_and_the_tokens_are_those_of_dense_and_of_greedy_decoding(family):
    ids, assistant = random_ids(1, 40), tiny_model("llama")
    dense = generated(tiny_model(family), ids)
    assert torch.equal(generated(full(family), ids, assistant_model=assistant), dense)
    model = small(family)
    alone = generated(model, ids)
    assert torch.equal(generated(model, ids, assistant_model=assistant), alone)
    assert torch.equal(generated(model, ids, assistant_model=small()), alone)


@EACH_SELECTION
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_every_cache_gives_dense_with_a_full_budget_and_rows_of_their_own_with_a_small_one(
    family, cache, selections, no_streams
):
    skip_what_dense_cannot(family, cache)
    rows = rows_of(3)
    expected = generated(tiny_model(family), left_padded(rows), cache_implementation=cache)
    assert torch.equal(generated(full(family, **selections), left_padded(rows), cache_implementation=cache), expected)
    model = small(family, **selections)
    alone = [generated(model, row[None])[0, -NEW:] for row in rows]
    together = generated(model, left_padded(rows), cache_implementation=cache)
    assert torch.equal(together[:, -NEW:], torch.stack(alone))


@pytest.mark.parametrize("key_index", ["always", "never"])
@pytest.mark.parametrize("selection", ["topk", "block"])
def test_an_offloaded_cache_keeps_its_index_and_its_tokens(selection, key_index, no_streams):
    model, ids = small(selection=selection, key_index=key_index, block_size=16), random_ids(2, 60)
    cache = DynamicCache(config=model.config, offloading=True)
    found = generated(model, ids, past_key_values=cache, max_new_tokens=20)
    assert torch.equal(found, generated(model, ids, max_new_tokens=20))
    assert all(bool(layer.nc_indexes) or key_index == "never" for layer in cache.layers)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_quantised_cache_gives_the_tokens_of_dense_over_the_same_cache(family, backend):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend], reason=f"{backend} is not installed")
    config = {"backend": backend, "nbits": 4, "q_group_size": 16, "residual_length": 16}
    config |= {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {"axis_key": 0, "axis_value": 0}
    ids = random_ids(2, 48)
    logits = {}
    for name, model in (("dense", tiny_model(family)), ("full", full(family)), ("small", small(family))):
        cache = QuantizedCache(config=model.config, **config)
        with torch.inference_mode():
            steps = [model(ids[:, :40], past_key_values=cache).logits]
            steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 48)]
        logits[name] = torch.cat(steps, 1)
        if name != "dense":
            assert (attended_fraction(model) == 1.0) == (name == "full")
    torch.testing.assert_close(logits["full"], logits["dense"], atol=2e-5, rtol=0)
    assert not torch.allclose(logits["small"], logits["dense"], atol=1e-3)


def caches_of(config):
    return [DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=120)]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_cache_goes_on_over_several_calls_as_one_long_call(family):
    turns = [random_ids(1, 23), random_ids(1, 9), random_ids(1, 1)]
    for model, reference in full_and_small(family):
        for cache in caches_of(model.config):
            text = turns[0][:, :0]
            for turn in turns:
                text = torch.cat((text, turn), 1)
                expected = generated(reference, text)
                text = generated(model, text, past_key_values=cache)
                assert torch.equal(text, expected)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_prefix_is_shared_by_several_continuations(family):
    prefix, model = random_ids(1, 30), small(family)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prefix, past_key_values=cache)
    for length in (1, 8, 25):
        text = torch.cat((prefix, random_ids(1, length)), 1)
        found = generated(model, text, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, generated(model, text))


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_a_cropped_cache_goes_on_as_one_that_never_was_longer(options):
    model, ids = patch_model(tiny_model("llama"), *SMALL, **options), random_ids(1, 60)
    cache, plain = DynamicCache(), DynamicCache()
    generated(model, ids, past_key_values=cache)
    cache.crop(48 - cache.get_seq_length())
    with torch.inference_mode():
        model(ids[:, :48], past_key_values=plain)
        for step in range(48, 60):
            found, expected = (model(ids[:, step : step + 1], past_key_values=c).logits for c in (cache, plain))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@EACH_SELECTION
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_beams_of_a_batch_are_those_of_each_row(family, selections):
    model, rows = small(family, **selections), rows_of(3)
    alone = [generated(model, row[None], num_beams=3)[0, -NEW:] for row in rows]
    together = generated(model, left_padded(rows), num_beams=3)
    assert torch.equal(together[:, -NEW:], torch.stack(alone))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generating_after_right_padding_is_refused_as_it_would_leave_a_hole(options):
    with pytest.raises(UnsupportedMaskError, match=r"holes.*to generate, to the left"):
        generated(small(), right_padded(rows_of(3)), **options)

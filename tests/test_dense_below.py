"""``dense_below``: with so few keys a call is the unpatched model's, and beyond them each row goes by its own."""

import itertools

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from ways import EACH_FAMILY, EACH_SETTING, SETTINGS, SMALL, assert_close, left_padded, positions_of

from nc_patch import nc_stats, patch_model, sparse_attention
from nc_patch.ops.backends import has_numba

BORDER = 64
REASON = f"no query sees more than dense_below={BORDER} keys"
WITH_MEANS = {"codes", "means"} if has_numba() else {"means"}
INDEXES = {"topk": WITH_MEANS, "unasked": WITH_MEANS, "topk by codes": {"codes"}, "window": set(), "blocks": {"pages"}}


def bordered(family="llama", **settings):
    return patch_model(tiny_model(family), *SMALL, dense_below=BORDER, **settings)


def dense_calls(model):
    return [layer["dense_calls"] for layer in nc_stats(model)["layers"]]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_call_of_few_keys_is_that_of_the_unpatched_model_and_keeps_no_index(family, setting):
    in_pytorch = {"backend": "torch", "on_drop": "raise", "max_dropped_mass": 0.0}  # and nothing is dropped
    models = [bordered(family, **SETTINGS[setting] | more) for more in ({}, in_pytorch)]
    models.append(tiny_model(family))
    exact = FAMILIES[family][3] == "sdpa"  # eager attention rounds otherwise
    caches = [DynamicCache(config=models[0].config) for _ in models]
    with torch.inference_mode():
        for piece in random_ids(2, BORDER).split([BORDER - 5, 1, 1, 3], 1):
            calls = zip(models, caches, strict=True)
            found, by_pytorch, expected = (model(piece, past_key_values=cache).logits for model, cache in calls)
            assert_close([found, by_pytorch], [expected] * 2)
            # A single query of a group is a row of its head's, which rounds otherwise, as do the compiled kernels.
            assert torch.equal(by_pytorch, expected) or not exact or piece.shape[1] <= 3
        assert not any(getattr(layer, "nc_indexes", None) for layer in caches[0].layers)
        assert dense_calls(models[0]) == [{REASON: 4}] * 3
        assert nc_stats(models[0])["attended_fraction"] == 1.0
        models[0](random_ids(2, 1), past_key_values=caches[0])
    layers = zip(caches[0].layers, dense_calls(models[0]), strict=True)
    beyond = [layer for layer, reasons in layers if reasons == {REASON: 4}]  # not those of a narrow window
    assert len(beyond) == (3 if family == "llama" else 1)
    assert all(set(layer.nc_indexes) == INDEXES[setting] for layer in beyond)


def test_what_patch_model_does_unasked_is_the_unpatched_model_up_to_1024_keys(dense_with_few_keys):
    dense, model, ids = tiny_model("llama"), patch_model(tiny_model("llama"), backend="torch"), random_ids(1, 300)
    text = dense.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)
    assert dense_calls(model) == [{"no query sees more than dense_below=1024 keys": 8}] * 3


@EACH_SETTING
def test_across_the_border_a_sequence_scores_the_same_alone_in_company_and_in_pieces(settings):
    model, ids, other = bordered(**settings), random_ids(190), random_ids(BORDER - 3)
    with torch.inference_mode():
        alone = model(ids[None]).logits[0]
        batch = left_padded([ids, other])
        together = model(**batch, position_ids=positions_of(batch["attention_mask"])).logits
        assert_close(together[0], alone)
        assert_close(together[1, -len(other) :], model(other[None]).logits[0])  # in a call that runs dense
        positions = torch.cat((torch.arange(len(other)), torch.arange(len(ids))))[None]
        packed = model(torch.cat((other, ids))[None], position_ids=positions, use_cache=False).logits[0]
        assert_close(packed, torch.cat((model(other[None]).logits[0], alone)))
        for cache in (
            DynamicCache(config=model.config), *(StaticCache(model.config, max_cache_len=n) for n in (190, 4 * BORDER))
        ):  # fmt: skip
            cuts = itertools.pairwise((0, 64, 128, 190))
            pieces = [model(ids[None, first:last], past_key_values=cache).logits[0] for first, last in cuts]
            assert_close(torch.cat(pieces), alone)


@EACH_SETTING
def test_generate_across_the_border_gives_the_same_on_every_cache_and_row_with_an_index_and_without(settings):
    rows, new = [random_ids(length) for length in (BORDER - 20, BORDER + 30, BORDER - 1)], 40
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    model, without = bordered(**settings), bordered(**settings | {"key_index": "never"})
    alone = torch.stack([without.generate(row[None], **how)[0, -new:] for row in rows])
    for cache in ("dynamic", "static"):
        together = model.generate(**left_padded(rows), cache_implementation=cache, **how)
        assert torch.equal(together[:, -new:], alone), cache
    assert torch.equal(bordered(**settings).generate(rows[0][None], **how)[0, -new:], alone[0])


def test_compiled_calls_and_steps_across_the_border_equal_eager_ones():
    model = bordered(backend="torch", **SETTINGS["unasked"])
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for length in (BORDER, 3 * BORDER, BORDER - 1):
            ids = random_ids(2, length)
            assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        ids, cache = random_ids(1, BORDER - 6), StaticCache(config=model.config, max_cache_len=BORDER + 30)
        expected = model.generate(ids, max_new_tokens=14, do_sample=False)
        tokens = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        for _ in range(13):
            tokens.append(compiled(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, -1), expected[:, ids.shape[1] :])


@EACH_SETTING
def test_a_call_of_few_keys_has_the_gradients_of_the_unpatched_model(settings):
    ids, gradients = random_ids(2, BORDER), []
    for model in (tiny_model("llama"), bordered(**settings)):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_the_function_attends_by_the_law_alone_unless_it_is_told(dense_with_few_keys):
    query, key = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    attended = lambda **given: sparse_attention(query, key, key, alpha=2.0, C=0.5, return_stats=True, **given).attended  # noqa: E731
    assert attended()[0, 0, 15:25].tolist() == [8, 9, 9, 9, 9, 10, 10, 10, 10, 10]
    assert attended(dense_below=20)[0, 0, 15:25].tolist() == [16, 17, 18, 19, 20, 10, 10, 10, 10, 10]

"""``dense_below``: with so few keys a call is the unpatched model's.

That beyond them each row goes by its own, however a model is run, ``ways.SETTINGS`` hold.
"""

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from transformers import DynamicCache
from ways import EACH_FAMILY, SETTINGS, SMALL, assert_close

from nc_patch import nc_stats, patch_model, sparse_attention
from nc_patch.ops.backends import has_numba

BORDER = 64
REASON = f"no query sees more than dense_below={BORDER} keys"
WITH_MEANS = {"codes", "means"} if has_numba() else {"means"}
INDEXES = {"topk": WITH_MEANS, "unasked": WITH_MEANS, "topk by codes": {"codes"}, "window": set(), "blocks": {"pages"}}


def bordered(family="llama", **settings):
    return patch_model(tiny_model(family), *SMALL, **settings | {"dense_below": BORDER})


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


def test_the_function_attends_by_the_law_alone_unless_it_is_told(dense_with_few_keys):
    query, key = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    attended = lambda **given: sparse_attention(query, key, key, alpha=2.0, C=0.5, return_stats=True, **given).attended  # noqa: E731
    assert attended()[0, 0, 15:25].tolist() == [8, 9, 9, 9, 9, 10, 10, 10, 10, 10]
    assert attended(dense_below=20)[0, 0, 15:25].tolist() == [16, 17, 18, 19, 20, 10, 10, 10, 10, 10]

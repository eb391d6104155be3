"""patch_model: in place, reversible, one model at a time; what it counts, and what it refuses."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
from profiles import made_up_profile
from tiny_models import FAMILIES, random_ids, tiny_model
from transformers import AutoConfig, AutoModel, DynamicCache, LlamaForCausalLM
from ways import (
    EACH_FAMILY,
    FULL,
    SETTINGS,
    SMALL,
    TOPK,
    alone,
    assert_close,
    generated,
    in_a_batch,
    left_padded,
    rows_of,
    small,
    state_of,
)

from nc_patch import (
    NCConfig,
    UnsupportedModelError,
    forget_index,
    is_patched,
    nc_stats,
    patch_model,
    patched,
    reset_stats,
    unpatch_model,
)
from nc_patch.common import warn_anew
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C
from nc_patch.ops.backends import has_numba
from nc_patch.selections import Block, TopK


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("selection", ["topk", "window", "block", "dense"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_law_of_every_key_is_dense_and_unpatching_leaves_the_model_bit_for_bit_as_it_was(family, selection):
    model, rows = tiny_model(family), rows_of(2)
    before, text = in_a_batch(model, rows), generated(model, left_padded(rows))
    state = state_of(model)
    for budget in ((1.0, 1.0), FULL, SMALL):
        patch_model(model, *budget, selection=selection)
        assert is_patched(model)
        found = in_a_batch(model, rows)
        if budget != SMALL:
            assert_close(found, before)
            assert torch.equal(generated(model, left_padded(rows)), text)
        unpatch_model(model)
        assert state_of(model) == state
        assert all(map(torch.equal, in_a_batch(model, rows), before))
        assert torch.equal(generated(model, left_padded(rows)), text)


BORDER = 64
WITH_MEANS = {"codes", "means"} if has_numba() else {"means"}
INDEXES = {"topk": WITH_MEANS, "unasked": WITH_MEANS, "topk by codes": {"codes"}, "window": set(), "blocks": {"pages"}}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_call_of_few_keys_is_that_of_the_unpatched_model_and_keeps_no_index(family, setting):
    in_pytorch = {"backend": "torch", "on_drop": "raise", "max_dropped_mass": 0.0}  # and nothing is dropped
    settings = SETTINGS[setting] | {"dense_below": BORDER}
    models = [patch_model(tiny_model(family), *SMALL, **settings | more) for more in ({}, in_pytorch)]
    models.append(tiny_model(family))
    exact = FAMILIES[family][3] == "sdpa"  # eager attention rounds otherwise
    caches = [DynamicCache(config=models[0].config) for _ in models]
    for piece in random_ids(2, BORDER).split([BORDER - 5, 1, 1, 3], 1):
        calls = zip(models, caches, strict=True)
        found, by_pytorch, expected = (model(piece, past_key_values=cache).logits for model, cache in calls)
        assert_close([found, by_pytorch], [expected] * 2)
        # A single query of a group is a row of its head's, which rounds otherwise, as do the compiled kernels.
        assert torch.equal(by_pytorch, expected) or not exact or piece.shape[1] <= 3
    assert not any(getattr(layer, "nc_indexes", None) for layer in caches[0].layers)
    few = {f"no query sees more than dense_below={BORDER} keys": 4}
    assert [layer["dense_calls"] for layer in nc_stats(models[0])["layers"]] == [few] * 3
    assert nc_stats(models[0])["attended_fraction"] == 1.0
    models[0](random_ids(2, 1), past_key_values=caches[0])
    layers = zip(caches[0].layers, nc_stats(models[0])["layers"], strict=True)
    beyond = [layer for layer, stats in layers if stats["dense_calls"] == few]  # not those of a narrow window
    assert len(beyond) == (3 if family == "llama" else 1)
    assert all(set(layer.nc_indexes) == INDEXES[setting] for layer in beyond)


# What is patched, and for how long


def test_the_context_manager_restores_what_was_before():
    model, ids = tiny_model("llama"), random_ids(1, 50)
    dense = model(ids).logits
    with patched(model, *SMALL, **TOPK) as inner:
        assert inner is model
        sparse = model(ids).logits
    assert torch.equal(model(ids).logits, dense)
    patch_model(model, *SMALL, **TOPK)
    with contextlib.suppress(KeyError), patched(model, 1.0, 0.0, **TOPK):
        assert not torch.equal(model(ids).logits, sparse)
        raise KeyError
    assert torch.equal(model(ids).logits, sparse)
    state = state_of(model)
    with patched(model, 1.0, 0.0, **TOPK):
        unpatch_model(model)
    assert state_of(model) == state
    assert torch.equal(model(ids).logits, sparse)


def test_save_pretrained_of_a_patched_model_writes_the_same_files(tmp_path):
    model, files = tiny_model("llama"), []
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        patch_model(model, *SMALL)
    assert files[0] == files[1]
    assert "nc" not in json.loads(files[1]["config.json"])
    assert not is_patched(LlamaForCausalLM.from_pretrained(tmp_path / "after"))


def test_copies_keep_the_patch_when_the_original_loses_it():
    model, rows = tiny_model("llama"), rows_of(1)
    dense, sparse = alone(model, rows), alone(patch_model(model, *SMALL, **TOPK), rows)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    unpatch_model(model)
    for other in copies:
        assert torch.equal(alone(other, rows)[0], sparse[0])
        assert torch.equal(alone(unpatch_model(other), rows)[0], dense[0])


def test_a_model_made_from_the_config_of_a_patched_one_runs_dense_and_the_log_says_so(caplog):
    ids, model = random_ids(1, 20), small()
    other = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    warn_anew.cache_clear()
    model(ids)
    assert "runs dense" not in caplog.text
    assert torch.equal(other(ids).logits, tiny_model("llama")(ids).logits)
    assert "LlamaAttention runs dense: its config names the attention of patched models" in caplog.text
    assert torch.equal(patch_model(other, *SMALL, **TOPK)(ids).logits, model(ids).logits)


# What it counts


def law(numbers, C=0.5):
    """How many keys queries that see so many attend under the law of ``SMALL``."""
    return sum(NCConfig(2.0, C).budget(n) for n in numbers)


def test_attended_keys_are_counted_by_layer_and_apart_over_the_tail_however_long_it_runs(monkeypatch):
    monkeypatch.setattr("nc_patch.stats._FOLD_AT", 4)
    model = small()
    reset_stats(model, tail=10)
    model(random_ids(2, 60))
    stats, tail = nc_stats(model), range(51, 61)
    assert stats["mean_keys"] == pytest.approx(law(range(1, 61)) / 60)
    assert stats["attended_fraction"] == pytest.approx(law(range(1, 61)) / sum(range(1, 61)))
    assert stats["tail_mean_keys"] == pytest.approx(law(tail) / 10)
    assert stats["tail_attended_fraction"] == pytest.approx(law(tail) / sum(tail))
    assert [(layer["layer"], layer["calls"]) for layer in stats["layers"]] == [(0, 1), (1, 1), (2, 1)]
    assert stats["layers"][1]["name"] == "model.layers.1.self_attn"
    reset_stats(model)
    assert nc_stats(model)["attended_fraction"] is None
    model.generate(random_ids(1, 5), max_new_tokens=20, do_sample=False)
    layer = nc_stats(model)["layers"][0]
    assert (layer["calls"], layer["tail_mean_keys"]) == (20, None)
    assert layer["mean_keys"] == pytest.approx(law(range(1, 25)) / 24)


def test_settings_per_layer_and_head_act_there_alone_and_what_ran_dense_is_counted_with_the_reason():
    model, ids = tiny_model("llama"), random_ids(1, 80)
    dense = model(ids).logits
    assert_close(patch_model(model, 1.0, 0.5, dense_layers=[0, 1, 2])(ids).logits, dense)
    patch_model(model, 1.0, 0.5, dense_layers=[0, 1, 2], backend="torch")
    assert torch.equal(model(ids).logits, dense)
    for selection in ("topk", "block"):  # whose plan layers of one law share
        patch_model(model, [4.0, 1.0, 4.0], 0.5, selection=selection)(ids)
        fractions = [layer["attended_fraction"] for layer in nc_stats(model)["layers"]]
        assert fractions[1] < fractions[0] == fractions[2] < 1
    patch_model(model, [[1.0, 2.0, 3.0, 4.0]] * 3, 0.0, **TOPK)(ids)
    expected = sum(min(n, k) for n in range(1, 81) for k in (1, 2, 3, 4)) / 320
    assert nc_stats(model)["mean_keys"] == pytest.approx(expected)
    patch_model(model, [2.0, 2.0, 1.0], [0.5, 0.5, 1.0], dense_layers=[1], decode="dense")
    model.generate(ids, max_new_tokens=3, do_sample=False)
    layers = nc_stats(model)["layers"]
    assert layers[0]["dense_calls"] == {'the selection is "dense"': 2}
    assert layers[1]["dense_calls"] == {"the layer is in dense_layers": 3}
    assert layers[1]["attended_fraction"] == 1.0
    assert layers[2]["dense_calls"]["alpha >= 1 with C = 1 attends every key"] == 1


def test_without_alpha_and_C_the_defaults_are_taken():
    model = patch_model(tiny_model("llama"))
    config = next(module for module in model.modules() if hasattr(module, "_nc_patch"))._nc_patch.config
    assert config == NCConfig(DEFAULT_ALPHA, DEFAULT_C)
    assert (config.prefill, config.decode) == (Block(), TopK(tail="mean"))


# What it refuses


@pytest.mark.parametrize("before", [unpatch_model, lambda model: model], ids=["plain", "patched"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((NCConfig(1.0, 0.5),), {}, TypeError, r"patch_model\(model, config=NCConfig\(\.\.\.\)\)"),
        ((1.0, 0.5), {"dense_layers": [3]}, ValueError, r"dense_layers names layers \[3\], .* has layers 0 to 2"),
        ((1.0, 0.5), {"config": NCConfig(1.0, 0.5)}, TypeError, "config holds every setting; leave out alpha, C"),
        ((), {"profile": made_up_profile(), "C": 0.5}, TypeError, "leave out C"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_changes(arguments, options, error, message, before):
    model, ids = before(small()), random_ids(1, 40)
    logits, state = model(ids).logits, state_of(model)
    with pytest.raises(error, match=message):
        patch_model(model, *arguments, **options)
    assert state_of(model) == state
    assert torch.equal(model(ids).logits, logits)


def test_attention_dropout_is_refused_in_training():
    model = patch_model(tiny_model("llama", attention_dropout=0.1), *SMALL, **TOPK).train()
    with pytest.raises(UnsupportedModelError, match=r"attention dropout 0.1"):
        model(random_ids(1, 8))
    assert bool(model.eval()(random_ids(1, 8)).logits.isfinite().all())


def test_what_is_no_model_or_cache_or_not_patched_is_refused_by_name():
    for call in (unpatch_model, nc_stats, reset_stats):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not patched; call patch_model first"):
            call(tiny_model("llama"))
    for call in (patch_model, nc_stats):
        with pytest.raises(UnsupportedModelError, match="expected a model of transformers, got str"):
            call("llama")
    t5 = AutoConfig.for_model("t5", vocab_size=50, d_model=32, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        patch_model(AutoModel.from_config(t5))
    with pytest.raises(TypeError, match=r"cache must be a cache of transformers.*got tuple"):
        forget_index(())

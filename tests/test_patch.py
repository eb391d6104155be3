"""patch_model: equality with dense attention at a full budget, reversibility, state, statistics, and refusals."""

import contextlib
import copy
import io
import json
import pickle

import pytest
import torch
from tiny_models import FAMILIES, NOT_PACKED_WHEN_DENSE, random_ids, tiny_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from ways import CHOICES, TOPK

from nc_patch import (
    NCConfig,
    UnsupportedMaskError,
    UnsupportedModelError,
    forget_index,
    is_patched,
    nc_stats,
    patch_model,
    patched,
    reset_stats,
    unpatch_model,
)
from nc_patch.common import say_once
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C
from nc_patch.selections import Block, TopK

SELECTIONS = ("topk", "window", "block", "dense")
FULL = {"alpha >= 1, C = 1": (1.0, 1.0), "budget above n": (500.0, 0.0)}


def outputs(model, ids, padding, positions):
    """Logits and greedy and beam text of a model in every way of running it."""
    with torch.inference_mode():
        result = {
            "plain": model(ids).logits,
            "padded": model(ids, attention_mask=padding).logits[padding.bool()],
            "packed": model(ids, position_ids=positions, use_cache=False).logits,
        }
        for cache in ("dynamic", "static"):
            for beams in (1, 3):
                result[f"{cache} cache, {beams} beams"] = model.generate(
                    ids,
                    attention_mask=padding,
                    max_new_tokens=8,
                    do_sample=False,
                    num_beams=beams,
                    cache_implementation=cache,
                    disable_compile=True,
                )
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_budget_equals_dense_and_unpatching_is_bit_identical(family):
    model = tiny_model(family)
    ids, padding = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    padding[1, :13] = 0
    positions = torch.cat((torch.arange(17), torch.arange(23)))[None].expand(2, -1)
    before = outputs(model, ids, padding, positions)
    expected = dict(before)
    if family in NOT_PACKED_WHEN_DENSE:
        with torch.inference_mode():
            expected["packed"] = torch.cat([model(ids[:, :17]).logits, model(ids[:, 17:]).logits], 1)
    for selection in SELECTIONS:
        for alpha, C in FULL.values():
            patch_model(model, alpha, C, selection=selection)
            assert is_patched(model)
            for way, result in outputs(model, ids, padding, positions).items():
                if result.is_floating_point():
                    assert torch.allclose(result, expected[way], atol=2e-5), (selection, way)
                else:
                    assert torch.equal(result, expected[way]), (selection, way)
            unpatch_model(model)
    assert not is_patched(model)
    for way, result in outputs(model, ids, padding, positions).items():
        assert torch.equal(result, before[way]), way


@pytest.mark.parametrize("window", [33, 100, 128])
def test_blocks_hold_every_key_of_a_sliding_window_at_a_full_budget(window):
    model, ids = tiny_model("mistral", sliding_window=window), random_ids(1, 300)
    with torch.inference_mode():
        dense = model(ids).logits
        patch_model(model, 500.0, 0.0, selection="block")
        torch.testing.assert_close(model(ids).logits, dense, atol=2e-5, rtol=0)
        cache = DynamicCache(config=model.config)
        model(ids[:, :290], past_key_values=cache)
        steps = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(290, 300)]
    torch.testing.assert_close(torch.cat(steps, 1), dense[:, 290:], atol=2e-5, rtol=0)


def test_a_small_budget_changes_the_output_and_is_counted():
    model, ids = tiny_model("llama"), random_ids(1, 100)
    with torch.inference_mode():
        dense = model(ids).logits
        patch_model(model, 2.0, 0.5, selection="topk")
        assert not torch.allclose(model(ids).logits, dense, atol=1e-3)
    stats = nc_stats(model)
    config = NCConfig(2.0, 0.5)
    budgets = [config.budget(n) for n in range(1, 101)]
    assert stats["mean_keys"] == pytest.approx(sum(budgets) / 100)
    assert stats["attended_fraction"] == pytest.approx(sum(budgets) / sum(range(1, 101)))
    assert [layer["calls"] for layer in stats["layers"]] == [1, 1, 1]
    assert [layer["layer"] for layer in stats["layers"]] == [0, 1, 2]
    assert stats["layers"][1]["name"] == "model.layers.1.self_attn"
    assert stats["tail_mean_keys"] is None


def test_the_tail_is_counted_apart():
    model, ids = tiny_model("llama"), random_ids(2, 60)
    patch_model(model, 2.0, 0.5, selection="topk")
    reset_stats(model, tail=10)
    with torch.inference_mode():
        model(ids)
    stats, config = nc_stats(model), NCConfig(2.0, 0.5)
    budgets = [config.budget(n) for n in range(51, 61)]
    assert stats["tail_mean_keys"] == pytest.approx(sum(budgets) / 10)
    assert stats["tail_attended_fraction"] == pytest.approx(sum(budgets) / sum(range(51, 61)))
    reset_stats(model)
    assert nc_stats(model)["attended_fraction"] is None
    with pytest.raises(ValueError, match="tail must be a positive number of queries or None, got 0"):
        reset_stats(model, tail=0)


def test_block_counts_what_it_attended():
    model, ids = tiny_model("llama"), random_ids(1, 200)
    patch_model(model, 1.0, 0.5, selection="block", block_size=16)
    with torch.inference_mode():
        model(ids)
    assert 0.1 < nc_stats(model)["attended_fraction"] < 0.6


def test_counting_survives_long_generations(monkeypatch):
    from nc_patch import stats

    monkeypatch.setattr(stats, "_FOLD_AT", 4)
    model, ids = tiny_model("llama"), random_ids(1, 5)
    patch_model(model, 2.0, 0.5, selection="topk")
    model.generate(ids, max_new_tokens=20, do_sample=False)
    layer = nc_stats(model)["layers"][0]
    assert layer["calls"] == 20
    budgets = [NCConfig(2.0, 0.5).budget(n) for n in range(1, 25)]
    assert layer["mean_keys"] == pytest.approx(sum(budgets) / 24)


def test_what_ran_dense_is_said_with_the_reason():
    model, ids = tiny_model("llama"), random_ids(1, 30)
    patch_model(model, 2.0, 0.5, dense_layers=[1], decode="dense")
    model.generate(ids, max_new_tokens=3, do_sample=False)
    layers = nc_stats(model)["layers"]
    assert layers[1]["dense_calls"] == {"the layer is in dense_layers": 3}
    assert layers[0]["dense_calls"] == {'the selection is "dense"': 2}
    assert layers[1]["attended_fraction"] == 1.0
    patch_model(model, 1.0, 1.0)
    with torch.inference_mode():
        model(ids)
    assert nc_stats(model)["layers"][0]["dense_calls"] == {"alpha >= 1 with C = 1 attends every key": 1}


def test_dense_layers_and_per_layer_settings_act_on_their_layer_only():
    model, ids = tiny_model("llama"), random_ids(1, 80)
    with torch.inference_mode():
        dense = model(ids).logits
        patch_model(model, 1.0, 0.5, dense_layers=[0, 1, 2])
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=0)
        patch_model(model, 1.0, 0.5, dense_layers=[0, 1, 2], backend="torch")
        assert torch.equal(model(ids).logits, dense)
        patch_model(model, [1.0, 1.0, 1.0], [1.0, 0.5, 1.0], selection="topk")
        model(ids)
    fractions = [layer["attended_fraction"] for layer in nc_stats(model)["layers"]]
    assert fractions[0] == fractions[2] == 1.0
    assert fractions[1] < 0.4


def test_budgets_per_head_reach_the_heads():
    model, ids = tiny_model("llama"), random_ids(1, 50)
    patch_model(model, [[1.0, 2.0, 3.0, 4.0]] * 3, 0.0, selection="topk")
    with torch.inference_mode():
        model(ids)
    expected = sum(min(n, k) for n in range(1, 51) for k in (1, 2, 3, 4)) / 200
    assert nc_stats(model)["mean_keys"] == pytest.approx(expected)


def test_patching_again_replaces_the_settings():
    model, ids = tiny_model("llama"), random_ids(1, 50)
    with torch.inference_mode():
        once = patch_model(tiny_model("llama"), 3.0, 0.5, selection="topk")(ids).logits
        patch_model(model, 1.0, 0.0, selection="topk")
        patch_model(model, 3.0, 0.5, selection="topk")
        assert torch.equal(model(ids).logits, once)
    unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_context_manager_restores_what_was_before():
    model, ids = tiny_model("llama"), random_ids(1, 50)
    with torch.inference_mode():
        dense = model(ids).logits
        with patched(model, 2.0, 0.5, selection="topk") as inner:
            assert inner is model
            sparse = model(ids).logits
        assert torch.equal(model(ids).logits, dense)
        patch_model(model, 2.0, 0.5, selection="topk")
        with contextlib.suppress(KeyError), patched(model, 1.0, 0.0, selection="topk"):
            assert not torch.equal(model(ids).logits, sparse)
            raise KeyError
        assert torch.equal(model(ids).logits, sparse)


def test_the_context_manager_patches_again_what_its_block_unpatched():
    model, ids = patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk"), random_ids(1, 50)
    with torch.inference_mode():
        sparse = model(ids).logits
        with patched(model, 1.0, 0.0, selection="topk"):
            unpatch_model(model)
        assert is_patched(model)
        assert torch.equal(model(ids).logits, sparse)
        assert nc_stats(model)["attended_fraction"] < 0.5
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match="has been set to 'eager'"):
            model(ids)


def test_save_pretrained_of_a_patched_model_writes_the_same_files(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    patch_model(model, 2.0, 0.5).save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert "nc" not in json.loads((tmp_path / "after" / "config.json").read_text())
    assert not is_patched(LlamaForCausalLM.from_pretrained(tmp_path / "after"))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_the_patch(way):
    model, ids = tiny_model("llama"), random_ids(1, 50)
    with torch.inference_mode():
        dense = model(ids).logits
        sparse = patch_model(model, 2.0, 0.5, selection="topk")(ids).logits
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        unpatch_model(model)
        assert torch.equal(other(ids).logits, sparse)
        assert torch.equal(unpatch_model(other)(ids).logits, dense)


def test_two_models_with_different_settings_live_side_by_side():
    first, second, ids = tiny_model("llama"), tiny_model("llama"), random_ids(1, 50)
    with torch.inference_mode():
        alone = patch_model(tiny_model("llama"), 1.0, 0.5, selection="topk")(ids).logits
        patch_model(first, 1.0, 0.5, selection="topk")
        patch_model(second, 3.0, 0.5, selection="topk")
        assert torch.equal(first(ids).logits, alone)
        assert not torch.equal(second(ids).logits, alone)


def test_models_that_share_a_config_object():
    first, ids, padding = tiny_model("llama"), random_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    padding[0, :9] = 0
    second = LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        dense = second(ids, attention_mask=padding).logits[padding.bool()]
        sparse = patch_model(first, 2.0, 0.5, selection="topk")(ids, attention_mask=padding).logits[padding.bool()]
        assert torch.allclose(second(ids, attention_mask=padding).logits[padding.bool()], dense, atol=1e-5)
        patch_model(second, 2.0, 0.5, selection="topk")
        unpatch_model(first)
        assert torch.equal(second(ids, attention_mask=padding).logits[padding.bool()], sparse)
        unpatch_model(second)
        assert torch.equal(second(ids, attention_mask=padding).logits[padding.bool()], dense)


def test_a_model_made_from_the_config_of_a_patched_one_runs_dense_and_the_log_says_so(caplog):
    ids, model = random_ids(1, 20), patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk")
    other = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    say_once.cache_clear()
    with torch.inference_mode():
        model(ids)
        assert "runs dense" not in caplog.text
        assert torch.equal(other(ids).logits, tiny_model("llama")(ids).logits)
        assert "LlamaAttention runs dense: its config names the attention of patched models" in caplog.text
        assert torch.equal(patch_model(other, 2.0, 0.5, selection="topk")(ids).logits, model(ids).logits)


def test_training_through_a_patched_model():
    model, ids = tiny_model("llama"), random_ids(2, 40)
    reference = tiny_model("llama")
    patch_model(model, 1.0, 0.9999999, backend="torch", selection="topk")  # all keys, but by way of the top-k operation
    for m in (model, reference):
        m.train()
        m(ids, labels=ids).loss.backward()
    for (name, got), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(got.grad, expected.grad, atol=1e-5), name
    patch_model(model, 2.0, 0.5, selection="topk")
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    assert model(ids, labels=ids).loss < loss


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = random_ids(1, 40)
    gradients = []
    for checkpointing in (False, True):
        model = patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_sampling_under_a_patched_model():
    model, ids = tiny_model("llama"), random_ids(2, 20)
    patch_model(model, 2.0, 0.5, selection="topk")
    torch.manual_seed(3)
    first = model.generate(ids, max_new_tokens=6, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(ids, max_new_tokens=6, do_sample=True))
    assert first.shape == (2, 26)


def test_a_compiled_forward_equals_the_eager_one():
    model, ids = patch_model(tiny_model("llama"), 2.0, 0.5, backend="torch", selection="topk"), random_ids(1, 40)
    with torch.inference_mode():
        eager = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert torch.allclose(compiled, eager, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    CHOICES,
    ids=["topk", "topk-by-codes", "block", "unasked"],
)
def test_compiled_decoding_on_a_static_cache_equals_generate(options):
    model, ids = patch_model(tiny_model("llama"), 2.0, 0.5, backend="torch", **options), random_ids(1, 60)
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)
        cache = StaticCache(config=model.config, max_cache_len=90)
        tokens = [model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)]
        torch._dynamo.reset()
        frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(model.forward, fullgraph=True, backend=frames)
        for _ in range(23):
            tokens.append(step(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, -1), expected[:, 60:])
    assert frames.frame_count <= 2  # a step is not compiled anew for every token
    if options != TOPK:
        assert all(layer.nc_indexes for layer in cache.layers)


def changed_nothing(model, call, exception, message):
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, is_patched(model)
    with pytest.raises(exception, match=message):
        call()
    assert (model.config.to_dict(), model.config._attn_implementation, is_patched(model)) == before


@pytest.mark.parametrize(
    ("arguments", "options", "exception", "message"),
    [
        ((0.0, 0.5), {}, ValueError, "alpha must be a positive number"),
        ((float("nan"), 0.5), {}, ValueError, "alpha must be a positive number, got nan"),
        ((1.0, 1.5), {}, ValueError, r"C must be a number in \[0, 1\]"),
        ((1.0,), {}, TypeError, "give alpha and C"),
        ((8.0, 0.0), {"law": "log"}, TypeError, "the option law was removed"),
        ((1.0, 0.5), {"selection": "best"}, ValueError, "selection must be one of"),
        ((1.0, 0.5), {"backend": "best"}, ValueError, "backend must be one of"),
        ((1.0, 0.5), {"block": 3}, TypeError, "unknown option block"),
        ((1.0,), {"c": 0.5}, TypeError, r"unknown option c; .* Did you mean C\?"),
        ((NCConfig(1.0, 0.5),), {}, TypeError, r"patch_model\(model, config=NCConfig\(\.\.\.\)\)"),
        (
            (1.0, 0.5),
            {"dense_layers": [3]},
            ValueError,
            r"dense_layers names layers \[3\], the model has layers 0 to 2",
        ),
        (([1.0, 2.0], 0.5), {}, ValueError, "alpha has 2 layers, the model has 3"),
        ((1.0, 0.5), {"config": NCConfig(1.0, 0.5)}, TypeError, "config holds every setting; leave out alpha, C"),
        ((), {"config": {"alpha": 1.0}}, TypeError, "config must be an NCConfig, got dict"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_changes(arguments, options, exception, message):
    model = tiny_model("llama")
    changed_nothing(model, lambda: patch_model(model, *arguments, **options), exception, message)
    patch_model(model, 2.0, 0.5, selection="topk")
    changed_nothing(model, lambda: patch_model(model, *arguments, **options), exception, message)


_SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertForMaskedLM(BertConfig(**_SMALL)), "no causal attention"),
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)),
            "does not go through",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
        (lambda: "llama", "expected a model of transformers, got str"),
    ],
)
def test_models_that_cannot_be_patched_are_refused_with_the_reason(make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        patch_model(make(), 1.0, 0.5)


def test_a_custom_4d_mask_is_refused_and_handed_to_sdpa_where_the_layer_is_dense():
    model, ids = tiny_model("llama"), random_ids(1, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    mask[..., 5, 2] = False
    with torch.inference_mode():
        dense = model(ids, attention_mask=mask).logits
        patch_model(model, 2.0, 0.5, selection="topk")
        with pytest.raises(
            UnsupportedMaskError, match=r"LlamaAttention got a custom attention mask \(torch.bool \(1, 1, 12, 12\)\)"
        ):
            model(ids, attention_mask=mask)
        patch_model(model, 2.0, 0.5, dense_layers=[0, 1, 2])
        assert torch.allclose(model(ids, attention_mask=mask).logits, dense, atol=1e-6)


def test_attention_dropout_is_refused_in_training():
    model = patch_model(tiny_model("llama", attention_dropout=0.1), 2.0, 0.5, selection="topk").train()
    with pytest.raises(UnsupportedModelError, match=r"attention dropout 0.1"):
        model(random_ids(1, 8))
    with torch.inference_mode():
        assert bool(model.eval()(random_ids(1, 8)).logits.isfinite().all())


def test_calls_that_need_a_patched_model_say_so():
    model = tiny_model("llama")
    for call in (unpatch_model, nc_stats, reset_stats):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not patched; call patch_model first"):
            call(model)
    for call in (unpatch_model, nc_stats, reset_stats, is_patched):
        with pytest.raises(UnsupportedModelError, match="expected a model of transformers, got str"):
            call("llama")
    with pytest.raises(TypeError, match=r"cache must be a cache of transformers.*got tuple"):
        forget_index(())


def test_without_alpha_and_C_the_defaults_are_taken():
    model = patch_model(tiny_model("llama"))
    config = next(module for module in model.modules() if hasattr(module, "_nc_patch"))._nc_patch.config
    assert config == NCConfig(DEFAULT_ALPHA, DEFAULT_C)
    assert (config.prefill, config.decode) == (Block(), TopK(tail="mean"))

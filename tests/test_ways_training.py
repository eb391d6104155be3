"""Training through the patch, autocast, other default dtypes: dense attention's numbers with a full budget."""

import contextlib
import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, Trainer, TrainingArguments
from ways import EACH_FAMILY_AND_SETTING, EACH_SETTING, attended_fraction, full, small

from nc_patch import KeyIndex, is_patched, nc_stats, sparse_attention

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def gradients(model, ids, *, checkpointing=False, forward=contextlib.nullcontext, backward=contextlib.nullcontext):
    """The gradients of a step, forward and backward within contexts."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    with forward():
        loss = model(ids, labels=ids, use_cache=False).loss
    with backward():
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@EACH_FAMILY_AND_SETTING
def test_gradients_are_dense_with_a_full_budget_and_checkpointing_changes_none(family, settings):
    ids = random_ids(2, 70)
    assert_same(gradients(full(family, **settings), ids), gradients(tiny_model(family), ids))
    own = gradients(small(family, **settings), ids)
    assert_same(gradients(small(family, **settings), ids, checkpointing=True), own)
    with pytest.raises(AssertionError):
        assert_same(own, gradients(tiny_model(family), ids))


def test_trainer_evaluates_and_trains_alike_with_dense_attention_and_a_full_budget(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    data = [{"input_ids": row, "labels": row} for row in random_ids(4, 30)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "use_cpu": True}
    settings |= {"learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    losses, weights = [], []
    for model in (tiny_model("llama"), full(), small()):
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=data, eval_dataset=data)
        before, trained, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
        losses.append([before["eval_loss"], trained.training_loss, after["eval_loss"]])
        weights.append(model.state_dict())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] != pytest.approx(losses[0], abs=1e-3)
    torch.testing.assert_close(weights[1], weights[0], atol=2e-4, rtol=0)


# Autocast and default dtypes


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


@EACH_SETTING
def test_a_small_budget_under_autocast_generates_and_trains_alike_in_every_way(settings):
    dense, model, ids = tiny_model("llama"), small(track=True, **settings), random_ids(2, 70)
    how = {"max_new_tokens": 6, "do_sample": False}
    with autocast():
        text = model.generate(ids, **how)
        assert torch.equal(model.generate(ids, use_cache="block" in str(settings), **how), text)
    of_full, of_dense = (gradients(each, ids, forward=autocast)[WEIGHT] for each in (full(**settings), dense))
    assert float((of_full - of_dense).norm() / of_dense.norm()) < 0.02
    expected = gradients(model, ids, forward=autocast)
    for how in ({"backward": autocast}, {"checkpointing": True}):
        torch.testing.assert_close(gradients(model, ids, forward=autocast, **how), expected, atol=0, rtol=0)


def test_the_function_under_autocast_is_that_of_the_lower_dtype():
    query, key, value = (torch.randn(1, heads, 50, 16) for heads in (4, 2, 2))
    lower = [tensor.bfloat16() for tensor in (query, key, value)]
    expected, index = sparse_attention(*lower, alpha=2.0, C=0.5), KeyIndex.build(lower[1], "codes")
    with autocast():
        assert torch.equal(sparse_attention(query, key, lower[2], alpha=2.0, C=0.5), expected)
        assert all(map(torch.equal, KeyIndex.build(lower[1], "codes").tensors(), index.tensors()))
        with pytest.raises(ValueError, match=r"of other keys than bfloat16 .* of torch.float32"):
            sparse_attention(query[:, :, -1:], key, value, alpha=2.0, index=KeyIndex.build(key, "codes"))


def numbers(model, ids):
    """Logits of a prompt and of steps, the gradient of a weight, and the mean kept mass of both phases."""
    cache = DynamicCache()
    logits = [model(ids, use_cache=False).logits.float()]
    with torch.no_grad():
        logits += [model(piece, past_key_values=cache).logits.float() for piece in ids.split([64, 5, 1], 1)]
    kept = nc_stats(model)["kept_mass"]
    mass = [kept[phase]["mean"] for phase in ("prefill", "decode")]
    return [*logits, gradients(model, ids)[WEIGHT], torch.tensor(mass, dtype=torch.float64, device="cpu")]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
@EACH_SETTING
def test_defaults_of_torch_change_nothing(settings, default):
    ids, models = random_ids(2, 70), [small(track=True, **settings) for _ in range(2)]
    expected = numbers(models[0], ids)
    (torch.set_default_dtype if isinstance(default, torch.dtype) else torch.set_default_device)(default)
    try:
        found = numbers(models[1], ids)
        assert nc_stats(copy.deepcopy(models[1]))["kept_mass"] == nc_stats(models[0])["kept_mass"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(map(torch.equal, found, expected))


def test_merging_lora_keeps_the_patch():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ids, model = random_ids(2, 30), peft.get_peft_model(small(), settings)
    with torch.inference_mode():
        adapted = model(ids).logits
        merged = model.merge_and_unload()
        assert is_patched(merged)
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=0)
    assert attended_fraction(merged) < 0.7

"""Training through the patch: LoRA, checkpointing, Trainer; with a full budget the numbers are dense attention's."""

import copy

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from ways import BLOCKS, EACH_FAMILY, TOPK, UNASKED, attended_fraction, full, small

from nc_patch import is_patched, nc_stats, patch_model, unpatch_model

peft = pytest.importorskip("peft", reason="peft is not installed")


def gradients(model, ids, checkpointing=False):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_gradients_are_dense_with_a_full_budget_and_checkpointing_changes_none(family):
    ids = random_ids(2, 30)
    assert_same(gradients(full(family), ids), gradients(tiny_model(family), ids))
    assert_same(gradients(small(family), ids, checkpointing=True), gradients(small(family), ids))


@pytest.mark.parametrize("options", [{"selection": "window"}, BLOCKS, TOPK | {"tail": "drop"}, UNASKED], ids=str)
def test_checkpointing_changes_no_gradient_of_any_selection(options):
    ids = random_ids(2, 70)
    assert_same(gradients(small(**options), ids, checkpointing=True), gradients(small(**options), ids))


@pytest.mark.parametrize("frozen", [True, False])
def test_derivatives_in_forward_mode_are_refused_instead_of_being_zero(frozen):
    model, ids = small().requires_grad_(not frozen), random_ids(1, 20)
    embedded = model.get_input_embeddings()(ids).detach()
    with pytest.raises(NotImplementedError, match=r"no derivative in forward mode.*or unpatch the model"):
        torch.func.jvp(lambda x: model(inputs_embeds=x, use_cache=False).logits, (embedded,), (embedded,))


def with_lora(model):
    torch.manual_seed(2)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_lora_step_is_dense_with_a_full_budget_whether_patched_before_or_after(family):
    ids = random_ids(2, 30)
    expected = gradients(with_lora(tiny_model(family)), ids)
    assert all("lora" in name for name in expected)
    assert_same(gradients(with_lora(full(family)), ids), expected)
    assert_same(gradients(patch_model(with_lora(tiny_model(family)), 1e6, 0.0, selection="topk"), ids), expected)


def test_lora_training_lowers_the_loss_and_merging_keeps_the_patch():
    ids, model = random_ids(2, 30), with_lora(small())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert attended_fraction(model) < 0.7
    with torch.inference_mode():
        adapted = model(ids).logits
        merged = model.merge_and_unload()
        assert is_patched(merged)
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=0)


def trainer_of(model, directory, data):
    arguments = TrainingArguments(
        str(directory),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_trainer_evaluates_and_steps_as_dense_with_a_full_budget(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in random_ids(4, 30)]
    losses, weights = [], []
    for model in (tiny_model("llama"), full()):
        trainer = trainer_of(model, tmp_path, data)
        losses.append([trainer.evaluate()["eval_loss"]])
        losses[-1] += [trainer.train().training_loss, trainer.evaluate()["eval_loss"]]
        weights.append(model.state_dict())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][2] < losses[0][0]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weight, weights[0][name], atol=2e-4, rtol=0, msg=name)


def test_trainer_evaluates_the_sparse_model_and_what_it_saves_is_unpatched(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in random_ids(4, 30)]
    model = small()
    trainer = trainer_of(model, tmp_path, data)
    with torch.inference_mode():
        batches = DataLoader(data, batch_size=2)
        expected = sum(float(model(**batch).loss) for batch in batches) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert not is_patched(loaded)
    with torch.inference_mode():
        ids = random_ids(1, 30)
        assert torch.equal(loaded.eval()(ids).logits, unpatch_model(model.eval())(ids).logits)


def test_train_and_eval_change_neither_the_patch_nor_the_output():
    model, ids = small(), random_ids(1, 40)
    with torch.inference_mode():
        before = model(ids).logits
        assert torch.equal(model.train()(ids).logits, before)
        assert torch.equal(model.eval()(ids).logits, before)


def test_state_goes_in_and_out_of_a_patched_model_as_of_any(tmp_path):
    model, ids = small(), random_ids(1, 40)
    plain = tiny_model("llama")
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.inference_mode():
        assert torch.equal(patch_model(plain, 2.0, 0.5, selection="topk")(ids).logits, model(ids).logits)
        other = copy.deepcopy(model)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert nc_stats(other)["layers"][0]["calls"] == nc_stats(model)["layers"][0]["calls"]

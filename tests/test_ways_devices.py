"""Models over several devices, off the device, over processes, and in fewer bits: the numbers stay."""

import tempfile

import pytest
import torch
from processes import start_call
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM
from ways import EACH_FAMILY, FULL, SMALL, attended_fraction, small

from eval_tasks.processes import free_port
from nc_patch import UnsupportedModelError, is_patched, patch_model, unpatch_model
from nc_patch.hooks import hand_on_mask
from nc_patch.masks import interval_mask
from nc_patch.visibility import is_packed, made_for

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module  # noqa: E402


def offload_to_cpu(model, directory):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, directory):
    accelerate.disk_offload(model, directory, execution_device=torch.device("cpu"))
    return model


def dispatch(model, directory):
    """A device map that leaves every second layer on disk."""
    inner = model.model
    places = {f"model.{name}": "cpu" for name, _ in inner.named_children() if name != "layers"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(inner.layers))}
    places |= {name: "cpu" for name, _ in model.named_children() if name != "model"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=directory, force_hooks=True)


OFFLOADS = {"cpu": offload_to_cpu, "disk": offload_to_disk, "dispatched": dispatch}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_offloaded_weights_change_no_number_patched_before_or_after(family, offload, tmp_path):
    ids = random_ids(2, 40)
    for budget, reference in ((FULL, tiny_model(family)), (SMALL, small(family))):
        expected = reference(ids).logits.detach()
        text = reference.generate(ids, max_new_tokens=4, do_sample=False)
        for first in ("patch", "offload"):
            model = tiny_model(family)
            steps = {
                "patch": lambda m, budget=budget: patch_model(m, *budget, selection="topk"),
                "offload": lambda m: OFFLOADS[offload](m, tempfile.mkdtemp(dir=tmp_path)),
            }
            for step in sorted(steps, key=lambda name, first=first: name != first):
                steps[step](model)
            torch.testing.assert_close(model(ids).logits.detach(), expected, atol=2e-5, rtol=0)
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
            assert (attended_fraction(model) == 1.0) == (budget == FULL)
        unpatch_model(model)
        torch.testing.assert_close(model(ids).logits, tiny_model(family)(ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_model_loaded_by_a_device_map_is_patched_as_any(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    implementation = tiny_model(family).config._attn_implementation
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", attn_implementation=implementation)
    ids = random_ids(2, 40)
    with torch.inference_mode():
        assert torch.equal(patch_model(model, *SMALL, selection="topk")(ids).logits, small(family)(ids).logits)
        assert torch.equal(unpatch_model(model)(ids).logits, tiny_model(family)(ids).logits)


def run_a_rank(directory, out):
    """One of the processes that hold a model together: logits for each budget, and what per-head laws say."""
    ids = torch.load(f"{directory}/ids.pt")
    model = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto").eval()
    found = {}
    for name, budget in (("full", FULL), ("small", SMALL)):
        patch_model(model, *budget, selection="topk", dense_below=0)
        with torch.inference_mode():
            found[name] = model(ids).logits
        found[f"{name} text"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    patch_model(model, [[1.0, 2.0, 3.0, 4.0]] * 3, 0.5, selection="topk", dense_below=0)
    try:
        model(ids)
    except UnsupportedModelError as error:
        found["per head"] = str(error)
    torch.save(found, out)
    torch.distributed.destroy_process_group()


def test_a_model_over_two_processes_gives_the_numbers_of_one(tmp_path):
    model, ids = tiny_model("llama"), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outs = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    ranks = []
    for rank, out in enumerate(outs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = out.with_suffix(".said")
        ranks.append(start_call(run_a_rank, str(tmp_path), str(out), said=said, **place, **shared))
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], outs[0].with_suffix(".said").read_text()
    for out in outs:
        found = torch.load(out)
        for name, reference in (("full", model), ("small", small())):
            torch.testing.assert_close(found[name], reference(ids).logits.detach(), atol=2e-5, rtol=0)
            text = reference.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert torch.equal(found[f"{name} text"], text)
        assert "given for 4 heads, LlamaAttention has 2 in this process" in found["per head"]


def int8_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def int8_quanto(model):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def int8_bitsandbytes(model):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                quantised = bitsandbytes.nn.Linear8bitLt(
                    linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
                )
                quantised.load_state_dict(linear.state_dict())
                setattr(module, name, quantised.to("cpu"))
    return model


QUANTISED = {"torchao": int8_torchao, "quanto": int8_quanto, "bitsandbytes": int8_bitsandbytes}


@pytest.mark.parametrize("library", QUANTISED)
def test_quantised_weights_give_dense_with_a_full_budget_and_the_row_alone_with_a_small_one(library):
    ids = random_ids(2, 40)
    model = QUANTISED[library](tiny_model("llama"))
    with torch.inference_mode():
        dense = model(ids).logits
        assert not torch.equal(dense, tiny_model("llama")(ids).logits)
        torch.testing.assert_close(patch_model(model, *FULL, selection="topk")(ids).logits, dense, atol=1e-4, rtol=0)
        sparse = patch_model(model, *SMALL, selection="topk")(ids).logits
        assert not torch.allclose(sparse, dense, atol=1e-2)
        for row in range(2):
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], sparse[row], atol=1e-3, rtol=0)
    assert is_patched(model)


def test_a_mask_is_moved_to_a_device_once_for_all_layers_there():
    model, mask = small(), interval_mask(1, 5, 5)
    layers = list(model.model.layers)
    for layer in layers:
        add_hook_to_module(layer, SequentialHook(ModelHook(), AlignDevicesHook(execution_device="meta")))
    moved = [hand_on_mask(layer, (), {"attention_mask": mask})[1]["attention_mask"] for layer in layers]
    assert moved[0].device.type == "meta"
    assert is_packed(moved[0])
    assert made_for(moved[0]) == 5
    assert all(each is moved[0] for each in moved)
    assert all(hand_on_mask in layer._forward_pre_hooks.values() for layer in layers)
    unpatch_model(model)
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_a_mask_that_is_where_its_layer_is_stays():
    model, mask = small(), interval_mask(1, 5, 5)
    layer = model.model.layers[0]
    assert hand_on_mask(layer, (), {"attention_mask": mask}) is None
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    assert hand_on_mask(layer, (), {"attention_mask": mask}) is None

"""Models over devices, processes and threads, in fewer bits: the numbers stay, or the way is refused."""

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import ways
from processes import run_ranks
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM
from ways import EACH_FAMILY, FULL, SMALL, TOPK, assert_close, attended_fraction, full_and_small, generated, small

from nc_patch import UnsupportedModelError, nc_stats, patch_model, reset_stats, unpatch_model
from nc_patch.layers import hand_on_mask
from nc_patch.masks import interval_mask
from nc_patch.visibility import begins_by, is_packed, made_for

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

# Devices


def dispatch(model, directory):
    """A device map that leaves a layer on disk."""
    names = [*model.model.named_children(), *((f"layers.{i}", layer) for i, layer in enumerate(model.model.layers))]
    places = {f"model.{name}": "disk" if name == "layers.1" else "cpu" for name, _ in names if name != "layers"}
    places |= {name: "cpu" for name, _ in model.named_children() if name != "model"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=directory, force_hooks=True)


def load_by_a_device_map(model, directory):
    model.save_pretrained(directory)
    implementation = {"attn_implementation": model.config._attn_implementation}
    return AutoModelForCausalLM.from_pretrained(directory, device_map="auto", **implementation)


@pytest.mark.parametrize("place", [dispatch, load_by_a_device_map])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_where_weights_lie_changes_no_number_patched_before_or_after(family, place, tmp_path):
    ids, dense = random_ids(2, 40), tiny_model(family)
    for budget, reference in ((FULL, dense), (SMALL, small(family))):
        expected, text = reference(ids).logits.detach(), generated(reference, ids)
        for patch_first in (True, False) if place is not load_by_a_device_map else (False,):
            model = tiny_model(family)
            if patch_first:
                patch_model(model, *budget, **TOPK)
            model = place(model, tempfile.mkdtemp(dir=tmp_path))
            if not patch_first:
                patch_model(model, *budget, **TOPK)
            assert_close(model(ids).logits.detach(), expected)
            assert torch.equal(generated(model, ids), text)
            assert (attended_fraction(model) == 1.0) == (budget == FULL)
        assert torch.equal(unpatch_model(model)(ids).logits, dense(ids).logits)


def run_a_rank(directory, out):
    """One of the processes that hold a model together: logits for each budget, and what per-head laws say."""
    ids = torch.load(f"{directory}/ids.pt")
    model = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto").eval()
    found = {}
    for name, budget in (("full", FULL), ("small", SMALL)):
        patch_model(model, *budget, **TOPK, dense_below=0)
        with torch.inference_mode():
            found[name] = model(ids).logits
        found[f"{name} text"] = generated(model, ids)
    patch_model(model, [[1.0, 2.0, 3.0, 4.0]] * 3, 0.5, **TOPK, dense_below=0)
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
    outs = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    codes, said = run_ranks(tmp_path, run_a_rank, *((str(tmp_path), str(out)) for out in outs))
    assert codes == [0, 0], said
    for out in outs:
        found = torch.load(out)
        for name, reference in (("full", model), ("small", small())):
            assert_close(found[name], reference(ids).logits.detach())
            assert torch.equal(found[f"{name} text"], generated(reference, ids))
        assert "given for 4 heads, LlamaAttention has 2 in this process" in found["per head"]


# Fewer bits


def under_autocast(model, dtype):
    if hasattr(model.config, "num_local_experts"):
        pytest.skip("transformers cannot: its experts do not run under autocast")
    model.forward = torch.autocast("cpu", dtype=dtype)(model.forward)


# By how much of the norm of a token's logits rounding may change them.
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of the tokens of a model with experts: rounding sends one to another expert where two score nearly the same.
OTHER_EXPERT = 0.1


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("take", [torch.nn.Module.to, under_autocast])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_in_fewer_bits_logits_are_those_of_dense_and_of_the_row_alone_whenever_they_are_taken(family, take, dtype):
    rows, dense = ways.rows_of(3), tiny_model(family)
    whole = dense(rows[0][None]).logits
    take(dense, dtype)
    assert not torch.equal(dense(rows[0][None]).logits.float(), whole)
    for settings in (TOPK, ways.UNASKED):
        with torch.inference_mode():
            for model, reference in full_and_small(family, **settings):
                for each in {model, reference}:
                    take(each, dtype)
                for found, row in zip(ways.in_a_batch(model, rows), ways.alone(reference, rows), strict=True):
                    assert found.dtype == row.dtype
                    error = (found - row).float().norm(dim=-1) / row.float().norm(dim=-1)
                    has_experts = hasattr(model.config, "num_local_experts")
                    assert (error > ROUNDING[dtype]).float().mean() <= (OTHER_EXPERT if has_experts else 0)
            take(before := tiny_model(family), dtype)
            expected = patch_model(before, *SMALL, **settings)(rows[0][None]).logits
            assert torch.equal(model(rows[0][None]).logits, expected)
            assert torch.equal(unpatch_model(model)(rows[0][None]).logits, dense(rows[0][None]).logits)


# Calls


def test_attention_weights_are_refused_by_name():
    model, ids = small(), random_ids(1, 20)
    with pytest.raises(UnsupportedModelError, match=r"asks for attention weights \(output_attentions\)"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_patched_model_that_was_switched_to_another_implementation_does_not_run_dense_in_silence(family):
    model, eager, ids = small(family), tiny_model(family), random_ids(1, 20)
    model.set_attn_implementation("eager")
    eager.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match=r"is patched, but .* set to 'eager' since.*unpatch_model"):
        model(ids)
    with torch.inference_mode():
        assert torch.equal(unpatch_model(model)(ids).logits, eager(ids).logits)
        assert torch.equal(patch_model(model, *SMALL, **TOPK)(ids).logits, small(family)(ids).logits)
    assert unpatch_model(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("settings", [TOPK, ways.UNASKED], ids=["topk", "unasked"])
def test_threads_that_generate_on_one_model_get_what_one_alone_gets_and_every_call_is_counted(settings):
    model, prompts = small(**settings), [random_ids(1 + i % 2, 20 + 15 * i) for i in range(4)]
    alone = [generated(model, prompt) for prompt in prompts]
    expected, together = nc_stats(model), threading.Barrier(4)
    reset_stats(model)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda prompt: (together.wait(), generated(model, prompt))[1], prompts)
        assert all(map(torch.equal, found, alone))
    stats = nc_stats(model)
    assert [layer["calls"] for layer in stats["layers"]] == [layer["calls"] for layer in expected["layers"]]
    assert stats["mean_keys"] == pytest.approx(expected["mean_keys"])


def test_a_mask_is_moved_to_a_device_once_for_all_layers_there_and_stays_where_it_is_right():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, mask = small(), interval_mask(1, 5, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    layers = list(model.model.layers)
    hooks.add_hook_to_module(layers[0], hooks.AlignDevicesHook(execution_device="cpu"))
    assert [hand_on_mask(layer, (), {"attention_mask": mask}) for layer in layers] == [None] * 3
    for layer in layers:
        hooks.add_hook_to_module(
            layer, hooks.SequentialHook(hooks.ModelHook(), hooks.AlignDevicesHook(execution_device="meta"))
        )
    moved = [hand_on_mask(layer, (), {"attention_mask": mask})[1]["attention_mask"] for layer in layers]
    assert all(each is moved[0] for each in moved)
    assert (moved[0].device.type, is_packed(moved[0])) == ("meta", True)
    assert (made_for(moved[0]), begins_by(moved[0])) == (5, (1, 0))

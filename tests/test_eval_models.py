"""Models by name, and what is loaded of each."""

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from tiny_sweep import tiny_files
from transformers import AutoModelForCausalLM

from eval_tasks import smollm2
from eval_tasks.errors import EvalError
from eval_tasks.models import attention_of, find_model, load_model
from nc_patch.calibration.fingerprint import weights_fingerprint


def test_paths_are_told_from_hub_names(tmp_path):
    assert find_model("org/name").location == "org/name"
    assert find_model("org/name", "v2").options == {"revision": "v2", "trust_remote_code": False}
    (tmp_path / "some.gguf").write_bytes(b"")
    gguf = find_model(str(tmp_path / "some.gguf"))
    assert (gguf.location, gguf.options["gguf_file"]) == (str(tmp_path), "some.gguf")
    with pytest.raises(EvalError, match="must be a directory with"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_in_its_dtype_with_an_implementation_it_has_and_eager_is_said(tmp_path, family, capsys):
    _, directory, *_ = tiny_files(tmp_path, family)
    loaded = load_model(directory, "auto", "cpu").model
    implementation = FAMILIES[family][3]
    assert (attention_of(loaded), loaded.training) == (implementation, False)
    assert ("runs eagerly" in capsys.readouterr().err) == (implementation == "eager")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(random_ids(1, 24)).logits, tiny_model(family)(random_ids(1, 24)).logits)
    assert load_model(directory, "bfloat16", "cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_fingerprint_is_that_of_the_weights_wherever_they_are_offloaded(tmp_path, tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    expected = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "lm_head"), "cpu" if tied else "disk")
    places |= {"model.layers": "disk", "model.norm": "disk", "model.rotary_emb": "cpu"}
    folder = str(tmp_path / "offload")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert weights_fingerprint(model) == expected
    model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(3, device="meta")))
    with pytest.raises(ValueError, match=r"lm_head.bias is on the meta device and holds no weights"):
        weights_fingerprint(model)


@pytest.mark.slow
def test_the_converted_model_has_the_bits_of_the_packaged_one_and_is_converted_once(monkeypatch):
    gguf, _ = smollm2._packaged_gguf()
    packaged = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    smollm2.smollm2_directory()
    monkeypatch.setattr(smollm2, "convert_gguf", None)
    assert weights_fingerprint(load_model("smollm2", "float32", "cpu").model) == weights_fingerprint(packaged)

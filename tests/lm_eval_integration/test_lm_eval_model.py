"""The lm-eval model ``nc_hf`` on a tiny random model: its arguments, what it computes, caches, records and refuses."""

import shutil
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval_case import LENGTHS, figures
from profiles import made_up_profile
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf
from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.model import NCHFLM, read_config, split_arguments
from eval_tasks.texts import python_reference
from nc_patch import NCConfig
from nc_patch.selections import Block, TopK


def small_model(pretrained, name="nc_hf", **options):
    """A model of lm-eval, sparse with C = 0.5 where nothing else is said."""
    budget = {"alpha": 2, "C": 0.5} if name == "nc_hf" else {}
    given = str(pretrained) if isinstance(pretrained, Path) else pretrained
    return get_model(name)(**{"pretrained": given, "device": "cpu", "dtype": "float32", **budget, **options})


def one_score(model):
    request = Instance("loglikelihood", {}, ("abc " * 60, "abc"), 0)
    return model.loglikelihood([request], disable_tqdm=True)[0][0]


def test_processes_of_several_machines_share_the_documents(model_dir, monkeypatch):
    taken, model = [], AutoModelForCausalLM.from_pretrained(model_dir)

    def init(self, rank, **_):
        self._model, self._rank, self._world_size = model, rank % 2, 4  # its number on its own machine
        self.accelerator = SimpleNamespace(process_index=rank, local_process_index=rank % 2)

    for rank in range(4):
        monkeypatch.setattr(HFLM, "__init__", partialmethod(init, rank))
        lm = NCHFLM(str(model_dir), alpha=2, C=0.5)
        taken += range(lm.rank, 10, lm.world_size)  # as lm-eval deals documents out
    assert sorted(taken) == list(range(10))


def test_a_dense_budget_gives_the_figures_of_hf_and_results_name_the_settings_and_what_was_attended(evaluate):
    dense = figures(evaluate("hf"))
    assert len(dense) == 2 * len(LENGTHS)
    assert figures(evaluate("nc_hf", alpha=1, C=1)) == pytest.approx(dense, rel=1e-5)
    settings = {"alpha": 1.0, "C": 0.5, "selection": "topk", "sink_keys": 2, "tail": "drop", "dense_below": 0}
    results = evaluate("nc_hf", **settings)
    assert results["config"]["nc_config"] == NCConfig(**settings).to_dict()
    assert 0 < results["config"]["nc_attended_fraction"] < 0.5
    assert figures(results)["perplexity_160"] != pytest.approx(dense["perplexity_160"], rel=1e-3)


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
def test_scores_and_generated_text_do_not_depend_on_the_batch(model_dir, selection, forwards):
    words, options = python_reference()[0].split(), {"until": ["</s>"], "max_gen_toks": 12}
    texts = [" ".join(words[i * 100 : i * 100 + n]) for i, n in enumerate((3, 20, 21, 30, 35, 7))]
    scored = [Instance("loglikelihood", {}, (text, " " + " ".join(words[-8:])), 0) for text in texts]
    asked = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    model = small_model(model_dir, alpha=1.5, selection=selection, block_size=16)
    alone, said = model.loglikelihood(scored, disable_tqdm=True), model.generate_until(asked, disable_tqdm=True)
    forwards.clear()
    model.batch_size_per_gpu = 4
    scores = [score for score, _ in model.loglikelihood(scored, disable_tqdm=True)]
    assert scores == pytest.approx([score for score, _ in alone], abs=1e-3)
    assert max(forwards) == (1 if selection == "block" else 4)
    assert model.batch_size == 4
    assert all(said)
    assert selection == "block" or model.generate_until(asked, disable_tqdm=True) == said


def test_a_loaded_model_is_patched_too(model_dir):
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = one_score(small_model(loaded, tokenizer=AutoTokenizer.from_pretrained(model_dir)))
    assert found == pytest.approx(one_score(small_model(model_dir)), abs=1e-5)
    assert found != pytest.approx(one_score(small_model(model_dir, "hf")), abs=1e-3)


def test_adapters_stay_when_the_model_is_patched(model_dir, tmp_path):
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), settings).save_pretrained(tmp_path)
    adapted = one_score(small_model(model_dir, "hf", peft=str(tmp_path)))
    assert one_score(small_model(model_dir, peft=str(tmp_path), alpha=1, C=1)) == pytest.approx(adapted, abs=1e-4)
    assert one_score(small_model(model_dir, alpha=1, C=1)) != pytest.approx(adapted, abs=1e-3)
    assert one_score(small_model(model_dir, peft=str(tmp_path))) != pytest.approx(adapted, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": None}, "alpha missing: .* or profile=FILE"),
        ({"sink_key": 4}, "unexpected keyword argument 'sink_key'; nc_hf takes alpha, C, prefill"),
        ({"nc_config": "absent.json"}, "leave out alpha"),
        ({"nc_config": "x.json", "profile": made_up_profile(), "alpha": None, "C": None}, "leave out profile"),
        ({"profile": made_up_profile(), "C": None}, "a profile brings alpha of its own"),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_read(model_dir, tmp_path, monkeypatch, arguments, message):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EvalError, match=message):
        small_model(**{"pretrained": tmp_path, **arguments})


def test_the_response_cache_tells_settings_and_weights_apart(model_dir, evaluate, tmp_path, forwards):
    copy = shutil.copytree(model_dir, tmp_path / "model")

    def run(**arguments):
        forwards.clear()
        options = {"use_cache": str(tmp_path / "cache" / "of"), "device": "cpu"}
        return figures(evaluate(**arguments, pretrained=str(copy), options=options)), len(forwards)

    first, calls = run(model="nc_hf", alpha=2, C=0.5)
    assert calls == 4 * len(LENGTHS)
    assert run(model="nc_hf", alpha=2.0, C=0.5) == (first, 0)
    for other in ({"model": "nc_hf", "alpha": 4, "C": 0.5}, {"model": "hf"}):
        found, calls = run(**other)
        assert calls == 4 * len(LENGTHS)
        assert found != pytest.approx(first, rel=1e-4)
    changed = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(copy)
    assert run(model="nc_hf", alpha=2, C=0.5)[0] != pytest.approx(first, rel=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_of_built_requests_tells_lengths_apart(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    fresh = figures(evaluate("hf", lengths=[64, 96]))
    evaluate("hf", lengths=[48, 96], options={"cache_requests": True})
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert len(list(tmp_path.iterdir())) == 2


def test_model_arguments_become_settings():
    for given, meant in (
        ({"prefill": "block", "block_size": 16, "tail": "drop"}, {"prefill": Block(16), "decode": TopK(tail="drop")}),
        ({"dense_layers": "0+1+29"}, {"dense_layers": (0, 1, 29)}),
        ({"dense_layers": 3}, {"dense_layers": (3,)}),
    ):
        assert read_config({"alpha": 2, "C": 0.5, **given}) == NCConfig(2.0, 0.5, **meant)
    # A backend is one of the kernels, or lm-eval's kind of model.
    assert split_arguments({"backend": "torch", "dtype": "auto"}) == ({"backend": "torch"}, {"dtype": "auto"})
    assert split_arguments({"backend": "causal", "alpha": 1}) == ({"alpha": 1}, {"backend": "causal"})


def test_settings_come_from_a_file_or_a_profile(tmp_path):
    config = NCConfig((1.0, 2.0), (0.5, 0.7), prefill="window", dense_layers=(1,))
    file, profile = tmp_path / "settings.json", made_up_profile().at_mass(0.9)
    file.write_text(config.to_json())
    assert read_config({}, str(file)) == config
    options = {"tail": "drop", "selection": "topk", "dense_layers": (0, 1)}
    assert read_config(options, profile=profile) == profile.config(**options)

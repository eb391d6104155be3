"""The lm-eval model ``nc_hf`` on a tiny random model: what it computes, records and refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval_case import LENGTHS, figures
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf
from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.model import NCHFLM
from nc_patch import NCConfig, UnsupportedModelError, calibrate


def test_nc_hf_is_registered() -> None:
    assert get_model("nc_hf").__name__ == "NCHFLM"


def test_processes_of_several_machines_share_the_documents(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    model = AutoModelForCausalLM.from_pretrained(model_dir)

    def launched(machine: int, local: int) -> Callable[..., None]:
        def init(self: Any, **_: Any) -> None:
            self._model = model
            self.accelerator = SimpleNamespace(process_index=2 * machine + local, local_process_index=local)
            self._rank, self._world_size = self.accelerator.local_process_index, 4

        return init

    for machine in (0, 1):
        for local in (0, 1):
            monkeypatch.setattr(HFLM, "__init__", launched(machine, local))
            lm = NCHFLM(str(model_dir), alpha=2, C=0.5)
            taken += range(lm.rank, 10, lm.world_size)  # as lm-eval deals documents out
    assert sorted(taken) == list(range(10))


def test_a_dense_budget_gives_the_figures_of_hf(evaluate: Callable[..., Any]) -> None:
    dense = figures(evaluate("hf"))
    assert len(dense) == 2 * len(LENGTHS)
    assert figures(evaluate("nc_hf", alpha=1, C=1)) == pytest.approx(dense, rel=1e-5)


def test_results_name_the_settings_and_what_was_attended(evaluate: Callable[..., Any]) -> None:
    results = evaluate("nc_hf", alpha=2.0, C=0.5, selection="topk", sink_keys=2, tail="drop", dense_below=0)
    assert (
        results["config"]["nc_config"]
        == NCConfig(2.0, 0.5, selection="topk", sink_keys=2, tail="drop", dense_below=0).to_dict()
    )
    assert 0 < results["config"]["nc_attended_fraction"] < 0.5
    json.dumps(results["config"], default=str)
    dense = evaluate("hf")
    assert figures(results)["perplexity_160"] != pytest.approx(figures(dense)["perplexity_160"], rel=1e-3)


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
def test_scores_do_not_depend_on_the_batch(model_dir: Path, text: Path, selection: str, forwards: list[int]) -> None:
    words = text.read_text().split()
    requests = [
        Instance("loglikelihood", {}, (" ".join(words[i * 100 : i * 100 + n]), " " + " ".join(words[-8:])), 0)
        for i, n in enumerate((3, 20, 21, 30, 35, 7))
    ]
    settings = {"alpha": 1.5, "C": 0.5, "selection": selection, "block_size": 16, "dtype": "float32"}
    model = get_model("nc_hf")(str(model_dir), device="cpu", batch_size=1, **settings)
    alone = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
    forwards.clear()
    model.batch_size_per_gpu = 4
    assert [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(alone, abs=1e-3)
    assert max(forwards) == (1 if selection == "block" else 4)
    assert model.batch_size == 4


@pytest.mark.parametrize("selection", ["topk", "window"])
def test_generated_text_does_not_depend_on_the_batch(model_dir: Path, text: Path, selection: str) -> None:
    words = text.read_text().split()
    requests = [
        Instance(
            "generate_until", {}, (" ".join(words[i * 50 : i * 50 + n]), {"until": ["</s>"], "max_gen_toks": 12}), 0
        )
        for i, n in enumerate((2, 14, 30))
    ]
    model = get_model("nc_hf")(str(model_dir), device="cpu", alpha=1.5, C=0.5, selection=selection, dtype="float32")
    alone = model.generate_until(requests, disable_tqdm=True)
    model.batch_size_per_gpu = 3
    assert model.generate_until(requests, disable_tqdm=True) == alone
    assert all(alone)


def test_a_loaded_model_is_patched_too(model_dir: Path, evaluate: Callable[..., Any]) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_model("nc_hf")(loaded, alpha=2, C=0.5, tokenizer=AutoTokenizer.from_pretrained(model_dir))
    request = Instance("loglikelihood", {}, ("abc " * 60, "abc"), 0)
    by_name = get_model("nc_hf")(str(model_dir), alpha=2, C=0.5, dtype="float32", device="cpu")
    dense = get_model("hf")(str(model_dir), dtype="float32", device="cpu")
    score = model.loglikelihood([request], disable_tqdm=True)[0][0]
    assert score == pytest.approx(by_name.loglikelihood([request], disable_tqdm=True)[0][0], abs=1e-5)
    assert score != pytest.approx(dense.loglikelihood([request], disable_tqdm=True)[0][0], abs=1e-3)


def test_adapters_stay_when_the_model_is_patched(model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), settings).save_pretrained(tmp_path)
    request = [Instance("loglikelihood", {}, ("abc " * 60, "abc"), 0)]
    arguments = {"pretrained": str(model_dir), "dtype": "float32", "device": "cpu"}
    score = lambda name, **more: get_model(name)(**arguments, **more).loglikelihood(request, disable_tqdm=True)[0][0]  # noqa: E731
    adapted = score("hf", peft=str(tmp_path))
    assert score("nc_hf", peft=str(tmp_path), alpha=1, C=1) == pytest.approx(adapted, abs=1e-4)
    assert score("nc_hf", alpha=1, C=1) != pytest.approx(adapted, abs=1e-3)
    assert score("nc_hf", peft=str(tmp_path), alpha=2, C=0.5) != pytest.approx(adapted, abs=1e-3)


# What must be refused before the weights are read


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"C": 0.5}, "alpha is missing"),
        ({"alpha": -1, "C": 0.5}, "alpha must be a positive number"),
        ({"alpha": 2, "C": 0.5, "sink_key": 4}, r"sink_key \(is it sink_keys\?\).*nc_hf takes alpha, C, prefill"),
        ({"alpha": 2, "C": 0.5, "dense_layers": "0+7"}, r"dense_layers names layers \[7\]"),
        ({"alpha": [1, 2, 3], "C": 0.5}, "alpha has 3 layers, the model has 2"),
        ({"alpha": 2, "C": 0.5, "pretrained": "/absent/model"}, "no model at /absent/model"),
        ({"alpha": 2, "C": 0.5, "pretrained": None}, "pretrained is missing"),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_read(
    model_dir: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_model("nc_hf")(**{"pretrained": str(model_dir), "device": "cpu", **arguments})


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_cannot_be_patched_is_refused_before_its_weights_are_read(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=400).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError):
        get_model("nc_hf")(str(tmp_path), alpha=2, C=0.5, device="cpu")


def test_an_argument_that_nothing_takes_is_refused_with_the_allowed_names(model_dir: Path) -> None:
    with pytest.raises(EvalError, match=r"frobnicate.*nc_hf takes alpha, C"):
        get_model("nc_hf")(str(model_dir), alpha=2, C=0.5, device="cpu", frobnicate=1)


def test_a_profile_sets_the_budget_of_every_head(
    evaluate: Callable[..., Any], model_dir: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    profile = calibrate(model, tokenizer, [text.read_text()], (32, 64, 128), pieces=2, rows=4)
    path = tmp_path / "profile.json"
    profile.at_budget(0.3, n=128).save(path)
    results = evaluate("nc_hf", profile=str(path), selection="topk", tail="drop")
    assert (
        results["config"]["nc_config"] == profile.at_budget(0.3, n=128).config(selection="topk", tail="drop").to_dict()
    )
    assert 0.2 < results["config"]["nc_attended_fraction"] < 0.4
    with pytest.raises(EvalError, match="profile: a profile brings alpha of its own"):
        evaluate("nc_hf", profile=str(path), alpha=2.0)

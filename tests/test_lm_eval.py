"""The lm-eval model ``nc_hf``, its command line and the task ``nc_perplexity``, on a tiny random model, offline."""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import eval_tasks.lm_eval.__main__ as command
from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import misspelt, read_config, split_arguments
from eval_tasks.lm_eval.perplexity import documents
from eval_tasks.tasks import TASKS, Layout, places, tokenise
from nc_patch import NCConfig, UnsupportedModelError

ROOT = Path(__file__).parents[1]
TASKS_DIRECTORY = ROOT / "eval_tasks"
POSITIONS = 192
LENGTHS = [48, 96, 160]
SCORED = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4,000 words, some of them of several tokens."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(200)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choices(words, k=4000)) + "\n")
    return file


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A Llama of two layers with random weights, large enough that attention is uneven, and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def evaluate(text: Path, model_dir: Path) -> Callable[..., dict[str, Any]]:
    """``evaluate(model, **model_args)``: runs ``nc_perplexity`` through ``simple_evaluate`` and returns its results."""

    def run(
        model: str,
        *,
        lengths: list[int] = LENGTHS,
        options: dict[str, Any] | None = None,
        text: Path = text,
        **model_args: Any,
    ) -> Any:
        arguments = {"pretrained": str(model_dir), "dtype": "float32", **model_args}
        metadata = {**arguments, "lengths": lengths, "scored": SCORED, "samples": 4, "text": str(text)}
        manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **(options or {})}
        return simple_evaluate(
            model=model, model_args=arguments, tasks=["nc_perplexity"], task_manager=manager, **options
        )

    return run


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The metrics of ``nc_perplexity`` by name."""
    found = results["results"]["nc_perplexity"].items()
    return {name.removesuffix(",none"): value for name, value in found if name.split("_")[-1].split(",")[0].isdigit()}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the model's forward calls, one entry per call."""
    calls: list[int] = []
    forward = transformers.LlamaForCausalLM.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted)
    return calls


# Arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 2, "C": 0.5}, NCConfig(2.0, 0.5)),
        ({"alpha": "2", "C": "5e-1"}, NCConfig(2.0, 0.5)),
        ({"alpha": [1, 2.5], "C": 0.5}, NCConfig((1.0, 2.5), 0.5)),
        ({"alpha": 2, "C": 0.5, "selection": "window"}, NCConfig(2.0, 0.5, prefill="window", decode="window")),
        ({"alpha": 2, "C": 0.5, "dense_layers": "0+1+29"}, NCConfig(2.0, 0.5, dense_layers=(0, 1, 29))),
        ({"alpha": 2, "C": 0.5, "dense_layers": 3}, NCConfig(2.0, 0.5, dense_layers=(3,))),
        ({"alpha": 2, "C": 0.5, "dense_layers": [0, 1]}, NCConfig(2.0, 0.5, dense_layers=(0, 1))),
        ({"alpha": 2, "C": 0.5, "sink_keys": "8", "min_keys": 16.0}, NCConfig(2.0, 0.5, sink_keys=8, min_keys=16)),
        ({"alpha": 6, "law": "log"}, NCConfig(6.0, law="log")),
    ],
)
def test_model_arguments_become_typed_settings(options: dict[str, Any], expected: NCConfig) -> None:
    assert read_config(options) == expected


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    config = NCConfig((1.0, 2.0), (0.5, 0.7), prefill="window", dense_layers=(1,))
    file = tmp_path / "settings.json"
    file.write_text(config.to_json())
    assert read_config({}, str(file)) == read_config({}, config.to_dict()) == config
    with pytest.raises(EvalError, match="leave out alpha"):
        read_config({"alpha": 1}, str(file))
    with pytest.raises(EvalError, match="No such file"):
        read_config({}, str(tmp_path / "absent.json"))
    file.write_text("{")
    with pytest.raises(EvalError, match="not JSON"):
        read_config({}, str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": 0.5}, "alpha is missing"),
        ({"alpha": 2}, "C is missing"),
        ({"alpha": 0, "C": 0.5}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan"), "C": 0.5}, "alpha must be a positive number"),
        ({"alpha": "two", "C": 0.5}, "alpha must be a positive number"),
        ({"alpha": 2, "C": 1.5}, r"C must be a number in \[0, 1\], got 1.5"),
        ({"alpha": 2, "C": 0.5, "selection": "best"}, "selection must be one of 'topk', 'block', 'window', 'dense'"),
        ({"alpha": 2, "C": 0.5, "selection": "topk", "decode": "dense"}, "leave out decode"),
        ({"alpha": 2, "C": 0.5, "sink_keys": -1.0}, "sink_keys must be at least 0, got -1"),
        ({"alpha": 2, "C": 0.5, "block_size": 33}, "block_size must be one of"),
        ({"alpha": 2, "C": 0.5, "dense_layers": "a+b"}, "dense_layers must be an integer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        read_config(options)


def test_backend_means_the_kernels_or_lm_evals_kind_of_model() -> None:
    assert split_arguments({"backend": "torch", "dtype": "auto"}) == ({"backend": "torch"}, {"dtype": "auto"})
    assert split_arguments({"backend": "causal", "alpha": 1}) == ({"alpha": 1}, {"backend": "causal"})
    with pytest.raises(EvalError, match=r"auto, triton, torch .* default, causal, seq2seq"):
        split_arguments({"backend": "cuda"})


def test_misspelt_options_are_recognised_and_other_arguments_are_not() -> None:
    found = misspelt(["c", "alhpa", "sink_key", "dense_layer", "device_map", "attn_implementation", "use_safetensors"])
    assert found == {"c": "C", "alhpa": "alpha", "sink_key": "sink_keys", "dense_layer": "dense_layers"}


# The model


def test_nc_hf_is_registered() -> None:
    assert get_model("nc_hf").__name__ == "NCHFLM"


def test_a_dense_budget_gives_the_figures_of_hf(evaluate: Callable[..., Any]) -> None:
    dense = figures(evaluate("hf"))
    assert len(dense) == 2 * len(LENGTHS)
    assert figures(evaluate("nc_hf", alpha=1, C=1)) == pytest.approx(dense, rel=1e-5)


def test_results_name_the_settings_and_what_was_attended(evaluate: Callable[..., Any]) -> None:
    results = evaluate("nc_hf", alpha=2.0, C=0.5, sink_keys=2)
    assert results["config"]["nc_config"] == NCConfig(2.0, 0.5, sink_keys=2).to_dict()
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


# The caches of lm-eval


def test_the_response_cache_tells_settings_apart(
    evaluate: Callable[..., Any], tmp_path: Path, forwards: list[int]
) -> None:
    def run(**arguments: Any) -> tuple[dict[str, float], int]:
        forwards.clear()
        found = figures(evaluate(**arguments, options={"use_cache": str(tmp_path / "cache"), "device": "cpu"}))
        return found, len(forwards)

    first, calls = run(model="nc_hf", alpha=2, C=0.5)
    assert calls == 4 * len(LENGTHS)
    other, calls = run(model="nc_hf", alpha=4, C=0.5)
    assert calls == 4 * len(LENGTHS)
    assert other != pytest.approx(first, rel=1e-4)
    again, calls = run(model="nc_hf", alpha=2.0, C=0.5)
    assert (again, calls) == (first, 0)
    dense, calls = run(model="hf")
    assert calls == 4 * len(LENGTHS)
    assert dense != pytest.approx(first, rel=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["cache_rank0.db"]


def test_the_response_cache_tells_weights_apart(model_dir: Path, tmp_path: Path, evaluate: Callable[..., Any]) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    options = {"use_cache": str(tmp_path / "cache")}
    arguments = {"pretrained": str(tmp_path / "model"), "alpha": 2, "C": 0.5, "lengths": [48], "options": options}
    first = figures(evaluate("nc_hf", **arguments))
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(tmp_path / "model")
    assert figures(evaluate("nc_hf", **arguments)) != pytest.approx(first, rel=1e-4)


def test_the_cache_of_built_requests_tells_lengths_apart(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    fresh = figures(evaluate("hf", lengths=[64, 96]))
    evaluate("hf", lengths=[48, 96], options={"cache_requests": True})
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert len(list(tmp_path.iterdir())) == 2


# The task


def test_figures_are_those_of_the_harness_where_every_token_is_a_word(
    model_dir: Path, tmp_path: Path, evaluate: Callable[..., Any]
) -> None:
    file = tmp_path / "letters.txt"
    file.write_text(" ".join(random.Random(2).choices("abcdefgh", k=2000)))
    tokens = tokenise(AutoTokenizer.from_pretrained(model_dir), file.read_text())
    layout = Layout(tuple(LENGTHS), samples=4, scored=SCORED, passage=0, seed=0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = figures(evaluate("hf", text=file))
    for length in LENGTHS:
        losses = []
        for place in places(tokens, layout):
            sample = TASKS["perplexity"].build(tokens, place, length, layout)
            ids = torch.tensor(sample.ids)
            logp = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])
            losses.append(-logp[-sample.scored :].mean().item())
        assert found[f"perplexity_{length}"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_figures_are_those_of_the_model_on_the_same_tokens(
    model_dir: Path, text: Path, evaluate: Callable[..., Any]
) -> None:
    rows = documents(pretrained=str(model_dir), lengths=LENGTHS, scored=SCORED, samples=4, text=str(text))["test"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    found = figures(evaluate("hf", dtype="float64"))
    for index, length in enumerate(LENGTHS):
        total, tokens, size = 0.0, 0, 0
        for row in rows:
            context = tokenizer(row["contexts"][index])["input_ids"]
            ids = torch.tensor(context + tokenizer(row["continuation"])["input_ids"])
            logp = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])[len(context) - 1 :]
            total, tokens, size = total + logp.sum().item(), tokens + len(logp), size + len(row["continuation"])
        assert found[f"perplexity_{length}"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
        assert found[f"bits_per_byte_{length}"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_every_length_scores_the_same_tokens_of_each_passage(model_dir: Path, text: Path) -> None:
    rows = documents(pretrained=str(model_dir), lengths=LENGTHS, scored=SCORED, text=str(text))["test"]
    source = text.read_text()
    assert len(rows) == 16
    ends = set()
    for row in rows:
        wholes = [context + row["continuation"] for context in row["contexts"]]
        assert all(longer.endswith(shorter) for shorter, longer in pairwise(wholes))
        assert wholes[-1] in source
        assert all(n - 9 <= got <= n for got, n in zip(row["context_tokens"], LENGTHS, strict=True))
        assert len(set(row["scored_tokens"])) == 1
        assert SCORED - 8 <= row["scored_tokens"][0] <= SCORED
        ends.add(source.index(wholes[-1]) + len(wholes[-1]))
    assert len(ends) == len(rows)


def test_a_limit_takes_passages_at_every_length(evaluate: Callable[..., Any], forwards: list[int]) -> None:
    results = evaluate("hf", options={"limit": 1})
    assert len(forwards) == len(LENGTHS)
    assert set(figures(results)) == {f"{name}_{n}" for name in ("perplexity", "bits_per_byte") for n in LENGTHS}


def test_default_lengths_are_those_the_model_has_positions_for(model_dir: Path, text: Path) -> None:
    rows = documents(tokenizer=str(model_dir), max_length=600, samples=4, text=str(text))["test"]
    assert rows[0]["lengths"] == [512]


def test_special_tokens_count_towards_the_length(model_dir: Path, text: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(tmp_path)
    row = documents(tokenizer=str(tmp_path), lengths=[64], scored=SCORED, samples=1, text=str(text))["test"][0]
    ids = AutoTokenizer.from_pretrained(tmp_path).encode(row["contexts"][0] + row["continuation"])
    assert ids[0] == 0
    assert len(ids) - 1 == row["context_tokens"][0] <= 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [48, POSITIONS + 1]}, rf"\[{POSITIONS + 1}\] exceed the {POSITIONS} positions"),
        ({"lengths": [SCORED - 1]}, "too short for the task perplexity"),
        ({"lengths": ["48"]}, "lengths must be a list of integers"),
        ({"lengths": []}, "lengths must be a list of integers"),
        ({}, f"the model has {POSITIONS} positions: give lengths"),
        ({"lengths": [48], "scored": 0}, "scored must be a positive integer"),
        ({"lengths": [48], "samples": 0}, "samples must be a positive integer"),
        ({"lengths": [48], "text": "/absent.txt"}, "no text named '/absent.txt'"),
        ({"lengths": [48], "pretrained": None}, "give pretrained=.* or tokenizer="),
    ],
)
def test_bad_settings_of_the_task_are_refused(
    model_dir: Path, text: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        documents(**{"pretrained": str(model_dir), "text": str(text), "scored": SCORED, **settings})


def test_a_text_without_room_or_without_words_is_refused(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    settings = {"pretrained": str(model_dir), "lengths": [96], "scored": SCORED, "text": str(file)}
    file.write_text("abc def")
    with pytest.raises(EvalError, match="the text has 5 tokens"):
        documents(**settings)
    file.write_text("x" * 5000)
    with pytest.raises(EvalError, match="too few spaces"):
        documents(**settings)


# The command line


def run_command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


def task_arguments(model_dir: Path, text: Path, output: Path) -> list[str]:
    metadata = json.dumps({"lengths": [48, 96], "scored": SCORED, "samples": 2, "text": str(text)})
    shared = ["--tasks", "nc_perplexity", "--device", "cpu", "--metadata", metadata, "--output_path", str(output)]
    return [*shared, "--model_args", f"pretrained={model_dir},dtype=float32"]


def written_results(directory: Path) -> dict[str, Any]:
    (file,) = directory.rglob("results_*.json")
    return json.loads(file.read_text())


@pytest.fixture
def our_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``main`` on arguments, without lm-eval's own thousands of tasks, whose index takes seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: TaskManager(include_defaults=False, **options))

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        command.main()

    return run


def test_the_stock_command_runs_the_task(model_dir: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--model", "hf", "--include_path", str(TASKS_DIRECTORY), *task_arguments(model_dir, text, tmp_path)]
    done = run_command("lm_eval", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = written_results(tmp_path)["results"]
    assert list(results) == ["nc_perplexity"]
    assert results["nc_perplexity"]["perplexity_96,none"] > 1


def test_our_command_runs_nc_hf(model_dir: Path, text: Path, tmp_path: Path, our_command: Callable[..., None]) -> None:
    arguments = task_arguments(model_dir, text, tmp_path)
    our_command("run", "--model", "nc_hf", *arguments, "alpha=2,C=0.5,selection=window,dense_layers=0+1")
    written = written_results(tmp_path)
    assert written["config"]["nc_config"] == NCConfig.create(2, 0.5, selection="window", dense_layers=(0, 1)).to_dict()
    assert written["results"]["nc_perplexity"]["perplexity_96,none"] > 1


def test_our_command_takes_the_users_tasks_too(tmp_path: Path, our_command: Callable[..., None], capsys: Any) -> None:
    (tmp_path / "mine.yaml").write_text("task: my_task\noutput_type: loglikelihood\n")
    our_command("ls", "subtasks", "--include_path", str(tmp_path))
    printed = capsys.readouterr().out
    assert "my_task" in printed
    assert "nc_perplexity" in printed


@pytest.mark.parametrize(
    ("model_args", "metadata", "message"),
    [
        (["alpha=2,C=2"], "{}", "C must be a number in [0, 1], got 2"),
        (["alpha=2,C=0.5"], '{"lengths": [500]}', f"lengths [500] exceed the {POSITIONS} positions of the model"),
        (["alpha=2,C=0.5", "pretrained=/absent"], "{}", "no model at /absent: there is no such file or directory"),
    ],
)
def test_our_command_ends_with_one_line_on_a_bad_argument(
    model_dir: Path, our_command: Callable[..., None], model_args: list[str], metadata: str, message: str
) -> None:
    line = ["run", "--model", "nc_hf", "--tasks", "nc_perplexity", "--device", "cpu", "--metadata", metadata]
    with pytest.raises(SystemExit) as ended:
        our_command(*line, "--model_args", f"pretrained={model_dir}", *model_args)
    assert ended.value.code == f"error: {message}"


def test_our_command_is_a_module(tmp_path: Path) -> None:
    done = run_command("eval_tasks.lm_eval", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--include_path" in done.stdout


def test_the_users_tasks_come_beside_ours(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("include_path: /theirs\ntasks: [x]\n")
    given = lambda **values: command.task_directories(argparse.Namespace(**values))  # noqa: E731
    assert given(include_path=None) == [str(TASKS_DIRECTORY)]
    assert given(include_path=str(TASKS_DIRECTORY)) == [str(TASKS_DIRECTORY)]
    assert given(include_path="/mine", config=str(config)) == [str(TASKS_DIRECTORY), "/mine"]
    assert given(include_path=None, config=str(config)) == [str(TASKS_DIRECTORY), "/theirs"]


def test_standing_in_the_package_directory_is_refused_instead_of_hiding_lm_eval() -> None:
    done = run_command("lm_eval", "ls", cwd=TASKS_DIRECTORY)
    assert done.returncode != 0
    assert "run from another directory" in done.stderr


@pytest.mark.slow
def test_a_real_model_keeps_its_perplexity_with_few_keys() -> None:
    from eval_tasks.smollm2 import smollm2_directory

    arguments = {"pretrained": str(smollm2_directory()), "dtype": "float32"}
    metadata = {**arguments, "lengths": [512, 1024]}

    def perplexity(model: str, **options: Any) -> tuple[float, float]:
        manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
        results = simple_evaluate(
            model=model,
            model_args={**arguments, **options},
            tasks=["nc_perplexity"],
            task_manager=manager,
            limit=2,
            device="cpu",
        )
        found = figures(results)
        return found["perplexity_512"], found["perplexity_1024"]

    dense, sparse = perplexity("hf"), perplexity("nc_hf", alpha=2, C=0.7)
    window = perplexity("nc_hf", alpha=2, C=0.7, selection="window")
    assert 6 < dense[1] < dense[0] < 20
    assert sparse[1] == pytest.approx(dense[1], rel=0.05)
    assert window[1] > sparse[1]

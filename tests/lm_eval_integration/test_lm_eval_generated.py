"""The generated tasks in lm-eval: every one from end to end, prompts, scores, settings, and the stock command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.tasks import TaskManager
from lm_eval_case import LONG_POSITIONS, TASKS_DIRECTORY
from test_lm_eval_command import run_command, written_results
from transformers import AutoTokenizer

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.retrieval import documents
from eval_tasks.synthetic import GENERATORS

RULER = [
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
]
BABI = [f"babi_qa{i}" for i in range(1, 6)]


def score(results: dict[str, Any], task: str, metric: str) -> float:
    value: float = results["results"][task][f"{metric},none"]
    return value


def test_every_offline_task_runs_from_end_to_end(run_tasks: Callable[..., Any]) -> None:
    results = run_tasks(["nc_long"], metadata={"lengths": [512], "samples": 2}, gen_kwargs="max_gen_toks=8")
    for name in (*RULER, *BABI, "passkey"):
        assert 0 <= score(results, f"nc_{name}", "string_match_512") <= 1
        assert len(results["samples"][f"nc_{name}"]) == 2
    for group, members in (("nc_ruler", RULER), ("nc_babi", BABI)):
        mean = sum(score(results, f"nc_{name}", "string_match_512") for name in members) / len(members)
        assert results["groups"][group]["string_match_512,none"] == pytest.approx(mean)
        assert "string_match_1024,none" not in results["groups"][group]
    for task in ("nc_recall", "nc_perplexity"):
        assert score(results, task, "perplexity_512") > 1
        assert score(results, task, "bits_per_byte_512") > 0
    assert score(results, "nc_document", "perplexity_0_512") == score(results, "nc_document", "perplexity") > 1
    assert results["configs"]["nc_cwe"]["metadata"]["text_sha256"]


def test_sparse_attention_that_keeps_everything_answers_as_dense(run_tasks: Callable[..., Any]) -> None:
    shared = {"metadata": {"lengths": [512], "samples": 2}, "gen_kwargs": "max_gen_toks=8"}
    dense = run_tasks(["nc_niah_single_2"], **shared)
    sparse = run_tasks(["nc_niah_single_2"], model="nc_hf", model_args={"alpha": 1, "C": 1}, **shared)
    for one, other in zip(dense["samples"]["nc_niah_single_2"], sparse["samples"]["nc_niah_single_2"], strict=True):
        assert one["resps"] == other["resps"]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_with_their_answer_fill_the_length(
    run_tasks: Callable[..., Any], long_model_dir: Path, chat: bool
) -> None:
    lengths = [512, 1024]
    results = run_tasks(
        ["nc_niah_multikey_2"],
        metadata={"max_seq_lengths": lengths, "samples": 4},
        gen_kwargs="max_gen_toks=20",
        limit=1,
        apply_chat_template=chat,
        system_instruction="Be brief." if chat else None,
    )
    (sample,) = results["samples"]["nc_niah_multikey_2"]
    tokenizer = AutoTokenizer.from_pretrained(long_model_dir)
    assert len(sample["arguments"]) == len(lengths)
    for length, (prompt, options) in zip(lengths, sample["arguments"], strict=True):
        assert options["max_gen_toks"] == 20
        assert 0.98 * length <= len(tokenizer(prompt)["input_ids"]) + 20 <= length
        assert prompt.startswith("<s>[system] Be brief.</s>[user] A special magic number") == chat
        assert prompt.count(sample["target"][0]) == 1
        assert prompt.endswith("mentioned in the provided text is")
    assert {f"string_match_{n}" for n in lengths} <= {
        name.split(",")[0] for name in results["results"]["nc_niah_multikey_2"]
    }


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_single_3", "cwe"])
def test_right_partial_and_wrong_answers_score_as_in_the_original(long_model_dir: Path, name: str) -> None:
    metadata = {"tokenizer": str(long_model_dir), "lengths": [512, 700, 1024], "samples": 3}
    manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
    task = manager.load([f"nc_{name}"])["tasks"][f"nc_{name}"]
    doc = task.dataset["test"][2]
    answers = doc["answers"]
    assert tuple(answers) == GENERATORS[name].answers(0, 2)
    scores = task.process_results(doc, [", ".join(answers).upper(), f"It is {answers[0]}.", "I do not know"])
    assert scores["string_match_512"] == 1
    assert scores["string_match_700"] == 1 / len(answers)
    assert scores["string_match_1024"] == 0
    assert scores["string_match"] == pytest.approx((1 + 1 / len(answers)) / 3)


def test_samples_are_the_same_for_every_model_and_number_of_samples(long_model_dir: Path) -> None:
    few = documents(generator="vt", tokenizer=str(long_model_dir), lengths=[512], samples=2, seed=7)["test"]
    many = documents(generator="vt", tokenizer=str(long_model_dir), lengths=[512], samples=5, seed=7)["test"]
    assert few.to_list() == many.to_list()[:2]
    assert len(documents(generator="vt", tokenizer=str(long_model_dir))["test"]) == 100
    default = documents(generator="vt", pretrained=str(long_model_dir))["test"][0]
    assert default["lengths"] == [n for n in (512, 1024) if n <= LONG_POSITIONS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [512, 4096]}, rf"\[4096\] exceed the {LONG_POSITIONS} positions"),
        ({"lengths": [512], "max_seq_lengths": [512]}, "mean the same: give one of them"),
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"pretrained": None}, "nc_vt measures context in tokens: give pretrained=.* or tokenizer="),
        ({"tokenizer": "/absent/tokenizer"}, "the tokenizer /absent/tokenizer cannot be loaded"),
        ({"text": "/absent.txt"}, "no text named '/absent.txt'"),
        ({"hub_copies": 3}, "hub_copies must name a directory, got 3"),
    ],
)
def test_bad_settings_are_refused(long_model_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        documents(**{"generator": "vt", "pretrained": str(long_model_dir), **settings})


def test_a_length_without_room_for_the_task_is_refused_by_name(run_tasks: Callable[..., Any]) -> None:
    with pytest.raises(EvalError, match="niah_single_2 cannot fill 150 tokens, of which 128 are kept for the answer"):
        run_tasks(["nc_niah_single_2"], metadata={"lengths": [150], "samples": 1})


def test_the_stock_command_runs_the_tasks_with_another_kind_of_model(long_model_dir: Path, tmp_path: Path) -> None:
    metadata = json.dumps({"tokenizer": str(long_model_dir), "lengths": [512, 2048], "samples": 3})
    arguments = ["--model", "dummy", "--include_path", str(TASKS_DIRECTORY), "--metadata", metadata, "--limit", "2"]
    tasks = ["--tasks", "nc_babi,nc_niah_single_2,nc_recall", "--output_path", str(tmp_path)]
    done = run_command("lm_eval", "run", *arguments, *tasks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = written_results(tmp_path)
    assert written["results"]["nc_niah_single_2"]["string_match_2048,none"] == 0
    assert written["groups"]["nc_babi"]["string_match_512,none"] == 0
    assert written["results"]["nc_recall"]["perplexity_2048,none"] > 0
    assert written["n-samples"]["nc_babi_qa1"] == {"original": 3, "effective": 2}

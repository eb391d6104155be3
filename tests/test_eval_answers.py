"""Generated tasks in a sweep: greedy answers like those of ``generate``, counted and scored."""

import json

import numpy as np
import pytest
import torch
from synthetic_tokenizers import tokenizer_of_kind
from tiny_models import tiny_model

from eval_tasks.answers import QUESTION_TOKENS, Question, answer, build_question
from eval_tasks.methods import METHODS, Budgets
from eval_tasks.store import read_rows
from eval_tasks.synthetic import Material
from nc_patch import NCConfig, patched
from nc_patch.cli import main


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_kind("byte_bpe")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def question(tokenizer):
    """A question whose answer is what the tiny model happens to say first."""
    ids = np.random.default_rng(0).integers(5, len(tokenizer), size=200)
    return Question(ids, ("needle",), "all", 12, 0.25)


@pytest.mark.parametrize(
    "config", [None, NCConfig(2.0, 0.5, dense_below=0), NCConfig(2.0, 0.5, dense_below=0, selection="topk")], ids=str
)
def test_answers_are_those_of_generate(model, tokenizer, question, config):
    ids = torch.from_numpy(question.ids)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    mask = torch.ones_like(ids)
    if config is None:
        out = model.generate(ids, attention_mask=mask, **options)
    else:
        with patched(model, config=config):
            out = model.generate(ids, attention_mask=mask, **options)
    expected = tokenizer.decode(out[0, 200:], skip_special_tokens=True)
    row = answer(model, tokenizer, config, question)
    assert row["said"] == expected[:400]
    assert row["score"] == 0.0
    assert answer(model, tokenizer, config, Question(question.ids, (expected[2:6],), "all", 12, None))["score"] == 1.0


def test_what_an_answer_attends_is_the_law_at_its_positions(model, tokenizer, question):
    config = METHODS["nc-topk"].config(Budgets(2.0, 0.5, 48))
    row = answer(model, tokenizer, config, question)
    said = row["said_tokens"]
    assert row["tail_mean_keys"] == pytest.approx(np.mean([config.budget(n) for n in range(200, 200 + said)]))
    dense = answer(model, tokenizer, None, question)
    assert dense["tail_mean_keys"] == pytest.approx(np.mean(range(200, 200 + dense["said_tokens"])))
    assert dense["mean_keys"] == pytest.approx(np.mean(range(1, 200 + dense["said_tokens"])))


def test_a_dense_prefill_before_a_dense_question_changes_no_answer(model, tokenizer, question):
    whole, split = (answer(model, tokenizer, None, question, phase) for phase in ("all", "question"))
    assert split["said"] == whole["said"]
    sparse = answer(model, tokenizer, NCConfig(2.0, 0.5, selection="topk"), question, "question")
    budgets = [NCConfig(2.0, 0.5).budget(n) for n in range(200 - QUESTION_TOKENS + 1, 200 + sparse["said_tokens"])]
    assert sparse["mean_keys"] == pytest.approx(np.mean(budgets))


@pytest.mark.parametrize("phase", ["all", "prefill", "question", "decode"])
def test_the_tokens_of_an_answer_are_timed_apart(model, tokenizer, question, phase):
    row = answer(model, tokenizer, NCConfig(2.0, 0.5, selection="topk"), question, phase)
    assert 0 < row.get("prefill_seconds", 1e-9) < row["first_token_seconds"] < row["seconds"]
    assert ("prefill_seconds" in row) == (phase != "all")


def test_a_question_fills_its_length_and_holds_its_answer(tokenizer):
    question = build_question("niah_single_1", tokenizer, 768, 0, 3, Material())
    assert 0.9 * 768 <= len(question.ids) + question.new_tokens <= 768
    shorter = build_question("niah_single_1", tokenizer, 768, 0, 3, Material(), new_tokens=16)
    assert (shorter.answers, shorter.new_tokens) == (question.answers, 16)
    assert len(shorter.ids) > len(question.ids)
    prompt = tokenizer.decode(question.ids)
    assert all(expected in prompt for expected in question.answers)
    assert 0 <= question.depth <= 1


def test_a_sweep_asks_every_method_the_same_and_maps_depths(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["eval", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--tasks", "passkey", "--methods", "dense", "nc-topk", "--lengths", "512", "640", "--samples", "2"]
    assert main(arguments) == 0
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 8
    asked = {(row["length"], row["sample"]): set() for row in rows}
    for row in rows:
        asked[row["length"], row["sample"]].add((tuple(row["expected"]), row["depth"], row["prompt_tokens"]))
    assert all(len(same) == 1 for same in asked.values())
    assert len({row["expected"][0] for row in rows}) == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "share of right answers by depth and length" in page
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["tasks"] == ["passkey"]


def test_a_length_below_what_a_generated_task_needs_is_refused(tmp_path, capsys, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["eval", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tasks", "niah_single_1"]
    assert main([*arguments, "--lengths", "64"]) == 2
    assert "length 64 is too short for the task niah_single_1" in capsys.readouterr().err

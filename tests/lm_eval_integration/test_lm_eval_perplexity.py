"""The lm-eval task ``nc_perplexity``: its passages, its figures, its errors."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval_case import LENGTHS, POSITIONS, SCORED, TASKS_DIRECTORY, figures
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.perplexity import documents
from eval_tasks.tasks import TASKS, Layout, places, tokenise


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

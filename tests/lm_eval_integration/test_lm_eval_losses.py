"""``nc_recall`` and ``nc_document`` in lm-eval: what is read and scored, and the figures against the model's own."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval import document, recall
from eval_tasks.texts import python_reference


@pytest.fixture(scope="module")
def rows(long_model_dir: Path) -> dict[str, Any]:
    settings = {"tokenizer": str(long_model_dir), "lengths": [512, 2048, 16384], "samples": 3}
    return {name: module.documents(**settings)["test"] for name, module in (("r", recall), ("d", document))}


def test_recall_repeats_its_passage_behind_filler_of_every_length(rows: dict[str, Any], long_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(long_model_dir)
    for row in rows["r"]:
        passage = row["continuation"].strip()
        for length, context, read, scored in zip(
            row["lengths"], row["contexts"], row["context_tokens"], row["scored_tokens"], strict=True
        ):
            assert context.count(passage) == 1
            assert context.index(passage) < 200
            whole = tokenizer(context + row["continuation"])["input_ids"]
            assert 0.98 * length <= len(whole) == read <= length
            assert 120 <= scored <= 130
    assert len({row["continuation"] for row in rows["r"]}) == 3


def test_a_filler_longer_than_the_text_never_holds_the_passage(long_model_dir: Path) -> None:
    row = recall.documents(tokenizer=str(long_model_dir), lengths=[100_000], samples=1)["test"][0]
    assert row["contexts"][0].count(row["continuation"].strip()) == 1
    assert 98_000 <= row["context_tokens"][0] <= 100_000


def test_documents_are_cut_at_the_lengths(rows: dict[str, Any], long_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(long_model_dir)
    text = python_reference()[0]
    starts = set()
    for row in rows["d"]:
        for i, length in enumerate(row["lengths"], 1):
            so_far = "".join(row["parts"][:i])
            assert 0.98 * length <= len(tokenizer(so_far)["input_ids"]) == sum(row["tokens"][:i]) <= length
        whole = "".join(row["parts"])
        assert whole in text
        starts.add(text.index(whole))
    assert len(starts) == 3


def test_document_figures_are_those_of_the_model_on_the_same_tokens(
    run_tasks: Callable[..., Any], long_model_dir: Path
) -> None:
    settings = {"lengths": [256, 512, 1024], "samples": 2}
    results = run_tasks(["nc_document"], metadata=settings, model_args={"dtype": "float64"})["results"]["nc_document"]
    tokenizer = AutoTokenizer.from_pretrained(long_model_dir)
    model = AutoModelForCausalLM.from_pretrained(long_model_dir, dtype=torch.float64)
    losses: list[list[float]] = [[], [], []]
    for row in document.documents(tokenizer=str(long_model_dir), **settings)["test"]:
        # lm-eval puts the BOS token before a text without context; parts after the first have no such token.
        for index, part in enumerate(row["parts"]):
            before = tokenizer("".join(row["parts"][:index]))["input_ids"] or [tokenizer.bos_token_id]
            ids = torch.tensor(before + tokenizer(part)["input_ids"])
            logp = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])
            losses[index] += (-logp[len(before) - 1 :, 0]).tolist()
    for (a, b), values in zip([(0, 256), (256, 512), (512, 1024)], losses, strict=True):
        assert results[f"perplexity_{a}_{b},none"] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-5)
    every = [value for values in losses for value in values]
    assert results["perplexity,none"] == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


def test_special_tokens_are_read_and_not_scored(tmp_path: Path) -> None:
    from synthetic_tokenizers import tokenizer_of_kind

    tokenizer_of_kind("bpe_with_bos").save_pretrained(tmp_path)
    row = document.documents(tokenizer=str(tmp_path), lengths=[128, 512], samples=1)["test"][0]
    whole = AutoTokenizer.from_pretrained(tmp_path)("".join(row["parts"]))["input_ids"]
    assert whole[0] == 0
    assert sum(row["tokens"]) == len(whole) - 1
    assert 502 <= len(whole) <= 512


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (recall, {"passage": 0}, "passage must be a positive integer"),
        (recall, {"lengths": [128]}, "needs .* tokens without any filler"),
        (recall, {"passage": 40_000, "lengths": [100_000]}, "too few for a passage of 40000 tokens"),
        (document, {"lengths": [200_000], "samples": 1}, r"the text has [\d,]+ tokens; 1 documents of 200,000 tokens"),
        (document, {"lengths": [512], "samples": 0}, "samples must be a positive integer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    long_model_dir: Path, module: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        module.documents(**{"tokenizer": str(long_model_dir), "lengths": [512], **settings})


def test_a_text_without_words_is_refused(long_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * 20_000)
    with pytest.raises(EvalError, match="a document cannot be cut at 512 tokens"):
        document.documents(tokenizer=str(long_model_dir), lengths=[512], samples=1, text=str(file))

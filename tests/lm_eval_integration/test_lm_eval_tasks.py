"""The tasks of this package in lm-eval: what is read and scored, the figures, the settings, and what is refused."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_eval_case import POSITIONS, figures, load_task, rows
from tiny_sweep import tokenizer_of_kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.synthetic import GENERATORS
from eval_tasks.texts import python_reference

RULER = [name for name in GENERATORS if name != "passkey"]
LOSSES = ("nc_perplexity", "nc_recall")


def test_every_offline_task_runs_from_end_to_end(run_tasks):
    results = run_tasks(["nc_long"], metadata={"lengths": [512], "samples": 2}, gen_kwargs="max_gen_toks=8")
    scores = {name: figures(results, f"nc_{name}")["string_match_512"] for name in (*RULER, "passkey")}
    assert all(0 <= score <= 1 for score in scores.values())
    assert all(len(results["samples"][f"nc_{name}"]) == 2 for name in scores)
    mean = sum(scores[name] for name in RULER) / len(RULER)
    assert results["groups"]["nc_ruler"]["string_match_512,none"] == pytest.approx(mean)
    assert "string_match_1024,none" not in results["groups"]["nc_ruler"]
    for task in LOSSES:
        assert set(figures(results, task)) == {"perplexity_512", "bits_per_byte_512"}
    assert results["configs"]["nc_cwe"]["metadata"]["text_sha256"]


def test_another_kind_of_model_runs_the_tasks_at_lengths_of_the_named_tokenizer(run_tasks, model_dir):
    metadata = {"pretrained": None, "tokenizer": str(model_dir), "lengths": [512, 2048], "samples": 3}
    results = run_tasks(["nc_niah_single_2", "nc_recall"], "dummy", metadata, limit=2)
    assert figures(results, "nc_niah_single_2")["string_match_2048"] == 0
    assert figures(results, "nc_recall")["perplexity_2048"] > 0
    assert results["n-samples"]["nc_recall"] == {"original": 3, "effective": 2}


@pytest.mark.parametrize("task", LOSSES)
def test_figures_are_those_of_the_model_on_the_same_tokens(task, model_dir, run_tasks):
    metadata = {"lengths": [400, 700, 1024], "samples": 2}
    found = figures(run_tasks([task], metadata=metadata, model_args={"dtype": "float64"}), task)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    losses, sizes = [[], [], []], [0, 0, 0]
    loaded = load_task(task, tokenizer=str(model_dir), **metadata)
    loaded.build_all_requests()
    for request in loaded.instances:
        context, continuation = request.args
        # lm-eval puts the BOS token before a text without context.
        before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
        ids = torch.tensor(before + tokenizer(continuation)["input_ids"])
        logp = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(-1, ids[1:, None])
        losses[request.idx] += (-logp[len(before) - 1 :, 0]).tolist()
        sizes[request.idx] += len(continuation.encode())
    expected = {}
    for length, values, size in zip(metadata["lengths"], losses, sizes, strict=True):
        expected[f"perplexity_{length}"] = math.exp(np.mean(values))
        expected[f"bits_per_byte_{length}"] = sum(values) / size / math.log(2)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe_with_bos"])
@pytest.mark.parametrize("task", LOSSES)
def test_documents_fill_their_lengths_and_score_what_they_say(tmp_path, task, kind):
    tokenizer, source, found = tokenizer_of_kind(kind), python_reference()[0], set()
    tokenizer.save_pretrained(tmp_path)
    count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    lengths = [512, 2048, 100_000 if task == "nc_recall" else 4096]  # beyond the text, whose filler is repeated
    # The last token of perplexity is predicted and not read.
    least, unread = (0.9, 1) if task == "nc_perplexity" else (0.98, 0)
    for row in rows(task, tokenizer=str(tmp_path), lengths=lengths, samples=3):
        contexts, scored = row["contexts"], row["continuations"]
        wholes = [before + after for before, after in zip(contexts, scored, strict=True)]
        assert all(least * n <= count(whole) - unread <= n for n, whole in zip(lengths, wholes, strict=True))
        # Special tokens are not scored.
        assert row["tokens"] == [count(text) - count("") for text in scored]
        assert len(set(scored)) == 1
        low, high = (230, 256) if task == "nc_perplexity" else (120, 130)
        assert low <= row["tokens"][0] <= high
        if task == "nc_recall":
            passage = scored[0].strip()
            assert all(context.count(passage) == 1 and context.index(passage) < 200 for context in contexts)
        else:
            assert wholes[-1] in source
            assert all(long.endswith(short) for short, long in pairwise(wholes))
        found.add(wholes[-1])
    assert len(found) == 3


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_with_their_answer_fill_every_length_of_a_limited_run(run_tasks, model_dir, chat):
    lengths = [512, 1024]
    options = {"apply_chat_template": chat, "system_instruction": "Be brief." if chat else None, "limit": 1}
    metadata = {"max_seq_lengths": lengths, "samples": 4}
    results = run_tasks(["nc_niah_multikey_2"], metadata=metadata, gen_kwargs="max_gen_toks=20", **options)
    (sample,) = results["samples"]["nc_niah_multikey_2"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for length, (prompt, generation) in zip(lengths, sample["arguments"], strict=True):
        assert generation["max_gen_toks"] == 20
        assert 0.98 * length <= len(tokenizer(prompt)["input_ids"]) + 20 <= length
        assert prompt.startswith("<s>[system] Be brief.</s>[user] A special magic number") == chat
        assert prompt.count(sample["target"][0]) == 1
        assert prompt.endswith("mentioned in the provided text is")
    assert set(figures(results, "nc_niah_multikey_2")) == {"string_match_512", "string_match_1024", "string_match"}


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_single_3", "cwe"])
def test_right_partial_and_wrong_answers_score_as_in_the_original(model_dir, name):
    task = load_task(f"nc_{name}", tokenizer=str(model_dir), lengths=[512, 700, 1024], samples=3)
    doc = task.dataset["test"][2]
    answers = doc["answers"]
    assert tuple(answers) == GENERATORS[name].answers(0, 2)
    scores = task.process_results(doc, [", ".join(answers).upper(), f"It is {answers[0]}.", "I do not know"])
    expected = {"string_match_512": 1, "string_match_700": 1 / len(answers), "string_match_1024": 0}
    assert scores == pytest.approx({**expected, "string_match": sum(expected.values()) / 3})


@pytest.mark.parametrize("task", ["nc_vt", *LOSSES])
def test_fewer_samples_are_the_first_of_more_and_the_seed_chooses_them(model_dir, task):
    def said(samples, seed):
        found = rows(task, tokenizer=str(model_dir), lengths=[512], samples=samples, seed=seed)
        return [row | {"seed": None} for row in found]

    assert said(2, 7) == said(5, 7)[:2] != said(2, 8)


def test_default_lengths_are_those_the_model_has_positions_for(model_dir):
    found = rows("nc_vt", pretrained=str(model_dir))
    assert found[0]["lengths"] == [n for n in (512, 1024) if n <= POSITIONS]
    assert len(found) == 100
    assert rows("nc_perplexity", tokenizer=str(model_dir), max_length=600)[0]["lengths"] == [512]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("nc_vt", {"lengths": [512, 4096]}, rf"\[4096\] exceed the {POSITIONS} positions"),
        ("nc_vt", {"max_seq_lengths": [512]}, "mean the same: give one of them"),
        ("nc_vt", {"pretrained": None}, "nc_vt measures context in tokens: give pretrained=.* or tokenizer="),
        ("nc_perplexity", {"lengths": [255]}, "too short for the task perplexity"),
        ("nc_perplexity", {"text": "wordless.txt", "samples": 1}, "the text cannot be cut at 256 tokens"),
        ("nc_recall", {"passage": 40_000, "lengths": [512]}, "too few for a passage of 40000 tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model_dir, tmp_path, monkeypatch, task, settings, message):
    monkeypatch.chdir(tmp_path)
    Path("wordless.txt").write_text("x" * 20_000)
    with pytest.raises(ValueError, match=message):
        load_task(task, **{"pretrained": str(model_dir), "lengths": [512], **settings}).build_all_requests()


def test_documents_of_the_hub_can_be_local_copies(run_tasks, model_dir, tmp_path):
    words = "The weather on the coast changed again, and the keeper of the lighthouse wrote it into his book of number"
    books = Dataset.from_list([{"text": " ".join([f"{words} {i}."] * 60)} for i in range(4)])
    (tmp_path / "proof-pile").mkdir()
    books.to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    books.to_json(str(tmp_path / "proof-pile" / "test.jsonl"))
    metadata = {"lengths": [256, 1024], "samples": 3}
    for task, text in (("nc_pg19", "{}:test"), ("nc_proof_pile", "{},proof-pile/test.jsonl:train")):
        results = run_tasks([task], metadata={**metadata, "text": text.format(tmp_path)})
        assert results["results"][task]["perplexity_1024,none"] > 1
        assert [sample["arguments"][0][1].count(" ") > 50 for sample in results["samples"][task]] == [True] * 3

"""The tasks of this package in lm-eval: what is read and scored, the figures, the settings, and what is refused."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from datasets import Dataset
from lm_eval_case import POSITIONS, figures, load_task, rows
from synthetic_tokenizers import tokenizer_of_kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.synthetic import GENERATORS
from eval_tasks.texts import python_reference

RULER = [name for name in GENERATORS if name != "passkey"]
LOSSES = ("nc_perplexity", "nc_recall", "nc_document")


def test_every_offline_task_runs_from_end_to_end(run_tasks):
    results = run_tasks(["nc_long"], metadata={"lengths": [512], "samples": 2}, gen_kwargs="max_gen_toks=8")
    scores = {name: figures(results, f"nc_{name}")["string_match_512"] for name in (*RULER, "passkey")}
    assert all(0 <= score <= 1 for score in scores.values())
    assert all(len(results["samples"][f"nc_{name}"]) == 2 for name in scores)
    mean = sum(scores[name] for name in RULER) / len(RULER)
    assert results["groups"]["nc_ruler"]["string_match_512,none"] == pytest.approx(mean)
    assert "string_match_1024,none" not in results["groups"]["nc_ruler"]
    for task in ("nc_recall", "nc_perplexity"):
        assert set(figures(results, task)) == {"perplexity_512", "bits_per_byte_512"}
    assert set(figures(results, "nc_document")) == {"perplexity_0_512", "bits_per_byte_0_512", "perplexity"}
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
    names = ["0_400", "400_700", "700_1024"] if task == "nc_document" else ["400", "700", "1024"]
    expected = {"perplexity": math.exp(np.mean(np.concatenate(losses)))} if task == "nc_document" else {}
    for name, values, size in zip(names, losses, sizes, strict=True):
        expected[f"perplexity_{name}"] = math.exp(np.mean(values))
        expected[f"bits_per_byte_{name}"] = sum(values) / size / math.log(2)
    assert found == pytest.approx(expected, rel=1e-5)


def wholes(row):
    """What a model reads and predicts of a document at each length."""
    return [context + scored for context, scored in zip(row["contexts"], row["continuations"], strict=True)]


def test_every_length_scores_the_same_tokens_of_each_passage(model_dir):
    source, tokenizer = python_reference()[0], AutoTokenizer.from_pretrained(model_dir)
    lengths, ends = [128, 256, 512], set()
    for row in rows("nc_perplexity", tokenizer=str(model_dir), lengths=lengths, scored=64):
        assert len(set(row["continuations"])) == len(set(row["tokens"])) == 1
        assert 56 <= row["tokens"][0] <= 64
        found = wholes(row)
        assert all(longer.endswith(shorter) for shorter, longer in pairwise(found))
        read = [len(tokenizer.encode(text)) - 1 for text in found]
        assert all(0.9 * n <= got <= n for got, n in zip(read, lengths, strict=True))
        assert found[-1] in source
        ends.add(source.index(found[-1]) + len(found[-1]))
    assert len(ends) == 16


def test_recall_repeats_its_passage_behind_filler_even_beyond_the_text(model_dir):
    tokenizer, lengths = AutoTokenizer.from_pretrained(model_dir), [512, 2048, 100_000]
    found = rows("nc_recall", tokenizer=str(model_dir), lengths=lengths, samples=3)
    for row in found:
        passage = row["continuations"][0].strip()
        for length, context, scored, whole in zip(lengths, row["contexts"], row["tokens"], wholes(row), strict=True):
            assert context.count(passage) == 1
            assert context.index(passage) < 200
            assert whole == f"{context} {passage}"
            assert 0.98 * length <= len(tokenizer.encode(whole)) <= length
            assert 120 <= scored <= 130
    assert len({row["continuations"][0] for row in found}) == 3


def test_documents_are_cut_at_the_lengths(model_dir):
    tokenizer, text, starts = AutoTokenizer.from_pretrained(model_dir), python_reference()[0], set()
    for row in rows("nc_document", tokenizer=str(model_dir), lengths=[512, 2048, 16384], samples=3):
        for i, (length, whole) in enumerate(zip(row["lengths"], wholes(row), strict=True), 1):
            assert whole == "".join(row["continuations"][:i])
            assert 0.98 * length <= len(tokenizer.encode(whole)) == sum(row["tokens"][:i]) <= length
        assert whole in text
        starts.add(text.index(whole))
    assert len(starts) == 3


def test_special_tokens_count_towards_the_length_and_are_not_scored(tmp_path):
    tokenizer = tokenizer_of_kind("bpe_with_bos")
    tokenizer.save_pretrained(tmp_path)
    (row,) = rows("nc_perplexity", tokenizer=str(tmp_path), lengths=[512], samples=1)
    assert 502 <= len(tokenizer.encode(wholes(row)[0])) - 1 <= 512
    assert 248 <= row["tokens"][0] == len(tokenizer.encode(row["continuations"][0])) - 1 <= 256
    (row,) = rows("nc_document", tokenizer=str(tmp_path), lengths=[128, 512], samples=1)
    assert 502 <= len(tokenizer.encode(wholes(row)[-1])) == sum(row["tokens"]) + 1 <= 512


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
        assert results["results"][task]["perplexity_256_1024,none"] > 1
        assert [sample["arguments"][0][1].count(" ") > 50 for sample in results["samples"][task]] == [True] * 3

"""Tasks with data from the hub: read from copies in the hub's format, and one clear line where there are none."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

import lm_eval.tasks
from datasets import Dataset, DatasetDict

import eval_tasks.hub_data
from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
WORDS = "The weather on the coast changed again, and the keeper of the lighthouse wrote it into his book of number"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub is out of reach, whatever machine this is."""
    monkeypatch.setattr(eval_tasks.hub_data, "hub_resolves", lambda: False)


@pytest.fixture
def copies(tmp_path):
    """Copies of what the tasks load: files as on the hub, or what ``save_to_disk`` writes."""
    directory = tmp_path / "copies"
    story = {"input": f"{WORDS} 1. Mary moved to the garden.", "question": "Where is Mary? ", "target": "garden"}
    stories = DatasetDict({f"qa{i}": Dataset.from_list([story] * 3) for i in range(1, 6)})
    stories.save_to_disk(str(directory / "RMT-team/babilong-1k-samples/1k"))
    essays = Dataset.from_list([{"text": " ".join(f"{WORDS} {i}." for i in range(300))}])
    essays.save_to_disk(str(directory / "baber/paul_graham_essays"))
    books = Dataset.from_list([{"text": "short"}, *({"text": " ".join([f"{WORDS} {i}."] * 60)} for i in range(4))])
    (directory / "emozilla/pg19-test").mkdir(parents=True)
    books.to_parquet(str(directory / "emozilla/pg19-test/test-00000-of-00001.parquet"))
    proofs = directory / "dwzhu/PoSE-Datasets/proof-pile"
    proofs.mkdir(parents=True)
    (proofs / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in books))
    return directory


def test_perplexity_on_hub_documents_takes_those_that_are_long_enough(run_tasks, copies):
    metadata = {"lengths": [256, 1024], "samples": 3, "hub_copies": str(copies)}
    results = run_tasks(["nc_hub_perplexity"], metadata=metadata)
    for task in ("nc_pg19", "nc_proof_pile"):
        assert results["results"][task]["perplexity_256_1024,none"] > 1
        assert [sample["arguments"][0][1].count(" ") > 50 for sample in results["samples"][task]] == [True] * 3
    with pytest.raises(
        EvalError, match=r"emozilla/pg19-test has 4 documents of 1,024 tokens or more .* and 5 are asked"
    ):
        run_tasks(["nc_pg19"], metadata={**metadata, "samples": 5})


def test_lm_evals_own_suites_run_on_copies(run_tasks, copies):
    metadata = {"hub_copies": str(copies), "max_seq_lengths": "1k"}
    options = {"more_tasks": [str(LM_EVAL_TASKS / "babilong")], "model_args": {"alpha": 1, "C": 1}, "limit": 1}
    results = run_tasks(["nc_hub_babilong_longctx"], "nc_hf", metadata, **options)
    assert set(results["results"]) >= {f"babilong_qa{i}" for i in range(1, 6)}
    assert results["samples"]["babilong_qa1"][0]["doc"]["target"] == "garden"


def test_lm_evals_own_ruler_runs_on_a_copy(run_tasks, copies, tmp_path, monkeypatch):
    # Stand-ins for the package wonderwords and for NLTK's download, which the task needs beside its essays.
    categories = {kind: [f"{kind}-{i}" for i in range(300)] for kind in ("nouns", "adjectives", "verbs")}
    words = ModuleType("wonderwords")
    words.RandomWord = type("RandomWord", (), {"_categories": categories})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wonderwords", words)
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    hub_task = "!function eval_tasks.lm_eval.hub.HubTask"
    (tmp_path / "one.yaml").write_text(f"group: one\ntask:\n  - task: niah_single_2\n    class: {hub_task}\n")
    metadata = {"hub_copies": str(copies), "max_seq_lengths": [1024]}
    options = {"model_args": {"alpha": 1, "C": 1}, "limit": 1, "gen_kwargs": "max_gen_toks=2"}
    before = set(sys.modules)
    try:
        results = run_tasks(["one"], "nc_hf", metadata, more_tasks=[str(LM_EVAL_TASKS / "ruler"), tmp_path], **options)
    finally:
        for module in {name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")} - before:
            del sys.modules[module]
    assert WORDS in results["samples"]["niah_single_2"][0]["arguments"][0][0]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nc_pg19", "emozilla/pg19-test"),
        ("nc_proof_pile", "dwzhu/PoSE-Datasets"),
        ("nc_hub_babilong", "RMT-team/babilong-1k-samples, configuration 0k,"),
        ("nc_hub_longbench2", "recursal/longbench-v2, configuration"),
    ],
)
def test_without_a_network_one_line_says_what_is_missing(model_dir, our_command, name, data):
    suites = tuple(str(LM_EVAL_TASKS / suite) for suite in ("babilong", "longbench2"))
    arguments = ["--device", "cpu", "--model_args", f"pretrained={model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit) as ended:
        our_command("run", "--model", "nc_hf", "--tasks", name, *arguments, suites=suites)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert f"the data set {data}" in message
    assert "could not be downloaded from the hub (the hub cannot be reached from here" in message
    assert "hub_copies" in message


def test_a_package_that_a_suite_needs_is_named(model_dir, our_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    arguments = ["--device", "cpu", "--model_args", f"pretrained={model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit, match=r"error: Please install the `wonderwords` and `nltk` packages"):
        our_command(
            *("run", "--model", "nc_hf", "--tasks", "nc_hub_ruler", *arguments), suites=(str(LM_EVAL_TASKS / "ruler"),)
        )


def test_a_copy_that_is_missing_or_broken_is_named(copies):
    with pytest.raises(EvalError, match=r"a/b could not be loaded from its copy .*no directory .*copies/a/b"):
        load_hub("a/b", copies=str(copies))
    with pytest.raises(EvalError, match=r"the data set emozilla/pg19-test could not be loaded from its copy"):
        load_hub("emozilla/pg19-test", copies=str(copies), split="absent")

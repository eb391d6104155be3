"""Tasks with data from the hub: read from copies in the hub's format, and one clear line where there are none."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach, whatever machine this is."""
    monkeypatch.setattr(eval_tasks.hub_data, "hub_resolves", lambda: False)


def write_parquet(directory: Path, configs: dict[str, dict[str, Dataset]]) -> None:
    """A data set as the hub lays it out: parquet files, and a card that says which configuration they are of."""
    directory.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, data in splits.items():
            file = directory / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(exist_ok=True)
            data.to_parquet(str(file))
            lines += [f"  - split: {split}", f"    path: {file.relative_to(directory)}"]
    (directory / "README.md").write_text("\n".join([*lines, "---", "# A card", ""]))


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Copies of what the tasks load, some as parquet and cards, some as ``save_to_disk`` writes them."""
    directory = tmp_path / "copies"
    story = {"input": f"{WORDS} 1. Mary moved to the garden.", "question": "Where is Mary? ", "target": "garden"}
    stories = DatasetDict({f"qa{i}": Dataset.from_list([story] * 3) for i in range(1, 6)})
    stories.save_to_disk(str(directory / "RMT-team/babilong-1k-samples/1k"))
    choice = {"context": WORDS, "question": "What changed?", "choices": ["a", "b", "c", "d"], "answer": 1}
    table = Dataset.from_list([choice] * 3)
    write_parquet(directory / "recursal/longbench-v2", {"table_qa": {"train": table}, "graph": {"train": table}})
    essays = Dataset.from_list([{"text": " ".join(f"{WORDS} {i}." for i in range(300))}])
    essays.save_to_disk(str(directory / "baber/paul_graham_essays"))
    books = Dataset.from_list([{"text": "short"}, *({"text": " ".join([f"{WORDS} {i}."] * 60)} for i in range(4))])
    write_parquet(directory / "emozilla/pg19-test", {"default": {"test": books}})
    proofs = directory / "dwzhu/PoSE-Datasets/proof-pile"
    proofs.mkdir(parents=True)
    (proofs / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in books))
    return directory


def test_perplexity_on_hub_documents_takes_those_that_are_long_enough(
    run_tasks: Callable[..., Any], copies: Path
) -> None:
    metadata = {"lengths": [256, 1024], "samples": 3, "hub_copies": str(copies)}
    results = run_tasks(["nc_hub_perplexity"], metadata=metadata)
    for task in ("nc_pg19", "nc_proof_pile"):
        assert results["results"][task]["perplexity_256_1024,none"] > 1
        assert [sample["arguments"][0][1].count(" ") > 50 for sample in results["samples"][task]] == [True] * 3
    with pytest.raises(
        EvalError, match=r"emozilla/pg19-test has 4 documents of 1,024 tokens or more .* and 5 are asked"
    ):
        run_tasks(["nc_pg19"], metadata={**metadata, "samples": 5})


def group_of(task: str, directory: Path) -> str:
    """A group like those of the package, around a single one of lm-eval's tasks; returns its directory."""
    directory.mkdir()
    hub_task = "!function eval_tasks.lm_eval.hub.HubTask"
    (directory / "one.yaml").write_text(f"group: one\ntask:\n  - task: {task}\n    class: {hub_task}\n")
    return str(directory)


def test_lm_evals_own_suites_run_on_copies(run_tasks: Callable[..., Any], copies: Path, tmp_path: Path) -> None:
    metadata = {"hub_copies": str(copies), "max_seq_lengths": "1k"}
    shared: dict[str, Any] = {"metadata": metadata, "model_args": {"alpha": 1, "C": 1}, "limit": 1}
    babilong = [str(LM_EVAL_TASKS / "babilong")]
    results = run_tasks(["nc_hub_babilong_longctx"], "nc_hf", more_tasks=babilong, **shared)
    assert set(results["results"]) >= {f"babilong_qa{i}" for i in range(1, 6)}
    assert results["samples"]["babilong_qa1"][0]["doc"]["target"] == "garden"
    longbench = [str(LM_EVAL_TASKS / "longbench2"), group_of("longbench2_table", tmp_path / "group")]
    results = run_tasks(["one"], "nc_hf", more_tasks=longbench, **shared)
    assert WORDS in results["samples"]["longbench2_table"][0]["arguments"][0][0]
    assert 0 <= results["results"]["longbench2_table"]["acc,none"] <= 1


def test_lm_evals_own_ruler_runs_on_a_copy(
    run_tasks: Callable[..., Any], copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stand-ins for the package wonderwords and for NLTK's download, which the task needs beside its essays.
    categories = {kind: [f"{kind}-{i}" for i in range(300)] for kind in ("nouns", "adjectives", "verbs")}
    words = ModuleType("wonderwords")
    words.RandomWord = type("RandomWord", (), {"_categories": categories})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wonderwords", words)
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    before = set(sys.modules)
    paths = [str(LM_EVAL_TASKS / "ruler"), group_of("niah_single_2", tmp_path / "group")]
    metadata = {"hub_copies": str(copies), "max_seq_lengths": [1024]}
    options = {"model_args": {"alpha": 1, "C": 1}, "limit": 1, "gen_kwargs": "max_gen_toks=2"}
    try:
        results = run_tasks(["one"], "nc_hf", metadata, more_tasks=paths, **options)
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
def test_without_a_network_one_line_says_what_is_missing(
    long_model_dir: Path, our_command: Callable[..., None], name: str, data: str
) -> None:
    suites = tuple(str(LM_EVAL_TASKS / suite) for suite in ("babilong", "longbench2"))
    arguments = ["--device", "cpu", "--model_args", f"pretrained={long_model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit) as ended:
        our_command("run", "--model", "nc_hf", "--tasks", name, *arguments, suites=suites)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert f"the data set {data}" in message
    assert "could not be downloaded from the hub (the hub cannot be reached from here" in message
    assert "hub_copies" in message


def test_a_package_that_a_suite_needs_is_named(
    long_model_dir: Path, our_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    arguments = ["--device", "cpu", "--model_args", f"pretrained={long_model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit, match=r"error: Please install the `wonderwords` and `nltk` packages"):
        our_command(
            *("run", "--model", "nc_hf", "--tasks", "nc_hub_ruler", *arguments), suites=(str(LM_EVAL_TASKS / "ruler"),)
        )


def test_a_copy_that_is_missing_or_broken_is_named(copies: Path) -> None:
    with pytest.raises(EvalError, match=r"a/b could not be loaded from its copy .*no directory .*copies/a/b"):
        load_hub("a/b", copies=str(copies))
    with pytest.raises(EvalError, match=r"the data set emozilla/pg19-test could not be loaded from its copy"):
        load_hub("emozilla/pg19-test", copies=str(copies), split="absent")

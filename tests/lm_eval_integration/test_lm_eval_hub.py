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
from lm_eval.tasks import TaskManager

import eval_tasks.hub_data
from eval_tasks.errors import EvalError
from eval_tasks.store import read_rows
from eval_tasks.synthetic import GENERATORS, Material, synthesize
from eval_tasks.synthetic.documents_qa import _hotpotqa, _squad
from nc_patch.cli import main

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
WORDS = "The weather on the coast changed again, and the keeper of the lighthouse wrote it into his book of number"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach, whatever machine this is, and nothing loaded before is remembered."""
    monkeypatch.setattr(eval_tasks.hub_data, "hub_resolves", lambda: False)
    _squad.cache_clear()
    _hotpotqa.cache_clear()


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


def squad() -> Dataset:
    rows = []
    for i in range(60):
        context = f"{WORDS} {i}. " * 4 + f"The boat of that day was called Boat{i}."
        answers = {"text": [f"Boat{i}", f"the Boat{i}"], "answer_start": [0, 0]} if i % 3 else {"text": []}
        rows.append({"title": f"T{i // 10}", "context": context, "question": f"Which boat, {i}?", "answers": answers})
    return Dataset.from_list(rows)


def hotpot() -> Dataset:
    rows = []
    for i in range(12):
        titles = [f"Subject {i} {j}" for j in range(10)]
        sentences = [[f"{WORDS} {i}.{j}. ", f"It has {j} doors."] for j in range(10)]
        facts = {"title": [titles[7], titles[2], titles[2]], "sent_id": [0, 0, 1]}
        context = {"title": titles, "sentences": sentences}
        rows.append({"question": f"How many, {i}?", "answer": "2", "context": context, "supporting_facts": facts})
    return Dataset.from_list(rows)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Copies of what the tasks load, some as parquet and cards, some as ``save_to_disk`` writes them."""
    directory = tmp_path / "copies"
    write_parquet(directory / "rajpurkar/squad_v2", {"squad_v2": {"validation": squad()}})
    DatasetDict(validation=hotpot()).save_to_disk(str(directory / "hotpotqa/hotpot_qa/distractor"))
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


@pytest.mark.parametrize("name", ["qa_squad", "qa_hotpot"])
def test_questions_come_from_a_copy_with_their_documents(copies: Path, long_model_dir: Path, name: str) -> None:
    from synthetic_tokenizers import tokenizer_of_kind

    material = Material(hub_copies=str(copies))
    prompts = set()
    for index, length in ((0, 512), (1, 512), (0, 1024)):
        found = synthesize(GENERATORS[name], tokenizer_of_kind("byte_bpe"), length, index=index, material=material)
        assert 0.98 * length <= found.prompt_tokens + found.new_tokens <= length
        number = re.findall(r", (\d+)\?", found.question)[-1]
        documents = re.findall(r"Document (\d+):\n", found.question)
        assert documents == [str(i) for i in range(1, len(documents) + 1)]
        assert found.match == "part"
        if name == "qa_squad":
            assert found.answers == (f"Boat{number}", f"the Boat{number}")
            assert found.question.count(f"called Boat{number}.") == 1
        else:
            assert len(found.depths) == 2
            assert all(found.question.count(f"Subject {number} {j}\n") == 1 for j in (2, 7))
        prompts.add(found.prompt)
    assert len(prompts) == 3


def test_a_copy_that_is_too_small_for_the_length_says_so(copies: Path) -> None:
    from synthetic_tokenizers import tokenizer_of_kind

    with pytest.raises(EvalError, match=r"qa_hotpot fills only \d+ of 65536 tokens: its data reach no further"):
        synthesize(
            GENERATORS["qa_hotpot"], tokenizer_of_kind("byte_bpe"), 65536, material=Material(hub_copies=str(copies))
        )


def test_all_thirteen_tasks_of_ruler_run_with_copies(run_tasks: Callable[..., Any], copies: Path) -> None:
    metadata = {"lengths": [512], "samples": 1, "hub_copies": str(copies)}
    results = run_tasks(["nc_ruler_13"], metadata=metadata, gen_kwargs="max_gen_toks=2")
    assert len(results["group_subtasks"]["nc_ruler_13"]) == 13
    assert "string_match_512,none" in results["groups"]["nc_ruler_13"]


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
    from eval_tasks.synthetic.words import ADJECTIVES, NOUNS, VERBS

    # Stand-ins for the package wonderwords and for NLTK's download, which the task needs beside its essays.
    categories = {"nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": VERBS}
    words = ModuleType("wonderwords")
    words.RandomWord = type("RandomWord", (), {"_categories": categories})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wonderwords", words)
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    before = set(sys.modules)
    try:
        results = run_tasks(
            ["one"],
            "nc_hf",
            {"hub_copies": str(copies), "max_seq_lengths": [1024]},
            model_args={"alpha": 1, "C": 1},
            more_tasks=[str(LM_EVAL_TASKS / "ruler"), group_of("niah_single_2", tmp_path / "group")],
            limit=1,
            gen_kwargs="max_gen_toks=2",
        )
    finally:
        for module in {name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")} - before:
            del sys.modules[module]
    assert WORDS in results["samples"]["niah_single_2"][0]["arguments"][0][0]


def test_a_sweep_takes_copies_and_says_before_it_measures_that_data_are_missing(
    copies: Path, long_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", "niah_single_1", "qa_squad", "lm-eval:nc_qa_hotpot", "--methods", "dense", "--samples", "1"]
    line = [
        "eval",
        "--model",
        str(long_model_dir),
        "--device",
        "cpu",
        "--lengths",
        "512",
        "--answer-tokens",
        "2",
        *tasks,
    ]
    assert main([*line, "--out", str(tmp_path / "without")]) == 2
    said = capsys.readouterr().err
    assert "the data set rajpurkar/squad_v2 could not be downloaded" in said
    assert "give --hub-copies DIR to nc-patch eval" in said
    assert not (tmp_path / "without").exists()
    assert main([*line, "--out", str(tmp_path / "with"), "--hub-copies", str(copies)]) == 0
    assert {row["task"] for row in read_rows(tmp_path / "with")} == {"niah_single_1", *tasks[2:4]}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nc_qa_squad", "rajpurkar/squad_v2"),
        ("nc_qa_hotpot", "hotpotqa/hotpot_qa, configuration distractor,"),
        ("nc_pg19", "emozilla/pg19-test"),
        ("nc_proof_pile", "dwzhu/PoSE-Datasets"),
        ("nc_hub_babilong", "RMT-team/babilong-1k-samples, configuration 0k,"),
        ("nc_hub_longbench2", "recursal/longbench-v2, configuration"),
    ],
)
def test_without_a_network_one_line_says_what_is_missing(
    long_model_dir: Path, our_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str, data: str
) -> None:
    suites = [str(LM_EVAL_TASKS / suite) for suite in ("babilong", "longbench2")]

    def manager(include_path: list[str], **options: Any) -> TaskManager:
        return TaskManager(include_path=[*suites, *include_path], include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    line = ["run", "--model", "nc_hf", "--tasks", name, "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        our_command(*line, "--model_args", f"pretrained={long_model_dir},alpha=2,C=0.5")
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

    def manager(include_path: list[str], **options: Any) -> TaskManager:
        paths = [str(LM_EVAL_TASKS / "ruler"), *include_path]
        return TaskManager(include_path=paths, include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    arguments = ["--tasks", "nc_hub_ruler", "--model_args", f"pretrained={long_model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit, match=r"error: Please install the `wonderwords` and `nltk` packages"):
        our_command("run", "--model", "nc_hf", "--device", "cpu", *arguments)


def test_a_copy_that_is_missing_or_broken_is_named(copies: Path) -> None:
    from eval_tasks.hub_data import load_hub

    with pytest.raises(
        EvalError, match=r"the data set a/b could not be loaded from its copy .*no directory .*copies/a/b"
    ):
        load_hub("a/b", copies=str(copies))
    with pytest.raises(EvalError, match=r"the data set emozilla/pg19-test could not be loaded from its copy"):
        load_hub("emozilla/pg19-test", copies=str(copies), split="absent")

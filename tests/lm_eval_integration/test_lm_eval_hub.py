"""Tasks with data from the hub: read from copies in the hub's format, and one clear line where there are none."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from datasets import Dataset

import eval_tasks.hub_data
from eval_tasks.errors import EvalError
from eval_tasks.hub_data import load_hub

WORDS = "The weather on the coast changed again, and the keeper of the lighthouse wrote it into his book of number"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub is out of reach, whatever machine this is."""
    monkeypatch.setattr(eval_tasks.hub_data, "hub_resolves", lambda: False)


@pytest.fixture
def copies(tmp_path):
    """Copies of what the tasks load, in files as on the hub."""
    directory = tmp_path / "copies"
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


@pytest.mark.parametrize(
    ("name", "data"), [("nc_pg19", "emozilla/pg19-test"), ("nc_proof_pile", "dwzhu/PoSE-Datasets")]
)
def test_without_a_network_one_line_says_what_is_missing(model_dir, our_command, name, data):
    arguments = ["--device", "cpu", "--model_args", f"pretrained={model_dir},alpha=2,C=0.5"]
    with pytest.raises(SystemExit) as ended:
        our_command("run", "--model", "nc_hf", "--tasks", name, *arguments)
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert f"the data set {data}" in message
    assert "could not be downloaded from the hub (the hub cannot be reached from here" in message
    assert "hub_copies" in message


def test_a_copy_that_is_missing_or_broken_is_named(copies):
    with pytest.raises(EvalError, match=r"a/b could not be loaded from its copy .*no directory .*copies/a/b"):
        load_hub("a/b", copies=str(copies))
    with pytest.raises(EvalError, match=r"the data set emozilla/pg19-test could not be loaded from its copy"):
        load_hub("emozilla/pg19-test", copies=str(copies), split="absent")

"""Whole sweeps on a tiny model: what is measured, what is refused, and that interruptions lose nothing."""

import math
import weakref

import pandas as pd
import pytest
import torch
from tiny_sweep import save_tiny_model, sweep_arguments, tiny_text

from eval_tasks import measure as measuring
from eval_tasks import peak
from eval_tasks.methods import DEFAULT_METHODS
from eval_tasks.store import read_rows, read_run
from eval_tasks.tasks import TASKS
from nc_patch.cli import main
from nc_patch.layers import PATCH_ATTRIBUTE

# Recall and perplexity by every method, and by dense attention what it is without the passage.
PER_SAMPLE = 2 * len(DEFAULT_METHODS) + 1


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A directory that a whole sweep filled."""
    directory = tmp_path_factory.mktemp("sweep")
    assert main(sweep_arguments(directory, directory / "out")) == 0
    return directory / "out"


@pytest.fixture
def sweep(tmp_path):
    """Runs ``nc-patch eval`` with further arguments into a directory of a name; returns its exit code."""
    return lambda name, *further, **options: main(sweep_arguments(tmp_path, tmp_path / name, *further, **options))


def test_a_sweep_holds_every_measurement_once_short_lengths_first(swept):
    rows = read_rows(swept)
    every = {
        (task, length, i, method)
        for task in TASKS
        for length in (48, 96)
        for i in (0, 1)
        for method in DEFAULT_METHODS
        if method == "dense" or not TASKS[task].dense_only
    }
    assert {(row["task"], row["length"], row["sample"], row["method"]) for row in rows} == every
    assert len(rows) == len(every) == (swept / "results.jsonl").read_bytes().count(b"\n")
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    assert all(row["seconds"] > 0 and math.isfinite(row["loss_sum"]) for row in rows)


def test_the_outputs_agree_with_the_rows_and_say_what_was_measured(swept):
    record = read_run(swept)
    expected = {"lengths": [48, 96], "torch": torch.__version__, "attention": "sdpa"}
    assert expected.items() <= record["identity"].items()
    assert record["sessions"][0]["hardware"] == record["hardware"]
    table = pd.read_csv(swept / "summary.csv").set_index(["task", "length", "method"])
    dense = [row for row in read_rows(swept) if (row["task"], row["length"], row["method"]) == ("recall", 96, "dense")]
    expected = math.exp(sum(row["loss_sum"] / row["tokens"] for row in dense) / 2)
    assert table["perplexity"]["recall", 96, "dense"] == pytest.approx(expected, rel=1e-4)
    assert (swept / "main.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_measures_nothing_and_another_text_or_other_arguments_are_refused_by_name(swept, capsys):
    before, planned = (swept / "results.jsonl").read_bytes(), 4 * PER_SAMPLE
    assert main(sweep_arguments(swept.parent, swept)) == 0
    assert f"{planned} of {planned} measurements are there already" in capsys.readouterr().err
    assert main(sweep_arguments(swept.parent, swept, "--seed", "3", "--alpha", "2.5")) == 2
    message = capsys.readouterr().err
    assert "seed was 0, is 3" in message
    assert "alpha was 2.0, is 2.5" in message
    assert "samples" not in message
    (swept.parent / "text.txt").write_text(tiny_text(2000, seed=9), encoding="utf-8")
    assert main(sweep_arguments(swept.parent, swept)) == 2
    assert "text_sha256 was" in capsys.readouterr().err
    assert (swept / "results.jsonl").read_bytes() == before


def test_a_cell_that_runs_out_of_memory_is_recorded_and_retried_where_that_is_asked(
    sweep, tmp_path, capsys, monkeypatch
):
    further, out = ("--methods", "dense", "nc-topk", "block", "--tasks", "recall"), tmp_path / "out"
    forward, held, freed = measuring.forward, [], []
    errors = [torch.OutOfMemoryError("CUDA out of memory"), None, RuntimeError("shapes do not fit")]

    def greedy(model, ids, keep, cache=None):
        patches = [m.__dict__[PATCH_ATTRIBUTE] for m in model.modules() if PATCH_ATTRIBUTE in m.__dict__]
        if len(ids) == 96 and any(patch.config.prefill.name == "block" for patch in patches):
            large = torch.zeros(8)
            held.append(weakref.ref(large))
            if error := errors.pop(0):
                raise error
            torch.empty(1 << 55)
        return forward(model, ids, keep, cache)

    monkeypatch.setattr(measuring, "forward", greedy)
    monkeypatch.setattr(peak, "clear_device_cache", lambda **_: freed.append(held[-1]() is None))
    assert sweep("out", *further) == 0
    assert freed == [True, True]
    said = capsys.readouterr().err
    assert "recall with block at 96 tokens: memory ran out at 96 tokens" in said
    assert "It is recorded, and the run goes on" in said
    rows = read_rows(out)
    assert [(row["method"], row["length"], row["failed"]) for row in rows if "failed" in row] == [
        ("block", 96, "out of memory")
    ] * 2
    assert len(rows) == 12
    assert "recall,96,block,0" in (out / "summary.csv").read_text()
    assert "out of memory" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="shapes do not fit"):  # which no other length would mend
        sweep("out", *further, "--retry-failed")
    monkeypatch.undo()
    assert sweep("out", *further) == 0
    assert "2 of them failed; --retry-failed measures them again" in capsys.readouterr().err
    assert sweep("out", *further, "--retry-failed") == 0
    assert not any("failed" in row for row in read_rows(out))
    before = (out / "results.jsonl").read_bytes()
    assert sweep("out", *further, "--retry-failed") == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_an_iso_sweep_tries_every_budget_also_of_a_model_without_sdpa(sweep, tmp_path, capsys):
    save_tiny_model(tmp_path / "model", "gemma2")
    (tmp_path / "text.txt").write_text(tiny_text(2000), encoding="utf-8")
    further = ("--methods", "fixed-topk", "--tasks", "recall", "unseen", "--match", "iso", "--iso-keys", "8", "64")
    assert sweep("out", *further) == 0
    assert "no SDPA attention" in capsys.readouterr().err
    rows, identity = read_rows(tmp_path / "out"), read_run(tmp_path / "out")["identity"]
    assert {(row["task"], row["length"], row["method"]) for row in rows} == {
        ("recall", 48, "dense"), ("recall", 48, "fixed-topk@8"), ("recall", 96, "dense"),
        ("recall", 96, "fixed-topk@8"), ("recall", 96, "fixed-topk@64"), ("unseen", 48, "dense"),
        ("unseen", 96, "dense"),
    }  # fmt: skip
    assert {row["tail_mean_keys"] for row in rows if row["method"] == "fixed-topk@8"} == {8.0}
    assert (identity["iso_keys"], identity["attention"]) == ([8, 64], "eager")

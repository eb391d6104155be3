"""Whole sweeps on a tiny model: what is measured, and that interruptions lose nothing."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import tiny_model
from tiny_sweep import save_tiny_model, sweep_arguments, tiny_text, tiny_tokenizer

from eval_tasks.errors import EvalError
from eval_tasks.measure import PHASES, measure
from eval_tasks.methods import DEFAULT_METHODS, METHODS, Budgets
from eval_tasks.store import read_rows, read_run
from eval_tasks.tasks import TASKS, Layout, tokenise
from nc_patch.attention import PATCH_ATTRIBUTE
from nc_patch.cli import main
from nc_patch.patch import is_patched

LAYOUT = Layout((96,), 1, 16, 12, 0)
# Recall and perplexity by every method, and by dense attention what it is without the passage.
PER_SAMPLE = 2 * len(DEFAULT_METHODS) + 1


@pytest.fixture(scope="module")
def sample():
    return TASKS["perplexity"].build(tokenise(tiny_tokenizer(), tiny_text(2000)), 0, 96, LAYOUT)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A directory that a whole sweep filled."""
    directory = tmp_path_factory.mktemp("sweep")
    assert main(sweep_arguments(directory, directory / "out")) == 0
    return directory / "out"


def test_the_loss_is_that_of_the_whole_forward_pass_at_the_scored_tokens(sample):
    model = tiny_model("llama")
    ids = torch.from_numpy(sample.ids)
    with torch.inference_mode():
        logits = model(ids[None, :-1]).logits[0].double()
    expected = -torch.log_softmax(logits, -1)[torch.arange(96), ids[1:]][-16:].sum()
    measured = measure(model, None, sample)
    assert measured.loss_sum == pytest.approx(float(expected), rel=1e-5)
    assert (measured.tokens, measured.bytes) == (16, 16 * len(" w00"))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("block", "nc", "oracle", "profile")])
def test_realised_budgets_are_those_of_the_law(sample, method):
    config = METHODS[method].config(Budgets(2.0, 0.5, 48))
    measured = measure(tiny_model("llama"), config, sample)
    law = (lambda n: n) if config is None else getattr(config, "config", config).budget
    budgets = [law(n) for n in range(1, 97)]
    assert measured.mean_keys == pytest.approx(sum(budgets) / 96)
    assert measured.tail_mean_keys == pytest.approx(sum(budgets[-16:]) / 16)
    assert measured.attended_fraction == pytest.approx(sum(budgets) / sum(range(1, 97)))
    assert measured.tail_attended_fraction == pytest.approx(sum(budgets[-16:]) / sum(range(81, 97)))
    assert measured.ran_dense == {}


def test_a_measurement_leaves_the_model_unpatched(sample):
    model = tiny_model("llama")
    before = measure(model, None, sample).loss_sum
    assert measure(model, METHODS["nc-topk"].config(Budgets(2.0, 0.5, 48)), sample).loss_sum != before
    assert measure(model, None, sample).loss_sum == before


def test_dense_keys_are_left_open_where_layers_slide(sample):
    measured = measure(tiny_model("mistral"), None, sample)
    assert (measured.attended_fraction, measured.mean_keys, measured.tail_mean_keys) == (1.0, None, None)


def test_a_model_without_sdpa_is_swept_and_calibrated_and_its_attention_is_recorded(tmp_path, capsys):
    save_tiny_model(tmp_path / "model", "gemma2")
    (tmp_path / "text.txt").write_text(tiny_text(2000), encoding="utf-8")
    further = ("--methods", "dense", "nc-topk", "random", "--tasks", "perplexity", "--samples", "1", "--lengths", "48")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    assert "no SDPA attention" in capsys.readouterr().err
    assert read_run(tmp_path / "out")["identity"]["attention"] == "eager"
    assert {row["method"] for row in read_rows(tmp_path / "out")} == {"dense", "nc-topk", "random"}
    place = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "c")]
    sizes = ["--lengths", "32", "64", "--pieces", "1", "--rows", "4", "--device", "cpu"]
    assert main(["calibrate", *place, *sizes]) == 0
    assert "no SDPA attention" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_an_error(sample):
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(EvalError, match="NaN or Inf"):
        measure(model, None, sample)


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
    assert len({row["key"] for row in rows}) == len(rows) == len(every)
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    assert all(row["seconds"] > 0 and math.isfinite(row["loss_sum"]) for row in rows)


def test_the_outputs_are_whole_and_agree_with_the_rows(swept):
    run = json.loads((swept / "run.json").read_text(encoding="utf-8"))
    assert run["identity"]["lengths"] == [48, 96]
    assert run["identity"]["torch"] == torch.__version__
    assert run["identity"]["attention"] == "sdpa"
    assert len(run["identity"]["text_sha256"]) == 64
    with (swept / "summary.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    dense = [row for row in read_rows(swept) if (row["task"], row["length"], row["method"]) == ("recall", 96, "dense")]
    expected = math.exp(sum(row["loss_sum"] / row["tokens"] for row in dense) / 2)
    [cell] = [c for c in table if (c["task"], c["length"], c["method"]) == ("recall", "96", "dense")]
    assert float(cell["perplexity"]) == pytest.approx(expected, rel=1e-4)
    assert cell["loss_minus_dense"] == ""
    assert (swept / "main.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_measures_nothing_and_keeps_the_results(swept, capsys):
    before = (swept / "results.jsonl").read_bytes()
    assert main(sweep_arguments(swept.parent, swept)) == 0
    assert (swept / "results.jsonl").read_bytes() == before
    planned = 4 * PER_SAMPLE
    assert f"{planned} of {planned} measurements are there already" in capsys.readouterr().err


def test_other_arguments_are_refused_by_name_and_change_nothing(swept, capsys):
    before = (swept / "results.jsonl").read_bytes()
    assert main(sweep_arguments(swept.parent, swept, "--seed", "3", "--alpha", "2.5")) == 2
    message = capsys.readouterr().err
    assert "seed was 0, is 3" in message
    assert "alpha was 2.0, is 2.5" in message
    assert "samples" not in message
    assert (swept / "results.jsonl").read_bytes() == before


def test_another_text_under_the_same_name_is_refused(tmp_path, capsys):
    arguments = sweep_arguments(tmp_path, tmp_path / "out", "--methods", "dense", "--tasks", "recall")
    assert main(arguments) == 0
    (tmp_path / "text.txt").write_text(tiny_text(2000, seed=9), encoding="utf-8")
    assert main(arguments) == 2
    assert "text_sha256 was" in capsys.readouterr().err


def test_a_time_limit_keeps_what_is_whole_and_the_next_run_goes_on(tmp_path, capsys):
    further = ("--methods", "dense", "nc-topk", "--tasks", "recall", "perplexity")
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, *further, "--minutes", "1e-9")) == 0
    first = (out / "results.jsonl").read_text()
    groups = {(row["task"], row["length"], row["sample"]) for row in read_rows(out)}
    assert len(read_rows(out)) == 2 * len(groups) < 16
    assert "the same command goes on" in capsys.readouterr().err
    assert "of 16 measurements are made" in (out / "report.html").read_text(encoding="utf-8")
    assert main(sweep_arguments(tmp_path, out, *further)) == 0
    assert (out / "results.jsonl").read_text().startswith(first)
    assert len(read_rows(out)) == 16


def test_ctrl_c_loses_nothing_and_the_command_goes_on(tmp_path):
    out = tmp_path / "out"
    arguments = sweep_arguments(tmp_path, out, "--lengths", "400", "--samples", "8", words=5000)
    command = [sys.executable, "-m", "nc_patch", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    results = out / "results.jsonl"
    deadline = time.monotonic() + 120
    while not results.exists() or results.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    before = results.read_bytes()
    assert before.endswith(b"\n")
    assert 5 <= before.count(b"\n") < 8 * PER_SAMPLE
    assert process.returncode == 130
    assert "To go on: nc-patch eval" in said
    assert main(arguments) == 0
    after = results.read_bytes()
    assert after.startswith(before)
    rows = read_rows(out)
    assert len(rows) == len({row["key"] for row in rows}) == 8 * PER_SAMPLE
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 2


def test_a_cell_that_runs_out_of_memory_is_recorded_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    from eval_tasks import measure as measuring

    further = ("--methods", "dense", "nc-topk", "block", "--tasks", "recall")
    forward = measuring._forward

    def greedy(model, ids, keep, cache=None):
        if len(ids) == 96 and is_patched(model) and any(m.config.prefill.name == "block" for m in patches(model)):
            torch.empty(1 << 55)
        return forward(model, ids, keep, cache)

    monkeypatch.setattr(measuring, "_forward", greedy)
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, *further)) == 0
    said = capsys.readouterr().err
    assert "recall with block at 96 tokens: memory ran out at 96 tokens" in said
    assert "It is recorded, and the run goes on" in said
    failed = [row for row in read_rows(out) if "failed" in row]
    assert {(row["method"], row["length"], row["failed"]) for row in failed} == {("block", 96, "out of memory")}
    assert len(read_rows(out)) == 12
    table = (out / "summary.csv").read_text()
    assert "recall,96,block,0" in table
    assert "out of memory" in (out / "report.html").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert main(sweep_arguments(tmp_path, out, *further)) == 0
    assert "2 of them failed; --retry-failed measures them again" in capsys.readouterr().err
    assert main(sweep_arguments(tmp_path, out, *further, "--retry-failed")) == 0
    assert not any("failed" in row for row in read_rows(out))
    assert len(read_rows(out)) == 12
    before = (out / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert main(sweep_arguments(tmp_path, out, *further)) == 0
    assert "failed" not in capsys.readouterr().err
    assert main(sweep_arguments(tmp_path, out, *further, "--retry-failed")) == 0
    assert (out / "results.jsonl").read_bytes() == before


def patches(model):
    return [m.__dict__[PATCH_ATTRIBUTE] for m in model.modules() if PATCH_ATTRIBUTE in m.__dict__]


def test_an_error_that_is_not_about_memory_is_not_taken_for_one(sample, monkeypatch):
    from eval_tasks import measure as measuring

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(measuring, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(tiny_model("llama"), None, sample)


@pytest.mark.parametrize("method", ["nc-topk", "nc-window", "fixed-topk-mean"])
def test_the_question_alone_is_sparse_where_that_is_asked(sample, method):
    model = tiny_model("llama")
    config = METHODS[method].config(Budgets(2.0, 0.5, 48))
    dense = measure(model, None, sample)
    assert measure(model, None, sample, "question").loss_sum == pytest.approx(dense.loss_sum, rel=1e-5)
    everywhere = dataclasses.replace(config, alpha=1.0, C=1.0, tail="drop")
    assert measure(model, everywhere, sample, "question").loss_sum == pytest.approx(dense.loss_sum, rel=1e-5)
    sparse = measure(model, config, sample, "question")
    assert sparse.loss_sum not in (
        pytest.approx(dense.loss_sum),
        pytest.approx(measure(model, config, sample).loss_sum),
    )
    budgets = [config.budget(n) for n in range(81, 97)]
    assert sparse.tail_mean_keys == sparse.mean_keys == pytest.approx(sum(budgets) / 16)


@pytest.mark.parametrize("method", ["nc-topk", "nc-window", "block", "random"])
def test_phases_are_sparse_where_they_say(sample, method):
    model = tiny_model("llama")
    attention = METHODS[method].config(Budgets(2.0, 0.5, 48))
    law = getattr(attention, "config", attention).budget
    dense = measure(model, None, sample)
    found = {phase: measure(model, attention, sample, phase) for phase in PHASES}
    assert len({round(m.loss_sum, 6) for m in (dense, *found.values())}) >= 4
    assert found["prefill"].tail_mean_keys == dense.tail_mean_keys == 88.5
    if method != "block":
        assert found["prefill"].mean_keys == pytest.approx(sum(law(n) for n in range(1, 81)) / 80)
        scored = sum(law(n) for n in range(81, 97)) / 16
        for phase in ("question", "decode"):
            assert found[phase].tail_mean_keys == found[phase].mean_keys == pytest.approx(scored)
    for phase in PHASES:
        assert measure(model, None, sample, phase).loss_sum == pytest.approx(dense.loss_sum, rel=1e-5)
    if method in ("nc-topk", "nc-window"):  # a row scores the same whether it is read alone or with others
        assert found["decode"].loss_sum == pytest.approx(found["question"].loss_sum, rel=1e-5)


def test_simulated_methods_have_no_time_and_stand_in_the_report(tmp_path):
    further = ("--methods", "dense", "nc-topk", "random", "oracle", "--tasks", "perplexity")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    rows = read_rows(tmp_path / "out")
    assert {row["method"] for row in rows if row["seconds"] is None} == {"random", "oracle"}
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8") as file:
        table = {row["method"]: row for row in csv.DictReader(file) if row["length"] == "96"}
    assert (table["random"]["seconds"], table["random"]["peak_memory_mb"]) == ("", "")
    assert float(table["nc-topk"]["seconds"]) > 0
    assert "oracle, 95% of the mass" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_every_seed_draws_its_own_samples_and_the_same_stretch_is_one_document(tmp_path, capsys):
    further = ("--methods", "dense", "nc-topk", "--tasks", "perplexity", "--seed", "0", "1", "7")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    rows = [row for row in read_rows(tmp_path / "out") if (row["length"], row["method"]) == (96, "dense")]
    assert [(row["sample"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 7), (5, 7)]
    assert [row["index"] for row in rows] == [0, 1] * 3
    assert main(sweep_arguments(tmp_path, tmp_path / "alone", *further[:5], "--seed", "7")) == 0
    same = [row for row in read_rows(tmp_path / "alone") if (row["length"], row["method"]) == (96, "dense")]
    assert [row["place"] for row in same] == [row["place"] for row in rows[4:]]
    assert [row["loss_sum"] for row in same] == pytest.approx([row["loss_sum"] for row in rows[4:]])
    assert all(row["document"] == str(row["place"]) for row in rows)
    assert main(sweep_arguments(tmp_path, tmp_path / "twice", "--seed", "3", "3")) == 2
    assert "--seed takes different numbers from 0 on, got 3 3" in capsys.readouterr().err


def test_blocks_of_which_none_is_chosen_are_said_once(tmp_path, capsys):
    further = ("--methods", "dense", "block", "--tasks", "perplexity")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    said = "there no block is chosen by content"
    log = capsys.readouterr().err
    assert log.count(said) == 1
    assert "of α·n^C blocks at 48 tokens (14 keys), α·n^C blocks at 96 tokens (20 keys)" in log
    assert said in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_every_session_records_its_hardware(swept):
    run = json.loads((swept / "run.json").read_text(encoding="utf-8"))
    first, *later = [session["hardware"] for session in run["sessions"]]
    assert first == run["hardware"]
    # Other tests may have gone on here with another number of threads.
    assert all({**hardware, "threads": first["threads"]} == first for hardware in later)


@pytest.mark.parametrize("phase", PHASES)
def test_the_prefill_is_timed_apart_where_there_is_one(sample, phase):
    measured = measure(tiny_model("llama"), METHODS["nc-topk"].config(Budgets(2.0, 0.5, 48)), sample, phase)
    if phase == "all":
        assert measured.prefill_seconds is None
    else:
        assert 0 < measured.prefill_seconds < measured.seconds
    simulated = measure(tiny_model("llama"), METHODS["random"].config(Budgets(2.0, 0.5, 48)), sample, phase)
    assert (simulated.seconds, simulated.prefill_seconds) == (None, None)


def test_losses_of_the_scored_tokens_add_up(sample):
    measured = measure(tiny_model("llama"), None, sample)
    assert len(measured.token_losses) == 16
    assert sum(measured.token_losses) == pytest.approx(measured.loss_sum, abs=1e-3)


def test_budgets_matched_at_the_scored_position_are_equal_in_the_rows(tmp_path):
    further = ("--methods", "dense", "fixed-topk", "fraction-topk", "nc-topk", "--tasks", "perplexity")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further, "--match", "scored")) == 0
    budgets = {(row["length"], row["budget"]) for row in read_rows(tmp_path / "out") if row["method"] != "dense"}
    assert budgets == {(48, 14), (96, 20)}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "scored: at every length all budgets are equal for the query that sees all of it" in page


def test_an_iso_sweep_tries_every_budget_and_reports_what_is_needed(tmp_path):
    further = ("--methods", "fixed-topk", "--tasks", "recall", "unseen", "--match", "iso", "--iso-keys", "8", "64")
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, *further)) == 0
    measured = {(row["task"], row["length"], row["method"]) for row in read_rows(out)}
    assert measured == {
        ("recall", 48, "dense"), ("recall", 48, "fixed-topk@8"), ("recall", 96, "dense"),
        ("recall", 96, "fixed-topk@8"), ("recall", 96, "fixed-topk@64"), ("unseen", 48, "dense"),
        ("unseen", 96, "dense"),
    }  # fmt: skip
    assert {row["tail_mean_keys"] for row in read_rows(out) if row["method"] == "fixed-topk@8"} == {8.0}
    assert (out / "report.md").stat().st_size > 0

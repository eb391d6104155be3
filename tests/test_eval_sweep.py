"""Sweeps on a tiny model: what is measured, by one process or several, what is refused, and that nothing is lost."""

import math
import os
import random
import re
import shutil
import signal
import time
import weakref

import pandas as pd
import pytest
import torch
from processes import command, lines, python, run_ranks, start, wait_until
from tiny_sweep import sweep_arguments, tiny_files, tiny_text
from torch.distributed.elastic.utils.distributed import get_free_port

from eval_tasks import measure as measuring
from eval_tasks import sweep
from eval_tasks.errors import EvalError
from eval_tasks.methods import DEFAULT_METHODS
from eval_tasks.store import Cell, read_rows, read_run
from eval_tasks.tasks import TASKS
from nc_patch import config, is_patched
from nc_patch.cli import main

# Fields that say when, where and how fast, and not what was found.
TIMES = ("seconds", "first_token_seconds", "prefill_seconds", "peak_memory", "commit", "process")
TIME_COLUMNS = ("seconds", "peak_memory_mb", "sparse_seconds", "seconds_per_answer_token")


def results(out):
    """The rows without times, by cell."""
    return {Cell.of(row): {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)}


def same_table(out, other):
    """Asserts that summary.csv is the same but for times."""
    tables = [pd.read_csv(directory / "summary.csv").drop(columns=list(TIME_COLUMNS)) for directory in (out, other)]
    pd.testing.assert_frame_equal(*tables)


def run_two(home, *outs, setups=(None, None)):
    """Two processes of a tiny sweep, into directories of these names."""
    given = zip((sweep_arguments(home, home / out) for out in outs), setups, strict=True)
    return run_ranks(home, command, *given)


@pytest.fixture(scope="module", autouse=True)
def defaults_of_other_processes():
    """The real default of ``dense_below`` in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config._DEFAULTS, "dense_below", config.DEFAULT_DENSE_BELOW)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def alone(home):
    """A sweep by one process that nobody disturbs."""
    assert main(sweep_arguments(home, home / "alone")) == 0
    return home / "alone"


def test_a_sweep_holds_every_measurement_once_short_lengths_first(alone):
    rows = read_rows(alone)
    methods = {task: ["dense"] if TASKS[task].dense_only else DEFAULT_METHODS for task in TASKS}
    every = [(n, task, i, name) for n in (48, 96) for task in TASKS for i in (0, 1) for name in methods[task]]
    assert sorted((row["length"], row["task"], row["sample"], row["method"]) for row in rows) == sorted(every)
    assert len(rows) == lines(alone / "results.jsonl")
    assert [row["length"] for row in rows] == sorted(row["length"] for row in rows)
    assert all(row["seconds"] > 0 and math.isfinite(row["loss_sum"]) for row in rows)


def test_the_same_command_again_measures_nothing_and_another_text_or_other_arguments_are_refused_by_name(
    home, alone, capsys
):
    before, text = (alone / "results.jsonl").read_bytes(), home / "text.txt"
    # Recall and perplexity by every method, and by dense attention what it is without the passage.
    planned = 4 * (2 * len(DEFAULT_METHODS) + 1)
    assert main(sweep_arguments(home, alone)) == 0
    assert f"{planned} of {planned} measurements are there already" in capsys.readouterr().err
    assert main(sweep_arguments(home, alone, "--seed", "3", "--alpha", "2.5")) == 2
    message = capsys.readouterr().err
    assert "seed was 0, is 3" in message
    assert "alpha was 2.0, is 2.5" in message
    assert "samples" not in message
    content = text.read_text()
    text.write_text(tiny_text(2000, seed=9), encoding="utf-8")
    assert main(sweep_arguments(home, alone)) == 2
    text.write_text(content)
    assert "text_sha256 was" in capsys.readouterr().err
    assert (alone / "results.jsonl").read_bytes() == before


def test_a_cell_that_runs_out_of_memory_is_recorded_and_retried_where_that_is_asked(home, capsys, monkeypatch):
    out = home / "memory"
    arguments = sweep_arguments(home, out, "--methods", "dense", "block", "--tasks", "recall")
    forward, held, freed = measuring.forward, [], []
    errors = [torch.OutOfMemoryError("CUDA out of memory"), None, RuntimeError("shapes do not fit")]

    def greedy(model, ids, keep, cache=None):
        if len(ids) == 96 and is_patched(model):
            large = torch.zeros(8)
            held.append(weakref.ref(large))
            if error := errors.pop(0):
                raise error
            torch.empty(1 << 55)
        return forward(model, ids, keep, cache)

    monkeypatch.setattr(measuring, "forward", greedy)
    monkeypatch.setattr(measuring, "clear_device_cache", lambda **_: freed.append(held[-1]() is None))
    assert main(arguments) == 0
    assert freed == [True, True]
    assert "recall with block at 96 tokens: memory ran out at 96 tokens" in capsys.readouterr().err
    kept = [(row["method"], row["length"], row.get("failed")) for row in read_rows(out)]
    assert len(kept) == 8
    assert kept.count(("block", 96, "out of memory")) == sum(failed is not None for *_, failed in kept) == 2
    assert "recall,96,block,0" in (out / "summary.csv").read_text()
    with pytest.raises(RuntimeError, match="shapes do not fit"):  # which no other length would mend
        main([*arguments, "--retry-failed"])
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "2 of them failed; --retry-failed measures them again" in capsys.readouterr().err
    assert main([*arguments, "--retry-failed"]) == 0
    assert not any("failed" in row for row in read_rows(out))


def test_an_iso_sweep_tries_every_budget_also_of_a_model_without_sdpa(tmp_path, capsys):
    tiny_files(tmp_path, "gemma2")
    further = ("--methods", "fixed-topk", "--tasks", "recall", "unseen", "--match", "iso", "--iso-keys", "8", "64")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    assert "no SDPA attention" in capsys.readouterr().err
    rows, identity = read_rows(tmp_path / "out"), read_run(tmp_path / "out")["identity"]
    found = {(row["task"], row["length"], row["method"]) for row in rows}
    dense = {(task, n, "dense") for task in ("recall", "unseen") for n in (48, 96)}
    assert found - dense == {("recall", n, f"fixed-topk@{k}") for n, k in ((48, 8), (96, 8), (96, 64))}
    assert dense < found
    assert {row["tail_mean_keys"] for row in rows if row["method"] == "fixed-topk@8"} == {8.0}
    assert (identity["iso_keys"], identity["attention"]) == ([8, 64], "eager")


def _other_machine_with_a_stale_file():
    hardware = sweep.hardware
    sweep.hardware = lambda *what: hardware(*what) | {"processor": "another"}
    sweep.read_rows = lambda directory: []


def test_two_processes_share_what_the_first_finds_missing_and_their_rows_are_those_of_one(home, alone):
    out, half = home / "two", (alone / "results.jsonl").read_text().splitlines(keepends=True)[::2]
    out.mkdir()
    (out / "results.jsonl").write_text("".join(half))
    shutil.copy(alone / "run.json", out)
    codes, (said, other) = run_two(home, "two", "two", setups=(None, _other_machine_with_a_stale_file))
    assert codes == [0, 0], said + other
    assert results(out) == results(alone)
    same_table(out, alone)
    rows = read_rows(out)
    assert {row["process"] for row in rows[len(half) :]} == {0, 1}
    assert lines(out / "results.jsonl") == len(rows)
    assert ("Report:" in said, "Report:" in other) == (True, False)
    record = read_run(out)
    session = record["sessions"][-1]
    assert session["hardware"] == record["hardware"]
    assert [machine["processor"] for machine in session["other_hardware"]] == ["another"]
    assert "different hardware" in (out / "report.html").read_text(encoding="utf-8")


def _killed():
    append_row = sweep.append_row

    def fatal(directory, row):
        append_row(directory, row)
        if lines(directory / "results.jsonl") >= 4:
            os.kill(os.getpid(), signal.SIGKILL)

    sweep.append_row = fatal


def _no_disk():
    def full(directory, row):
        raise EvalError("the disk of this machine is full")

    sweep.append_row = full


def _other_version():
    versions = sweep.versions
    sweep.versions = lambda: versions() | {"torch": "1.0"}


GONE = "another of the 2 processes ended or does not answer"


@pytest.mark.parametrize(
    ("outs", "setups", "codes", "messages"),
    [
        (("first", "first"), (_killed, None), [-signal.SIGKILL, 2], ("", "")),
        (("second", "second"), (None, _killed), [2, -signal.SIGKILL], (GONE, "")),
        (("full", "full"), (None, _no_disk), [2, 2], (GONE, "1: .*the disk of this machine is full")),
        (("old", "old"), (None, _other_version), [2, 2], (GONE, '1: .*/old holds .*torch was .*, is "1.0"')),
        (("here", "there"), (None, None), [2, 2], (GONE, "1: .*/there is not the directory that process 0 writes to")),
    ],
    ids=["first", "second", "disk", "versions", "directories"],
)
def test_where_a_process_ends_or_fails_it_says_so_the_other_stops_and_the_same_command_goes_on(
    home, alone, outs, setups, codes, messages
):
    found, said = run_two(home, *outs, setups=setups)
    assert found == codes, said
    assert all(re.search(message, each) for message, each in zip(messages, said, strict=True)), said
    kept = read_rows(home / outs[0])
    assert bool(kept) == (outs[0] in ("first", "second", "full"))  # else they would not measure the same
    if -signal.SIGKILL in codes:
        assert main(sweep_arguments(home, home / outs[0])) == 0
        assert results(home / outs[0]) == results(alone)
        assert all(row in read_rows(home / outs[0]) for row in kept)


def _interruptible():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def test_killed_or_interrupted_twenty_times_at_random_nothing_is_lost_and_the_table_is_that_of_an_undisturbed_run(
    home, alone
):
    draw, out, codes, kept = random.Random(7), home / "killed", [], b""
    written = out / "results.jsonl"
    while len(codes) < 20:
        process = start(command, sweep_arguments(home, out), _interruptible, said=home / "said")
        # Some are killed while the model loads, the rest after a few rows, wherever that is in the code.
        further = max(0, draw.randint(-1, 4))
        more = lines(written) + further
        wait_until(lambda n=more, p=process: lines(written) >= n or not p.is_alive())
        time.sleep(draw.uniform(0.0, 0.02 if further else 0.5))
        os.kill(process.pid, signal.SIGINT if further % 2 else signal.SIGKILL)
        process.join(60)
        said, content = (home / "said").read_text(), written.read_bytes() if written.exists() else b""
        assert process.exitcode in (0, 130, -signal.SIGKILL), said
        assert process.exitcode != 130 or said.count("To go on: nc-patch eval") == 1
        assert content.startswith(kept)
        kept = content[: content.rfind(b"\n") + 1]
        if process.exitcode:
            codes.append(process.exitcode)
        else:  # a machine so fast that it ended before it could be killed
            assert results(out) == results(alone)
            shutil.rmtree(out)
            kept = b""
    assert set(codes) == {130, -signal.SIGKILL}
    assert main(sweep_arguments(home, out)) == 0
    assert results(out) == results(alone)
    same_table(out, alone)
    assert written.read_bytes().startswith(kept)
    assert lines(written) == len(read_rows(out))


def test_a_device_map_changes_no_number(home, alone):
    assert main(sweep_arguments(home, home / "mapped", "--device-map", "auto")) == 0
    assert results(home / "mapped") == results(alone)


@pytest.mark.slow
def test_accelerate_launches_two_processes_on_the_cpu(home, alone):
    arguments = sweep_arguments(home, home / "accelerated", "--threads", "1")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    python("-m", *launcher, "--main_process_port", get_free_port(), "-m", "nc_patch", *arguments)
    assert {row["process"] for row in read_rows(home / "accelerated")} == {0, 1}
    same_table(home / "accelerated", alone)

"""Runs of several processes, and runs that are killed: the same numbers as of one process that nobody disturbs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from processes import ended, free_port, lines, start, start_ranks, wait_until
from tiny_sweep import sweep_arguments

from eval_tasks.errors import EvalError
from eval_tasks.store import Cell, read_rows
from nc_patch import config
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
    return ended(home, start_ranks(home, [sweep_arguments(home, home / out) for out in outs], setups))


@pytest.fixture(scope="module", autouse=True)
def defaults_of_other_processes():
    """The real default of ``dense_below`` in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config._DEFAULTS, "dense_below", config.DEFAULT_DENSE_BELOW)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(home):
    """A sweep by one process that nobody disturbs."""
    assert main(sweep_arguments(home, home / "alone")) == 0
    return home / "alone"


def _other_machine_with_a_stale_file():
    from eval_tasks import run

    hardware = run.hardware
    run.hardware = lambda *what: hardware(*what) | {"processor": "another"}
    run.read_rows = lambda directory: []


def test_two_processes_share_what_the_first_finds_missing_and_their_rows_are_those_of_one(home, alone):
    out, half = home / "two", (alone / "results.jsonl").read_text().splitlines(keepends=True)[::2]
    out.mkdir()
    (out / "results.jsonl").write_text("".join(half))
    shutil.copy(alone / "run.json", out)
    codes, said, other = run_two(home, "two", "two", setups=(None, _other_machine_with_a_stale_file))
    assert codes == [0, 0], said + other
    assert results(out) == results(alone)
    same_table(out, alone)
    rows = read_rows(out)
    assert {row["process"] for row in rows[len(half) :]} == {0, 1}
    assert lines(out / "results.jsonl") == len(rows)
    assert ("Report:" in said, "Report:" in other) == (True, False)
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    _, session = record["sessions"]
    assert session["hardware"] == record["hardware"]
    assert [machine["processor"] for machine in session["other_hardware"]] == ["another"]
    assert "different hardware" in (out / "report.html").read_text(encoding="utf-8")


def _slow_rows():
    from eval_tasks import run

    measure = run.measure

    def slowly(*arguments):
        time.sleep(0.03)
        return measure(*arguments)

    run.measure = slowly


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_stops_the_run_with_an_error_and_it_goes_on_later(home, alone, victim):
    out = home / f"died{victim}"
    ranks = start_ranks(home, [sweep_arguments(home, out)] * 2, (_slow_rows, _slow_rows))
    wait_until(lambda: lines(out / "results.jsonl") >= 4)
    ranks[victim].kill()
    survivor = ranks[1 - victim]
    survivor.join(120)
    assert survivor.exitcode == 2
    assert victim == 0 or "ended or does not answer" in (home / "said0").read_text()
    kept = read_rows(out)
    assert len(kept) >= 4
    assert main(sweep_arguments(home, out)) == 0
    assert results(out) == results(alone)
    assert all(row in read_rows(out) for row in kept)


def _no_disk():
    from eval_tasks import run

    def full(directory, row):
        raise EvalError("the disk of this machine is full")

    run.append_row = full


def _other_version():
    from eval_tasks import run

    versions = run.versions
    run.versions = lambda: versions() | {"torch": "1.0"}


@pytest.mark.parametrize(
    ("outs", "setup", "message"),
    [
        (("full", "full"), _no_disk, "the disk of this machine is full"),
        (("old", "old"), _other_version, '/old holds a run of other arguments: torch was .*, is "1.0"'),
        (("here", "there"), None, "/there is not the directory that process 0 writes to"),
    ],
    ids=["disk", "versions", "directories"],
)
def test_an_error_in_one_process_is_said_there_and_stops_the_others(home, outs, setup, message):
    codes, said, other = run_two(home, *outs, setups=(None, setup))
    assert codes == [2, 2], said
    assert re.search(f"nc-patch: process 1: .*{message}", other)
    assert "another of the 2 processes ended or does not answer" in said
    assert outs[0] == "full" or not lines(home / outs[0] / "results.jsonl")


def _interruptible():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it


def test_killed_or_interrupted_twenty_times_at_random_nothing_is_lost_and_the_table_is_that_of_an_undisturbed_run(
    home, alone
):
    draw, out, codes, kept = random.Random(7), home / "killed", [], b""
    written = out / "results.jsonl"
    while len(codes) < 20:
        process = start(sweep_arguments(home, out), home / "said", _interruptible)
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


def test_a_launcher_that_started_one_process_in_place_of_several_is_refused(home, monkeypatch, capsys):
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(sweep_arguments(home, home / "one")) == 2
    assert "give it --multi_gpu in place of --cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launches_two_processes_on_the_cpu(home, alone):
    arguments = sweep_arguments(home, home / "accelerated", "--threads", "1")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = ["-m", *launcher, "--main_process_port", str(free_port()), "-m", "nc_patch", *arguments]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {row["process"] for row in read_rows(home / "accelerated")} == {0, 1}
    same_table(home / "accelerated", alone)

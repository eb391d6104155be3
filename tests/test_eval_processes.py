"""Runs of several processes, and runs that are killed: the same numbers as of one process that nobody disturbs."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from processes import lines, start, start_ranks, wait_until
from tiny_sweep import sweep_arguments

from eval_tasks import launch
from eval_tasks.errors import EvalError
from eval_tasks.launch import Launch, run_processes, wanted_launch, without_processes
from eval_tasks.ranks import Ranks
from eval_tasks.store import read_rows
from nc_patch import config
from nc_patch.cli import main

# Fields that say when, where and how fast, and not what was found.
TIMES = ("seconds", "first_token_seconds", "prefill_seconds", "peak_memory", "commit", "process")
TIME_COLUMNS = ("seconds", "tokens_per_second", "peak_memory_mb", "sparse_seconds", "seconds_per_answer_token")


def results(out):
    """The rows without times, by key."""
    return {row["key"]: {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)}


def table(out):
    """The lines of summary.csv without the columns of times."""
    header, *rows = [line.split(",") for line in (out / "summary.csv").read_text(encoding="utf-8").splitlines()]
    kept = [place for place, name in enumerate(header) if name not in TIME_COLUMNS]
    return [[row[place] for place in kept] for row in (header, *rows)]


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


def test_two_processes_share_the_work_and_find_what_one_does(home, alone):
    ranks = start_ranks(home, ["two", "two"])
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (home / "said0").read_text()
    assert results(home / "two") == results(alone)
    assert table(home / "two") == table(alone)
    rows = read_rows(home / "two")
    assert {row["process"] for row in rows} == {0, 1}
    assert lines(home / "two" / "results.jsonl") == len(rows)
    assert not list((home / "two").glob("results.rank*"))
    assert "Report:" in (home / "said0").read_text()
    assert "Report:" not in (home / "said1").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_stops_the_run_with_an_error_and_it_goes_on_later(home, alone, victim):
    out = home / f"died{victim}"
    ranks = start_ranks(home, [out.name, out.name])
    part = out / ("results.rank1.jsonl" if victim else "results.jsonl")
    wait_until(lambda: lines(part) >= 2)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    survivor = ranks[1 - victim]
    survivor.join(60)
    assert survivor.exitcode == 2
    said = (home / "said0").read_text()
    assert victim == 0 or "ended or does not answer" in said
    kept = read_rows(out)
    assert len(kept) >= 2
    assert main(sweep_arguments(home, out)) == 0
    assert results(out) == results(alone)
    assert table(out) == table(alone)
    assert all(row in read_rows(out) for row in kept)


def _no_disk_for_parts():
    from eval_tasks import store

    def full(self, row):
        raise EvalError("the disk of this machine is full")

    store.ResultStore.append = full


def test_an_error_in_one_process_is_said_and_stops_the_others(home):
    ranks = start_ranks(home, ["full", "full"], setups=(None, _no_disk_for_parts))
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert "the disk of this machine is full" in (home / "said1").read_text()
    assert "process 1" in (home / "said0").read_text() or "another" in (home / "said0").read_text()


def _slow_rows():
    from eval_tasks import cells

    measure = cells.Measurer._measured

    def slowly(self, planned):
        time.sleep(0.2)
        return measure(self, planned)

    cells.Measurer._measured = slowly


def _no_time():
    from eval_tasks import run

    run._exceeds = lambda *_: True


def test_a_run_that_another_process_stopped_for_time_is_not_called_complete(home, alone):
    few = ("--methods", "dense", "nc-topk", "--tasks", "recall", "--minutes", "60")
    ranks = start_ranks(home, ["hurried", "hurried"], *few, setups=(_slow_rows, _no_time))
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (home / "said0").read_text()
    said = (home / "said0").read_text()
    assert len(read_rows(home / "hurried")) == 6
    assert "Stopped before the limit of 60 minutes with 2 of 8 measurements to go" in said
    assert "To measure the rest: nc-patch eval" in said
    assert "Measured in" not in said


def _other_machine():
    from eval_tasks import run

    hardware = run.hardware
    run.hardware = lambda *what: hardware(*what) | {"processor": "another"}


def test_processes_on_different_machines_are_recorded_and_said(home):
    few = ("--methods", "dense", "nc-topk", "--tasks", "recall")
    ranks = start_ranks(home, ["mixed", "mixed"], *few, setups=(None, _other_machine))
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (home / "said0").read_text()
    record = json.loads((home / "mixed" / "run.json").read_text(encoding="utf-8"))
    [session] = record["sessions"]
    assert session["hardware"] == record["hardware"]
    assert record["hardware"]["processor"] != "another"
    assert [machine["processor"] for machine in session["other_hardware"]] == ["another"]
    assert "Parts of this run were measured on different hardware" in (home / "mixed" / "report.md").read_text()


def test_directories_that_are_not_shared_are_refused(home):
    ranks = start_ranks(home, ["here", "there"])
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert "there is not the directory that process 0 writes to" in (home / "said0").read_text()


def test_killed_twenty_times_at_random_the_table_is_that_of_an_undisturbed_run(home, alone):
    draw = random.Random(7)
    outs = (home / f"killed{number}" for number in itertools.count())

    def same_as_alone(out):
        assert results(out) == results(alone)
        assert table(out) == table(alone)
        assert lines(out / "results.jsonl") == len(read_rows(out))

    out, kills = next(outs), 0
    while kills < 20:
        process = start(sweep_arguments(home, out), home / "said")
        before = lines(out / "results.jsonl")
        # Some are killed while the model loads, the rest after a few rows, wherever that is in the code.
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0.0, 0.5))
        else:
            more = before + draw.randint(1, 4)
            wait_until(
                lambda out=out, more=more, process=process: (
                    lines(out / "results.jsonl") >= more or not process.is_alive()
                )
            )
            time.sleep(draw.uniform(0.0, 0.02))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), (home / "said").read_text()
        kills += process.exitcode != 0
        if process.exitcode == 0:  # a machine so fast that it ended before it could be killed: the next one, then
            same_as_alone(out)
            out = next(outs)
    assert main(sweep_arguments(home, out)) == 0
    same_as_alone(out)


def test_work_is_handed_out_once_and_in_order():
    assert list(Ranks().take(4)) == [0, 1, 2, 3]


def test_the_launch_that_accelerate_announces_on_the_cpu_is_taken_from_its_command_line(monkeypatch):
    monkeypatch.setattr(
        launch, "_launcher_command", lambda: ["--cpu", "--num_processes", "3", "-m", "nc_patch", "eval"]
    )
    announced = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in announced.items():
        monkeypatch.setenv(name, value)
    assert wanted_launch(None) == Launch(3, 3, 0, "127.0.0.1", 29511)
    assert wanted_launch(2) == Launch(2, 2)
    monkeypatch.setattr(launch, "_launcher_command", lambda: None)
    with pytest.raises(EvalError, match="started one process"):
        wanted_launch(None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert wanted_launch(None) is None
    with pytest.raises(EvalError, match="leave out --processes"):
        wanted_launch(2)


def test_processes_do_not_start_processes():
    assert without_processes(["--out", "a", "--processes", "4", "--seed", "1"]) == ["--out", "a", "--seed", "1"]
    assert without_processes(["--processes=4"]) == []


def test_a_process_that_cannot_start_ends_the_run_with_its_exit_code(monkeypatch):
    monkeypatch.setattr(launch.sys, "executable", "/bin/false")
    assert run_processes(Launch(2, 2), ["eval"]) == 1


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_with_two_processes(home, alone):
    arguments = sweep_arguments(home, home / "accelerated", "--threads", "1")
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", *launcher, "--main_process_port", str(launch.free_port()), "-m", "nc_patch", *arguments]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "starting the 2 of this machine" in done.stderr
    assert len({row["process"] for row in read_rows(home / "accelerated")}) == 2
    assert table(home / "accelerated") == table(alone)

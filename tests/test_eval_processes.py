"""Runs of several processes, and runs that are killed: the same numbers as of one process that nobody disturbs."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import lines, start, start_ranks, wait_until
from tiny_sweep import sweep_arguments

from eval_tasks import processes as module
from eval_tasks.errors import EvalError
from eval_tasks.models import load_model
from eval_tasks.processes import Processes, free_port, start_processes
from eval_tasks.store import read_rows
from nc_patch import config
from nc_patch.cli import main

# Fields that say when, where and how fast, and not what was found.
TIMES = ("seconds", "first_token_seconds", "prefill_seconds", "peak_memory", "commit", "process")
TIME_COLUMNS = ("seconds", "tokens_per_second", "peak_memory_mb", "sparse_seconds", "seconds_per_answer_token")
FEW = ("--methods", "dense", "nc-topk", "--tasks", "recall")


def results(out):
    """The rows without times, by key."""
    return {row["key"]: {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)}


def table(out):
    """The lines of summary.csv without the columns of times."""
    header, *rows = [line.split(",") for line in (out / "summary.csv").read_text(encoding="utf-8").splitlines()]
    kept = [place for place, name in enumerate(header) if name not in TIME_COLUMNS]
    return [[row[place] for place in kept] for row in (header, *rows)]


def losses(out):
    return {(row["length"], row["sample"], row["method"]): row["loss_sum"] for row in read_rows(out)}


def ended(home, *outs, further=(), setups=(None, None)):
    """The exit codes of the two processes of a tiny sweep, and what each of them said."""
    ranks = start_ranks(home, list(outs), *further, setups=setups)
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks], *((home / f"said{rank}").read_text() for rank in (0, 1))


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
    codes, said, other = ended(home, "two", "two")
    assert codes == [0, 0], said
    assert results(home / "two") == results(alone)
    assert table(home / "two") == table(alone)
    rows = read_rows(home / "two")
    assert {row["process"] for row in rows} == {0, 1}
    assert lines(home / "two" / "results.jsonl") == len(rows)
    assert ("Report:" in said, "Report:" in other) == (True, False)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_stops_the_run_with_an_error_and_it_goes_on_later(home, alone, victim):
    out = home / f"died{victim}"
    ranks = start_ranks(home, [out.name, out.name], setups=(_slow_rows, _slow_rows))
    wait_until(lambda: lines(out / "results.jsonl") >= 4)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    survivor = ranks[1 - victim]
    survivor.join(120)
    assert survivor.exitcode == 2
    assert victim == 0 or "ended or does not answer" in (home / "said0").read_text()
    kept = read_rows(out)
    assert len(kept) >= 4
    assert main(sweep_arguments(home, out)) == 0
    assert results(out) == results(alone)
    assert all(row in read_rows(out) for row in kept)


def _slow_rows():
    from eval_tasks import run

    measure = run.measure

    def slowly(*arguments):
        time.sleep(0.03)
        return measure(*arguments)

    run.measure = slowly


def _no_disk():
    from eval_tasks import run

    def full(directory, row):
        raise EvalError("the disk of this machine is full")

    run.append_row = full


def test_an_error_in_one_process_is_said_and_stops_the_others(home):
    codes, said, other = ended(home, "full", "full", setups=(None, _no_disk))
    assert codes == [2, 2]
    assert "the disk of this machine is full" in other
    assert "process 1" in said or "another" in said


def _other_machine():
    from eval_tasks import run

    hardware = run.hardware
    run.hardware = lambda *what: hardware(*what) | {"processor": "another"}


def test_processes_on_different_machines_are_recorded_and_said(home):
    codes, said, _ = ended(home, "mixed", "mixed", further=FEW, setups=(None, _other_machine))
    assert codes == [0, 0], said
    record = json.loads((home / "mixed" / "run.json").read_text(encoding="utf-8"))
    [session] = record["sessions"]
    assert session["hardware"] == record["hardware"]
    assert [machine["processor"] for machine in session["other_hardware"]] == ["another"]
    assert "different hardware" in (home / "mixed" / "report.md").read_text()


def _stale_file():
    from eval_tasks import run

    run.read_rows = lambda directory: []


def test_processes_share_out_the_list_of_the_first_whatever_they_read_themselves(home, alone):
    out = home / "stale"
    shutil.copytree(alone, out)
    whole = (alone / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(whole[:-3]))
    codes, said, other = ended(home, "stale", "stale", setups=(None, _stale_file))
    assert codes == [0, 0], said + other
    assert results(out) == results(alone)
    assert lines(out / "results.jsonl") == len(whole)


def _other_version():
    from eval_tasks import run

    versions = run.versions
    run.versions = lambda: versions() | {"torch": "1.0"}


def test_processes_of_other_versions_are_refused(home):
    codes, said, _ = ended(home, "old", "old", further=FEW, setups=(None, _other_version))
    assert codes == [2, 2], said
    assert "process 1 of 2: torch is 1.0 here, " in said
    assert not lines(home / "old" / "results.jsonl")


def test_directories_that_are_not_shared_are_refused(home):
    codes, said, _ = ended(home, "here", "there")
    assert codes == [2, 2]
    assert "there is not the directory that process 0 writes to" in said


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
            results_file = out / "results.jsonl"
            wait_until(lambda f=results_file, n=more, p=process: lines(f) >= n or not p.is_alive())
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


@pytest.fixture(scope="module")
def whole(home):
    assert main(sweep_arguments(home, home / "whole", *FEW, "--samples", "1")) == 0
    return home / "whole"


def test_a_device_map_changes_no_number(home, whole):
    assert main(sweep_arguments(home, home / "mapped", *FEW, "--samples", "1", "--device-map", "auto")) == 0
    assert losses(home / "mapped") == losses(whole)
    with pytest.raises(EvalError, match="give one"):
        load_model(str(home / "model"), device="cpu", device_map="auto", tp_plan="auto")


def test_a_model_over_two_processes_measures_what_one_does_and_writes_once(home, whole):
    codes, said, _ = ended(home, "split", "split", further=(*FEW, "--samples", "1", "--tp-plan", "auto"))
    assert codes == [0, 0], said
    assert losses(home / "split") == pytest.approx(losses(whole), rel=1e-5)
    assert {row["process"] for row in read_rows(home / "split")} == {0}
    assert lines(home / "split" / "results.jsonl") == len(losses(whole))


def test_processes_that_the_user_asks_for_are_started_and_end_as_the_first_that_failed(home, alone, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = sweep_arguments(home, home / "asked", "--processes", "2")
    assert main(arguments) == 0
    assert results(home / "asked") == results(alone)
    assert {row["process"] for row in read_rows(home / "asked")} == {0, 1}
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    assert start_processes(2, ["eval"]) == 1


def test_what_accelerate_announces_is_taken_from_its_configuration(monkeypatch, tmp_path):
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}
    settings |= {"num_processes": 3, "num_machines": 1, "machine_rank": 0, "mixed_precision": "no"}
    (tmp_path / "accelerate.json").write_text(json.dumps(settings))
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    command = ["--config_file", str(tmp_path / "accelerate.json"), "-m", "nc_patch", "eval"]
    monkeypatch.setattr(module, "_launcher_command", lambda: command)
    assert module._announced()[:2] == (1, 3)


def test_what_accelerate_announces_is_taken_from_its_command_line(monkeypatch):
    command = ["--cpu", "--num_processes", "6", "--num_machines", "2", "--machine_rank", "1", "-m", "nc_patch", "eval"]
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_launcher_command", lambda: command)
    meeting = {"rdzv_backend": "static", "rdzv_endpoint": "10.0.0.1:29511", "rdzv_configs": {"rank": 1}}
    assert module._announced() == (2, 3, meeting)
    monkeypatch.setattr(module, "_launcher_command", lambda: None)
    with pytest.raises(EvalError, match="started one process"):
        start_processes(None, ["eval"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert start_processes(None, ["eval"]) is None
    with pytest.raises(EvalError, match="leave out --processes"):
        start_processes(2, ["eval"])


def test_processes_do_not_start_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", module._RUN_ID)
    assert start_processes(4, ["eval"]) is None
    assert (Processes().gathered(3), Processes().from_first(4)) == ([3], 4)


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_with_two_processes(home, alone):
    arguments = sweep_arguments(home, home / "accelerated", "--threads", "1")
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", *launcher, "--main_process_port", str(free_port()), "-m", "nc_patch", *arguments]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "starting the 2 of this machine" in done.stderr
    assert len({row["process"] for row in read_rows(home / "accelerated")}) == 2
    assert table(home / "accelerated") == table(alone)

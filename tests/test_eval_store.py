"""The directory of results: whole lines, torn lines, other arguments, hostile content, and two runs at once."""

import json
import resource

import pytest
from test_eval_report import row as made_up_row
from test_eval_report import run_of

from eval_tasks.errors import EvalError
from eval_tasks.provenance import check_same, record_session
from eval_tasks.store import (
    RESULTS,
    RUN,
    append_row,
    claimed,
    read_rows,
    read_run,
    write_atomically,
)

DETAILS = run_of(model="m")
IDENTITY = DETAILS.pop("identity")


def row(sample, **fields):
    return made_up_row("recall", 48, sample, "dense", 2.0) | fields


def line(sample, **fields):
    return json.dumps(row(sample, **fields)) + "\n"


def samples(directory):
    return [each["sample"] for each in read_rows(directory)]


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row(0, said="é <b>"), row(1, loss_sum=-1.5)]
    with claimed(tmp_path / "out"):
        for each in rows:
            append_row(tmp_path / "out", each)
    assert read_rows(tmp_path / "out") == rows


@pytest.mark.parametrize(
    "torn", ['{"key": "c", "val', '{"nothing": 1}', "\x00\x00\x00", "\x00\x00\x00\n", '{"key": \n']
)
@pytest.mark.parametrize("who", ["the next run", "another process of the run"])
def test_a_torn_last_line_is_cut_off(tmp_path, capsys, torn, who):
    (tmp_path / RESULTS).write_text(line(0) + torn, encoding="utf-8")
    assert samples(tmp_path) == [0]
    if who == "the next run":
        with claimed(tmp_path):
            assert "torn off" in capsys.readouterr().err
    append_row(tmp_path, row(1))
    assert (tmp_path / RESULTS).read_text().splitlines(keepends=True) == [line(0), line(1)]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path, capsys):
    (tmp_path / RESULTS).write_text((line(0) + line(1)).rstrip("\n"), encoding="utf-8")
    with claimed(tmp_path):
        append_row(tmp_path, row(2))
    assert samples(tmp_path) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_next_run_waits_for_the_processes_that_a_killed_first_one_leaves(tmp_path):
    with claimed(tmp_path), claimed(tmp_path, is_first=False):
        pass
    with claimed(tmp_path, is_first=False):
        with pytest.raises(EvalError, match="another process is measuring"), claimed(tmp_path):
            pass
        with claimed(tmp_path, is_first=False):
            pass
    with claimed(tmp_path), pytest.raises(EvalError, match="another process is measuring"), claimed(tmp_path):
        pass


def test_a_retry_takes_the_place_of_a_failure_and_never_the_other_way_round(tmp_path):
    failed = {**row(0), "failed": "out of memory"}
    for each in (failed, row(1), row(0, tokens=3), {**failed, "sample": 1}):
        append_row(tmp_path, each)
    assert read_rows(tmp_path) == [row(0, tokens=3), row(1)]


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path):
    append_row(tmp_path, row(0))
    write_atomically(tmp_path / RUN, b"old")
    before = (tmp_path / RESULTS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(EvalError, match="make room, and the same command goes on"):
            append_row(tmp_path, row(1))
        with pytest.raises(EvalError, match=r"run.json cannot be written"):
            write_atomically(tmp_path / RUN, b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / RESULTS).read_bytes() == before
    assert (tmp_path / RUN).read_bytes() == b"old"
    assert not list(tmp_path.glob(".run.json*"))
    append_row(tmp_path, row(1))
    assert samples(tmp_path) == [0, 1]


def test_a_value_that_json_cannot_hold_is_an_error_and_leaves_the_file_alone(tmp_path):
    append_row(tmp_path, row(0))
    with pytest.raises(ValueError, match="JSON"):
        append_row(tmp_path, row(1, loss_sum=float("nan")))
    assert samples(tmp_path) == [0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"method": "=cmd()"}, "method cannot be"),
        ({"task": "\x1b[2J"}, "task cannot be"),
        ({"length": 0}, "length cannot be"),
        ({"budget": True}, "budget cannot be"),
        ({"loss_sum": 1e12, "tokens": 1}, "within 700"),
        ({"attended_fraction": 1.5}, "attended_fraction cannot be"),
        ({"seconds": "1"}, "seconds cannot be"),
        ({"token_losses": [1.0, "x"]}, "token_losses cannot be"),
        ({"token_losses": [1.0]}, "token_losses must be 10, one for each of the tokens"),
        ({"depth": 2}, "depth cannot be"),
    ],
)
def test_a_row_that_cannot_have_been_measured_is_refused_by_its_field(tmp_path, damage, message):
    (tmp_path / RESULTS).write_text(line(0) + line(1, **damage))
    with pytest.raises(EvalError, match=message):
        read_rows(tmp_path)


def test_a_row_without_a_field_is_refused_with_its_line(tmp_path):
    lacking = row(1)
    del lacking["tokens"]
    (tmp_path / RESULTS).write_text(line(0) + json.dumps(lacking) + "\n")
    with pytest.raises(EvalError, match=r"line 2 of .* is a damaged result: tokens is missing. Remove that line"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"identity": IDENTITY | {"seed": "first"}},
        {"sessions": [{"hardware": "a laptop"}]},
        {"sessions": [{"other_hardware": {"processor": "p"}}]},
        {"hardware": {"processor": "\x1b[2J"}},
        {"identity": IDENTITY | {"lengths": [0]}},
        {"identity": IDENTITY | {"dtype": "\ud800"}},
    ],
)
def test_a_record_of_another_kind_is_refused(tmp_path, damage):
    (tmp_path / RUN).write_text(json.dumps(DETAILS | {"identity": IDENTITY, "command": "c", "sessions": []} | damage))
    with pytest.raises(EvalError, match=r"run.json is damaged: (sessions|hardware|identity|lengths|seed) cannot be"):
        read_run(tmp_path)


def test_each_session_is_recorded_the_first_command_stays_and_other_hardware_is_said(tmp_path, capsys):
    record_session(tmp_path, IDENTITY, DETAILS, "nc-patch eval", [DETAILS["hardware"]])
    record_session(tmp_path, IDENTITY, {}, "second", [{"processor": "q"}])
    # Tuples are lists in a file, and what the record lacks is not compared.
    check_same(tmp_path, {**IDENTITY, "methods": tuple(IDENTITY["methods"]), "new": 1})
    run = read_run(tmp_path)
    assert (run["command"], run["text_origin"], run["identity"]) == ("nc-patch eval", DETAILS["text_origin"], IDENTITY)
    assert [session["command"] for session in run["sessions"]] == ["nc-patch eval", "second"]
    assert {"started", "commit"} <= run["sessions"][0].keys()
    assert "runs on other hardware" in capsys.readouterr().err


def test_results_without_the_record_of_what_they_are_of_are_refused(tmp_path):
    check_same(tmp_path, IDENTITY)
    append_row(tmp_path, row(0))
    with pytest.raises(EvalError, match=r"holds results and no run.json"):
        check_same(tmp_path, IDENTITY)

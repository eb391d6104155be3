"""The directory of results: whole lines, torn lines, other arguments, hostile content, and two runs at once."""

import json
import resource

import pytest
from test_eval_report import row as made_up_row
from test_eval_report import run_of

from eval_tasks.errors import EvalError
from eval_tasks.store import (
    RESULTS,
    RUN,
    append_row,
    check_same,
    claimed,
    read_rows,
    read_run,
    record_session,
    write_atomically,
)

DETAILS = run_of(model="m")
IDENTITY = DETAILS.pop("identity")


def row(sample, **fields):
    return made_up_row("recall", 48, sample, "dense", 2.0) | fields


def line(sample, **fields):
    return json.dumps(row(sample, **fields)) + "\n"


ROWS = [row(0, loss_sum=-1.5), row(1, said="é <b>")]
WRITTEN = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ROWS).encode()
SECOND = WRITTEN.index(b"\n") + 1


@pytest.mark.parametrize("who", ["the next run", "another process of the run"])
def test_whole_lines_are_read_as_they_were_written_and_a_torn_last_one_is_cut_off(tmp_path, who):
    """Torn anywhere, within a letter as well, or damaged by the end of the machine."""
    cuts = [*range(SECOND, len(WRITTEN) - 1, 9), WRITTEN.index("é".encode()) + 1, len(WRITTEN) - 2]
    ends = [WRITTEN[SECOND:cut] for cut in cuts] + [b'{"nothing": 1}', b"\0\0\0", b"\0\0\0\n", b'{"key": \n']
    for content, whole in [(WRITTEN, 2), (WRITTEN[:-1], 2), *((WRITTEN[:SECOND] + end, 1) for end in ends)]:
        (tmp_path / RESULTS).write_bytes(content)
        assert read_rows(tmp_path) == ROWS[:whole]
        if who == "the next run":
            with claimed(tmp_path):
                pass
        append_row(tmp_path, row(2))
        assert read_rows(tmp_path) == [*ROWS[:whole], row(2)]
        assert (tmp_path / RESULTS).read_bytes().count(b"\n") == whole + 1


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


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    append_row(tmp_path, row(0))
    write_atomically(tmp_path / RUN, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / RESULTS).stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(EvalError, match="make room, and the same command goes on"):
            append_row(tmp_path, row(1))
        with pytest.raises(EvalError, match=r"run.json cannot be written"):
            write_atomically(tmp_path / RUN, b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_rows(tmp_path) == [row(0)]
    assert (tmp_path / RUN).read_bytes() == b"old"
    assert not list(tmp_path.glob(".run.json*"))
    append_row(tmp_path, row(1))
    assert read_rows(tmp_path) == [row(0), row(1)]


def test_a_value_that_json_cannot_hold_is_an_error_and_leaves_the_file_alone(tmp_path):
    append_row(tmp_path, row(0))
    with pytest.raises(ValueError, match="JSON"):
        append_row(tmp_path, row(1, loss_sum=float("nan")))
    assert read_rows(tmp_path) == [row(0)]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (RESULTS, {"length": "long"}, "length cannot be 'long'"),
        (RESULTS, {"tokens": None}, "tokens is missing. Remove that line"),
        (RUN, {"identity": IDENTITY | {"methods": "dense"}}, "methods cannot be 'dense'"),
        (RUN, {"sessions": None}, "sessions is missing"),
    ],
)
def test_what_cannot_have_been_measured_is_refused_by_its_place_and_its_field(tmp_path, file, damage, message):
    whole = row(1) if file == RESULTS else DETAILS | {"identity": IDENTITY, "command": "c", "sessions": []}
    content = {name: value for name, value in (whole | damage).items() if value is not None}
    (tmp_path / file).write_text(line(0) * (file == RESULTS) + json.dumps(content))
    read, place = (read_rows, "line 2 of .*") if file == RESULTS else (read_run, "run.json")
    with pytest.raises(EvalError, match=f"{place} is .*damaged.*: {message}"):
        read(tmp_path)


def test_each_session_is_recorded_and_the_first_command_stays(tmp_path):
    record_session(tmp_path, IDENTITY, DETAILS, "nc-patch eval", [DETAILS["hardware"]])
    record_session(tmp_path, IDENTITY, {}, "second", [{"processor": "q"}])
    # Tuples are lists in a file, and what the record lacks is not compared.
    check_same(tmp_path, {**IDENTITY, "methods": tuple(IDENTITY["methods"]), "new": 1})
    run = read_run(tmp_path)
    assert (run["command"], run["text_origin"], run["identity"]) == ("nc-patch eval", DETAILS["text_origin"], IDENTITY)
    assert [session["command"] for session in run["sessions"]] == ["nc-patch eval", "second"]
    assert {"started", "commit"} <= run["sessions"][0].keys()


def test_results_without_the_record_of_what_they_are_of_are_refused(tmp_path):
    check_same(tmp_path, IDENTITY)
    append_row(tmp_path, row(0))
    with pytest.raises(EvalError, match=r"holds results and no run.json"):
        check_same(tmp_path, IDENTITY)

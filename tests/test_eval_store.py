"""The directory of results: whole lines, torn lines, other arguments, and two processes at once."""

import json

import pytest

from eval_tasks.errors import EvalError
from eval_tasks.provenance import check_same, record_session
from eval_tasks.store import RESULTS, ResultStore, measurement_key, read_rows, read_run, valid_rows, write_atomically


def test_rows_are_there_when_the_store_is_opened_again(tmp_path):
    rows = [{"key": "a", "value": 1.5}, {"key": "b", "value": "é <b>"}]
    with ResultStore(tmp_path / "out") as store:
        for row in rows:
            store.append(row)
    with ResultStore(tmp_path / "out") as store:
        assert store.rows == rows


@pytest.mark.parametrize(
    "torn", ['{"key": "c", "val', '{"key": "c"', '{"nothing": 1}', "\x00\x00\x00", "\x00\x00\x00\n", '{"key": \n']
)
def test_a_torn_last_line_is_cut_off_and_said(tmp_path, capsys, torn):
    path = tmp_path / RESULTS
    path.write_text('{"key": "a"}\n' + torn, encoding="utf-8")
    assert [row["key"] for row in read_rows(tmp_path)] == ["a"]
    with ResultStore(tmp_path) as store:
        assert [row["key"] for row in store.rows] == ["a"]
        store.append({"key": "b"})
    assert "torn off" in capsys.readouterr().err
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path, capsys):
    (tmp_path / RESULTS).write_text('{"key": "a"}\n{"key": "b"}', encoding="utf-8")
    with ResultStore(tmp_path) as store:
        store.append({"key": "c"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_damage_in_the_middle_is_refused_with_its_line(tmp_path):
    (tmp_path / RESULTS).write_text('{"key": "a"}\n{"key": \n{"key": "c"}\n', encoding="utf-8")
    with pytest.raises(EvalError, match=r"line 2 of .* is damaged"), ResultStore(tmp_path):
        pass


def test_a_second_process_is_refused_while_the_first_measures(tmp_path):
    with ResultStore(tmp_path), pytest.raises(EvalError, match="another process"), ResultStore(tmp_path):
        pass
    with ResultStore(tmp_path) as store:
        assert store.rows == []


def test_the_parts_of_other_processes_are_taken_in_once_and_removed(tmp_path, capsys):
    with ResultStore(tmp_path) as store:
        store.append({"key": "a"})
    with ResultStore(tmp_path, rank=1) as part:
        part.append({"key": "b"})
        with pytest.raises(EvalError, match="another process"), ResultStore(tmp_path):
            pass
    (tmp_path / "results.rank2.jsonl").write_text('{"key": "a"}\n{"key": "c"}\n{"key": "d', encoding="utf-8")
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "b", "c"]
    with ResultStore(tmp_path) as store:
        assert [row["key"] for row in store.rows] == ["a", "b", "c"]
    assert (tmp_path / RESULTS).read_text().count("\n") == 3
    assert not list(tmp_path.glob("results.rank*"))
    assert "results.rank2.jsonl was torn off" in capsys.readouterr().err


def test_an_interruption_while_parts_are_taken_in_doubles_nothing(tmp_path, monkeypatch):
    with ResultStore(tmp_path, rank=1) as part:
        part.append({"key": "b"})
    monkeypatch.setattr("pathlib.Path.unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), ResultStore(tmp_path):
        pass
    monkeypatch.undo()
    with ResultStore(tmp_path) as store:
        assert [row["key"] for row in store.rows] == ["b"]
    assert (tmp_path / RESULTS).read_text().count("\n") == 1


def test_a_later_row_of_the_same_key_counts(tmp_path):
    with ResultStore(tmp_path) as store:
        store.append({"key": "a", "failed": "out of memory"})
        store.append({"key": "a", "value": 1})
    assert read_rows(tmp_path) == [{"key": "a", "value": 1}]


def test_a_retry_by_another_process_takes_the_place_of_the_failure(tmp_path):
    failed, measured = {"key": "a", "failed": "out of memory"}, {"key": "a", "value": 1}
    with ResultStore(tmp_path) as store:
        store.append(failed)
        store.append({"key": "b", "value": 2})
    with ResultStore(tmp_path, rank=1) as part:
        part.append(measured)
        part.append({"key": "b", "failed": "out of memory"})
    assert read_rows(tmp_path) == [measured, {"key": "b", "value": 2}]
    with ResultStore(tmp_path) as store:
        assert store.rows == [failed, {"key": "b", "value": 2}, measured]
        assert valid_rows(store.rows) == [measured, {"key": "b", "value": 2}]
    assert read_rows(tmp_path) == [measured, {"key": "b", "value": 2}]
    (tmp_path / "results.rank1.jsonl").write_text('{"key": "a", "failed": "out of memory"}\n')
    with ResultStore(tmp_path) as store:
        assert len(store.rows) == 3


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path):
    import resource

    with ResultStore(tmp_path) as store:
        store.append({"key": "a"})
        before = (tmp_path / RESULTS).read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
        try:
            with pytest.raises(EvalError, match="make room, and the same command goes on"):
                store.append({"key": "b"})
            with pytest.raises(EvalError, match=r"run.json cannot be written"):
                write_atomically(tmp_path / "run.json", b"x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / RESULTS).read_bytes() == before
        assert not list(tmp_path.glob(".run.json*"))
        store.append({"key": "b"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot be written"), ResultStore(tmp_path / "file" / "out"):
        pass


def test_a_value_that_json_cannot_hold_is_an_error_and_leaves_the_file_alone(tmp_path):
    with ResultStore(tmp_path) as store:
        store.append({"key": "a"})
        with pytest.raises(ValueError, match="JSON"):
            store.append({"key": "b", "value": float("nan")})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a"]


def test_keys_depend_on_every_field_and_not_on_their_order():
    assert measurement_key({"a": 1, "b": [2]}) == measurement_key({"b": [2], "a": 1})
    assert measurement_key({"a": 1, "b": [2]}) != measurement_key({"a": 1, "b": [3]})


def test_other_arguments_are_refused_by_name_and_the_same_ones_are_not(tmp_path):
    identity = {"lengths": (512, 1024), "seed": 0}
    record_session(tmp_path, identity, {"hardware": {}}, "nc-patch eval")
    check_same(tmp_path, identity)
    check_same(tmp_path, {"seed": 0})
    with pytest.raises(EvalError) as refused:
        check_same(tmp_path, {"lengths": (512,), "seed": 0})
    assert "lengths was [512, 1024], is [512]" in str(refused.value)
    assert "seed was" not in str(refused.value)


def test_each_session_is_recorded_and_the_first_command_stays(tmp_path):
    for command in ("first", "second"):
        record_session(tmp_path, {"seed": 0}, {}, command)
    run = read_run(tmp_path)
    assert run["command"] == "first"
    assert [session["command"] for session in run["sessions"]] == ["first", "second"]


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(EvalError, match="damaged"):
        check_same(tmp_path, {"seed": 0})


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "summary.csv"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("failed")))
    with pytest.raises(EvalError, match=r"summary.csv cannot be written: failed"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.csv"]


def test_run_json_is_json_with_everything(tmp_path):
    record_session(tmp_path, {"model": "m"}, {"text_origin": "é"}, "c")
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run["identity"] == {"model": "m"}
    assert run["text_origin"] == "é"
    assert {"started", "commit", "command"} <= run["sessions"][0].keys()

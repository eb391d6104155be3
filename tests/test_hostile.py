"""Directories of results from strangers: refused with a clear error where they are damaged, never run.

``test_config.py`` and ``test_profile.py`` hold files of settings and profiles to the same.
"""

import json
from pathlib import Path

import pytest
from test_eval_report import rows_of, run_of
from tiny_sweep import sweep_arguments

from eval_tasks.errors import EvalError
from eval_tasks.report import Report
from eval_tasks.summary import merge_runs
from nc_patch.cli import main

ROWS = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0}) + rows_of("perplexity", 4096, {"dense": 2.0})
RUN = run_of(model="tiny", methods=["dense", "nc-topk"]) | {"command": "nc-patch eval", "sessions": [{"started": "x"}]}
DAMAGED = [
    *(b"\x00\xff\xfe garbage", b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"3", b"{}", b'{"key": [1]}'),
    *(
        b'{"key": "a", "length": 1' + b"0" * 10_000 + b"}",
        b'{"key": "' + b"x" * (1 << 25) + b'"}',
        b'{"key": "a", "len',
    ),
]


def written(directory: Path, rows: list = ROWS, run: object = RUN) -> Path:
    """A directory of results; what is bytes is written as it is."""
    directory.mkdir()
    *lines, record = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (*rows, run))
    (directory / "results.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (directory / "run.json").write_bytes(record)
    return directory


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_directories_are_refused_by_name(tmp_path, damage):
    assert Report(*merge_runs([written(tmp_path / "sound")]), 0.05).result
    for name, row, run in (("results.jsonl", damage, RUN), ("run.json", ROWS[0], damage)):
        with pytest.raises(EvalError, match=f"{name} is damaged") as refused:
            merge_runs([written(tmp_path / name, [row, *ROWS[1:]], run)])
        assert len(str(refused.value)) < 600


NAMES = ("results.jsonl", ".lock", "run.json", "report.html")


@pytest.mark.parametrize(("name", "target"), [*((name, "there") for name in NAMES), (".lock", "missing")])
def test_links_lead_no_write_out_of_the_directory(name, target, tmp_path, capsys):
    directory, outside = written(tmp_path / "in"), tmp_path / "outside"
    outside.mkdir()
    if target == "there":
        (outside / target).write_text("precious\nnot JSON", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside / target)
    reports = name in ("run.json", "report.html")
    main(["report", str(directory)] if reports else sweep_arguments(tmp_path / "model", directory))
    assert "Traceback" not in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before

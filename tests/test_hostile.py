"""Directories of results from strangers: refused with a clear error, never run, never a traceback.

``test_config.py`` and ``test_profile.py`` hold files of settings and profiles to the same.
"""

import copy
import json
import random
from pathlib import Path

import pytest
from test_eval_report import rows_of, run_of
from tiny_sweep import sweep_arguments

from eval_tasks.errors import EvalError
from eval_tasks.report import Report
from eval_tasks.summary import merge_runs
from nc_patch.cli import main

SCRIPT = "<script>alert(1)</script>"
# Values that stand for every kind of wrong one: types, sizes, numbers that are none, paths, and terminal commands.
WRONG = [
    *(None, True, -1, 0, 10**400, 10**18, 1e308, float("nan"), float("-inf"), "", "1", "x" * 200_000, [], {}, [[]]),
    *({"a": {"b": [1] * 20_000}}, "../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800", "=cmd|' /C calc'!A0", SCRIPT),
    *("$\\frac{1}{2}$", "${title}", "```\n# x\n```", "nul\x00", -(10**30), 1e-320, ["dense", 3], [10**30], "🙂" * 9),
]


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


def changed(value: object, rng: random.Random) -> object:
    """A copy in which one thing at a random depth is wrong, or missing."""
    value = copy.deepcopy(value)
    at = value
    while True:
        key = rng.choice(sorted(at)) if isinstance(at, dict) else rng.randrange(len(at))
        inner = at[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
            at = inner
        elif isinstance(at, dict) and rng.random() < 0.2:
            del at[key]
            return value
        else:
            at[key] = rng.choice(WRONG)
            return value


def test_damaged_directories_are_reported_or_refused_by_name(tmp_path):
    assert Report(*merge_runs([written(tmp_path / "sound")]), 0.05).details
    draws = [random.Random(seed) for seed in range(120)]
    rows = [*DAMAGED, *(changed(ROWS[0], rng) for rng in draws[::2])]
    runs = [*DAMAGED, *(changed(RUN, rng) for rng in draws[1::2])]
    refused = 0
    for number, (row, run) in enumerate([*((row, RUN) for row in rows), *((ROWS[0], run) for run in runs)]):
        directory, said, text = written(tmp_path / str(number), [row, *ROWS[1:]], run), "", ""
        try:
            text = " ".join(part for detail in Report(*merge_runs([directory]), 0.05).details for part in detail)
        except EvalError as error:
            said = str(error)
        refused += bool(said)
        assert text or str(directory) in said
        assert not isinstance(row, bytes) or "results.jsonl is damaged" in said
        assert not isinstance(run, bytes) or "run.json is damaged" in said
        assert said.isprintable()
        assert len(said) < 600
        assert "<script" not in text
        assert "\x1b" not in text
    assert refused > 40 + 2 * len(DAMAGED)


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

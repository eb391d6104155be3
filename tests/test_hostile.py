"""Directories of results from strangers: refused with a clear error, never run, never a traceback.

Nor is anything unpickled or the network used on a local model. ``test_config.py`` and ``test_profile.py`` hold files of
settings and profiles to the same.
"""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_eval_report import rows_of, run_of
from tiny_sweep import sweep_arguments

from eval_tasks.errors import EvalError
from eval_tasks.report import Report
from eval_tasks.store import read_rows
from eval_tasks.summary import merge_runs
from nc_patch.cli import main

SCRIPT = "<script>alert(1)</script>"
# Values that stand for every kind of wrong one: types, sizes, numbers that are none, paths, and terminal commands.
WRONG = [
    *(None, True, -1, 0, 10**400, 10**18, 1e308, float("nan"), float("-inf"), "", "1", "x" * 200_000, [], {}, [[]]),
    *({"a": {"b": [1] * 20_000}}, "../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800", "=cmd|' /C calc'!A0", SCRIPT),
    *("$\\frac{1}{2}$", "${title}", "```\n# x\n```", "nul\x00", -(10**30), 1e-320, ["dense", 3], [10**30], "🙂" * 9),
]


@pytest.fixture
def directory(tmp_path):
    return written(tmp_path / "in")


def written(directory: Path) -> Path:
    """A directory of results in which nothing is wrong."""
    directory.mkdir()
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0}) + rows_of("perplexity", 4096, {"dense": 2.0})
    write(directory, rows, RUN)
    return directory


RUN = run_of(model="tiny", methods=["dense", "nc-topk"]) | {"command": "nc-patch eval", "sessions": [{"started": "x"}]}


def write(directory: Path, rows: list, run: object) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (directory / "results.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (directory / "run.json").write_bytes(run if isinstance(run, bytes) else json.dumps(run).encode())


def files_of(directory: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*")) if not p.is_symlink()}


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
    refused = 0
    for seed in range(120):
        rng, directory = random.Random(seed), written(tmp_path / str(seed))
        rows, run = read_rows(directory), RUN
        if rng.random() < 0.5:
            rows[rng.randrange(len(rows))] = changed(rows[0], rng)
        else:
            run = changed(RUN, rng)
        write(directory, rows, run)
        said = text = ""
        try:
            text = " ".join(part for detail in Report(*merge_runs([directory]), 0.05).details for part in detail)
        except EvalError as error:
            said = str(error)
        refused += bool(said)
        assert text or str(directory) in said
        assert said.isprintable()
        assert len(said) < 600
        assert "<script" not in text
        assert "\x1b" not in text
    assert refused > 40


DAMAGED = {
    "garbage": b"\x00\xff\xfe garbage",
    "deep": b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number": b"3",
    "no key": b"{}",
    "a list for a key": b'{"key": [1]}',
    "many digits": b'{"key": "a", "length": 1' + b"0" * 10_000 + b"}",
    "gigantic": b'{"key": "' + b"x" * (1 << 25) + b'"}',
    "truncated": b'{"key": "a", "len',
}


@pytest.mark.parametrize("part", ["results.jsonl", "run.json"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_lines_and_records_are_named_and_nothing_is_written(content, part, directory, capsys):
    rows = read_rows(directory)
    if part == "results.jsonl":
        write(directory, [rows[0], content, *rows[1:]], RUN)
    else:
        write(directory, rows, content)
    before = files_of(directory.parent)
    assert main(["report", str(directory), "--out", str(directory.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert "damaged" in said
    assert "Traceback" not in said
    assert len(said) < 600
    assert files_of(directory.parent) == before


NAMES = ("results.jsonl", ".lock", "run.json", "report.html")


@pytest.mark.parametrize(("name", "target"), [*((name, "there") for name in NAMES), (".lock", "missing")])
def test_links_lead_no_write_out_of_the_directory(name, target, directory, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    if target == "there":
        (outside / target).write_text("precious\nnot JSON", encoding="utf-8")
    before = files_of(outside)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside / target)
    reports = name in ("run.json", "report.html")
    main(["report", str(directory)] if reports else sweep_arguments(tmp_path / "model", directory))
    assert "Traceback" not in capsys.readouterr().err
    assert files_of(outside) == before


# Runs in a process of its own: what an audit hook sees cannot be taken back, nor the hook.
AUDITED = """
import socket, sys
events = []
def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "socket.connect", "socket.getaddrinfo"):
        # Numba unpickles the kernels that it has compiled, from a folder of the user's own.
        if "numba" not in sys._getframe(1).f_globals.get("__name__", ""):
            events.append((event, tuple(map(str, arguments))[:3]))
def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked for: {arguments}")
sys.addaudithook(hook)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from tiny_sweep import sweep_arguments
from tiny_models import tiny_model, random_ids
import nc_patch
from pathlib import Path
from nc_patch.cli import main
model = nc_patch.patch_model(tiny_model("llama"), 1.0, 0.7)
model.generate(random_ids(1, 30), max_new_tokens=3, do_sample=False, pad_token_id=0)
nc_patch.unpatch_model(model)
where = Path(sys.argv[1])
assert main(sweep_arguments(where, where / "out")) == 0
assert main(["report", str(where / "out"), "--out", str(where / "report")]) == 0
assert not events, events
print("nothing")
"""


def test_nothing_is_unpickled_and_no_network_is_used_on_a_local_model(tmp_path):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    # As a user has it, who has not said that the hub is out of reach.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-c", AUDITED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("nothing")

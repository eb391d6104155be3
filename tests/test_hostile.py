"""Directories of results from strangers: refused with a clear error where they are damaged, never run.

Nor is anything unpickled or the network used on a local model. ``test_config.py`` and ``test_profile.py`` hold files of
settings and profiles to the same.
"""

import json
import os
from pathlib import Path

import pytest
from processes import python
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


def test_nothing_is_unpickled_and_no_network_is_used_on_a_local_model(tmp_path, monkeypatch):
    tests = Path(__file__).parent
    # As a user has it, who has not said that the hub is out of reach.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    path = os.pathsep.join([str(tests.parent), str(tests)])
    assert python("-W", "ignore", "-c", AUDITED, tmp_path, cwd=tmp_path, PYTHONPATH=path).endswith("nothing\n")

"""The command line: exit codes and messages, all before any work; what a run needs at its end is there as it begins."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_sweep import sweep_arguments

from eval_tasks import calibrate_command, fidelity_command, sweep
from eval_tasks.bench import command
from eval_tasks.methods import METHODS
from eval_tasks.tasks import TASKS
from nc_patch import __version__
from nc_patch.cli import main

PROFILE = Path(__file__).parent / "data" / "profile_format_1.json"


def test_help_lists_and_the_version_are_printed(capsys):
    for arguments, words in (
        (["--help"], ["measure sparse attention by context length"]),
        (["--version"], [__version__]),
        (["eval", "--help"], [*METHODS, "iso: no budgets are equal"]),
        (["eval", "--list-methods"], METHODS),
        (["eval", "--list-tasks"], TASKS),
    ):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: nc-patch"),
        (["evaluate"], "invalid choice: 'evaluate' (choose from"),
        (["eval"], "required: --out"),
        (["eval", "--out", "file"], "is a file; give a directory"),
        (["eval", "--out", "file/out"], "cannot be written"),
        (["report", "."], "holds no measurements"),
    ],
)
def test_commands_without_what_they_need_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(sweep_arguments(tmp_path, arguments[2]) if len(arguments) == 3 else arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--model", "/no/such/model"), "no model at /no/such/model"),
        (("--model", "nobody/no-such-model"), "nobody/no-such-model is no directory here"),
        (("--text", "no-such-text"), "no text named 'no-such-text'"),
        (("--lengths", "48", "1024"), "length 1,024 is beyond the 512 positions"),
        (("--lengths", "8"), "length 8 is too short for the task recall"),
        (("--lengths", "48", "48"), "48 is given twice"),
        (("--samples", "99"), "the text has 2,000 tokens; 99 samples of up to 96 tokens need 14,652"),
        (("--alpha", "-1"), "alpha must be a positive number"),
        (("--C", "1.5"), "C must be a number in [0, 1]"),
        (("--equal-at", "1"), "equal_at must be a length of at least 2"),
        (("--device", "abacus"), "device must be auto, cpu, cuda"),
        (("--methods", "magic"), "unknown method 'magic'; allowed are dense, window"),
        (("--methods", "fixed-topk@64"), "chosen by --match iso"),
        (("--methods", "dense", "--match", "iso"), "name one, for example fixed-topk"),
        (("--methods", "kvpress:SnapKVPress", "--match", "iso"), "which --match iso cannot set; leave it out"),
        (("--methods", "kvpress:SnapKVPress"), "--phase question"),
        (("--iso-keys", "96", "--match", "iso"), "(96) holds all keys of every length (48 96)"),
        (("--match", "luck"), "invalid choice: 'luck'"),
        (("--tasks", "juggling"), "invalid choice: 'juggling' (choose from"),
        (("--methods", "profile"), "--profile FILE, from nc-patch calibrate"),
        (("--seed", "-1"), "at least 0"),
        (("--samples", "0"), "at least 1"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--device", "cuda"), "torch sees 0 GPUs"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, capsys, monkeypatch, further, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, *further)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_backend_that_needs_a_gpu_is_refused_on_the_cpu_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, "--backend", "triton")) == 2
    assert "does not run on this model and device" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("eval", file) for file in ("report.html", "main.png", "summary.csv")),
        *(("fidelity", file) for file in ("fidelity.json", "fidelity.png")),
        *(("calibrate", file) for file in ("profile.json", "calibration.csv", "calibration.png")),
        *(("bench", file) for file in ("decode.json", "decode.png")),
    ],
)
def test_a_file_that_has_no_place_is_seen_before_anything_is_measured(name, file, tmp_path, capsys, monkeypatch):
    for module, measures in (
        *((sweep, "_measure_all"), (fidelity_command, "fidelity"), (calibrate_command, "calibrate")),
        (command, "_measure"),
    ):
        monkeypatch.setattr(module, measures, None)
    (tmp_path / "out" / file).mkdir(parents=True)
    eval_command = sweep_arguments(tmp_path, tmp_path / "out")
    bench_command = ["bench", "decode", "--device", "cpu", "--out", str(tmp_path / "out")]
    others = {"eval": eval_command, "bench": bench_command}
    assert main(others.get(name, [name, "--device", "cpu", *eval_command[1:7]])) == 2
    assert f"cannot be written: {file} is a directory. Give another" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_extra_that_has_them(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["eval", "--list-methods"]) == 2
    assert "eval needs matplotlib: pip install -e '.[eval]' in the checkout of nc_patch" in capsys.readouterr().err


NEEDS = f"""import sys
def loaded(package, before=()):
    print([name for name in sorted(set(sys.modules) - set(before)) if name.split(".")[0] == package])
sys.modules["scipy"] = None
import nc_patch
nc_patch.Profile.load({str(PROFILE)!r}).at_mass(0.9).config()
loaded("eval_tasks")
del sys.modules["scipy"]
import eval_tasks.report, eval_tasks.calibrate_command
from eval_tasks.figures import Figure, to_png, to_svg
before = set(sys.modules)
figure = Figure()
figure.subplots().plot([1, 2], [1, 2], label="a")
to_png(figure), to_svg(figure)
loaded("matplotlib", before)
"""


def test_a_profile_needs_neither_scipy_nor_the_harness_and_a_report_nothing_more_of_matplotlib_when_it_is_drawn():
    done = subprocess.run([sys.executable, "-c", NEEDS], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["[]"] * 2, done.stdout + done.stderr

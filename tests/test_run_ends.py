"""What a run needs at its end is there before it begins: a place for every file, what draws, and options that fit."""

import subprocess
import sys

import pytest
from tiny_sweep import save_tiny_model, sweep_arguments, tiny_text

from eval_tasks import calibrate_command, fidelity_command, run
from eval_tasks.bench import command
from nc_patch.cli import main


def measured(*_: object, **__: object) -> None:
    raise AssertionError("something was measured before what the end needs was looked for")


@pytest.fixture
def of_a_model(tmp_path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(2000), encoding="utf-8")
    shared = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    return lambda name, *further: [name, *shared, "--out", str(tmp_path / "out"), *further]


@pytest.mark.parametrize("file", ["report.html", "main.png", "summary.csv"])
def test_eval_sees_before_it_measures_that_a_file_of_its_report_has_no_place(tmp_path, capsys, monkeypatch, file):
    monkeypatch.setattr(run, "_measure_all", measured)
    (tmp_path / "out" / file).mkdir(parents=True)
    assert main(sweep_arguments(tmp_path, tmp_path / "out")) == 2
    assert f"cannot be written: {file} is a directory. Give another." in capsys.readouterr().err


@pytest.mark.parametrize("file", ["fidelity.json", "fidelity.png"])
def test_fidelity_sees_it_too(of_a_model, tmp_path, capsys, monkeypatch, file):
    monkeypatch.setattr(fidelity_command, "fidelity", measured)
    (tmp_path / "out" / file).mkdir(parents=True)
    assert main(of_a_model("fidelity", "--lengths", "64")) == 2
    assert f"cannot be written: {file} is a directory. Give another." in capsys.readouterr().err


@pytest.mark.parametrize("file", ["profile.json", "calibration.html", "calibration.png"])
def test_calibrate_sees_it_too(of_a_model, tmp_path, capsys, monkeypatch, file):
    monkeypatch.setattr(calibrate_command, "calibrate", measured)
    (tmp_path / "out" / file).mkdir(parents=True)
    assert main(of_a_model("calibrate")) == 2
    assert f"cannot be written: {file} is a directory. Give another." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [(("--fraction", "2"), "fraction must be a number"), (("--fraction", "0.1", "--at", "0"), "n must be a positive")],
)
def test_calibrate_sees_before_it_measures_that_its_budget_is_none(of_a_model, capsys, monkeypatch, further, message):
    monkeypatch.setattr(calibrate_command, "calibrate", measured)
    assert main(of_a_model("calibrate", *further)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["decode.json", "decode.png"])
def test_bench_sees_it_too(tmp_path, capsys, monkeypatch, file):
    monkeypatch.setattr(command, "_measure", measured)
    (tmp_path / "out" / file).mkdir(parents=True)
    assert main(["bench", "decode", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert f"cannot be written: {file} is a directory. Give another" in capsys.readouterr().err


def test_a_report_loads_nothing_of_matplotlib_when_it_is_drawn():
    script = """
import sys
import eval_tasks.report, eval_tasks.profile_report
from eval_tasks.figures import Figure, to_png, to_svg
before = set(sys.modules)
figure = Figure()
figure.subplots().plot([1, 2], [1, 2], label="a")
to_png(figure), to_svg(figure, "a")
print([name for name in sorted(set(sys.modules) - before) if name.startswith("matplotlib")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr

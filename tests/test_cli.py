"""The command line: exit codes and messages, all before any work."""

import importlib.util
import sys

import pytest
from tiny_sweep import sweep_arguments

from eval_tasks.methods import METHODS
from eval_tasks.tasks import TASKS
from nc_patch import __version__
from nc_patch.cli import main


def test_no_command_an_unknown_one_and_help(capsys):
    assert main([]) == 2
    assert "usage: nc-patch" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "unknown command 'evaluate'; allowed are demo, eval, report" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "measure sparse attention by context length" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_eval_help_names_every_method_and_the_lists_print_them(capsys):
    assert main(["eval", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert "iso: no budgets are equal" in said
    assert main(["eval", "--list-methods"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert main(["eval", "--list-tasks"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TASKS)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--model", "/no/such/model"), "no model at /no/such/model"),
        (("--model", "nobody/no-such-model"), "'nobody/no-such-model' is no directory here"),
        (("--text", "no-such-text"), "no text named 'no-such-text'"),
        (("--lengths", "48", "1024"), "length 1,024 is beyond the 512 positions"),
        (("--lengths", "8"), "length 8 is too short for the task recall"),
        (("--lengths", "48", "48"), "48 is given twice"),
        (("--samples", "99"), "the text has 2,000 tokens; 99 samples of up to 96 tokens need 14,652"),
        (("--alpha", "-1"), "alpha must be a positive number"),
        (("--alpha", "nan"), "alpha must be a positive number"),
        (("--C", "1.5"), "C must be a number in [0, 1]"),
        (("--equal-at", "1"), "equal_at must be a length of at least 2"),
        (("--device", "abacus"), "device must be auto, cpu, cuda"),
        (("--methods", "magic"), "unknown method 'magic'; allowed are dense, window"),
        (("--methods", "fixed-topk@64"), "chosen by --match iso"),
        (("--methods", "dense", "--match", "iso"), "name one, for example fixed-topk"),
        (("--methods", "kvpress:SnapKVPress", "--match", "iso"), "no budget that --match iso could vary"),
        (("--match", "luck"), "invalid choice: 'luck'"),
        (("--tp-plan", "auto"), "add --processes N"),
        (("--tasks", "juggling"), "unknown task 'juggling'; allowed are recall"),
        (("--samples", "0"), "at least 1"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, capsys, further, message):
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, *further)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_or_unusable_out_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["eval"]) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert main(["eval", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; give a directory" in capsys.readouterr().err
    assert main(sweep_arguments(tmp_path, tmp_path / "file" / "out")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(sweep_arguments(tmp_path, tmp_path / "out", "--device", "cuda")) == 2
    assert "torch sees 0 GPUs" in capsys.readouterr().err


def test_a_backend_that_needs_a_gpu_is_refused_on_the_cpu_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "out"
    assert main(sweep_arguments(tmp_path, out, "--backend", "triton")) == 2
    assert "does not run on this model and device" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == b""


def test_missing_packages_are_named_with_the_extra_that_has_them(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["eval", "--list-methods"]) == 2
    assert "eval needs matplotlib: pip install -e '.[eval]' in the checkout of nc_patch" in capsys.readouterr().err


def test_a_report_of_an_empty_directory_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no measurements" in capsys.readouterr().err


def test_the_library_imports_nothing_of_the_harness():
    import subprocess

    code = "import sys, nc_patch; sys.exit(any(name.split('.')[0] == 'eval_tasks' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

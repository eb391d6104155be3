"""The stock command with this package's task, and ``python -m eval_tasks.lm_eval``."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval_case import POSITIONS, ROOT, SCORED, TASKS_DIRECTORY

import eval_tasks.lm_eval.__main__ as command
from nc_patch import NCConfig


def run_command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False)


def task_arguments(model_dir: Path, text: Path, output: Path) -> list[str]:
    metadata = json.dumps({"lengths": [48, 96], "scored": SCORED, "samples": 2, "text": str(text)})
    shared = ["--tasks", "nc_perplexity", "--device", "cpu", "--metadata", metadata, "--output_path", str(output)]
    return [*shared, "--model_args", f"pretrained={model_dir},dtype=float32"]


def written_results(directory: Path) -> dict[str, Any]:
    (file,) = directory.rglob("results_*.json")
    return json.loads(file.read_text())


def test_the_stock_command_runs_the_task(model_dir: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--model", "hf", "--include_path", str(TASKS_DIRECTORY), *task_arguments(model_dir, text, tmp_path)]
    done = run_command("lm_eval", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = written_results(tmp_path)
    assert list(written["results"]) == ["nc_perplexity"]
    assert written["results"]["nc_perplexity"]["perplexity_96,none"] > 1
    recorded = written["configs"]["nc_perplexity"]["metadata"]
    assert recorded["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (recorded["lengths"], recorded["samples"]) == ([48, 96], 2)


def test_our_command_runs_nc_hf(model_dir: Path, text: Path, tmp_path: Path, our_command: Callable[..., None]) -> None:
    arguments = task_arguments(model_dir, text, tmp_path)
    our_command("run", "--model", "nc_hf", *arguments, "alpha=2,C=0.5,selection=window,dense_layers=0+1,dense_below=0")
    written = written_results(tmp_path)
    expected = NCConfig(2, 0.5, selection="window", dense_layers=(0, 1), dense_below=0)
    assert written["config"]["nc_config"] == expected.to_dict()
    assert written["results"]["nc_perplexity"]["perplexity_96,none"] > 1


@pytest.mark.parametrize("line", [["ls", "subtasks"], ["validate", "--tasks", "my_task,nc_perplexity,nc_ruler"]])
def test_our_command_lists_and_validates_the_users_tasks_beside_ours(
    tmp_path: Path, our_command: Callable[..., None], capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("task: my_task\noutput_type: loglikelihood\n")
    our_command(*line, "--include_path", str(tmp_path))
    printed = capsys.readouterr().out
    assert "my_task" in printed
    assert "nc_perplexity" in printed


def test_the_users_tasks_are_those_of_the_command_line_or_of_the_config(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("include_path: /theirs\ntasks: [x]\n")
    given = lambda **values: command.task_directories(argparse.Namespace(**values))  # noqa: E731
    assert given(include_path=None) == given(include_path=str(TASKS_DIRECTORY)) == [str(TASKS_DIRECTORY)]
    assert given(include_path="/mine", config=str(config)) == [str(TASKS_DIRECTORY), "/mine"]
    assert given(include_path=None, config=str(config)) == [str(TASKS_DIRECTORY), "/theirs"]


@pytest.mark.parametrize(
    ("model_args", "further", "message"),
    [
        (["alpha=2,C=2"], [], "C must be a number in [0, 1], got 2"),
        (["alpha=2,C=0.5", "pretrained=/absent"], [], "no model at /absent: there is no such file or directory"),
        (
            ["alpha=2,C=0.5"],
            ["--metadata", '{"lengths": [500]}'],
            f"lengths [500] exceed the {POSITIONS} positions of the model",
        ),
        (["alpha=2,C=0.5"], ["--output_path", "out"], "--output_path out is a file; give a directory"),
        (["alpha=2,C=0.5"], ["--output_path", "out/results.json"], "--output_path out is a file; give a directory"),
    ],
)
def test_our_command_ends_with_one_line_on_a_bad_argument(
    model_dir: Path,
    our_command: Callable[..., None],
    forwards: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_args: list[str],
    further: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("")
    line = ["run", "--model", "nc_hf", "--tasks", "nc_perplexity", "--device", "cpu", *further]
    with pytest.raises(SystemExit) as ended:
        our_command(*line, "--model_args", f"pretrained={model_dir}", *model_args)
    assert ended.value.code == f"error: {message}"
    assert not forwards


def test_our_command_is_a_module(tmp_path: Path) -> None:
    done = run_command("eval_tasks.lm_eval", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--include_path" in done.stdout


def test_standing_in_the_package_directory_is_refused_instead_of_hiding_lm_eval() -> None:
    done = run_command("lm_eval", "ls", cwd=TASKS_DIRECTORY)
    assert done.returncode != 0
    assert "run from another directory" in done.stderr

"""The stock command with this package's task, and ``python -m eval_tasks.lm_eval``."""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from lm_eval_case import ROOT, SCORED, TASKS_DIRECTORY
from processes import python

from eval_tasks.lm_eval import __main__ as command
from eval_tasks.texts import python_reference
from nc_patch import NCConfig


@pytest.mark.parametrize(
    ("module", "line", "model_args", "settings"),
    [
        ("lm_eval", ["--model", "hf", "--include_path", str(TASKS_DIRECTORY)], "", None),
        (
            *("eval_tasks.lm_eval", ["--model", "nc_hf"]),
            ",alpha=2,C=0.5,selection=window,dense_layers=0+1,dense_below=0",
            NCConfig(2, 0.5, selection="window", dense_layers=(0, 1), dense_below=0).to_dict(),
        ),
    ],
)
def test_the_stock_command_and_ours_run_the_tasks_with_no_cache_that_can_be_written(
    model_dir, tmp_path, module, line, model_args, settings
):
    metadata = json.dumps({"lengths": [256, 512], "scored": SCORED, "samples": 2})
    shared = ["--device", "cpu", "--metadata", metadata, "--gen_kwargs", "max_gen_toks=4", "--output_path", "out"]
    given = ["--tasks", "nc_perplexity,nc_passkey", "--model_args", f"pretrained={model_dir},dtype=float32{model_args}"]
    home = tmp_path / "home"
    home.write_text("")  # a file where the directory of caches and their locks would be
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(home)}
    python("-m", module, "run", *line, *shared, *given, cwd=tmp_path, **environment)
    (file,) = tmp_path.rglob("results_*.json")
    written = json.loads(file.read_text())
    assert set(written["results"]) == {"nc_passkey", "nc_perplexity"}
    assert written["results"]["nc_perplexity"]["perplexity_512,none"] > 1
    recorded = written["configs"]["nc_perplexity"]["metadata"]
    assert recorded["text_sha256"] == hashlib.sha256(python_reference()[0].encode()).hexdigest()
    assert (recorded["lengths"], recorded["samples"]) == ([256, 512], 2)
    assert written["config"].get("nc_config") == settings


def test_our_command_ends_with_one_line_on_a_bad_argument(model_dir, forwards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", TaskManager)  # which the command replaces
    monkeypatch.setattr(command, "_TaskManager", partial(TaskManager, include_defaults=False))  # thousands of tasks
    for model_args, further, message in (
        ("alpha=2,C=2", [], "C must be a number in [0, 1], got 2"),
        ("alpha=2,C=0.5", ["--output_path", "out"], "--output_path out is a file; give a directory"),
    ):
        line = ["run", "--model", "nc_hf", "--tasks", "nc_perplexity", "--device", "cpu", *further]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *line, "--model_args", f"pretrained={model_dir},{model_args}"])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == f"error: {message}"
    assert not forwards

"""Every file of ``examples/`` runs, on a tiny model."""

import json
import os
import re
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import processes
import pytest
import torch
from transformers import ContinuousBatchingConfig

from eval_tasks.models import load_model
from nc_patch import patch_model

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as ``python examples/NAME ...`` would, and returns what it printed."""

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_a_long_prompt_is_answered_densely_and_sparsely(run, subword_model):
    said = run("generate_long_prompt.py", "--model", subword_model, "--length", 400)
    tokens = int(re.match(r"(\d+) tokens", said).group(1))
    assert 350 <= tokens <= 400
    assert "dense: " in said
    assert "alpha=12, C=0.5: " in said
    keys, share = re.search(r"read (\d+) keys a query, ([\d.]+) %", said).groups()
    assert 0 < int(keys) <= 12 * tokens**0.5 + 1
    assert 0 < float(share) < 80


def test_a_profile_is_calibrated_once_and_generates_with_its_budget(run, subword_model, tmp_path):
    profile = tmp_path / "profile.json"
    arguments = ("--model", subword_model, "--lengths", 64, 128, "--fraction", 0.2, "--profile", profile)
    said = run("calibrate_then_generate.py", *arguments)
    written = profile.read_bytes()
    assert len(re.findall(r"^layer \d+: keys of 128 by head \[\d+(, \d+)*\]$", said, re.M)) == 3
    assert float(re.search(r"attended ([\d.]+) %", said).group(1)) == pytest.approx(20, abs=3)
    assert run("calibrate_then_generate.py", *arguments) == said
    assert profile.read_bytes() == written


def test_a_lora_adapter_learns_through_sparse_attention(run, subword_model):
    said = run("lora_step.py", "--model", subword_model, "--length", 128, "--steps", 3)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    norms = [float(norm) for norm in re.findall(r"norm ([\d.]+)", said)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert all(norm > 0 for norm in norms)
    assert 0 < float(re.search(r"attended ([\d.]+) %", said).group(1)) < 50


def test_the_server_answers_as_generate_does_and_refuses_what_it_cannot_read(subword_model):
    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    loaded = load_model(subword_model)
    patch_model(loaded.model, 2.0, 0.5, decode="block")
    prompt = "A class definition is an executable statement. " * 8
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    room = ContinuousBatchingConfig(num_blocks=8)
    length = inputs["input_ids"].shape[1]
    expected = loaded.tokenizer.decode(output[0, length:], skip_special_tokens=True)
    with loaded.model.continuous_batching_context_manager(continuous_batching_config=room) as manager:
        served = example["server"](loaded, manager, 0)
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()

        def ask(body):
            connection = HTTPConnection("127.0.0.1", served.server_port, timeout=60)
            connection.request("POST", "/v1/completions", body)
            answer = connection.getresponse()
            return answer.status, json.load(answer)

        try:
            with ThreadPoolExecutor(3) as users:
                answers = list(users.map(ask, [json.dumps({"prompt": prompt, "max_tokens": 8}).encode()] * 3))
            for status, answer in answers:
                assert (status, answer["choices"][0]["text"]) == (200, expected)
                assert answer["usage"].pop("seconds") > 0
                assert answer["usage"] == {"prompt_tokens": length, "completion_tokens": 8}
            for body in (b"{}", b"[]", b'{"prompt": 3}', b'{"prompt": ""}', b"no JSON"):
                status, refusal = ask(body)
                assert (status, list(refusal)) == (400, ["error"])
        finally:
            served.shutdown()
            served.server_close()
            thread.join(10)


def test_the_notebook_runs_from_top_to_bottom(subword_model, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace('"smollm2", 3000, 256', f'"{subword_model}", 400, 32')
            exec(compile(source, "tour.ipynb", "exec"), names)
    said = capsys.readouterr().out
    assert "a prompt of 400 tokens" in said
    assert re.search(r"^ +all +\d+", said, re.M)
    assert set(names["found"]) == {"block", "topk", "window"}
    assert all(ratio > 0 for points in names["found"].values() for _, ratio in points)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "further", "written"),
    [
        ("lm_eval.sh", ["nc_perplexity"], "**/results_*.json"),
        ("accelerate_sweep.sh", ["--lengths", "96", "--scored", "16", "--passage", "12"], "report.html"),
    ],
)
def test_scripts_run_from_end_to_end(subword_model, tmp_path, name, further, written):
    ahead = {"PATH": Path(sys.executable).parent, "PYTHONPATH": EXAMPLES.parent}
    environment = {name: f"{first}{os.pathsep}{os.environ.get(name, '')}" for name, first in ahead.items()}
    environment |= {"OUTPUT": "out", "METADATA": '{"lengths": [300, 400]}'}
    processes.run("bash", EXAMPLES / name, subword_model, *further, cwd=tmp_path, **environment)
    assert list((tmp_path / "out").glob(written))

"""lm-eval's two caches must not hand one run's figures to another."""

import shutil

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval_case import LENGTHS, figures
from transformers import AutoModelForCausalLM


def test_the_response_cache_tells_settings_apart(evaluate, tmp_path, forwards):
    def run(**arguments):
        forwards.clear()
        found = figures(evaluate(**arguments, options={"use_cache": str(tmp_path / "cache"), "device": "cpu"}))
        return found, len(forwards)

    first, calls = run(model="nc_hf", alpha=2, C=0.5)
    assert calls == 4 * len(LENGTHS)
    other, calls = run(model="nc_hf", alpha=4, C=0.5)
    assert calls == 4 * len(LENGTHS)
    assert other != pytest.approx(first, rel=1e-4)
    again, calls = run(model="nc_hf", alpha=2.0, C=0.5)
    assert (again, calls) == (first, 0)
    dense, calls = run(model="hf")
    assert calls == 4 * len(LENGTHS)
    assert dense != pytest.approx(first, rel=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["cache_rank0.db"]


def test_the_response_cache_tells_weights_apart(model_dir, tmp_path, evaluate):
    shutil.copytree(model_dir, tmp_path / "model")
    options = {"use_cache": str(tmp_path / "cache")}
    arguments = {"pretrained": str(tmp_path / "model"), "alpha": 2, "C": 0.5, "lengths": [48], "options": options}
    first = figures(evaluate("nc_hf", **arguments))
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(tmp_path / "model")
    assert figures(evaluate("nc_hf", **arguments)) != pytest.approx(first, rel=1e-4)


def test_the_cache_of_built_requests_tells_lengths_apart(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    fresh = figures(evaluate("hf", lengths=[64, 96]))
    evaluate("hf", lengths=[48, 96], options={"cache_requests": True})
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert len(list(tmp_path.iterdir())) == 2

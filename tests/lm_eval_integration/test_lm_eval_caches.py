"""lm-eval's two caches must not hand one run's figures to another."""

import shutil

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval_case import LENGTHS, figures
from transformers import AutoModelForCausalLM


def test_the_response_cache_tells_settings_and_weights_apart(model_dir, evaluate, tmp_path, forwards):
    copy = shutil.copytree(model_dir, tmp_path / "model")

    def run(**arguments):
        forwards.clear()
        options = {"use_cache": str(tmp_path / "cache" / "of"), "device": "cpu"}
        return figures(evaluate(**arguments, pretrained=str(copy), options=options)), len(forwards)

    first, calls = run(model="nc_hf", alpha=2, C=0.5)
    assert calls == 4 * len(LENGTHS)
    assert run(model="nc_hf", alpha=2.0, C=0.5) == (first, 0)
    for other in ({"model": "nc_hf", "alpha": 4, "C": 0.5}, {"model": "hf"}):
        found, calls = run(**other)
        assert calls == 4 * len(LENGTHS)
        assert found != pytest.approx(first, rel=1e-4)
    changed = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(copy)
    assert run(model="nc_hf", alpha=2, C=0.5)[0] != pytest.approx(first, rel=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_of_built_requests_tells_lengths_apart(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    fresh = figures(evaluate("hf", lengths=[64, 96]))
    evaluate("hf", lengths=[48, 96], options={"cache_requests": True})
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert figures(evaluate("hf", lengths=[64, 96], options={"cache_requests": True})) == fresh
    assert len(list(tmp_path.iterdir())) == 2

"""Simulated attention: the floor and the ceiling are what they say, by the model's own weights."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from eval_tasks.errors import EvalError
from eval_tasks.simulated import IMPLEMENTATION, Simulated, _Active, _chosen, counted, simulating
from nc_patch import NCConfig, patched


def logits(model, ids, simulated):
    with torch.inference_mode(), simulating(model, simulated, tail=10) as counters:
        return model(ids).logits, counted(counters)


def causal_scores(heads: int, length: int) -> torch.Tensor:
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    return 2 * torch.randn(1, heads, length, length).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_everything_is_dense_attention(family):
    model, ids = tiny_model(family), random_ids(2, 40)
    with torch.inference_mode():
        dense = model(ids).logits
    every = NCConfig(1.0, 1.0, selection="topk")
    for simulated in (Simulated("random", config=every), Simulated("top-p", mass=1.0 - 1e-9)):
        found, stats = logits(model, ids, simulated)
        assert torch.allclose(found, dense, atol=2e-5)
        assert stats["attended_fraction"] == pytest.approx(1.0, abs=2e-3)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense)


def test_random_keys_fill_the_budget_and_hold_the_first_and_the_own_key():
    config = NCConfig(2.0, 0.5, selection="topk", sink_keys=3, recent_keys=1)
    scores = causal_scores(2, 60)
    n = torch.arange(1, 61)
    visible = torch.stack((torch.zeros_like(n), n), -1)[None]
    budget = config.budget(n)[None, None].expand(1, 2, 60)
    active = [_Active(Simulated("random", config), None, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    chosen, other = (_chosen(one, scores, visible, budget) for one in active)
    assert torch.equal(chosen.sum(-1), budget)
    assert chosen.diagonal(dim1=-2, dim2=-1).all()
    assert chosen[:, :, 20:, :3].all()
    assert not (chosen & (scores == -torch.inf)).any()
    assert not torch.equal(chosen, other)


def test_the_oracle_takes_the_fewest_keys_that_hold_its_mass():
    scores = causal_scores(3, 50)
    chosen = _chosen(_Active(Simulated("top-p", mass=0.8), None, torch.Generator()), scores, torch.empty(0), None)
    weights = torch.softmax(scores.double(), -1)
    held = (weights * chosen).sum(-1)
    assert (held >= 0.8 - 1e-6).all()
    lightest = weights.masked_fill(~chosen, torch.inf).amin(-1)
    assert (held - lightest < 0.8).all()
    assert (weights.masked_fill(chosen, 0).amax(-1) <= lightest + 1e-9).all()


def test_random_keys_are_the_same_every_time():
    model, ids = tiny_model("llama"), random_ids(1, 50)
    simulated = Simulated("random", config=NCConfig(1.0, 0.5, selection="topk"))
    first, stats = logits(model, ids, simulated)
    assert torch.equal(logits(model, ids, simulated)[0], first)
    assert stats["mean_keys"] == pytest.approx(sum(NCConfig(1.0, 0.5).budget(n) for n in range(1, 51)) / 50)


def test_a_patched_model_simulates_nothing_and_the_name_runs_nowhere_else():
    model, ids = tiny_model("llama"), random_ids(1, 8)
    simulated = Simulated("top-p", mass=0.5)
    with patched(model, 2.0, 0.5), pytest.raises(EvalError, match="unpatch it first"):
        logits(model, ids, simulated)
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="interrupted"), simulating(model, simulated, None):
        raise RuntimeError("interrupted")
    assert model.config._attn_implementation == before
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(EvalError, match="within simulating"):
        model(ids)

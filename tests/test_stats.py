"""What ``nc_stats`` says of the kept mass: where it is there, what it rests on, and how it adds up."""

import copy
import json
import pickle

import pytest
import torch
from tiny_models import random_ids, tiny_model
from ways import EACH_SETTING

from nc_patch import nc_stats, patch_model
from nc_patch.patch import reset_stats
from nc_patch.stats import LayerCounters, MassCounts, summary, total_mass

NONE = {"prefill": None, "decode": None}


def kept(model, phase="prefill"):
    return [layer["kept_mass"][phase] for layer in nc_stats(model)["layers"]]


@pytest.mark.parametrize(
    ("options", "prefill", "decode"),
    [
        ({}, "estimate", "bounds"),
        ({"selection": "topk", "key_index": "always"}, "exact", "bounds"),
        ({"selection": "topk", "key_index": "never"}, "exact", "exact"),
        ({"selection": "window"}, "exact", "exact"),
        ({"selection": "block", "block_size": 16}, "estimate", "exact"),
        ({"selection": "block", "block_size": 16, "min_mass": 0.9}, "estimate", "exact"),
        ({"prefill": "topk", "decode": "dense"}, "exact", "dense"),
        ({"dense_layers": [0, 1, 2]}, "dense", "dense"),
    ],
    ids=str,
)
def test_every_figure_says_what_it_rests_on(options, prefill, decode):
    model, ids, padding = tiny_model("llama"), random_ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    padding[0, :30] = 0
    patch_model(model, 2.0, 0.5, track=True, **options)
    model.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False)
    for phase, basis, calls, rows in (("prefill", prefill, 1, 4 * 270), ("decode", decode, 3, 4 * 2 * 3)):
        for found in kept(model, phase):
            assert found["calls"] == {basis: calls}
            assert found["rows"] == rows
            assert 0 < found["lower"] <= found["mean"] <= found["upper"] <= 1
            assert found["mean"] == pytest.approx(sum(found["mean_by_head"]) / 4, rel=1e-6)
            assert found["certified"] == (basis != "estimate")
            assert (found["audited_rows"] > 0) == (basis == "estimate")
            assert (found["least"] is None) == (basis == "estimate")
            if basis == "dense":
                assert found["least"] == found["lower"] == found["upper"] == 1.0
            elif basis != "estimate":
                assert found["least"] <= found["lower"] < 1
                assert found["least"] == min(found["least_by_head"])
                assert found["upper"] - found["lower"] < 1e-3
        assert nc_stats(model)["kept_mass"][phase]["rows"] == 3 * rows
    stats = nc_stats(model)
    assert json.loads(json.dumps(stats)) == stats
    header, every, *_ = str(stats).splitlines()
    assert (header.split()[0], every.split()[:2]) == ("layer", ["all", "12"])
    reset_stats(model)
    assert [layer["kept_mass"] for layer in nc_stats(model)["layers"]] == [NONE] * 3


@EACH_SETTING
def test_watching_the_mass_changes_no_number_keeps_no_graph_and_counts_what_is_run_again(settings):
    ids, texts, gradients = random_ids(1, 80), [], []
    watched = [{"on_drop": name, "max_dropped_mass": 0.999} for name in ("warn", "raise", "dense")]
    for options in ({}, *watched, {"track": True}):
        model = patch_model(tiny_model("llama"), 2.0, 0.5, **options, **settings)
        torch.manual_seed(5)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=True))
        assert (nc_stats(model)["kept_mass"] == NONE) == (not options)
        reset_stats(model)
        model.train()(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert all(all(map(torch.equal, each, gradients[0])) for each in gradients)
    counts = model.model.layers[0].self_attn._nc_patch.counters.mass["prefill"]
    held = [t for values in vars(counts).values() if isinstance(values, list) for t in values]
    assert held
    assert not any(t.requires_grad for t in held)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert [sum(found["calls"].values()) for found in kept(model)] == [3] * 3


def test_calls_add_up_what_is_certain_with_what_is_estimated_and_survive_copies_and_pickles(monkeypatch):
    monkeypatch.setattr("nc_patch.stats._FOLD_AT", 3)
    counters = LayerCounters()
    seen = torch.tensor([[[0, 5], [0, 0]]], dtype=torch.int32)
    lower = torch.linspace(0.5, 0.96, 14).view(7, 1, 2)  # call, batch, head
    for call in lower:
        bounds = torch.stack((call, call + 0.02), -1)[:, :, None].repeat(1, 1, 2, 1)
        bounds[:, :, 1] = 0.0  # a query that sees nothing
        counters.mass["decode"].add_bounds("bounds", bounds, seen, 0.8)
    counters.mass["decode"].add_bounds("dense", torch.ones(1, 2, 2, 2), seen, 0.8)
    audit = torch.tensor([[10.0, 6.0, 0.5, 5.0, 6.0], [10.0, 8.0, 0.25, 5.0, 6.0], [20.0, 14.0, 0.4, 5.0, 12.0]])
    for _ in range(7):
        counters.mass["prefill"].add_audit(audit)
    counters.mass["prefill"].add_bounds("dense", torch.ones(1, 2, 30, 2), seen[:, :1].expand(1, 30, 2), 0.8)
    counters.exceeded_calls = 4
    half = 2.0301 * (7 * 0.4) ** 0.5 / 200  # the quantile of Student's t with 35 degrees of freedom
    for held in (counters, copy.deepcopy(counters), pickle.loads(pickle.dumps(counters))):
        found = summary(held)
        decode, prefill = found["kept_mass"]["decode"], found["kept_mass"]["prefill"]
        assert (found["exceeded_calls"], decode["calls"], decode["rows"]) == (4, {"bounds": 7, "dense": 1}, 16)
        assert decode["lower_by_head"] == pytest.approx(((lower.sum((0, 1)) + 1) / 8).tolist())
        assert decode["upper_by_head"] == pytest.approx((((lower + 0.02).sum((0, 1)) + 1) / 8).tolist())
        assert decode["lower"] == pytest.approx(float(lower.sum() + 2) / 16)
        assert decode["least_by_head"] == pytest.approx(lower.amin((0, 1)).tolist())
        assert (decode["least"], decode["below"]) == (0.5, int((lower < 0.8).sum()))
        assert prefill["mean_by_head"] == pytest.approx([0.72, 0.86])
        assert (prefill["mean"], prefill["upper"] - prefill["mean"]) == pytest.approx((0.79, half), rel=1e-3)
        assert (prefill["certified"], prefill["audited_rows"]) == (False, 2 * 7 * 6)
        assert prefill["calls"] == {"estimate": 7, "dense": 1}
        total = total_mass([held.mass["prefill"], MassCounts()])
        assert total == {name: prefill[name] for name in total}
    assert total_mass([MassCounts()]) is None

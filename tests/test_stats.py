"""What ``nc_stats`` says of block prefill: the estimated dropped mass, and when it is there."""

import copy
import math
import pickle

import pytest
import torch
from tiny_models import random_ids, tiny_model

from nc_patch import nc_stats, patch_model
from nc_patch.patch import reset_stats
from nc_patch.stats import LayerCounters, summary

OPTIONS = {"selection": "block", "block_size": 16, "track": True}


def dropped(model):
    return [layer["dropped_mass"] for layer in nc_stats(model)["layers"]]


def test_dropped_mass_is_there_only_where_it_is_tracked():
    model, ids = tiny_model("llama"), random_ids(1, 200)
    with torch.inference_mode():
        patch_model(model, 2.0, 0.5, selection="block")(ids)
        assert dropped(model) == [None] * 3
        patch_model(model, 2.0, 0.5, **OPTIONS)
        assert dropped(model) == [None] * 3
        model(ids)
    for found in dropped(model):
        assert found["rows"] == 200 // 16 + 1
        assert 0 < found["mean"] < 1
        assert found["mean"] == pytest.approx(sum(found["mean_by_head"]) / 4, rel=1e-6)
        assert all(error > 0 for error in found["standard_error_by_head"])
        assert found["enlarged_fraction"] is None
    reset_stats(model)
    assert dropped(model) == [None] * 3


def test_min_mass_says_how_often_it_took_more_and_drops_less():
    model, ids = tiny_model("llama"), random_ids(1, 300)
    with torch.inference_mode():
        patch_model(model, 2.0, 0.5, **OPTIONS)(ids)
        by_law = [found["mean"] for found in dropped(model)]
        patch_model(model, 2.0, 0.5, min_mass=0.9, **OPTIONS)(ids)
    for found, before in zip(dropped(model), by_law, strict=True):
        assert 0 < found["enlarged_fraction"] <= 1
        assert found["mean"] < before


def test_calls_add_up_and_survive_copies_and_pickles():
    counters = LayerCounters()
    kept = torch.tensor([[0.5, 0.7, 0.9], [0.2, 0.4, 0.9]])
    for column in kept.unbind(1):
        rows = torch.ones_like(column)
        counters.add_estimate(torch.stack((rows, column, column.square(), rows, rows), -1), enlarges=True)
    for held in (counters, copy.deepcopy(counters), pickle.loads(pickle.dumps(counters))):
        found = summary(held)["dropped_mass"]
        assert found["mean_by_head"] == pytest.approx([0.3, 0.5], rel=1e-5)
        assert found["mean"] == pytest.approx(0.4, rel=1e-5)
        spread = kept.std(-1) / math.sqrt(3)
        assert found["standard_error_by_head"] == pytest.approx(spread.tolist(), rel=1e-4)
        assert (found["rows"], found["enlarged_fraction"]) == (3, 1.0)

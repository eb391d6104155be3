"""The list of methods: each is what its name says, and budgets are equal where the way of matching says so."""

import math

import pytest
import torch
from tiny_models import tiny_model

from eval_tasks.methods import (
    DEFAULT_METHODS,
    DENSE,
    METHODS,
    NC,
    PROFILE,
    Budgets,
    LogConfig,
    budget_at,
    find_method,
    keys_of,
    total_of,
    with_keys,
)
from nc_patch import NCConfig, patch_model
from nc_patch.selections import Block, TopK

LAWS = [(2.0, 0.5, 1024), (2.0, 0.7, 512), (1.0, 0.9, 4096), (4.0, 0.6, 1000), (3.3, 0.0, 77), (50.0, 1.0, 64)]
# A profile's budgets differ from head to head; test_calibrate_command.py holds their mean to the others'.
SPARSE = [name for name in METHODS if name not in (DENSE, PROFILE)]


def total(name, budgets, length):
    config = METHODS[name].config(budgets.at(length))
    return sum(config.budget(n) for n in range(1, length + 1))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_budgets_are_equal_where_the_way_of_matching_says_so(name, law):
    deployed = Budgets(*law)
    assert deployed.at(64) == deployed.at(4096) == deployed
    assert budget_at(name, deployed, law[2]) == deployed.laws["fixed"][0]
    scored = Budgets(*law, match="scored")
    for length in (64, 500, 4096):
        assert budget_at(name, scored, length) == budget_at("nc-topk", scored, length)
    totals = Budgets(*law, match="total")
    for length in (64, 700):
        wanted = total("nc-topk", totals, length)
        assert wanted == total_of(length, law[0], law[1])
        # A fixed budget is a whole number: half a key a query is as near as it comes.
        assert abs(total(name, totals, length) - wanted) <= max(0.5 * length, 2)


@pytest.mark.parametrize(
    ("name", "selection", "options", "growth"),
    [
        ("window", "window", {"sink_keys": 0}, 1),
        ("streaming", "window", {"sink_keys": 4}, 1),
        ("fixed-topk", "topk", {"tail": "drop"}, 1),
        ("log-topk", "topk", {"tail": "drop"}, 1.2),
        ("fraction-topk", "topk", {"tail": "drop"}, 4),
        ("nc-window", "window", {"sink_keys": 4}, 2),
        ("nc-topk", "topk", {"tail": "drop"}, 2),
        ("fixed-topk-mean", "topk", {"tail": "mean"}, 1),
        ("nc-topk-mean", "topk", {"tail": "mean"}, 2),
        ("block", "block", {}, 2),
    ],
)
def test_a_method_selects_by_its_options_and_its_budget_grows_or_is_what_is_asked_for(name, selection, options, growth):
    budgets, named = Budgets(2.0, 0.5, 1024), with_keys(name, 48)
    config, fixed = METHODS[name].config(budgets), find_method(named).config(budgets)
    assert (config.dense_below, config.prefill, config.prefill.name) == (0, config.decode, selection)
    assert {option: getattr(config.prefill, option) for option in options} == options
    assert budget_at(name, budgets, 4096) == math.ceil(growth * budgets.laws["fixed"][0])
    assert keys_of(named) == (name, 48)
    assert [budget_at(named, budgets, n) for n in (32, 512, 4096)] == [32, 48, 48]
    assert (fixed.prefill, fixed.decode, fixed.dense_below) == (config.prefill, config.decode, 0)


def test_the_method_nc_is_what_patch_model_does_unasked(dense_with_few_keys):
    budgets, model = Budgets(3.0, 0.6, 1024), patch_model(tiny_model("llama"), 3.0, 0.6)
    unasked = next(module for module in model.modules() if hasattr(module, "_nc_patch"))._nc_patch.config
    assert METHODS[NC].config(budgets) == unasked
    assert (unasked.dense_below, unasked.prefill, unasked.decode) == (1024, Block(), TopK(tail="mean"))
    assert budget_at(NC, budgets, 1024) == 1024
    assert budget_at(NC, budgets, 2048) == budget_at("nc-topk", budgets, 2048)
    assert NC in DEFAULT_METHODS
    assert (find_method("nc@48").config(budgets).dense_below, METHODS[DENSE].config(budgets)) == (0, None)
    assert budget_at(DENSE, budgets, 4096) == 4096


def test_every_query_has_the_logarithmic_budget_of_the_keys_that_it_sees():
    config = LogConfig(6.4, selection="window", sink_keys=0, backend="torch")
    n = (0, 1, 2, 1024, 2048)
    assert [config.budget(k) for k in n] == config.budget(torch.tensor(n)).tolist() == [0, 1, 2, 64, 71]
    visible = torch.tensor([[[3, 3], [3, 4], [0, 1024]]], dtype=torch.int32)
    assert config.row_budgets(visible, 2048).tolist() == [[[0, 1, 64]]]
    assert config.to_dict() != NCConfig(6.4, selection="window", sink_keys=0, backend="torch").to_dict()

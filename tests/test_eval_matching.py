"""Budgets are equal where the way of matching says so."""

import pytest

from eval_tasks.matching import Budgets, total_of
from eval_tasks.methods import DENSE, METHODS, PROFILE, budget_at

SPARSE = [name for name, method in METHODS.items() if name not in (DENSE, PROFILE) and not method.simulated]
LAWS = [(2.0, 0.5), (1.0, 0.7), (4.0, 0.6)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_scored_budgets_are_equal_at_every_length(name, law):
    budgets = Budgets(*law, equal_at=1024, match="scored")
    for length in (64, 500, 1024, 4096):
        assert budget_at(name, budgets, length) == budget_at("nc-topk", budgets, length)


def _total(name, budgets, length):
    config = METHODS[name].config(budgets.at(length))
    return sum(config.budget(n) for n in range(1, length + 1))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", SPARSE)
def test_totals_are_equal_as_nearly_as_the_law_allows(name, law):
    budgets = Budgets(*law, equal_at=1024, match="total")
    for length in (64, 700):
        wanted = _total("nc-topk", budgets, length)
        # A fixed budget is a whole number: half a key a query is as near as it comes.
        assert abs(_total(name, budgets, length) - wanted) <= max(0.5 * length, 2)


def test_the_total_that_is_matched_is_that_of_the_law():
    budgets = Budgets(2.0, 0.5, 64)
    assert total_of(300, 2.0, 0.5) == _total("nc-topk", budgets, 300)


def test_deployed_laws_are_the_same_at_every_length():
    budgets = Budgets(2.0, 0.5, 1024)
    assert budgets.at(64) == budgets.at(4096) == budgets
    assert budget_at("fixed-topk", budgets, 4096) == 64
    assert budget_at("fraction-topk", budgets, 4096) == 256


def test_an_unknown_way_of_matching_is_refused():
    with pytest.raises(ValueError, match="deploy, scored, total, iso"):
        Budgets(2.0, 0.5, 1024, match="luck")

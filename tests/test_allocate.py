"""Sharing a budget: what is asked is spent, and no other way of sharing found loses less."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from profiles import LENGTHS, made_up_profile

from nc_patch import ProfileError
from nc_patch.budget import budget_of
from nc_patch.calibration.allocate import Demand, Laws, attended_fraction


def spent(profile, n: int, over: str, dense_below: int = 0) -> float:
    """Attended keys / visible keys, counted one by one with the budget law itself."""
    config = profile.config()
    attended = seen = 0
    for (layer, window), head in itertools.product(enumerate(profile.windows), range(profile.shape[1])):
        alpha, C = config.laws(layer)[head]
        for row in range(1, n + 1) if over == "sequence" else [n]:
            visible = min(row, window or row)
            dense = layer in config.dense_layers
            attended += visible if dense else budget_of(visible, alpha, C, 1, dense_below)
            seen += visible
    return attended / seen


@pytest.mark.parametrize("windows", [(0, 0, 0), (0, 200, 0)], ids=["global", "one-layer-slides"])
@pytest.mark.parametrize("over", ["sequence", "last"])
@pytest.mark.parametrize("fraction", [0.05, 0.14, 0.5, 1.0])
def test_budgets_sum_to_what_is_asked_at_every_calibrated_length(fraction, over, windows):
    profile = made_up_profile(windows=windows)
    for n in LENGTHS:
        if fraction * n >= 8:  # curves are taken at no fewer keys
            assert spent(profile.at_budget(fraction, n=n, over=over), n, over) == pytest.approx(fraction, rel=0.01)


def test_budgets_over_all_lengths_and_in_keys():
    profile = made_up_profile()
    shared = profile.at_budget(0.1)
    rows = np.concatenate([np.arange(1, n + 1) for n in LENGTHS])
    assert attended_fraction(Laws(shared.alpha, shared.C), rows, np.zeros(3, int), 1) == pytest.approx(0.1, rel=0.01)
    last = profile.at_budget(keys=64.0, n=1024, over="last")
    assert spent(last, 1024, "last") * 1024 == pytest.approx(64, rel=0.01)
    assert spent(profile.at_budget(keys=64.0, n=1024), 1024, "sequence") * 512.5 == pytest.approx(64, rel=0.01)


def test_heads_that_are_all_alike_share_a_budget_to_the_key():
    profile = made_up_profile()
    error = np.broadcast_to(profile.error[:, :1, :1], profile.error.shape)
    profile = replace(profile, error=error, sensitivity=np.ones((3, 4)))
    assert spent(profile.at_budget(keys=20.5, n=1024, over="last"), 1024, "last") * 1024 == pytest.approx(20.5)


def test_what_is_dense_counts(dense_with_few_keys):
    profile = made_up_profile()
    for given, below in (({}, 1024), ({"dense_below": 300}, 300), ({"dense_below": 0}, 0)):
        shared = profile.at_budget(0.5, n=2048, **given)
        assert spent(shared, 2048, "sequence", below) == pytest.approx(0.5, rel=0.01)
    shared = profile.at_budget(0.5, n=512, dense_layers=(1,), dense_below=0)
    assert [shared.config().is_dense(layer) for layer in range(3)] == [False, True, False]
    assert spent(shared, 512, "sequence") == pytest.approx(0.5, rel=0.01)


def test_no_exchange_of_keys_between_heads_loses_less():
    profile = made_up_profile()
    keys, cost = np.array(profile.keys, dtype=float), profile.sensitivity[..., None] * profile.error
    demand = Demand(keys, profile.visible, cost)
    taken = demand.at(demand.price_range()[1] / 300)[-1]
    inside = keys < LENGTHS[-1]

    def change(head: tuple[int, int], moved: float) -> float:
        """What a head loses more with so many keys more."""
        curve = np.append(keys[inside], LENGTHS[-1]), np.append(cost[-1][head][inside], 0.0)
        return float(np.diff(np.interp([taken[head], taken[head] + moved], *curve))[0])

    inner = [at for at in np.ndindex(*taken.shape) if 12 < taken[at] < 0.5 * LENGTHS[-1]]
    assert len(inner) > 4
    for giver, taker in itertools.permutations(inner, 2):
        moved = 0.35 * min(taken[giver], taken[taker])
        assert change(giver, -moved) + change(taker, moved) > -1e-9


def test_a_shared_budget_is_predicted_to_lose_less_than_any_uniform_law():
    profile, rows, windows = made_up_profile(), np.arange(1, 1025), np.zeros(3, int)
    shared = profile.at_budget(0.1, n=1024)

    def lost(laws: Laws) -> float:
        total = 0.0
        for (level, n), head in itertools.product(enumerate(LENGTHS), np.ndindex(3, 4)):
            k = min(np.ceil(laws.alpha[head] * n ** laws.C[head]), n)
            error = np.interp(np.log(k), np.log(profile.keys), profile.error[(level, *head)])
            total += n * float(profile.sensitivity[head] * error) * bool(k < n)
        return total

    def uniform(C: float) -> Laws:
        """The smallest law for all heads that attends as much."""
        alphas = 1e-3 * 1.01 ** np.arange(2000)
        laws = (Laws(np.full((3, 4), alpha), np.full((3, 4), C)) for alpha in alphas)
        return next(each for each in laws if attended_fraction(each, rows, windows, 1) >= 0.1)

    assert lost(Laws(shared.alpha, shared.C)) < 0.9 * min(lost(uniform(C)) for C in (0.3, 0.5, 0.7, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give fraction, for example"),
        ({"fraction": 0.1, "keys": 3}, "and not both"),
        ({"fraction": 0.0}, "fraction must be a number in .0, 1., got 0.0"),
        ({"fraction": float("nan")}, "fraction must be a number"),
        ({"keys": -1.0}, "keys must be a number in .0, inf"),
        ({"fraction": 0.1, "n": 0}, "n must be an integer of at least 1, got 0"),
        ({"fraction": 0.1, "dense_below": -1}, "dense_below must be an integer of at least 0, got -1"),
        ({"fraction": 0.1, "over": "all"}, "over must be"),
        ({"fraction": 0.1, "dense_layers": (3,)}, "dense_layers must be a list of layers from 0 to 2"),
        ({"fraction": 0.1, "n": 2048}, "no budgets attend 0.1 .* dense_below=1024"),
        ({"fraction": 0.3, "n": 512, "dense_layers": (1,)}, r"no budgets attend 0.3 of the keys: .* layers \[1\]"),
    ],
)
def test_what_cannot_be_asked_or_had_is_refused(arguments, message, dense_with_few_keys):
    with pytest.raises(ProfileError, match=message):
        made_up_profile().at_budget(**arguments)

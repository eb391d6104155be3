"""Sharing a budget: what is asked is spent, and no other way of sharing found loses less."""

import itertools

import numpy as np
import pytest
from profiles import LENGTHS, made_up_profile

from nc_patch import ProfileError
from nc_patch.budget import budget_of
from nc_patch.calibration.allocate import Demand, Laws, attended_fraction


def spent(profile, n: int, over: str) -> float:
    """Attended keys / visible keys, counted one by one with the budget law itself."""
    config = profile.config()
    rows = range(1, n + 1) if over == "sequence" else [n]
    attended = seen = 0
    for layer, window in enumerate(profile.windows):
        for head in range(profile.shape[1]):
            alpha, C = config.laws(layer)[head]
            for row in rows:
                visible = min(row, window or row)
                attended += visible if layer in config.dense_layers else budget_of(visible, alpha, C)
                seen += visible
    return attended / seen


@pytest.mark.parametrize("windows", [(0, 0, 0), (0, 200, 0)], ids=["global", "one-layer-slides"])
@pytest.mark.parametrize("over", ["sequence", "last"])
@pytest.mark.parametrize("fraction", [0.05, 0.14, 0.5, 1.0])
def test_budgets_sum_to_what_is_asked_at_every_calibrated_length(fraction, over, windows):
    profile = made_up_profile(windows=windows)
    for n in LENGTHS:
        if fraction * n < 8:  # fewer keys than curves are taken at
            continue
        shared = profile.at_budget(fraction, n=n, over=over)
        assert spent(shared, n, over) == pytest.approx(fraction, rel=0.01)


def test_budgets_over_all_lengths_and_in_keys():
    profile = made_up_profile()
    shared = profile.at_budget(0.1)
    rows = np.concatenate([np.arange(1, n + 1) for n in LENGTHS])
    assert attended_fraction(Laws(shared.alpha, shared.C), rows, np.zeros(3, int), 1) == pytest.approx(0.1, rel=0.01)
    assert "over all calibrated lengths" in shared.aim
    last = profile.at_budget(keys=64.0, n=1024, over="last")
    assert spent(last, 1024, "last") * 1024 == pytest.approx(64, rel=0.01)
    assert spent(profile.at_budget(keys=64.0, n=1024), 1024, "sequence") * 512.5 == pytest.approx(64, rel=0.01)


def test_queries_that_attend_all_of_few_keys_are_counted(dense_with_few_keys):
    profile = made_up_profile()
    rows = np.arange(1, 2049)
    for given, below in (({}, 1024), ({"dense_below": 300}, 300), ({"dense_below": 0}, 0)):
        shared = profile.at_budget(0.5, n=2048, **given)
        found = attended_fraction(Laws(shared.alpha, shared.C), rows, np.zeros(3, int), 1, below)
        assert found == pytest.approx(0.5, rel=0.01)
    with pytest.raises(ProfileError, match=r"no budgets attend 0.1 .* dense_below=1024"):
        profile.at_budget(0.1, n=2048)
    with pytest.raises(ProfileError, match="dense_below must be an integer of at least 0, got -1"):
        profile.at_budget(0.1, n=2048, dense_below=-1)


def test_dense_layers_stay_dense_and_count():
    profile = made_up_profile()
    shared = profile.at_budget(0.5, n=512, dense_layers=(1,))
    assert [shared.config().is_dense(layer) for layer in range(3)] == [False, True, False]
    assert spent(shared, 512, "sequence") == pytest.approx(0.5, rel=0.01)
    with pytest.raises(ProfileError, match=r"no budgets attend 0.3 of the keys: .* dense layers \[1\]"):
        profile.at_budget(0.3, n=512, dense_layers=(1,))


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
    profile = made_up_profile()
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
        alpha, rows = 1e-3, np.arange(1, 1025)
        while True:
            laws = Laws(np.full((3, 4), alpha), np.full((3, 4), C))
            if attended_fraction(laws, rows, np.zeros(3, int), 1) >= 0.1:
                return laws
            alpha *= 1.01

    assert lost(Laws(shared.alpha, shared.C)) < 0.9 * min(lost(uniform(C)) for C in (0.3, 0.5, 0.7, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give fraction, for example"),
        ({"fraction": 0.1, "keys": 3}, "and not both"),
        ({"fraction": 0.0}, "fraction must be a number in .0, 1., got 0.0"),
        ({"fraction": 1.5}, "fraction must be a number"),
        ({"fraction": float("nan")}, "fraction must be a number"),
        ({"keys": -1.0}, "keys must be a number in .0, inf"),
        ({"fraction": 0.1, "n": 0}, "n must be a positive integer, got 0"),
        ({"fraction": 0.1, "over": "all"}, "over must be"),
        ({"fraction": 0.1, "dense_layers": (3,)}, "dense_layers must be a list of layers from 0 to 2"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, message):
    with pytest.raises(ProfileError, match=message):
        made_up_profile().at_budget(**arguments)

"""Needed budgets and fitted laws: recovered where the truth is known."""

import numpy as np
import pandas as pd
import pytest

from eval_tasks.iso_quality import LAWS, iso_quality

LENGTHS = (512, 1024, 2048, 4096, 8192)
BUDGETS = (8, 16, 32, 64, 128, 256, 512)


def losses(needed, shifts=(0.0,) * 9, lengths=LENGTHS, budgets=BUDGETS):
    """Loss over dense that is ln(needed / k): exactly zero at the needed budget; a document shifts it as a whole."""
    shifts = np.array(shifts)
    return pd.DataFrame({(n, k): np.log(needed(n) / k) + shifts for n in lengths for k in budgets if k < n})


def root(n):
    return 2.0 * n**0.5


def needs(losses, seed=0):
    """The budgets that lose nothing, and the law that stands on every line."""
    needed = iso_quality(losses, 0.0, seed)
    return needed, needed.iloc[0]


@pytest.mark.parametrize(
    ("law", "best", "C"),
    [(root, "power", 0.5), (lambda n: 6.4 * np.log2(n), "logarithmic", None), (lambda n: 50.0, "constant", 0.0)],
)
def test_a_law_is_recovered_and_recognised_by_what_it_predicts(law, best, C):
    needed, found = needs(losses(law))
    assert found[best] == pytest.approx(1.0, abs=1e-5)
    assert found[best] <= min(found[name] for name in LAWS) + 1e-9
    assert list(needed["keys"]) == pytest.approx([law(n) for n in LENGTHS], rel=1e-6)
    if C is not None:
        assert (found["C"], found["alpha"]) == pytest.approx((C, law(1)), rel=1e-5, abs=1e-9)


def test_the_interval_of_C_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for trial in range(20):
        tilts = np.random.default_rng(trial).normal(0.0, 0.05, 30)
        _, law = needs(losses(lambda n, tilts=tilts: 2.0 * n ** (0.5 + tilts), [0.0] * 30), seed=trial)
        covered += law["C_low"] <= 0.5 <= law["C_high"]
    assert covered >= 16


def test_lengths_where_the_budget_is_only_bounded_do_not_enter_the_law_which_takes_three_known_ones():
    """Measured with 40 and 128 keys, 2·n^0.5 is known from 512 to 2,048 tokens, and bounded below and above them."""
    needed, law = needs(losses(root, lengths=(256, 512, 1024, 2048, 8192), budgets=(40, 128)))
    assert list(needed["at_most"]) == [True, False, False, False, False]
    assert (needed["keys"][0], needed["keys"].isna().sum(), np.isnan(needed["keys"][4])) == (40, 1, True)
    assert list(needed["reached"]) == pytest.approx([1, 1, 1, 1, 0])
    assert law["C"] == pytest.approx(0.5, abs=1e-6)
    _, law = needs(losses(root, lengths=(256, 512, 1024, 8192), budgets=(40, 128)))
    assert law[["alpha", "C", "C_low", "C_high", *LAWS]].isna().all()


def test_resamples_without_a_known_budget_widen_the_interval_and_are_not_left_out():
    """One document in ten needs far more keys, which is beyond all measured ones at the longest length."""
    shifts = np.where(np.arange(20) < 2, np.log(4.0) * 10, 0.0)
    needed, law = needs(losses(root, shifts - shifts.mean(), budgets=(8, 16, 32, 64, 128, 200)))
    longest = needed.iloc[-1]
    assert longest["reached"] < 0.975
    assert longest["high"] == 8192
    assert longest["low"] < longest["keys"] < 200
    assert law["C_low"] < 0.5
    assert law["C_high"] > 0.75


def test_a_larger_budget_that_is_worse_again_counts_against_the_smaller():
    data = pd.DataFrame({(512, 16): [1.0], (512, 32): [3.0], (512, 64): [1.0]})
    assert 32 < iso_quality(data, within=2.0)["keys"][0] < 64


def test_one_document_has_no_intervals():
    needed, _ = needs(losses(root, [0.0]))
    assert needed[["low", "high", "C_low", "C_high"]].isna().all(axis=None)

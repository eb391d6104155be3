"""Needed budgets and fitted laws: recovered where the truth is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from eval_tasks.iso_quality import iso_quality
from eval_tasks.summary import needed_table

LENGTHS = (512, 1024, 2048, 4096, 8192)
BUDGETS = (8, 16, 32, 64, 128, 256, 512)


def table(losses):
    """Losses of documents by length and budget as ``iso_quality`` takes them."""
    return pd.DataFrame({(n, k): values for n, budgets in losses.items() for k, values in budgets.items()})


def needs(losses, within=0.0, seed=0):
    return iso_quality("recall", "fixed-topk", losses, within, seed)


def losses(needed, documents=20, noise=0.0, seed=0):
    """Loss over dense that is ln(needed / k): exactly zero at the needed budget; a document shifts it as a whole."""
    shifts = np.random.default_rng(seed).normal(0.0, noise, documents) if noise else np.zeros(documents)
    shifts = shifts - shifts.mean()
    return table({n: {k: np.log(needed(n) / k) + shifts for k in BUDGETS if k < n} for n in LENGTHS})


def test_a_power_law_is_recovered_and_predicts_best():
    found = needs(losses(lambda n: 2.0 * n**0.5))
    assert pytest.approx(0.5, abs=1e-6) == found.law.C
    assert found.law.alpha == pytest.approx(2.0, rel=1e-5)
    assert found.law.errors["power"] == pytest.approx(1.0, abs=1e-5)
    assert found.law.errors["power"] < found.law.errors["logarithmic"] < found.law.errors["constant"]
    assert list(found.needed["keys"]) == pytest.approx([2.0 * n**0.5 for n in LENGTHS], rel=1e-6)


@pytest.mark.parametrize(("law", "best"), [(lambda n: 6.4 * np.log2(n), "logarithmic"), (lambda n: 50.0, "constant")])
def test_another_law_is_recognised_by_what_it_predicts(law, best):
    errors = needs(losses(law)).law.errors
    assert errors[best] == pytest.approx(1.0, abs=1e-6)
    assert errors[best] <= min(errors.values()) + 1e-9


def test_the_interval_of_C_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for trial in range(20):
        draw = np.random.default_rng(trial)
        tilts = draw.normal(0.0, 0.05, 30)
        data = {n: {k: list(np.log(2.0 * n ** (0.5 + tilts) / k)) for k in BUDGETS if k < n} for n in LENGTHS}
        law = needs(table(data), within=0.0, seed=trial).law
        covered += law.C_low <= 0.5 <= law.C_high
    assert covered >= 16


def test_a_margin_lets_a_smaller_budget_do():
    strict = needs(losses(lambda n: 64.0))
    lax = needs(losses(lambda n: 64.0), within=np.log(2))
    assert list(lax.needed["keys"]) == pytest.approx(list(strict.needed["keys"] / 2))


def test_a_budget_that_none_reaches_is_none_and_one_that_the_smallest_reaches_is_a_bound():
    found = needs(losses(lambda n: 10_000.0 if n > 1024 else 2.0, noise=0.1))
    assert list(found.needed["keys"].fillna(0)) == [8, 8, 0, 0, 0]
    assert list(found.needed["at_most"]) == [True, True, False, False, False]
    assert list(found.needed["reached"]) == pytest.approx([1, 1, 0, 0, 0])
    assert len(found.bounded) == 5
    assert found.law is None


def test_lengths_where_the_budget_is_only_bounded_do_not_enter_the_law():
    """Measured with 40 and 128 keys, 2·n^0.5 is known from 512 to 2,048 tokens, and bounded below and above them."""
    data = {n: {k: [np.log(2.0 * n**0.5 / k)] * 9 for k in (40, 128)} for n in (256, 512, 1024, 2048, 8192)}
    found = needs(table(data))
    assert list(found.needed.loc[found.needed["at_most"], "length"]) == [256]
    assert list(found.needed.loc[found.needed["keys"].isna(), "length"]) == [8192]
    assert pytest.approx(0.5, abs=1e-6) == found.law.C


def test_no_law_goes_through_fewer_than_three_known_budgets():
    data = {n: {k: [np.log(2.0 * n**0.5 / k)] * 9 for k in (64, 512)} for n in (256, 512, 2048, 4096)}
    found = needs(table(data))
    assert list(found.bounded["length"]) == [256, 512]
    assert found.law is None


def test_resamples_without_a_known_budget_widen_the_interval_and_are_not_left_out():
    """One document in ten needs four times as many keys, which is beyond all measured ones at the longest length."""
    shifts = np.where(np.arange(20) < 2, np.log(4.0) * 10, 0.0)
    shifts = shifts - shifts.mean()
    data = {n: {k: list(np.log(2.0 * n**0.5 / k) + shifts) for k in (8, 16, 32, 64, 128, 200)} for n in LENGTHS}
    found = needs(table(data))
    longest = found.needed.iloc[-1]
    assert longest["reached"] < 0.975
    assert longest["high"] == 8192
    assert longest["low"] < longest["keys"] < 200
    assert found.law.C_low < 0.5
    assert found.law.C_high > 0.75


def test_a_larger_budget_that_is_worse_again_counts_against_the_smaller():
    data = {512: {16: [-1.0], 32: [1.0], 64: [-1.0]}}
    assert 32 < needs(table(data)).needed["keys"][0] < 64


def test_one_document_has_no_intervals():
    found = needs(losses(lambda n: 2.0 * n**0.5, documents=1))
    assert np.isnan(found.law.C_low)
    assert found.needed["low"].isna().all()


def test_the_table_of_needed_budgets_has_the_law_beside_each():
    known = needs(losses(lambda n: 2.0 * n**0.5))
    needed = needed_table([known, replace(known, method="streaming", law=None)])
    assert list(needed["length"]) == [*LENGTHS, *LENGTHS]
    assert list(needed["keys"]) == list(known.needed["keys"]) * 2
    assert set(needed.loc[needed["method"] == "fixed-topk", "C"]) == {known.law.C}
    assert needed.loc[needed["method"] == "streaming", ["alpha", "C", "C_low", "C_high"]].isna().all(axis=None)

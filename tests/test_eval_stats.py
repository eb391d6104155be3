"""Statistics against dense attention: each against another computation of the same thing, or against simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from eval_tasks.stats import (
    MARGIN_DOCUMENTS,
    SIGNIFICANCE,
    compare,
    corrected,
    documents_for_difference,
    documents_for_margin,
    losses_within,
    mcnemar,
    mean_within,
    paired_difference,
    sign_flips,
    smallest_detectable,
)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        reference = random.normal(scale=5.0, size=40)
        _, low, high = paired_difference(reference + random.normal(loc=0.3, size=40), reference, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_constant_difference_has_an_interval_of_no_width_and_one_sample_none():
    reference = np.random.default_rng(0).normal(size=30)
    assert paired_difference(reference + 0.25, reference) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_difference([2.0], [1.5]) == pytest.approx((0.5, np.nan, np.nan), nan_ok=True)


def test_mcnemar_counts_only_samples_on_which_the_two_differ():
    # 8 lost, 1 won: twice the lower tail of a fair coin thrown nine times.
    here, there = [1] * 8 + [0] * 1 + [1] * 5 + [0] * 20, [0] * 8 + [1] * 1 + [1] * 5 + [0] * 20
    assert compare(here, there, 0.05, answers=True)["p_difference"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert compare(here, here, 0.05, answers=True)["p_difference"] == 1.0


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_all_flips_of_signs_are_counted_so_that_p_is_as_small_as_the_documents_allow(count):
    values = np.random.default_rng(count).normal(0.4, 1.0, size=count)
    flips = np.array(list(itertools.product((-1, 1), repeat=count))) @ np.abs(values)
    assert sign_flips(values) == pytest.approx((np.abs(flips) >= abs(values.sum()) - 1e-9).mean())
    assert sign_flips([1.0] * 40 * count) == pytest.approx(2.0 ** (1 - 40 * count))


@pytest.mark.parametrize(
    ("test", "draw", "allowed"),
    [
        # Even where no loss was drawn: the share of answers lost is 0.05 above the share won.
        (losses_within, lambda r, n: r.choice([1.0, 0.0], n, p=[0.05, 0.95]), 0.065),
        (losses_within, lambda r, n: r.choice([1.0, -1.0, 0.0], n, p=[0.15, 0.1, 0.75]), 0.065),
        (losses_within, lambda r, n: np.where(r.random(n) < 0.1, r.random(n), 0.0), 0.065),
        (losses_within, lambda r, n: r.uniform(0.0, 0.1, n), 0.065),
        (mean_within, lambda r, n: r.normal(0.05, 0.3, n), 0.065),
        (mean_within, lambda r, n: r.exponential(0.05, n), 0.09),
        (mean_within, lambda r, n: r.normal(0.0, 0.01, n) + 0.2 * (r.random(n) < 0.25), 0.065),
        # Where nine in ten documents lose nothing, twenty of them hold no loss in 12 cases of 100, and look like it.
        (mean_within, lambda r, n: r.normal(0.0, 0.01, n) + 0.5 * (r.random(n) < 0.1), 0.14),
    ],
)
@pytest.mark.parametrize("documents", [10, MARGIN_DOCUMENTS, 50])
def test_a_mean_loss_at_the_margin_of_0_05_is_rarely_called_non_inferior(test, draw, allowed, documents):
    random = np.random.default_rng(12)
    assert np.mean([test(draw(random, documents), 0.05) <= SIGNIFICANCE for _ in range(1000)]) <= allowed


def test_the_margin_of_answers_is_that_of_the_binomial_distribution():
    for lost, count in ((0, 10), (0, 59), (1, 93), (3, 40)):
        high = stats.binomtest(lost, count).proportion_ci(0.9, method="exact").high
        p = losses_within([1.0] * lost + [0.0] * (count - lost), 0.05)
        assert (p <= SIGNIFICANCE) == (high <= 0.05)
        assert losses_within([1.0] * lost + [-1.0] * 5 + [0.0] * (count - lost - 5), 0.05) == p
    assert losses_within([0.5, 0.0, 0.0, 0.0] * 30, 0.05) == 1.0
    assert losses_within([0.01] * 200, 0.05) <= SIGNIFICANCE


@pytest.mark.parametrize("family", [1, 9, 200, 5000])
def test_no_verdict_is_possible_below_the_documents_that_a_family_needs(family):
    fewest = documents_for_difference(family)
    for test in (sign_flips, mcnemar):
        assert family * test([1.0] * fewest) <= SIGNIFICANCE < family * test([1.0] * (fewest - 1))
    fewest = documents_for_margin(0.05, True, family)
    nothing_lost = [losses_within([0.0] * n, 0.05) for n in (fewest, fewest - 1)]
    assert family * nothing_lost[0] <= SIGNIFICANCE < family * nothing_lost[1]
    assert documents_for_margin(0.05, False, family) == MARGIN_DOCUMENTS
    assert np.isnan(mean_within([0.0] * (MARGIN_DOCUMENTS - 1), 0.05))


def test_what_is_detectable_is_detected_so_often_after_the_correction():
    draw = np.random.default_rng(13)
    values = draw.normal(size=40)
    size = smallest_detectable(values / values.std(ddof=1), family=20)
    found = sum(20 * stats.ttest_1samp(draw.normal(size, 1.0, 40), 0).pvalue <= 0.05 for _ in range(1000))
    assert found / 1000 == pytest.approx(0.8, abs=0.06)
    share = smallest_detectable([0.0] * 60, right_or_wrong=True, family=20)
    lost = (draw.random((1000, 60)) < share).sum(1)
    found = sum(20 * mcnemar([1] * n + [0] * (60 - n)) <= 0.05 for n in lost)
    assert found / 1000 == pytest.approx(0.8, abs=0.05)
    possible = [([9.0] * 5, False, 1), ([0.0] * 8, True, 20), ([0.0] * 8, True, 1)]
    assert [bool(np.isnan(smallest_detectable(*each))) for each in possible] == [True, True, False]


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [
        (0.0, 0.01, "as good"),
        (0.03, 0.01, "slightly worse"),
        (0.5, 0.01, "worse"),
        (-0.5, 0.01, "better"),
        (0.0, 1.0, "undecided"),
    ],
)
def test_verdicts_are_what_the_data_show(mean, spread, expected):
    values = np.random.default_rng(5).normal(0.0, spread, size=30)
    values += mean - values.mean()
    for losses, fails, said in (
        (values, False, expected),
        (values, True, "dense fails"),
        ([mean], False, "too few samples"),
    ):
        found = compare(losses, [0.0] * len(losses), 0.05) | {"dense_fails": fails}
        assert corrected(pd.DataFrame([found]))["verdict"][0] == said


def test_a_family_is_corrected_by_holms_procedure_and_those_without_a_verdict_do_not_count():
    # A margin that could not be tested counts: it was asked.
    p_difference, p_margin = [0.01, 0.04, 0.03, 0.005, np.nan, 0.5], [0.9, 0.8, np.nan, 0.01, np.nan, 0.5]
    columns = {"p_difference": p_difference, "p_margin": p_margin, "dense_fails": [False] * 5 + [True]}
    after = corrected(pd.DataFrame(columns).assign(difference=1.0))
    assert list(after["p_difference"]) == pytest.approx([0.03, 0.06, 0.06, 0.02, np.nan, 0.5], nan_ok=True)
    assert list(after["p_margin"]) == pytest.approx([1, 1, np.nan, 0.04, np.nan, 0.5], nan_ok=True)

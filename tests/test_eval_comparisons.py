"""Verdicts against dense attention: each test against another computation of the same thing, or against simulation."""

import numpy as np
import pytest
from scipy import stats

from eval_tasks.comparisons import (
    Comparison,
    compare,
    corrected,
    effective_length,
    holm,
    mcnemar,
    smallest_detectable,
)


def compared(values, reference=None, margin=0.05, **further):
    reference = [0.0] * len(values) if reference is None else reference
    return compare("recall", 512, "nc-topk", values, reference, list(range(len(values))), margin, **further)


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_mcnemar_counts_only_samples_on_which_the_two_differ():
    # 8 lost, 1 won: twice the lower tail of a fair coin thrown nine times.
    here, there = [1] * 8 + [0] * 1 + [1] * 5 + [0] * 20, [0] * 8 + [1] * 1 + [1] * 5 + [0] * 20
    assert mcnemar(here, there) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar([1, 0], [1, 0]) == 1.0
    assert compared(here, there, right_or_wrong=True).p_difference == pytest.approx(2 * 10 / 2**9)


def test_few_documents_are_tested_exactly():
    """With four documents all worse, 2 of the 16 ways to flip signs are as extreme."""
    assert compared([1.0, 2.0, 3.0, 4.0]).p_difference == pytest.approx(2 / 16)
    assert compared([-1.0, -2.0, -3.0, -4.0], margin=0.5).p_margin == pytest.approx(1 / 16)


def test_many_documents_agree_with_a_t_test_where_that_is_right():
    values = np.random.default_rng(0).normal(0.3, 1.0, size=60)
    found = compared(list(values), margin=0.5)
    assert found.p_difference == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)
    assert found.p_margin == pytest.approx(stats.ttest_1samp(values, 0.5, alternative="less").pvalue, abs=0.01)


def test_the_smallest_detectable_difference_is_found_in_eighty_of_a_hundred_cases():
    draw = np.random.default_rng(3)
    size = smallest_detectable(draw.normal(size=100_000)) * np.sqrt(100_000 / 25) * 1.03  # scaled to 25 documents
    found = sum(stats.ttest_1samp(draw.normal(size, 1.0, 25), 0).pvalue <= 0.05 for _ in range(1000))
    assert found / 1000 == pytest.approx(0.8, abs=0.05)


def test_below_six_documents_nothing_can_be_detected():
    assert compared([9.0] * 5).p_difference > 0.05
    assert smallest_detectable([9.0] * 5) is None
    assert compared([9.0, 8.0, 9.0, 8.0, 9.0, 8.0]).p_difference < 0.05
    assert smallest_detectable([9.0, 8.0, 9.0, 8.0, 9.0, 8.0]) is not None


def test_the_share_of_lost_answers_that_is_detectable_is_detected_so_often():
    draw = np.random.default_rng(4)
    share = smallest_detectable([0.0] * 40, right_or_wrong=True)
    lost = draw.random((2000, 40)) < share
    found = sum(mcnemar(list(row.astype(int)), [0] * 40) <= 0.05 for row in lost)
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [
        (0.0, 0.01, "non-inferior"),
        (0.03, 0.01, "worse, yet within the margin"),
        (0.5, 0.01, "worse"),
        (-0.5, 0.01, "better"),
        (0.0, 1.0, "undecided"),
    ],
)
def test_verdicts_are_what_the_data_show(mean, spread, verdict):
    values = np.random.default_rng(5).normal(0.0, spread, size=30)
    assert compared(list(values - values.mean() + mean)).verdict == verdict


def test_one_document_has_no_verdict_and_failing_dense_none_either():
    assert compared([0.3]).verdict == "too few documents"
    assert compared([0.0] * 30, dense_fails=True).verdict == "dense fails here: no verdict"


def test_a_family_is_corrected_together_and_those_without_a_verdict_do_not_count():
    draw = np.random.default_rng(6)
    family: list[Comparison] = [compared(list(draw.normal(0.4, 1.0, size=30))) for _ in range(4)]
    family += [compared([0.5]), compared([0.5] * 9, dense_fails=True)]
    result = corrected(family)
    raw = [c.p_difference for c in family[:4]]
    assert [c.p_difference for c in result[:4]] == pytest.approx(holm(raw))
    assert result[4:] == family[4:]
    assert [c.difference for c in result] == [c.difference for c in family]


def test_noise_alone_is_rarely_called_a_difference():
    draw = np.random.default_rng(8)
    wrong = sum(compared(list(draw.normal(size=12))).p_difference <= 0.05 for _ in range(100))
    assert wrong <= 12


def test_the_effective_length_ends_at_the_first_length_outside():
    assert effective_length({512: 0.01, 1024: 0.04, 2048: 0.2, 4096: 0.0}, 0.05) == 1024
    assert effective_length({512: 0.2, 1024: 0.0}, 0.05) is None
    assert effective_length({512: -0.1, 8192: 0.05}, 0.05) == 8192

"""Paired bootstrap intervals."""

import numpy as np
import pytest

from eval_tasks.bootstrap import paired_difference


def test_a_constant_difference_has_an_interval_of_no_width_however_much_the_samples_vary():
    reference = np.random.default_rng(0).normal(size=30)
    found = paired_difference(list(reference + 0.25), list(reference))
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.decided
    assert found.samples == 30


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        reference = random.normal(scale=5.0, size=40)
        found = paired_difference(list(reference + random.normal(loc=0.3, size=40)), list(reference), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_sample_has_a_mean_and_no_interval():
    found = paired_difference([2.0], [1.5])
    assert (found.mean, found.low, found.high, found.decided) == (0.5, None, None, False)


def test_the_same_seed_gives_the_same_interval():
    values, reference = [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]
    assert paired_difference(values, reference, seed=3) == paired_difference(values, reference, seed=3)


@pytest.mark.parametrize(("values", "reference"), [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_samples_are_refused(values, reference):
    with pytest.raises(ValueError, match="same samples"):
        paired_difference(values, reference)


def test_samples_of_one_document_are_drawn_together():
    """Copies of every sample say nothing new: clustered, the interval stays; as if independent, it would shrink."""
    values = list(np.random.default_rng(2).normal(size=12))
    documents = list(range(12))
    once = paired_difference(values, [0.0] * 12, documents=documents)
    copied = paired_difference(values * 9, [0.0] * 108, documents=documents * 9)
    independent = paired_difference(values * 9, [0.0] * 108)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert (copied.documents, copied.samples) == (12, 108)
    assert independent.high - independent.low < 0.5 * (once.high - once.low)


def test_documents_with_more_samples_weigh_more_in_the_mean():
    found = paired_difference([1.0, 1.0, 4.0], [0.0] * 3, documents=["a", "a", "b"])
    assert found.mean == 2.0
    assert found.documents == 2

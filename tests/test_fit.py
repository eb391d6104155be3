"""Power laws through counts: robust against an outlier, and intervals that hold the truth."""

import numpy as np
import pytest

from nc_patch.calibration.fit import fit_power_laws, theil_sen
from nc_patch.common import student_quantile

LENGTHS = np.log([256.0, 512.0, 1024.0, 2048.0, 4096.0])[:, None]


def counts(C: float, pieces: int, noise: float, between: float, seed: int, heads: int = 40) -> np.ndarray:
    """log k ``[P, L, 1, H, R]`` of a law 3 n^C, with noise of rows and of pieces."""
    generator = np.random.default_rng(seed)
    of_piece = between * generator.standard_normal((pieces, 1, 1, heads, 1))
    of_row = noise * generator.standard_normal((pieces, len(LENGTHS), 1, heads, 16))
    return np.log(3) + C * LENGTHS[..., None, None] + of_piece + of_row


def test_an_exact_law_is_found_and_a_law_that_bends_has_a_wide_interval():
    exact, straight = counts(0.6, 3, 0.0, 0.0, 0), counts(0.5, 3, 0.01, 0.0, 0)
    bent = straight + 0.1 * (LENGTHS - LENGTHS.mean())[..., None, None] ** 2
    fit, narrow, wide = (fit_power_laws(LENGTHS, log_k, 0.1) for log_k in (exact, straight, bent))
    for found, expected in ((fit.C, 0.6), (fit.alpha, 3.0), (fit.C_low, 0.6), (fit.C_high, 0.6), (fit.r2, 1.0)):
        assert found == pytest.approx(expected, rel=1e-9)
    assert (wide.C_high - wide.C_low).mean() > 3 * (narrow.C_high - narrow.C_low).mean()


def test_one_length_that_lies_off_hardly_moves_the_slope_which_stays_within_0_and_1():
    points = np.log(3) + 0.5 * LENGTHS[..., None]
    points[2] += 2.0
    assert np.ravel(theil_sen(LENGTHS, points)) == pytest.approx([0.5, np.log(3)], abs=1e-9)
    assert [float(theil_sen(LENGTHS, slope * LENGTHS[..., None])[0].item()) for slope in (-0.4, 1.3)] == [0.0, 1.0]


def test_lengths_that_are_all_the_same_say_nothing_of_the_slope():
    fit = fit_power_laws(np.full((3, 1), np.log(100.0)), np.full((2, 3, 1, 2, 4), np.log(10.0)), 0.1)
    assert [np.unique(values).tolist() for values in (fit.C, fit.C_low, fit.C_high)] == [[0], [0], [1]]
    assert fit.alpha == pytest.approx(10.0)


@pytest.mark.parametrize("pieces", [3, 6])
def test_nine_intervals_of_ten_hold_the_exponent(pieces):
    fits = [fit_power_laws(LENGTHS, counts(0.5, pieces, 0.4, 0.2, seed), 0.1, seed) for seed in range(6)]
    assert 0.82 <= np.mean([(fit.C_low <= 0.5) & (fit.C_high >= 0.5) for fit in fits]) <= 1.0


def test_students_quantile_is_near_the_exact_one():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (3, 4, 6, 10, 30, 100):
        for share in (0.95, 0.975):
            found = student_quantile(freedom, stats.norm.ppf(share))
            assert found == pytest.approx(stats.t.ppf(share, freedom), rel=0.01)

"""Power laws through counts: robust against an outlier, and intervals that hold the truth."""

import numpy as np
import pytest

from nc_patch.calibration.fit import fit_power_laws, student_quantile, theil_sen

LENGTHS = np.log([256.0, 512.0, 1024.0, 2048.0, 4096.0])


def counts(C: float, pieces: int, noise: float, between: float, seed: int, heads: int = 40) -> np.ndarray:
    """log k ``[P, L, 1, H, R]`` of a law 3 n^C, with noise of rows and of pieces."""
    generator = np.random.default_rng(seed)
    rows = 16
    shape = (pieces, len(LENGTHS), 1, heads, rows)
    law = np.log(3) + C * LENGTHS[:, None, None, None]
    of_piece = between * generator.standard_normal((pieces, 1, 1, heads, 1))
    return law + of_piece + noise * generator.standard_normal(shape)


def test_an_exact_law_is_found_with_an_interval_of_no_width():
    fit = fit_power_laws(LENGTHS[:, None], counts(0.6, 3, 0.0, 0.0, 0), 0.1)
    for found, expected in ((fit.C, 0.6), (fit.alpha, 3.0), (fit.C_low, 0.6), (fit.C_high, 0.6), (fit.r2, 1.0)):
        assert found == pytest.approx(expected, rel=1e-9)


def test_one_length_that_lies_off_hardly_moves_the_slope():
    points = (np.log(3) + 0.5 * LENGTHS)[:, None, None].copy()
    points[2] += 2.0
    slope, intercept = theil_sen(LENGTHS[:, None], points)
    assert slope[0, 0] == pytest.approx(0.5, abs=1e-9)
    assert intercept[0, 0] == pytest.approx(np.log(3), abs=1e-9)


@pytest.mark.parametrize(("slope", "expected"), [(-0.4, 0.0), (1.3, 1.0)])
def test_the_exponent_stays_within_0_and_1(slope, expected):
    found, _ = theil_sen(LENGTHS[:, None], slope * LENGTHS[:, None, None])
    assert found[0, 0] == expected


def test_lengths_that_are_all_the_same_say_nothing_of_the_slope():
    same = np.full((3, 1), np.log(100.0))
    log_k = np.log(10.0) + np.zeros((2, 3, 1, 2, 4))
    fit = fit_power_laws(same, log_k, 0.1)
    assert (fit.C == 0).all()
    assert (fit.C_low == 0).all()
    assert (fit.C_high == 1).all()
    assert fit.alpha == pytest.approx(10.0)


@pytest.mark.parametrize("pieces", [3, 6])
def test_nine_intervals_of_ten_hold_the_exponent(pieces):
    inside = []
    for seed in range(6):
        fit = fit_power_laws(LENGTHS[:, None], counts(0.5, pieces, 0.4, 0.2, seed), 0.1, seed)
        inside.append((fit.C_low <= 0.5) & (fit.C_high >= 0.5))
    share = np.mean(inside)
    assert 0.82 <= share <= 1.0


def test_a_law_that_bends_widens_the_interval():
    bent = counts(0.5, 3, 0.01, 0.0, 0) + 0.1 * (LENGTHS - LENGTHS.mean())[:, None, None, None] ** 2
    straight = counts(0.5, 3, 0.01, 0.0, 0)
    wide, narrow = (fit_power_laws(LENGTHS[:, None], log_k, 0.1) for log_k in (bent, straight))
    assert (wide.C_high - wide.C_low).mean() > 3 * (narrow.C_high - narrow.C_low).mean()


def test_students_quantile_is_near_the_exact_one():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (3, 4, 6, 10, 30, 100):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=0.02)
    assert student_quantile(0) == pytest.approx(stats.norm.ppf(0.95), rel=1e-6)

"""Rows of attention as curves, against float64 over whole score matrices; and power laws through what they need."""

import numpy as np
import pytest
import torch
from attention_cases import random_case
from operations import problem_of

from nc_patch.calibration.fit import fit_power_laws, theil_sen
from nc_patch.calibration.measure import row_curves
from nc_patch.layers import Observed
from nc_patch.ops import rows as score_rows
from nc_patch.ops.problem import visible_mask
from nc_patch.selections import TopK


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 12, 17, 26, 33])
def test_rows_equal_the_float64_definition(monkeypatch, seed):
    monkeypatch.setattr(score_rows, "MOST_ROWS", 16)  # so that they are taken in several blocks
    case = random_case(seed)
    query, key, value, visible = (tensor[:1] for tensor in (case.query, case.key, case.value, case.visible))
    full = visible[..., 1] - visible[..., 0]
    rows = full[0].nonzero()[:, 0]
    if not len(rows):
        pytest.skip("no row of this case sees a key")
    scoring = {"scale": case.scale, "softcap": case.softcap or None, "sinks": case.sinks}
    keys, eps = (8, 11, 16, 23, 64, 200), (0.05, 0.3)
    g = torch.Generator().manual_seed(seed)
    probes = torch.randn(2, query.shape[1], len(rows), value.shape[-1], generator=g)
    problem_with = lambda budget: problem_of(query, key, value, visible, budget, **scoring)  # noqa: E731
    call = Observed(0, problem_with(full[:, None]), torch.zeros(*query.shape[:3], value.shape[-1]))
    found = row_curves(call, rows, keys, eps, probes)
    assert torch.equal(found.visible, full[0, rows].long())

    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = torch.softmax(scores.masked_fill(~visible_mask(visible, key.shape[2]), -torch.inf), -1)[0][:, rows]
    mass = weights.sort(-1, descending=True).values.cumsum(-1)
    for number, share in enumerate(eps):
        # Within rounding of the threshold either count is right.
        fewest, most = ((mass < 1 - share + slack).sum(-1) + 1 for slack in (-1e-5, 1e-5))
        assert ((found.support[number] >= fewest) & (found.support[number] <= most)).all()
    reference = lambda budget: TopK(tail="drop").reference(problem_with(budget))  # noqa: E731
    dense = reference(full[:, None])
    for number, count in enumerate(keys):
        expected = reference(full.clamp(max=count)[:, None])
        assert torch.allclose(found.kept[number].double(), expected.kept_mass[0][:, rows], atol=2e-5)
        difference = (expected.output - dense.output)[0][:, rows].double()
        along = (probes.double() * difference).sum(-1).square().sum(0)
        assert torch.allclose(found.error[number].double(), along, atol=1e-4, rtol=1e-3)


# Laws

LENGTHS = np.log([256.0, 512.0, 1024.0, 2048.0, 4096.0])[:, None]


def counts(C: float, pieces: int, noise: float, between: float, seed: int) -> np.ndarray:
    """log k ``[P, L, 1, H, R]`` of a law 3 n^C of 40 heads, with noise of rows and of pieces."""
    generator = np.random.default_rng(seed)
    of_piece = between * generator.standard_normal((pieces, 1, 1, 40, 1))
    of_row = noise * generator.standard_normal((pieces, len(LENGTHS), 1, 40, 16))
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

"""Rows of attention as curves, against plain float64 over whole score matrices; and exponents that are known."""

import numpy as np
import pytest
import torch
from attention_cases import random_case
from operations import problem_of, reference_attention

from nc_patch.calibration.fit import fit_power_laws
from nc_patch.calibration.measure import SMALLEST_KEYS, Plan, row_curves
from nc_patch.layers import Observed
from nc_patch.ops.problem import causal_intervals, visible_mask
from nc_patch.selections import TopK


def observed(query, key, value, visible=None, **settings) -> Observed:
    visible = causal_intervals(1, query.shape[2], key.shape[2], "cpu") if visible is None else visible
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    return Observed(0, problem_of(query, key, value, visible, visible[..., 1][:, None], **settings), output)


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 12, 17, 26, 33])
def test_rows_equal_the_float64_definition(seed):
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
    found = row_curves(observed(query, key, value, visible, **scoring), rows, keys, eps, probes)
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
    settings = {"visible": visible, "selection": "topk", **scoring}
    settings |= {"sink_keys": TopK().sink_keys, "recent_keys": TopK().recent_keys}
    dense = reference_attention(query, key, value, budget=full[:, None], **settings)
    for number, count in enumerate(keys):
        expected = reference_attention(query, key, value, budget=full.clamp(max=count)[:, None], **settings)
        assert torch.allclose(found.kept[number].double(), expected.kept_mass[0][:, rows], atol=2e-5)
        difference = (expected.output - dense.output)[0][:, rows].double()
        along = (probes.double() * difference).sum(-1).square().sum(0)
        assert torch.allclose(found.error[number].double(), along, atol=1e-4, rtol=1e-3)


def test_normal_probes_measure_the_squared_norm_of_the_error():
    g = torch.Generator().manual_seed(0)
    call = observed(*(torch.randn(1, 2, 300, 16, generator=g) for _ in range(3)))
    every_direction = torch.eye(16)[:, None, None].expand(16, 2, 200, 16)
    exact, estimate = (
        row_curves(call, torch.arange(100, 300), (16,), (0.1,), probes).error.mean() / of
        for probes, of in ((every_direction, 1), (torch.randn(8, 2, 200, 16, generator=g), 8))
    )
    assert estimate == pytest.approx(float(exact), rel=0.1)


def test_the_grid_starts_above_the_keys_that_are_always_attended_and_reaches_the_longest():
    grid = np.array(Plan((4096, 8192), 24, (0.1,)).keys)
    assert grid[0] == SMALLEST_KEYS > TopK().sink_keys + TopK().recent_keys
    assert grid[-1] >= 8192 > grid[-2]
    assert ((grid[1:] / grid[:-1] > 1.3) & (grid[1:] / grid[:-1] < 1.5)).all()


@pytest.mark.parametrize(("alpha", "C"), [(8.0, 0.0), (8.0, 0.2), (8.0, 0.5), (1.5, 0.8), (0.4, 1.0)])
def test_the_exponent_of_rows_that_are_constructed_is_recovered(alpha, C):
    # About alpha n^C of the first n keys have a high score, and equal weights: (1 - eps) of them hold 1 - eps.
    lengths, rows = (256, 1024, 4096), 8
    place = torch.arange(lengths[-1] + 1, dtype=torch.float64)
    count = torch.minimum((alpha * place**C).floor(), place)
    heavy = torch.where(count[1:] > count[:-1], 15.0, -15.0).float()
    key = heavy[None, None, :, None].repeat(1, 1, 1, 4)
    call = observed(torch.full((1, 2, lengths[-1], 4), 0.5), key, torch.randn(1, 1, lengths[-1], 4))
    found = [row_curves(call, torch.arange(n - rows, n), (8,), (0.1,), torch.zeros(1, 2, rows, 4)) for n in lengths]
    log_n = np.array([[float(each.visible.double().log().mean())] for each in found])
    log_k = np.array([[each.support[0].double().log().numpy()[None] for each in found]])
    laws = fit_power_laws(log_n, log_k, 0.1)
    assert np.abs(laws.C - C).max() < 0.03
    assert laws.alpha == pytest.approx(np.full((1, 2), 0.9 * alpha), rel=0.2)

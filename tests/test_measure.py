"""Rows of attention as curves, against plain float64 over whole score matrices; and exponents that are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from attention_cases import random_case
from operations import problem_of, reference_attention

from nc_patch.attention import Observed
from nc_patch.calibration.fit import fit_power_laws, theil_sen
from nc_patch.calibration.measure import SMALLEST_KEYS, Plan, row_curves
from nc_patch.ops.problem import visible_mask
from nc_patch.selections import TopK

DEFAULTS = TopK()


def observed(query, key, value, visible, scale=1.0, softcap=None, sinks=None) -> Observed:
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    budget = visible[..., 1][:, None]
    return Observed(0, problem_of(query, key, value, visible, budget, sinks, scale=scale, softcap=softcap), output)


def causal(length: int) -> torch.Tensor:
    end = torch.arange(1, length + 1, dtype=torch.int32)
    return torch.stack((torch.zeros_like(end), end), -1)[None]


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 12, 17, 26, 33])
def test_rows_equal_the_float64_definition(seed):
    case = random_case(seed)
    one = slice(0, 1)
    query, key, value, visible = case.query[one], case.key[one], case.value[one], case.visible[one]
    n = (visible[0, :, 1] - visible[0, :, 0]).long()
    rows = (n > 0).nonzero()[:, 0]
    if not len(rows):
        pytest.skip("no row of this case sees a key")
    call = observed(query, key, value, visible, case.scale, case.softcap or None, case.sinks)
    keys, eps = (8, 11, 16, 23, 64, 200), (0.05, 0.3)
    g = torch.Generator().manual_seed(seed)
    probes = torch.randn(2, query.shape[1], len(rows), value.shape[-1], generator=g)
    found = row_curves(call, rows, keys, eps, probes)

    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    scores = scores * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    weights = torch.softmax(scores.masked_fill(~visible_mask(visible, key.shape[2]), -torch.inf), -1)[0][:, rows]
    assert torch.equal(found.visible, n[rows])
    mass = weights.sort(-1, descending=True).values.cumsum(-1)
    for number, share in enumerate(eps):
        # Within rounding of the threshold either count is right.
        fewest, most = ((mass < 1 - share + slack).sum(-1) + 1 for slack in (-1e-5, 1e-5))
        assert ((found.support[number] >= fewest) & (found.support[number] <= most)).all()
    settings = {
        "visible": visible, "selection": "topk", "scale": case.scale, "softcap": case.softcap, "sinks": case.sinks,
        "sink_keys": DEFAULTS.sink_keys, "recent_keys": DEFAULTS.recent_keys,
    }  # fmt: skip
    full = visible[..., 1] - visible[..., 0]
    dense = reference_attention(query, key, value, budget=full[:, None], **settings)
    for number, count in enumerate(keys):
        expected = reference_attention(query, key, value, budget=full.clamp(max=count)[:, None], **settings)
        assert torch.allclose(found.kept[number].double(), expected.kept_mass[0][:, rows], atol=2e-5)
        difference = (expected.output - dense.output)[0][:, rows].double()
        along = (probes.double() * difference).sum(-1).square().sum(0)
        assert torch.allclose(found.error[number].double(), along, atol=1e-4, rtol=1e-3)


def test_normal_probes_measure_the_squared_norm_of_the_error():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 16, generator=g) for _ in range(3))
    rows = torch.arange(100, 300)
    every_direction = torch.eye(16)[:, None, None].expand(16, 2, 200, 16)
    exact = row_curves(observed(query, key, value, causal(300)), rows, (16,), (0.1,), every_direction).error.mean()
    probes = torch.randn(8, 2, 200, 16, generator=g)
    estimate = row_curves(observed(query, key, value, causal(300)), rows, (16,), (0.1,), probes).error.mean() / 8
    assert estimate == pytest.approx(float(exact), rel=0.1)


def test_the_grid_starts_above_the_keys_that_are_always_attended_and_reaches_the_longest():
    grid = Plan((4096, 8192), 24, (0.1,)).keys
    assert grid[0] == SMALLEST_KEYS > DEFAULTS.sink_keys + DEFAULTS.recent_keys
    assert grid[-1] >= 8192 > grid[-2]
    assert all(1.3 < b / a < 1.5 for a, b in itertools.pairwise(grid))


def counted(call: Observed, lengths: tuple[int, ...], rows: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """log n ``[L, 1]`` and log of the support ``[1, L, 1, H, R]`` of rows just before each length."""
    log_n, log_k = [], []
    for length in lengths:
        at = torch.arange(length - rows, length)
        probes = torch.zeros(1, call.problem.query.shape[1], rows, call.problem.value.shape[-1])
        found = row_curves(call, at, (8,), (eps,), probes)
        log_n.append([float(found.visible.double().log().mean())])
        log_k.append(found.support[0].double().log().numpy()[None])
    return np.array(log_n), np.array(log_k)[None]


@pytest.mark.parametrize(("alpha", "C"), [(8.0, 0.0), (8.0, 0.2), (8.0, 0.5), (1.5, 0.8), (0.4, 1.0)])
def test_the_exponent_of_rows_that_are_constructed_is_recovered(alpha, C):
    # About alpha n^C of the first n keys have a high score, and equal weights: (1 - eps) of them hold 1 - eps.
    length = 4096
    place = torch.arange(length + 1, dtype=torch.float64)
    count = torch.minimum((alpha * place**C).floor(), place)
    heavy = count[1:] > count[:-1]
    key = torch.where(heavy, 15.0, -15.0).float()[None, None, :, None].repeat(1, 1, 1, 4)
    query = torch.full((1, 2, length, 4), 0.5)
    call = observed(query, key, torch.randn(1, 1, length, 4), causal(length))
    log_n, log_k = counted(call, (256, 1024, 4096), 8, 0.1)
    laws = fit_power_laws(log_n, log_k, 0.1)
    assert np.abs(laws.C - C).max() < 0.03
    assert laws.alpha == pytest.approx(np.full((1, 2), 0.9 * alpha), rel=0.2)


@pytest.mark.parametrize("s", [0.2, 0.35, 0.5])  # near 1 a handful of keys decides at these lengths
def test_the_exponent_of_gaussian_scores_is_recovered(s):
    # Scores N(0, sigma^2) with sigma^2 = s^2 * 2 ln n: half the mass lies above sigma^2, in n * Q(sigma) keys, whose
    # exponent tends to 1 - s^2 slowly; at these lengths it is what the same line through the exact values says.
    lengths, rows, heads = (512, 1024, 2048, 4096), 48, 4
    g = torch.Generator().manual_seed(1)
    key, value = torch.randn(1, 1, 4096, 64, generator=g), torch.randn(1, 1, 4096, 4, generator=g)
    query = torch.randn(1, heads, 4096, 64, generator=g)
    sigma = s * torch.arange(1, 4097).double().log().mul(2).sqrt()
    query = query / query.norm(dim=-1, keepdim=True) * sigma.float()[:, None]
    log_n, log_k = counted(observed(query, key, value, causal(4096)), lengths, rows, 0.5)
    exact = []
    for n in np.exp(log_n[:, 0]):
        spread = s * math.sqrt(2 * math.log(n))
        exact.append(math.log(n * 0.5 * math.erfc(spread / math.sqrt(2))))
    expected, _ = theil_sen(log_n, np.array(exact)[:, None, None])
    found = fit_power_laws(log_n, log_k, 0.5).C.mean()
    assert found == pytest.approx(float(expected[0, 0]), abs=0.03)
    assert abs(found - (1 - s * s)) < 0.1

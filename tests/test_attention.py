"""Every way of attending in PyTorch and in the kernels for CPUs, against the float64 definitions."""

import itertools

import pytest
import torch
from attention_cases import (
    DESCRIBED,
    KINDS,
    PAGE_KINDS,
    PREFILL,
    TOLERANCE,
    WAYS,
    case_for,
    check,
    decode_case,
    random_case,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import operation, problem_of_case

from nc_patch.ops import rows as torch_rows
from nc_patch.ops.backends import has_numba
from nc_patch.ops.problem import Problem, causal_intervals
from nc_patch.ops.reference import raw_scores
from nc_patch.selections import Block, TopK

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not has_numba(), reason="needs Numba"))]
INSTALLED = ("torch", "cpu") if has_numba() else ("torch",)
EACH = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_random_cases_equal_the_reference(way, dtype):
    for seed in range(50 if dtype == torch.float32 else 12):
        case = case_for(way, seed, dtype)
        expected = case.reference(way)
        for backend, stats in itertools.product(INSTALLED, (True, False)):
            check(way, case, backend, expected=expected, stats=stats)
            if WAYS[way].index == "codes":
                check(way, case, backend, expected=expected, stats=stats, bounds=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", DESCRIBED)
def test_described_cases_equal_the_reference(name):
    shape, way = DESCRIBED[name]
    case = shape.case()
    expected = case.reference(way)
    for backend in INSTALLED:
        check(way, case, backend, expected=expected)


@given(st.integers(0, 10**6), st.integers(0, len(KINDS) - 1), st.integers(0, 5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_topk_chooses_the_references_keys_whatever_they_are_and_codes_bound_the_kept_mass(seed, kind, new):
    case = decode_case(seed)
    pad = -case.query.shape[-1] % 16 if seed % 3 else 0  # whole vectors of codes, or keys themselves
    case.query, case.key = (torch.nn.functional.pad(t, (0, pad)) for t in (case.query, case.key))
    if kind in (1, 5, 6):
        case.query = (case.query * 4).round()
    case.key = KINDS[kind](case.key)
    # What float32 rounds off a large logit; of still larger ones a single key has all of the softmax.
    largest = float((case.scale * raw_scores(problem_of_case(case))).abs().max())
    tolerance = 1e-5 + (5e-7 * largest if largest < 1e5 else 0.0)
    new = min(new, case.query.shape[2], int((case.visible[:, -1, 1] - case.visible[:, 0, 0]).min()))
    expected = case.reference("codes")
    for backend in INSTALLED:
        for bounds in (False, True):
            given = {"new": max(new, 0), "stats": False, "bounds": bounds, "tolerance": tolerance}
            check("codes", case, backend, expected=expected, **given)
        check("drop", case, backend, expected=expected, stats=False, tolerance=tolerance)


@pytest.mark.parametrize("kind", [None, *PAGE_KINDS])
def test_pages_are_chosen_and_attended_as_defined_whatever_the_keys_are(kind):
    for seed in range(80) if kind is None else range(300, 320):
        case = decode_case(seed)
        case.key = case.key if kind is None else kind(case.key)
        given = {"stats": kind is None and seed % 2 == 0, "tolerance": None if kind is None else 1e-4}
        new = seed % 4 if bool((case.origin == 0).all()) else 0
        for backend in INSTALLED:
            check("pages", case, backend, expected=case.reference("pages"), new=new, **given)


@EACH
@pytest.mark.parametrize("way", ["drop", "window", "codes", "pages"])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_the_rows_that_attend_them_and_no_number_is_wrong(way, where, what, backend):
    reached = 0
    for seed in range(12):
        case = case_for(way, seed, longest=60)
        case.softcap = 0.0
        tensor = getattr(case, where)
        tensor[0, 0, tensor.shape[2] // 2, 0] = what
        expected = case.reference(way).output
        output = case.selection(way).run(case.problem(way), backend).output.double()
        reached += bool(expected.isnan().any())
        assert not bool((output.isfinite() & ~expected.isfinite()).any()), seed
        if where == "key" or backend == "torch":
            assert torch.equal(output.isnan(), expected.isnan()), seed
        sound = output.isfinite() & expected.isfinite()
        torch.testing.assert_close(output[sound], expected[sound], atol=1e-4, rtol=1e-5)
    assert reached


@EACH
@pytest.mark.parametrize("way", WAYS)
def test_a_sink_beyond_all_scores_leaves_the_statistics_right(way, backend):
    case = case_for(way, 4)
    case.sinks = torch.full((case.query.shape[1],), 120.0)
    check(way, case, backend)


@pytest.mark.parametrize("way", ["drop", "window", "block"])
def test_many_chunks_equal_one(way, monkeypatch):
    case = random_case(5)
    case.min_mass = 0.91
    whole = case.selection(way).run(problem_of_case(case), "torch")
    monkeypatch.setattr(torch_rows, "SCORES_PER_BLOCK", 64)
    parts = case.selection(way).run(problem_of_case(case), "torch")
    assert relative_error(parts.output, whole.output) < 1e-6
    if way == "block":
        assert torch.equal(parts.attended, whole.attended)
        assert torch.equal(parts.enlarged, whole.enlarged)


@pytest.mark.parametrize("way", PREFILL)
def test_gradients_equal_those_of_the_reference(way):
    for seed in range(16):
        case = case_for(way, seed, longest=90)
        names = [name for name in ("query", "key", "value", "sinks") if getattr(case, name) is not None]
        gradients, weight = [], torch.randn(*case.query.shape[:3], case.value.shape[-1])
        for dtype in (torch.float32, torch.float64):
            leaves = {name: getattr(case, name).detach().to(dtype).requires_grad_() for name in names}
            problem = problem_of_case(case)._replace(**leaves)
            selection = case.selection(way)
            output = (operation(selection, problem) if dtype == torch.float32 else selection.reference(problem)).output
            gradients.append(torch.autograd.grad(output, list(leaves.values()), weight.to(output.dtype)))
        for found, expected in zip(*gradients, strict=True):
            assert relative_error(found, expected) < 1e-4, seed


@EACH
def test_memory_grows_with_keys_and_not_with_queries_times_keys(backend):
    process = pytest.importorskip("psutil").Process()
    n = 6000  # Lq * Lk * heads in float32 would be 288 MB
    query, key = torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
    visible = causal_intervals(1, n, n, "cpu")
    budget = torch.full((1, 1, n), 50, dtype=torch.int32).minimum(visible[..., 1][:, None])
    problem = Problem(query, key, key, visible, visible[..., 0].contiguous(), budget, 0.25)
    before = process.memory_info().rss
    for selection in (TopK(), Block()):
        selection.run(problem, backend)
    assert process.memory_info().rss - before < 150e6

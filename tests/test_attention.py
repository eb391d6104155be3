"""Every way of attending in PyTorch and in the kernels for CPUs, against the float64 definitions."""

import itertools

import pytest
import torch
from attention_cases import DESCRIBED, KINDS, PAGE_KINDS, TOLERANCE, WAYS, check, random_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import problem_of_case

from nc_patch import library
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
def test_random_cases_equal_the_reference(way):
    for seed, dtype in enumerate([*TOLERANCE] * 16):
        case = random_case(seed, 300 if way == "block" else 150, dtype, decode=WAYS[way].index is not None)
        expected = case.reference(way)
        for backend, stats in itertools.product(INSTALLED, (True, False)):
            check(way, case, backend, expected=expected, stats=stats, bounds=WAYS[way].index == "codes" and not stats)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", DESCRIBED)
def test_described_cases_equal_the_reference(name):
    shape, way = DESCRIBED[name]
    case = shape.case()
    expected = case.reference(way)
    for backend in INSTALLED:
        check(way, case, backend, expected=expected)


@given(st.integers(0, 10**6), st.integers(0, len(KINDS) - 1), st.integers(0, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_topk_chooses_the_references_keys_whatever_they_are_and_codes_bound_the_kept_mass(seed, kind, new):
    case = random_case(seed, decode=True)
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
    for seed in range(24):
        case = random_case(seed, decode=True)
        case.key = case.key if kind is None else kind(case.key)
        given = {"stats": kind is None and seed % 2 == 0, "tolerance": None if kind is None else 1e-4}
        new = seed % 4 if bool((case.origin == 0).all()) else 0
        for backend in INSTALLED:
            check("pages", case, backend, expected=case.reference("pages"), new=new, **given)


@pytest.mark.skipif(not has_numba(), reason="needs Numba")
@pytest.mark.parametrize("way", ["drop", "window", "codes", "pages"])
@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_and_inf_reach_the_rows_that_attend_them_and_no_number_is_wrong(way, where):
    """In the compiled kernels, where a value may reach more rows; ``test_fuzz.py`` holds PyTorch to the reference."""
    reached = 0
    for seed, what in enumerate([torch.nan, torch.inf, -torch.inf] * 5):
        case = random_case(seed, 60, decode=WAYS[way].index is not None)
        case.softcap = 0.0
        tensor = getattr(case, where)
        tensor[0, 0, tensor.shape[2] // 2, 0] = what
        expected = case.reference(way).output
        output = case.selection(way).run(case.problem(way), "cpu").output.double()
        reached += bool(expected.isnan().any())
        assert not bool((output.isfinite() & ~expected.isfinite()).any()), seed
        if where == "key":
            assert torch.equal(output.isnan(), expected.isnan()), seed
        sound = output.isfinite() & expected.isfinite()
        torch.testing.assert_close(output[sound], expected[sound], atol=1e-4, rtol=1e-5)
    assert reached


@EACH
@pytest.mark.parametrize("way", WAYS)
def test_a_sink_beyond_all_scores_leaves_the_statistics_right(way, backend):
    case = random_case(4, decode=WAYS[way].index is not None)
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


@pytest.mark.parametrize("way", ["topk", "window", "dense", "block"])
def test_custom_ops_keep_the_contract_of_torch(way):
    for backend in INSTALLED:  # the kernels for CPUs have no gradient, and return what compiled graphs expect
        case = random_case(8, longest=40)
        for t in (case.query, case.key, case.value):
            t.requires_grad_(backend == "torch")
        problem, chosen = problem_of_case(case, stats=True), case.selection(way)
        arguments = (problem.tensors(), *library.arguments(chosen, problem, backend))
        utils = {} if backend == "torch" else {"test_utils": "test_faketensor"}
        torch.library.opcheck(library.operation(chosen, problem, backend), arguments, **utils)


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

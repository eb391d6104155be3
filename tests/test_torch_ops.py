"""The PyTorch operations against the float64 reference: every shape, adversarial values, gradients."""

import pytest
import torch
from attention_cases import Case, random_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import (
    operation,
    problem_of,
    run_blocks,
    selection_of,
    three,
    topk_mask,
    torch_topk_attention,
    torch_window_attention,
)

from nc_patch.ops import rows as torch_rows
from nc_patch.ops.kth_largest import by_partition_, by_topk
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import TopK

SELECTIONS = ("topk", "window", "block")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def run(case: Case, selection: str, want_stats: bool):
    tensors = (case.query, case.key, case.value, case.visible)
    if selection == "block":
        result = run_blocks(case, stats=want_stats)
        return *three(result), result.attended
    function = {"topk": torch_topk_attention, "window": torch_window_attention}[selection]
    output, lse, kept_mass = function(*tensors, case.budget, case.sinks, **case.row_settings(want_stats))
    return output, lse, kept_mass, case.budget.expand(case.query.shape[:3])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_random_cases_equal_the_reference(selection, dtype):
    for seed in range(20 if selection == "block" else 60):
        case = random_case(seed, dtype=dtype, longest=300 if selection == "block" else 150)
        expected = case.reference(selection)
        output, lse, kept_mass, attended = run(case, selection, want_stats=True)
        assert output.dtype == dtype
        assert relative_error(output, expected.output) < TOLERANCE[dtype], seed
        assert torch.allclose(lse.double(), expected.lse, atol=1e-4), seed
        assert torch.allclose(kept_mass.double(), expected.kept_mass, atol=1e-5), seed
        assert torch.equal(attended, expected.attended), seed
        alone, lse, kept_mass, _ = run(case, selection, want_stats=False)
        assert relative_error(alone, output) < TOLERANCE[dtype] / 10, seed
        assert lse.numel() == kept_mass.numel() == 0


@given(st.integers(1000, 10**9), st.sampled_from(SELECTIONS))
@settings(max_examples=60, deadline=None)
def test_more_random_cases(seed, selection):
    case = random_case(seed, longest=120)
    assert relative_error(run(case, selection, want_stats=False)[0], case.reference(selection).output) < 1e-5


@pytest.mark.parametrize("selection", SELECTIONS)
def test_many_row_blocks_equal_one(selection, monkeypatch):
    case = random_case(5, longest=150)
    whole = run(case, selection, want_stats=False)[0]
    monkeypatch.setattr(torch_rows, "SCORES_PER_BLOCK", 64)
    assert relative_error(run(case, selection, want_stats=False)[0], whole) < 1e-6


def revealing_case(keys: torch.Tensor, budget: int, sink_keys: int = 0, recent_keys: int = 0) -> Case:
    """One query head over ``keys [Lk, D]``, with values that reveal which keys are attended."""
    Lk, D = keys.shape
    value = torch.eye(Lk)[None, None]
    query = torch.full((1, 1, 1, D), 0.5)
    visible = torch.tensor([[[0, Lk]]], dtype=torch.int32)
    allowed = torch.tensor([[[budget]]], dtype=torch.int32)
    return Case(
        query, keys[None, None], value, visible, visible[..., 0], allowed, None, 0.01, 0.0, sink_keys, recent_keys
    )


ADVERSARIAL = {
    "all equal": lambda n: torch.ones(n, 4),
    "all zero": lambda n: torch.zeros(n, 4),
    "two values": lambda n: (torch.rand(n, 1) > 0.5).float().expand(n, 4) / 2,
    "one outlier": lambda n: torch.cat(
        (torch.full((n // 2, 4), -1.0), torch.full((1, 4), 900.0), torch.full((n - n // 2 - 1, 4), -1.0))
    ),
    "denormals": lambda n: torch.randint(1, 9, (n, 1)).float().expand(n, 4) * 2.0**-148,
    "neighbouring floats": lambda n: (1 + torch.randint(0, 4, (n, 1)) * 2.0**-22).expand(n, 4).contiguous(),
    "huge": lambda n: torch.randn(n, 4) * 1e30,
    "rising": lambda n: torch.arange(n)[:, None].expand(n, 4) / 8,
    "falling": lambda n: -torch.arange(n)[:, None].expand(n, 4) / 8,
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("budget", [1, 2, 31, 63, 64, 99, 100])
def test_the_attended_set_is_exact_on_adversarial_keys(kind, budget):
    case = revealing_case(ADVERSARIAL[kind](100), budget, sink_keys=2, recent_keys=1)
    scores = (case.query @ case.key.transpose(-1, -2)).float()
    expected = topk_mask(scores, case.visible, case.budget, 2, 1)
    # The weights of attended keys may underflow to zero where scores are huge, so the set is read off the kept scores.
    block = torch_rows.RowBlock(0, 0, 1, 0, 100)
    raw = torch_rows.scores_of(case.query[0], case.key[0], torch_rows.Buffers(100, torch.device("cpu")))
    problem = problem_of(case.query, case.key, case.value, case.visible, case.budget)
    TopK(2, 1).hide_(raw, torch_rows.Rows.of(problem, block), torch_rows.Buffers(100, torch.device("cpu")))
    assert torch.equal(raw > -torch.inf, expected[0])


@pytest.mark.parametrize("algorithm", [by_topk, by_partition_])
def test_thresholds_are_the_kth_largest(algorithm):
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        heads, rows, length = (int(torch.randint(1, n, (1,), generator=g)) for n in (5, 9, 200))
        values = torch.randn(heads, rows, length, generator=g)
        values = values.round() if seed % 3 == 0 else values
        values[torch.rand(values.shape, generator=g) < 0.1 * (seed % 2)] = -torch.inf
        count = torch.randint(0, length + 1, (heads, rows) if seed % 2 else (rows,), generator=g)
        threshold, tied = algorithm(values.clone(), count)
        ordered = values.sort(-1, descending=True).values
        for h in range(heads):
            for r in range(rows):
                k = int(count[h, r] if seed % 2 else count[r])
                if k == 0:
                    assert threshold[h, r] == torch.inf
                    assert not tied[h, r]
                else:
                    assert threshold[h, r] == ordered[h, r, k - 1]
                    assert bool(tied[h, r]) == (k < length and bool(ordered[h, r, k] == ordered[h, r, k - 1]))


def test_thresholds_are_split_over_threads_alike():
    torch.set_num_threads(3)
    values, count = torch.randn(9, 40, 400), torch.randint(0, 401, (40,))
    expected = by_topk(values, count)
    got = by_partition_(values.clone(), count)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("selection", ["topk", "window"])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_reach_only_the_rows_that_attend_them(selection, where, what):
    for seed in range(12):
        case = random_case(seed, longest=60)
        case.softcap = 0.0
        tensor = getattr(case, where)
        tensor[0, 0, tensor.shape[2] // 2, 0] = what
        expected = case.reference(selection).output
        output = run(case, selection, want_stats=False)[0].double()
        assert torch.equal(output.isnan(), expected.isnan()), seed
        assert torch.allclose(output.nan_to_num(), expected.nan_to_num(), atol=1e-4), seed


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_equal_those_of_the_reference(selection):
    for seed in range(12):
        case = random_case(seed, longest=100)
        occupied = case.visible[..., 1] > case.visible[..., 0]
        if not bool(occupied.all()):  # the reference's own gradient is NaN where a row sees nothing
            continue
        inputs = [t for t in (case.query, case.key, case.value, case.sinks) if t is not None]
        mine = [t.clone().requires_grad_() for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        sinks = mine[3] if case.sinks is not None else None
        problem = problem_of(
            *(*mine[:3], case.visible, case.budget, sinks), scale=case.scale, softcap=case.softcap, origin=case.origin
        )
        keys = {"sink_keys": case.sink_keys, "recent_keys": case.recent_keys}
        output = operation(selection_of(selection, **case.block_settings(), **keys), problem).output
        weight = torch.randn_like(output)
        (output * weight).sum().backward()
        case.query, case.key, case.value = exact[:3]
        case.sinks = exact[3] if case.sinks is not None else None
        (case.reference(selection).output * weight.double()).sum().backward()
        for got, expected in zip(mine, exact, strict=True):
            assert relative_error(got.grad, expected.grad) < 1e-4, seed


def test_a_row_that_sees_nothing_has_no_gradient_and_no_nan():
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    visible = causal_intervals(1, 6, 6, "cpu").clone()
    visible[0, :2] = 3
    budget = (visible[..., 1] - visible[..., 0])[:, None].clamp(max=2)
    output = operation(TopK(1, 1, "drop"), problem_of(query, key, value, visible, budget, scale=0.5)).output
    output.sum().backward()
    assert torch.equal(output[:, :, :2], torch.zeros(1, 2, 2, 4))
    assert all(bool(t.grad.isfinite().all()) for t in (query, key, value))
    assert torch.equal(query.grad[:, :, :2], torch.zeros(1, 2, 2, 4))


def test_memory_grows_with_keys_and_not_with_queries_times_keys():
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    n = 6000  # Lq * Lk * heads in float32 would be 288 MB
    query, key = torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16)
    visible = causal_intervals(1, n, n, "cpu")
    budget = torch.full((1, 1, n), 50, dtype=torch.int32).minimum((visible[..., 1])[:, None])
    before = process.memory_info().rss
    torch_topk_attention(
        query, key, key, visible, budget, None, scale=0.25, softcap=0.0, sink_keys=1, recent_keys=1, want_stats=False
    )
    assert process.memory_info().rss - before < 150e6

"""Random calls against the float64 reference: a few in every run, with ``-m wide`` as many as FUZZ_CASES says.

FUZZ_FIRST is the first seed of those. Below, what calls with extreme values once showed.
"""

import os

import fuzz_checks
import pytest
import torch
from attention_cases import HARD, PAGE_KINDS, WAYS, check, random_case
from operations import INSTALLED, INTERPRETED, problem_of_case
from torch.nn.functional import scaled_dot_product_attention

from nc_patch import sparse_attention
from nc_patch.ops.reference import raw_scores

CASES, FIRST = int(os.environ.get("FUZZ_CASES", "2000")), int(os.environ.get("FUZZ_FIRST", "2000000"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", fuzz_checks.KINDS)
def test_random_calls_equal_the_reference(kind):
    said = [fuzz_checks.check(kind, seed) for seed in range(300)]
    assert [each for each in said if each is not None] == []


@pytest.mark.wide
@pytest.mark.parametrize("kind", WAYS if INTERPRETED else fuzz_checks.KINDS)
def test_many_more_random_calls(kind):
    count = CASES * fuzz_checks.KINDS.get(kind, 1) // 1000  # the interpreter takes half a minute for two
    said = [fuzz_checks.check(kind, seed) for seed in range(FIRST, FIRST + count)]
    assert [each for each in said if each is not None] == []


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("forward", lambda run, q, k, v, **options: run(q, k * 1.01, v, **options)),
        ("forward", lambda run, q, k, v, **options: run(q, k, v * 1.01, **options)),
        ("broken", lambda run, q, k, v, **options: run(q, k, v.nan_to_num(0, 0, 0), **options)),
        ("gradient", lambda run, q, k, v, **options: run(q, k, v * 1.1, **options)),
        ("decode", lambda run, q, k, v, **options: run((q[:1, :1, :1, :1].neg_(), q)[1], k, v, **options)),
    ],
    ids=["key", "value", "no number", "gradient", "written"],
)
def test_what_is_wrong_is_noticed(kind, wrong, monkeypatch):
    run = fuzz_checks.sparse_attention
    changed = lambda query, key, value, **options: wrong(run, query, key, value, **options)  # noqa: E731
    monkeypatch.setattr(fuzz_checks, "sparse_attention", changed)
    assert sum(fuzz_checks.check(kind, seed) is not None for seed in range(36)) > 6


@pytest.mark.parametrize("kind", HARD)
def test_topk_chooses_the_references_keys_whatever_they_are_and_codes_bound_the_kept_mass(kind):
    for seed in range(12):
        case = random_case(f"{kind} {seed}", decode=True)
        pad = -case.query.shape[-1] % 16 if seed % 3 else 0  # whole vectors of codes, or keys themselves
        case.query, case.key = (torch.nn.functional.pad(t, (0, pad)) for t in (case.query, case.key))
        if kind in ("all equal", "far from zero", "heavy tails"):
            case.query = (case.query * 4).round()
        case.key = HARD[kind](case.key)
        # What float32 rounds off a large logit; of still larger ones a single key has all of the softmax.
        largest = float((case.scale * raw_scores(problem_of_case(case))).abs().max())
        tolerance = 1e-5 + (5e-7 * largest if largest < 1e5 else 0.0)
        new = min(seed % 6, case.query.shape[2], int((case.visible[:, -1, 1] - case.visible[:, 0, 0]).min()))
        expected = case.reference("codes")
        for backend in INSTALLED:
            given = {"expected": expected, "stats": False, "tolerance": tolerance}
            for bounds in (False, True):
                check("codes", case, backend, new=max(new, 0), bounds=bounds, **given)
            check("drop", case, backend, **given)


@pytest.mark.parametrize("kind", PAGE_KINDS)
def test_pages_are_chosen_and_attended_as_defined_whatever_the_keys_are(kind):
    for seed in range(24):
        case = random_case(seed, decode=True)
        case.key = kind(case.key)
        expected, new = case.reference("pages"), seed % 4 if bool((case.origin == 0).all()) else 0
        for backend in INSTALLED:
            check("pages", case, backend, expected, new, stats=False, tolerance=1e-4)


@pytest.mark.parametrize("selection", ["topk", "window", "block", "dense"])
def test_a_scale_above_one_does_not_overflow_the_query(selection):
    query, key = torch.full((1, 1, 40, 2), 2.0**126), torch.randn(1, 1, 40, 2) * 2.0**-137
    value = torch.randn(1, 1, 40, 4)
    output = sparse_attention(query, key, value, alpha=1.0, C=1.0, selection=selection, scale=2.0**10)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=2.0**10)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("what", [-torch.inf, torch.nan])
def test_a_row_of_blocks_without_a_finite_score_is_no_number(what, stats):
    query, key, value = torch.ones(1, 1, 100, 1), torch.randn(1, 1, 100, 1), torch.randn(1, 1, 100, 4)
    key[:, :, :50] = what
    options = {"selection": "block", "alpha": 1.0, "C": 0.99, "min_keys": 100, "backend": "torch"}
    found = sparse_attention(query, key, value, return_stats=stats, **options)
    output = found.output if stats else found
    assert output[:, :, :50].isnan().all()
    assert output[:, :, 50:].isnan().all() == (what != -torch.inf)

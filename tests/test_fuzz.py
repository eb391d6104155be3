"""Random calls against the float64 reference, within the minutes of a test run; ``scripts/fuzz.py`` goes on for longer.

Seeds that once failed are in ``fuzz_seeds.json``, and what they showed is tested by name below.
"""

import json
from pathlib import Path

import fuzz_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from nc_patch import KeyIndex, sparse_attention

FAILED = json.loads((Path(__file__).parent / "fuzz_seeds.json").read_text(encoding="utf-8"))["failed"]


@pytest.mark.parametrize("kind", fuzz_checks.KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_random_calls_equal_the_reference_or_are_refused_by_name(kind, seed):
    assert fuzz_checks.check(kind, seed) is None


@pytest.mark.parametrize(("kind", "seed", "what"), FAILED, ids=[f"{kind}-{seed}" for kind, seed, _ in FAILED])
def test_seeds_that_once_failed(kind, seed, what):
    assert fuzz_checks.check(kind, seed) is None, what


@pytest.mark.wide
@pytest.mark.parametrize("kind", fuzz_checks.KINDS)
def test_many_more_random_calls(kind):
    for seed in range(2_000_000, 2_000_000 + 2 * fuzz_checks.KINDS[kind]):
        assert fuzz_checks.check(kind, seed) is None


@pytest.mark.parametrize("changed", ["query", "key", "value"])
def test_a_wrong_result_is_noticed(changed, monkeypatch):
    run = fuzz_checks.sparse_attention

    def wrong(query, key, value, **options):
        tensors = {"query": query, "key": key, "value": value}
        tensors[changed] = tensors[changed] * 1.01
        return run(tensors["query"], tensors["key"], tensors["value"], **options)

    monkeypatch.setattr(fuzz_checks, "sparse_attention", wrong)
    noticed = [fuzz_checks.check("moderate", seed) for seed in range(24)]
    assert sum(said is not None for said in noticed) > 6


def test_a_wrong_gradient_and_a_written_input_are_noticed(monkeypatch):
    run = fuzz_checks.sparse_attention
    monkeypatch.setattr(fuzz_checks, "sparse_attention", lambda q, k, v, **o: run(q, k, v * 1.1, **o))
    assert sum(fuzz_checks.check("gradient", seed) is not None for seed in range(12)) > 3

    def writing(query, key, value, **options):
        result = run(query, key, value, **options)
        if query.numel() and not query._is_view():
            query.view(-1)[0] += 1
        return result

    monkeypatch.setattr(fuzz_checks, "sparse_attention", writing)
    assert any("an input was written to" in (fuzz_checks.check("moderate", seed) or "") for seed in range(60))


def test_a_value_that_is_ignored_though_it_is_not_a_number_is_noticed(monkeypatch):
    run = fuzz_checks.sparse_attention
    monkeypatch.setattr(fuzz_checks, "sparse_attention", lambda q, k, v, **o: run(q, k, v.nan_to_num(0, 0, 0), **o))
    noticed = [fuzz_checks.check("broken", seed) for seed in range(24)]
    assert sum(said is not None for said in noticed) > 2


def one_row(scores: list[float], budget: int, **options):
    """Attention of one query over keys with these raw scores, and values that show the weights."""
    key = torch.tensor(scores)[None, None, :, None]
    value = torch.eye(len(scores))[None, None]
    settings_ = {"sink_keys": 0, "recent_keys": 0, "scale": 1.0, "tail": "drop", "backend": "torch"}
    settings_ |= {"dense_below": 0} | options
    return sparse_attention(torch.ones(1, 1, 1, 1), key, value, alpha=budget, **settings_)[0, 0, 0]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_threshold_far_below_the_other_scores_does_not_blur_them(softcap):
    # The fourth best key scores -1e20; next to it the difference between the first three is lost in float32.
    weights = one_row([1.0, 3.0, 2.0, -1e20, -3e20], 4, softcap=softcap)
    scores = torch.tensor([1.0, 3.0, 2.0, -1e20]).double()
    expected = torch.softmax(scores if softcap is None else softcap * torch.tanh(scores / softcap), 0)
    torch.testing.assert_close(weights[:4].double(), expected, atol=1e-6, rtol=1e-5)
    assert weights[4] == 0


@pytest.mark.parametrize("indexed", [False, True], ids=["prefill", "decode"])
def test_scores_below_the_smallest_float32_choose_as_well_as_their_rounding_lets_them(indexed):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, length, 16, generator=generator) for length in (1, 90))
    query = query * 2.0**-143
    value = torch.eye(90)[None, None]
    options = {"index": KeyIndex.build(key, "codes")} if indexed else {}
    options |= {"sink_keys": 0, "recent_keys": 0, "scale": 1.0, "tail": "drop", "backend": "torch", "dense_below": 0}
    attended = sparse_attention(query, key, value, alpha=20.0, C=0.0, **options)[0, 0, 0] > 0
    scores = (query.double() @ key.double().mT)[0, 0, 0]
    assert attended.sum() == 20
    # Every one of the 16 products is rounded to a multiple of the smallest float32.
    assert scores[attended].min() >= scores[~attended].max() - 16 * 2.0**-149


def test_infinite_scores_that_are_soft_capped_are_numbers():
    weights = one_row([torch.inf, 1.0, -torch.inf], 3, softcap=2.0)
    expected = torch.softmax(2.0 * torch.tanh(torch.tensor([torch.inf, 0.5, -torch.inf])), 0)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(one_row([torch.inf, 1.0, -torch.inf], 1, softcap=2.0), torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("selection", ["topk", "window", "block", "dense"])
def test_a_scale_above_one_does_not_overflow_the_query(selection):
    query, key = torch.full((1, 1, 40, 2), 2.0**126), torch.randn(1, 1, 40, 2) * 2.0**-137
    value = torch.randn(1, 1, 40, 4)
    output = sparse_attention(query, key, value, alpha=1.0, C=1.0, selection=selection, scale=2.0**10)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, scale=2.0**10)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_large_max_factor_takes_all_blocks_that_the_mass_needs():
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in range(3))
    options = {"alpha": 1.0, "selection": "block", "min_mass": 0.999999, "return_stats": True, "dense_below": 0}
    result = sparse_attention(query * 0.01, key, value, max_factor=1e300, **options)
    assert torch.equal(result.attended[0, 0], torch.arange(1, 301, dtype=torch.int32))


def test_pages_of_keys_that_all_heads_share_are_attended():
    key, value = (torch.randn(1, 1, 200, 16).expand(1, 3, 200, 16) for _ in range(2))
    query = torch.randn(1, 6, 1, 16)
    options = {"alpha": 40.0, "selection": "block", "block_size": 16, "dense_below": 0}
    shared = sparse_attention(query, key, value, index=KeyIndex.build(key, "pages", block_size=16), **options)
    key, value = key.contiguous(), value.contiguous()
    apart = sparse_attention(query, key, value, index=KeyIndex.build(key, "pages", block_size=16), **options)
    torch.testing.assert_close(shared, apart)


def test_a_row_that_finds_none_of_its_keys_among_the_blocks_is_zero_and_has_no_gradient():
    # The rows' intervals end far apart, so that the second one's keys are not among the first one's blocks.
    tensors = [torch.randn(1, 1, length, 8, requires_grad=True) for length in (2, 200, 200)]
    visible = torch.tensor([[[0, 128], [70, 90]]], dtype=torch.int32)
    options = {"alpha": 1.0, "selection": "block", "query_block_size": 128, "dense_below": 0, "return_stats": True}
    result = sparse_attention(*tensors, visible=visible, origin=torch.zeros(1, 2, dtype=torch.int32), **options)
    assert result.attended[0, 0, 1] == 0
    assert torch.equal(result.output[0, 0, 1], torch.zeros(8))
    result.output.sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in tensors)
    assert torch.equal(tensors[0].grad[0, 0, 1], torch.zeros(8))


@pytest.mark.parametrize("tail", ["drop", "mean"])
@pytest.mark.parametrize("selection", ["topk", "window", "block", "dense"])
def test_no_keys_at_all_give_zeros(selection, tail):
    query, key, value = torch.randn(2, 4, 3, 16), torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 8)
    visible = torch.zeros(2, 3, 2, dtype=torch.int32)
    options = {"alpha": 2.0, "selection": selection, "visible": visible, "tail": tail, "dense_below": 0}
    output = sparse_attention(query, key, value, **options)
    assert torch.equal(output, torch.zeros(2, 4, 3, 8))

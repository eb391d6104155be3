"""The tail of top-k: what is not attended enters by the means of its pages, in every way of running."""

import pytest
import torch
from attention_cases import Case, random_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import implementation, operation, problem_of, problem_of_case, torch_topk_attention
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from nc_patch import KeyIndex, NCConfig, patch_model, sparse_attention
from nc_patch.ops.means import PageMeans, page_means, page_starts
from nc_patch.selections import TopK
from nc_patch.selections.topk.codes import KeyCodes, channel_moments, encode_keys


def tail_case(seed: int, longest: int = 150, dtype: torch.dtype = torch.float32) -> Case:
    """A random case whose rows see intervals of the sequences they belong to: one, padded, or several packed."""
    case = random_case(seed, longest, dtype)
    g = torch.Generator().manual_seed(seed)
    B, Lq, _ = case.visible.shape
    Lk = case.key.shape[2]
    kind = seed % 4
    if kind == 1:  # any interval of one sequence
        first = torch.randint(0, 20, (B, 1), generator=g, dtype=torch.int32).expand(B, Lq)
        case.origin = first.clamp(max=Lk).contiguous()
        case.visible[..., 1] = torch.maximum(case.visible[..., 1], case.origin)
        case.visible[..., 0] = torch.maximum(case.visible[..., 0], case.origin).minimum(case.visible[..., 1])
    elif kind == 2:  # packed sequences
        end = torch.arange(Lk - Lq + 1, Lk + 1, dtype=torch.int32)
        borders = torch.randint(0, Lk, (4,), generator=g, dtype=torch.int32).sort().values
        borders[0] = 0
        start = borders[torch.searchsorted(borders, end - 1, right=True) - 1].to(torch.int32)
        case.visible = torch.stack((start, end), -1).expand(B, -1, -1).contiguous()
        case.origin = case.visible[..., 0].clone()
    else:
        case.origin = torch.zeros(B, Lq, dtype=torch.int32)
    n = (case.visible[..., 1] - case.visible[..., 0])[:, None]
    share = torch.rand(case.budget.shape, generator=g)
    case.budget = (share * share * (n + 1)).floor().clamp(min=1).minimum(n).to(torch.int32)
    return case


def means_of(case: Case) -> PageMeans:
    return page_means(case.key, case.value, page_starts(case.visible, case.origin, case.key.shape[2]))


def attend(case: Case, want_stats: bool = True):
    return torch_topk_attention(
        *(case.query, case.key, case.value, case.visible, case.budget, case.sinks),
        **case.row_settings(want_stats),
        tail=means_of(case),
        origin=case.origin,
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_random_cases_equal_the_reference(dtype, tolerance):
    for seed in range(60):
        case = tail_case(seed, dtype=dtype)
        expected = case.reference("topk", tail=True)
        output, lse, kept_mass = attend(case)
        assert output.dtype == dtype
        assert relative_error(output, expected.output) < tolerance, seed
        assert torch.allclose(lse.double(), expected.lse, atol=1e-4 if dtype == torch.float32 else 1e-2), seed
        assert torch.allclose(kept_mass.double(), expected.kept_mass, atol=1e-5), seed


@given(st.integers(1000, 10**9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_more_random_cases(seed):
    case = tail_case(seed)
    assert relative_error(attend(case, False)[0], case.reference("topk", tail=True).output) < 1e-5


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decoding_by_codes_equals_the_reference(seed):
    case = tail_case(seed)
    case.query, case.visible = case.query[:, :, -5:], case.visible[:, -5:].contiguous()
    case.budget, case.origin = case.budget[..., -5:].contiguous(), case.origin[:, -5:].contiguous()
    center, spread = channel_moments(case.key, case.visible[:, -1, 0], case.visible[:, -1, 1])
    codes = KeyCodes(*encode_keys(case.key, center, spread), center, spread)
    problem = problem_of_case(case, means=means_of(case), key_index=tuple(codes))
    output, lse, _ = implementation(TopK(case.sink_keys, case.recent_keys), problem)
    expected = case.reference("topk", tail=True)
    assert relative_error(output, expected.output) < 1e-5
    assert torch.allclose(lse.double(), expected.lse, atol=1e-4)


def test_a_page_whose_keys_are_equal_is_not_missed():
    """Keys and values that are constant over pages are approximated without an error, however few are attended."""
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 9, 8, generator=g).repeat_interleave(16, 2) for _ in range(2))
    query = torch.randn(1, 4, 144, 8, generator=g)
    visible = torch.stack((torch.zeros(144), torch.arange(1, 145)), -1).int()[None]
    budget = (visible[..., 1] - (visible[..., 1] - 1) // 16 * 16)[:, None]  # no more than the own page
    rows = torch.arange(144) % 16 == 15  # the others' own page is cut
    case = Case(query, key, value, visible, visible[..., 0], budget, None, 0.5, 0.0, 0, 16)
    dense, sparse = case.reference("dense").output, attend(case)[0]
    dropped = case.reference("topk").output
    assert relative_error(sparse[:, :, rows], dense[:, :, rows]) < 1e-6
    assert relative_error(dropped[:, :, rows], dense[:, :, rows]) > 0.1


def test_pages_of_packed_sequences_lie_in_slots_of_their_own():
    origin = torch.tensor([[0] * 20 + [20] * 33 + [53] * 40], dtype=torch.int32)
    end = torch.arange(1, 94, dtype=torch.int32)[None]
    starts = page_starts(torch.stack((origin, end), -1), origin, 93)
    assert starts.tolist() == [[0, 20, 36, 53, 69, -1, -1]]
    negative = torch.full_like(origin, -5)  # a sequence whose first five keys are gone
    starts = page_starts(torch.stack((torch.zeros_like(end), end), -1), negative, 93)
    assert starts.tolist() == [[11, 27, 43, 59, 75, -1, -1]]


def test_prefill_chunks_and_single_tokens_score_alike():
    model = patch_model(tiny_model("llama"), 1.0, 0.6, tail="mean", selection="topk")
    ids = random_ids(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 21:]).logits
        torch.testing.assert_close(whole[1:, 21:], alone, atol=2e-5, rtol=0)
        for pieces in ([90], [50, 40], [64, *[1] * 26], [70, 9, 1, 10]):
            cache, done, logits = DynamicCache(), 0, []
            for piece in pieces:
                part = model(ids[:, done : done + piece], attention_mask=mask[:, : done + piece], past_key_values=cache)
                logits.append(part.logits)
                done += piece
            assert list(cache.layers[0].nc_indexes) == ["codes", "means"]
            torch.testing.assert_close(torch.cat(logits, 1)[mask == 1], whole[mask == 1], atol=2e-5, rtol=0)


def test_an_index_of_means_changes_no_result():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16, generator=g) for heads, length in ((4, 3), (2, 77), (2, 77)))
    options = {"alpha": 1.0, "C": 0.5, "tail": "mean"}
    plain = sparse_attention(query, key, value, **options)
    means, codes = KeyIndex.build(key, "means", value=value), KeyIndex.build(key, "codes")
    assert relative_error(sparse_attention(query, key, value, means=means, **options), plain) < 1e-6
    both = sparse_attention(query, key, value, means=means, index=codes, return_kept_mass="bounds", **options)
    assert relative_error(both.output, plain) < 1e-5
    assert torch.equal(sparse_attention(query, key, value, alpha=1.0, C=0.5), plain)
    assert relative_error(sparse_attention(query, key, value, alpha=1.0, C=0.5, tail="drop"), plain) > 1e-2
    # There is room for a multiple of 128 keys; and the origins.
    assert means.nbytes() * 16 <= (key.nbytes + value.nbytes) * 128 / 77 + 16 * 8


def test_a_full_budget_is_dense():
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 80, 16, generator=g) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    output = sparse_attention(query, key, value, alpha=80.0, C=0.0, tail="mean")
    assert relative_error(output, dense) < 1e-5


def test_what_a_tail_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="tail must be one of 'mean', 'drop', got 'none'"):
        NCConfig(2.0, 0.5, tail="none")
    sliding = torch.tensor([[[0, 4], [1, 5], [2, 6]]], dtype=torch.int32)
    rows = torch.randn(1, 2, 6, 8)
    with pytest.raises(
        ValueError, match=r"the interval \[0, 4\] in sequence 0 of the batch, which reaches from 0 to 1"
    ):
        sparse_attention(rows[:, :, :3], rows, rows, alpha=1.0, C=0.5, visible=sliding)
    sparse_attention(rows[:, :, :3], rows, rows, alpha=1.0, C=0.5, visible=sliding, origin=sliding[..., 0] * 0)
    query = torch.randn(1, 2, 40, 8)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"needs the values \[1, 2, 40, \'Dv\'\] of the keys, got none"):
            KeyIndex.build(query, "means")
        means = KeyIndex.build(query, "means", value=query)
        with pytest.raises(ValueError, match=r'"means" for one with tail="mean"; got "means" for TopK.*drop'):
            sparse_attention(query[:, :, -1:], query, query, alpha=1.0, C=0.5, means=means, tail="drop")


def test_gradients_are_those_of_the_reference():
    for seed in range(24):
        case = tail_case(seed, longest=90)
        inputs = [case.query, case.key, case.value] + ([] if case.sinks is None else [case.sinks])
        grad = torch.randn(*case.query.shape[:3], case.value.shape[-1])
        found = []
        for double in (False, True):
            leaves = [(t.double() if double else t).clone().requires_grad_() for t in inputs]
            case.query, case.key, case.value = leaves[:3]
            case.sinks = leaves[3] if len(leaves) > 3 else None
            if double:
                output = case.reference("topk", tail=True).output
            else:
                tensors = (case.query, case.key, case.value, case.visible, case.budget, case.sinks)
                settings = {"scale": case.scale, "softcap": case.softcap, "origin": case.origin}
                chosen = TopK(case.sink_keys, case.recent_keys, "mean")
                output = operation(chosen, problem_of(*tensors, **settings)).output
            found.append(torch.autograd.grad(output, leaves, grad.to(output.dtype)))
        for result, expected in zip(*found, strict=True):
            assert relative_error(result, expected) < 1e-4, seed

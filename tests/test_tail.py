"""The tail of top-k: what is not attended enters by the means of its pages, however a call runs."""

import pytest
import torch
from attention_cases import Case, relative_error
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from nc_patch import KeyIndex, NCConfig, patch_model, sparse_attention
from nc_patch.ops.means import page_starts


def test_a_page_whose_keys_are_equal_is_not_missed():
    """Keys and values that are constant over pages are approximated without an error, however few are attended."""
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 9, 8, generator=g).repeat_interleave(16, 2) for _ in range(2))
    query = torch.randn(1, 4, 144, 8, generator=g)
    visible = torch.stack((torch.zeros(144), torch.arange(1, 145)), -1).int()[None]
    budget = (visible[..., 1] - (visible[..., 1] - 1) // 16 * 16)[:, None]  # no more than the own page
    rows = torch.arange(144) % 16 == 15  # the others' own page is cut
    case = Case(query, key, value, visible, visible[..., 0], budget, None, 0.5, 0.0, 0, 16)
    dense, dropped = case.reference("dense").output, case.reference("drop").output
    sparse = case.selection("topk").run(case.problem("topk"), "torch").output
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
        means = KeyIndex.build(query, "means", value=query)
        with pytest.raises(ValueError, match=r'"means" for one with tail="mean"; got "means" for TopK.*drop'):
            sparse_attention(query[:, :, -1:], query, query, alpha=1.0, C=0.5, means=means, tail="drop")

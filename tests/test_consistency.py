"""A sequence scores the same alone, in a padded batch, packed, prefilled in chunks, and decoded token by token."""

import itertools

import pytest
import torch
from tiny_models import FAMILIES, NOT_PACKED_WHEN_DENSE, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from nc_patch import patch_model

LENGTH, PADDING = 150, 20


def logits_in_pieces(model, ids, cuts, cache):
    pieces = [model(ids[:, first:last], past_key_values=cache).logits[0] for first, last in itertools.pairwise(cuts)]
    return torch.cat(pieces)


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_scores_the_same_however_it_is_run(family, selection):
    model = patch_model(tiny_model(family), 2.0, 0.6, selection=selection, block_size=16)
    ids, other = random_ids(1, LENGTH), random_ids(1, LENGTH + PADDING)
    same = lambda result: torch.testing.assert_close(result, alone, atol=1e-5, rtol=0)  # noqa: E731
    with torch.inference_mode():
        alone = model(ids).logits[0]

        batch = torch.cat((torch.cat((torch.zeros(1, PADDING, dtype=torch.long), ids), 1), other))
        padding = torch.ones_like(batch)
        padding[0, :PADDING] = 0
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        same(model(batch, attention_mask=padding, position_ids=positions).logits[0, PADDING:])

        positions = torch.cat((torch.arange(LENGTH + PADDING), torch.arange(LENGTH)))[None]
        packed = model(torch.cat((other, ids), 1), position_ids=positions, use_cache=False).logits
        same(packed[0, LENGTH + PADDING :])

        # Blocks are chosen by whole query blocks, so that a prompt may be cut at their borders.
        cuts = [0, 64, 128, LENGTH] if selection == "block" else [0, 37, 38, 90, LENGTH]
        same(logits_in_pieces(model, ids, cuts, DynamicCache(config=model.config)))
        same(logits_in_pieces(model, ids, cuts, StaticCache(config=model.config, max_cache_len=LENGTH + 30)))
        if selection != "block":  # decoding chooses blocks for itself
            same(logits_in_pieces(model, ids, list(range(LENGTH + 1)), DynamicCache(config=model.config)))


def test_a_family_that_is_packed_here_alone_is_not_when_dense():
    ids, other = random_ids(1, 30), random_ids(1, 40)
    positions = torch.cat((torch.arange(40), torch.arange(30)))[None]
    for family in NOT_PACKED_WHEN_DENSE:
        model = tiny_model(family)
        with torch.inference_mode():
            packed = model(torch.cat((other, ids), 1), position_ids=positions, use_cache=False).logits[0, 40:]
            assert not torch.allclose(packed, model(ids).logits[0], atol=1e-3)


def test_neighbours_in_a_batch_do_not_change_a_row():
    model = patch_model(tiny_model("llama"), 2.0, 0.6, selection="topk")
    ids = random_ids(3, 60)
    with torch.inference_mode():
        together = model(ids).logits
        for row in range(3):
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=0)

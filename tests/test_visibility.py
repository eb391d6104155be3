"""Visible intervals equal the masks that transformers itself would build, for every kind it composes."""

import pytest
import torch
from transformers import masking_utils as mu

from nc_patch import UnsupportedMaskError, visibility
from nc_patch.ops.reference import visible_mask
from nc_patch.visibility import Visibility, interval_mask, is_bidirectional, is_plain_causal

LENGTH = 40
SEQUENCES = (3, 17, 20)  # lengths of packed sequences
PACKED_POSITIONS = torch.cat([torch.arange(n) for n in SEQUENCES])[None]


def packed(mask_function):
    ids = mu.find_packed_sequence_indices(PACKED_POSITIONS)
    if hasattr(mu, "packed_sequence_compatibility_function"):
        return mu.packed_sequence_compatibility_function(mask_function, PACKED_POSITIONS, ids)
    return mu.and_masks(mask_function, mu.packed_sequence_mask_function(ids))


NO_PADDING = torch.zeros(1, dtype=torch.long)
KINDS = {
    "causal": (mu.causal_mask_function, None),
    "sliding": (mu.sliding_window_causal_mask_function(7), 7),
    "chunked": (mu.chunked_causal_mask_function(8, NO_PADDING), 8),
    "packed": (packed(mu.causal_mask_function), None),
    "packed sliding": (packed(mu.sliding_window_causal_mask_function(7)), 7),
    "packed chunked": (packed(mu.chunked_causal_mask_function(8, NO_PADDING)), 8),
}


def expected(mask_function, q_length, kv_length, q_offset, kv_offset, padding, batch):
    return mu.sdpa_mask(
        batch, q_length, kv_length, q_offset, kv_offset, mask_function, padding, allow_is_causal_skip=False
    )[:, :1]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequence(kind):
    mask_function, local = KINDS[kind]
    packed_mask = interval_mask(1, LENGTH, LENGTH, mask_function=mask_function, local_size=local)
    visible, _ = Visibility.unpack(packed_mask)
    assert torch.equal(visible_mask(visible, LENGTH), expected(mask_function, LENGTH, LENGTH, 0, 0, None, 1))


@pytest.mark.parametrize("kind", ["causal", "sliding"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"), [(5, 40, 35, 0), (1, 40, 39, 0), (4, 12, 30, 22)]
)
def test_against_a_cache(kind, q_length, kv_length, q_offset, kv_offset):
    mask_function, local = KINDS[kind]
    packed_mask = interval_mask(2, q_length, kv_length, q_offset, kv_offset, mask_function, local_size=local)
    visible, _ = Visibility.unpack(packed_mask)
    assert torch.equal(
        visible_mask(visible, kv_length), expected(mask_function, q_length, kv_length, q_offset, kv_offset, None, 2)
    )


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_static_cache_longer_than_what_was_written(kind):
    mask_function, local = KINDS[kind]
    packed_mask = interval_mask(1, 3, 64, torch.tensor(10), 0, mask_function, local_size=local)
    visible, _ = Visibility.unpack(packed_mask)
    assert visible[..., 1].tolist() == [[11, 12, 13]]
    assert torch.equal(visible_mask(visible, 64), expected(mask_function, 3, 64, 10, 0, None, 1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_padding(kind, side):
    mask_function, local = KINDS[kind]
    padding = torch.ones(3, LENGTH, dtype=torch.bool)
    for row, count in enumerate((0, 9, 31)):
        padding[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = False
    visible, origin = Visibility.unpack(
        interval_mask(3, LENGTH, LENGTH, mask_function=mask_function, attention_mask=padding, local_size=local)
    )
    mask = expected(mask_function, LENGTH, LENGTH, 0, 0, padding, 3)
    tokens = padding[:, None, :, None]
    assert torch.equal(visible_mask(visible, LENGTH), mask & tokens), "a padding query sees nothing, others as in SDPA"
    first = padding.int().argmax(-1)
    assert torch.equal(origin[padding], first[:, None].expand(3, LENGTH)[padding].int())


def test_chunks_are_counted_from_the_first_token_of_a_left_padded_row():
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :5] = False
    mask_function = mu.chunked_causal_mask_function(8, torch.tensor([0, 5]))
    visible, _ = Visibility.unpack(
        interval_mask(2, LENGTH, LENGTH, mask_function=mask_function, attention_mask=padding)
    )
    mask = expected(mask_function, LENGTH, LENGTH, 0, 0, padding, 2)
    assert torch.equal(visible_mask(visible, LENGTH), mask & padding[:, None, :, None])


def test_origins_of_packed_sequences():
    _, origin = Visibility.unpack(interval_mask(1, LENGTH, LENGTH, mask_function=KINDS["packed sliding"][0]))
    assert origin.tolist() == [[0] * 3 + [3] * 17 + [20] * 20]


def test_origin_of_a_cache_that_dropped_its_first_keys_is_negative():
    _, origin = Visibility.unpack(interval_mask(1, 1, 7, 30, 24, KINDS["sliding"][0], local_size=7))
    assert origin.tolist() == [[-24]]


def test_a_mask_handed_in_again_is_returned_as_it_is():
    mask = interval_mask(2, 5, 5)
    assert interval_mask(2, 5, 5, attention_mask=mask) is mask


@pytest.mark.parametrize("kind", KINDS)
def test_bisection_while_compiling_finds_the_same_starts(kind, monkeypatch):
    mask_function, local = KINDS[kind]
    plain = Visibility.unpack(interval_mask(1, LENGTH, LENGTH, mask_function=mask_function, local_size=local))
    monkeypatch.setattr(visibility.torch.compiler, "is_compiling", lambda: True)
    probed = Visibility.unpack(interval_mask(1, LENGTH, LENGTH, mask_function=mask_function, local_size=local))
    assert torch.equal(plain.visible, probed.visible)
    if kind in ("causal", "packed"):
        assert torch.equal(plain.origin, probed.origin)


@pytest.mark.parametrize(
    ("mask_function", "name"),
    [
        (mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(torch.zeros(1, 40))), "or_mask"),
        (mu.sliding_window_bidirectional_mask_function(4), "inner_mask"),
        (mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: k % 2 == 0), "lambda"),
        (mu.sliding_window_overlay(4), "not causal"),
    ],
)
def test_masks_that_are_not_causal_intervals_are_refused_by_name(mask_function, name):
    with pytest.raises(UnsupportedMaskError, match=name):
        interval_mask(1, LENGTH, LENGTH, mask_function=mask_function)


def test_the_mask_of_cross_attention_holds_every_key_that_is_no_padding_and_is_marked():
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    packed = interval_mask(3, 2, 4, mask_function=mu.bidirectional_mask_function, attention_mask=padding)
    assert packed[:, 0, :, :2].tolist() == [[[0, 4]] * 2, [[1, 3]] * 2, [[0, 0]] * 2]
    assert is_bidirectional(packed)
    assert not is_bidirectional(interval_mask(3, 4, 4))
    padding[0, 1] = False
    with pytest.raises(UnsupportedMaskError, match="holes"):
        interval_mask(3, 2, 4, mask_function=mu.bidirectional_mask_function, attention_mask=padding)


def test_custom_masks_are_refused_while_compiling(monkeypatch):
    monkeypatch.setattr(visibility.torch.compiler, "is_compiling", lambda: True)
    for mask_function, custom in (
        (mu.or_masks(mu.causal_mask_function), False),
        (mu.and_masks(mu.causal_mask_function), True),
    ):
        with pytest.raises(UnsupportedMaskError, match="not one interval"):
            interval_mask(1, 4, 4, mask_function=mask_function, use_vmap=custom)


def test_padding_with_holes_is_refused():
    padding = torch.ones(1, 6, dtype=torch.bool)
    padding[0, 3] = False
    with pytest.raises(UnsupportedMaskError, match="holes"):
        interval_mask(1, 6, 6, attention_mask=padding)


def test_plain_causal_is_told_from_the_rest():
    assert is_plain_causal(interval_mask(2, 5, 9, 4), 9)
    assert not is_plain_causal(interval_mask(2, 5, 12, 4), 12)
    padding = torch.ones(2, 5, dtype=torch.bool)
    assert is_plain_causal(interval_mask(2, 5, 5, attention_mask=padding), 5)
    padding[1, 0] = False
    assert not is_plain_causal(interval_mask(2, 5, 5, attention_mask=padding), 5)

"""Visible intervals equal the masks that transformers itself would build, for every kind it composes."""

import pytest
import torch
from transformers import masking_utils as mu

from nc_patch import UnsupportedMaskError, masks
from nc_patch.masks import interval_mask
from nc_patch.ops.problem import visible_mask
from nc_patch.visibility import Visibility, is_bidirectional, is_packed, is_plain_causal, visibility_of

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
    visible = Visibility.unpack(packed_mask, LENGTH, LENGTH).visible
    assert torch.equal(visible_mask(visible, LENGTH), expected(mask_function, LENGTH, LENGTH, 0, 0, None, 1))


@pytest.mark.parametrize("kind", ["causal", "sliding"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"), [(5, 40, 35, 0), (1, 40, 39, 0), (4, 12, 30, 22)]
)
def test_against_a_cache(kind, q_length, kv_length, q_offset, kv_offset):
    mask_function, local = KINDS[kind]
    packed_mask = interval_mask(2, q_length, kv_length, q_offset, kv_offset, mask_function, local_size=local)
    visible = Visibility.unpack(packed_mask, q_length, kv_length).visible
    assert torch.equal(
        visible_mask(visible, kv_length), expected(mask_function, q_length, kv_length, q_offset, kv_offset, None, 2)
    )


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_static_cache_longer_than_what_was_written(kind):
    mask_function, local = KINDS[kind]
    packed_mask = interval_mask(1, 3, 64, torch.tensor(10), 0, mask_function, local_size=local)
    visible = Visibility.unpack(packed_mask, 3, 64).visible
    assert visible[..., 1].tolist() == [[11, 12, 13]]
    assert torch.equal(visible_mask(visible, 64), expected(mask_function, 3, 64, 10, 0, None, 1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_padding(kind, side):
    mask_function, local = KINDS[kind]
    padding = torch.ones(3, LENGTH, dtype=torch.bool)
    for row, count in enumerate((0, 9, 31)):
        padding[row, slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)] = False
    visible, origin, order = Visibility.unpack(
        interval_mask(3, LENGTH, LENGTH, mask_function=mask_function, attention_mask=padding, local_size=local),
        *(LENGTH, LENGTH),
    )
    assert order is None
    mask = expected(mask_function, LENGTH, LENGTH, 0, 0, padding, 3)
    tokens = padding[:, None, :, None]
    assert torch.equal(visible_mask(visible, LENGTH), mask & tokens), "a padding query sees nothing, others as in SDPA"
    first = padding.int().argmax(-1)
    assert torch.equal(origin[padding], first[:, None].expand(3, LENGTH)[padding].int())


def test_chunks_are_counted_from_the_first_token_of_a_left_padded_row():
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :5] = False
    mask_function = mu.chunked_causal_mask_function(8, torch.tensor([0, 5]))
    packed_mask = interval_mask(2, LENGTH, LENGTH, mask_function=mask_function, attention_mask=padding)
    visible = Visibility.unpack(packed_mask, LENGTH, LENGTH).visible
    mask = expected(mask_function, LENGTH, LENGTH, 0, 0, padding, 2)
    assert torch.equal(visible_mask(visible, LENGTH), mask & padding[:, None, :, None])


def test_origins_of_packed_sequences():
    packed_mask = interval_mask(1, LENGTH, LENGTH, mask_function=KINDS["packed sliding"][0])
    origin = Visibility.unpack(packed_mask, LENGTH, LENGTH).origin
    assert origin.tolist() == [[0] * 3 + [3] * 17 + [20] * 20]


def test_origin_of_a_cache_that_dropped_its_first_keys_is_negative():
    origin = Visibility.unpack(interval_mask(1, 1, 7, 30, 24, KINDS["sliding"][0], local_size=7), 1, 7).origin
    assert origin.tolist() == [[-24]]


def test_a_mask_handed_in_again_is_returned_as_it_is():
    mask = interval_mask(2, 5, 5)
    assert interval_mask(2, 5, 5, attention_mask=mask) is mask


@pytest.mark.parametrize("kind", KINDS)
def test_bisection_while_compiling_finds_the_same_starts(kind, monkeypatch):
    mask_function, local = KINDS[kind]
    make = lambda: interval_mask(1, LENGTH, LENGTH, mask_function=mask_function, local_size=local)  # noqa: E731
    plain = Visibility.unpack(make(), LENGTH, LENGTH)
    monkeypatch.setattr(masks.torch.compiler, "is_compiling", lambda: True)
    probed = Visibility.unpack(make(), LENGTH, LENGTH)
    assert torch.equal(plain.visible, probed.visible)
    if kind in ("causal", "packed"):
        assert torch.equal(plain.origin, probed.origin)


IMAGES = torch.full((1, LENGTH), -1)
IMAGES[0, 5:12], IMAGES[0, 20:31] = 0, 1
BLOCKWISE = mu.blockwise_overlay(IMAGES)
PARTED = torch.where(IMAGES == 1, 0, IMAGES)


@pytest.mark.parametrize(
    "mask_function",
    [
        pytest.param(mu.or_masks(mu.causal_mask_function, BLOCKWISE), id="images"),
        pytest.param(
            mu.and_masks(mu.or_masks(mu.causal_mask_function, BLOCKWISE), mu.sliding_window_overlay(9)), id="sliding"
        ),
        pytest.param(mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: k < 13), id="prefix"),
        pytest.param(mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: k % 2 == 0), id="every second key"),
        pytest.param(mu.sliding_window_overlay(4), id="no end"),
        pytest.param(mu.sliding_window_bidirectional_mask_function(4), id="both ways"),
    ],
)
@pytest.mark.parametrize("left", [0, 6])
@pytest.mark.parametrize("elements", [50, 1 << 20])
def test_whatever_lets_a_query_see_one_run_of_the_keys_is_taken(mask_function, left, elements, monkeypatch):
    monkeypatch.setattr(masks, "_ELEMENTS_AT_ONCE", elements)
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[:, :left] = False
    found = Visibility.unpack(
        interval_mask(1, LENGTH, LENGTH, mask_function=mask_function, attention_mask=padding), LENGTH, LENGTH
    )
    mask = expected(mask_function, LENGTH, LENGTH, 0, 0, padding, 1) & padding[:, None, :, None]
    order = torch.arange(LENGTH)[None] if found.order is None else found.order.long()
    assert torch.equal(visible_mask(found.visible, LENGTH), mask.take_along_dim(order[:, None, None], 3))
    assert bool((found.origin[padding] <= found.visible[padding][:, 0]).all())


@pytest.mark.parametrize(
    ("mask_function", "name"),
    [
        (mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(PARTED)), "or_mask"),
        (mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0), "and_mask"),
    ],
)
def test_a_mask_of_several_runs_becomes_what_sdpa_takes_and_is_refused_by_name(mask_function, name):
    mask = interval_mask(1, LENGTH, LENGTH, mask_function=mask_function)
    assert torch.equal(mask, expected(mask_function, LENGTH, LENGTH, 0, 0, None, 1))
    with pytest.raises(UnsupportedMaskError, match=rf"Layer got a custom.*{name}.*several runs of keys"):
        visibility_of(mask, 1, LENGTH, LENGTH, "Layer")


def test_masks_of_four_dimensions_are_taken_where_every_row_is_one_run_and_refused_with_the_reason_otherwise():
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    for mask in (causal, added, causal.expand(2, 3, 6, 6), torch.where(causal, 0.0, -torch.inf).bfloat16()):
        found = visibility_of(mask, 2, 6, 6, "Layer")
        assert found.order is None
        assert torch.equal(visible_mask(found.visible, 6), causal.expand(2, 1, 6, 6))
    by_head, biased, unknown = causal.repeat(1, 2, 1, 1), added.clone(), added.clone()
    by_head[0, 1, 5, 0], biased[0, 0, 3, 1], unknown[0, 0, 3, 1] = False, 0.5, torch.nan
    for mask, why in (
        (causal.int(), "should be bool"),
        (by_head, "from head to head"),
        (biased, "adds to scores"),
        (unknown, "adds to scores"),
        (added.clone().requires_grad_(), "requires a gradient"),
        (causal[..., :5], r"should be \[2, 1, 6, 6\]"),
    ):
        with pytest.raises(UnsupportedMaskError, match=why):
            visibility_of(mask, 2, 6, 6, "Layer")


def test_documents_of_a_mask_of_four_dimensions_begin_where_their_rows_do():
    mask = expected(KINDS["packed"][0], LENGTH, LENGTH, 0, 0, None, 1)
    found = visibility_of(mask, 1, LENGTH, LENGTH, "Layer")
    assert found.origin.tolist() == [[0] * 3 + [3] * 17 + [20] * 20]
    assert torch.equal(visible_mask(found.visible, LENGTH), mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("keys", [3, 4])
def test_no_mask_of_the_callers_is_taken_for_packed_intervals(dtype, keys):
    assert not is_packed(torch.ones(1, 1, keys, keys).tril().to(dtype))
    assert is_packed(interval_mask(1, keys, keys))


def test_packed_intervals_of_another_call_are_refused():
    for made, called in ((30, 20), (20, 30)):
        with pytest.raises(UnsupportedMaskError, match=f"another call than one of {called} queries"):
            visibility_of(interval_mask(1, made, called), 1, called, called, "Layer")


def test_a_mask_of_four_dimensions_with_padding_leaves_keys_where_they_lie():
    padding = torch.arange(20) >= 5
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & padding & padding[:, None]
    found = visibility_of(mask[None, None], 1, 20, 20, "Layer")
    assert found.order is None
    assert found.visible[0, 5:].tolist() == [[5, end] for end in range(6, 21)]


@pytest.mark.parametrize("kind", ["causal", "sliding"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"),
    [(LENGTH, LENGTH, 0, 0), (5, LENGTH, 35, 0), (1, LENGTH, 39, 0), (4, 12, 36, 28), (3, 64, 37, 0)],
)
def test_padding_with_holes_leaves_the_keys_that_are_tokens(kind, q_length, kv_length, q_offset, kv_offset):
    mask_function, local = KINDS[kind]
    padding = torch.ones(4, LENGTH, dtype=torch.bool)
    padding[0, 7:20], padding[1, [0, 1, 2, 15, 33, 36]], padding[2, :30:2] = False, False, False
    found = Visibility.unpack(
        interval_mask(4, q_length, kv_length, q_offset, kv_offset, mask_function, padding, local_size=local),
        *(q_length, kv_length),
    )
    mask = expected(mask_function, q_length, kv_length, q_offset, kv_offset, padding, 4)
    is_token = padding[:, q_offset : q_offset + q_length]
    order = found.order[:, None, None].long()
    assert torch.equal(
        visible_mask(found.visible, kv_length), (mask & is_token[:, None, :, None]).take_along_dim(order, 3)
    )
    first = padding.int().argmax(-1, keepdim=True)
    dropped = padding[:, :kv_offset].sum(-1, keepdim=True)
    assert torch.equal(
        found.origin[is_token], (padding.cumsum(-1).gather(1, first) - 1 - dropped).expand_as(is_token)[is_token].int()
    )


def test_the_mask_of_cross_attention_holds_every_key_that_is_no_padding_and_is_marked():
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    packed = interval_mask(3, 2, 4, mask_function=mu.bidirectional_mask_function, attention_mask=padding)
    assert packed.view(torch.int32)[:, 0, :, :2].tolist() == [[[0, 4]] * 2, [[1, 3]] * 2, [[0, 0]] * 2]
    assert is_bidirectional(packed)
    assert not is_bidirectional(interval_mask(3, 4, 4))
    padding[0, 1] = False
    mask = interval_mask(3, 2, 4, mask_function=mu.bidirectional_mask_function, attention_mask=padding)
    assert torch.equal(mask, padding[:, None, None].expand(3, 1, 2, 4))


def test_custom_masks_are_refused_while_compiling(monkeypatch):
    monkeypatch.setattr(masks.torch.compiler, "is_compiling", lambda: True)
    for mask_function, custom in (
        (mu.or_masks(mu.causal_mask_function), False),
        (mu.and_masks(mu.causal_mask_function), True),
    ):
        with pytest.raises(UnsupportedMaskError, match="cannot be looked at while"):
            interval_mask(1, 4, 4, mask_function=mask_function, use_vmap=custom)


def test_plain_causal_is_told_from_the_rest():
    plain = lambda mask, lengths: is_plain_causal(Visibility.unpack(mask, *lengths).visible, lengths[1])  # noqa: E731
    assert plain(interval_mask(2, 5, 9, 4), (5, 9))
    assert not plain(interval_mask(2, 5, 12, 4), (5, 12))
    padding = torch.ones(2, 5, dtype=torch.bool)
    assert plain(interval_mask(2, 5, 5, attention_mask=padding), (5, 5))
    padding[1, 0] = False
    assert not plain(interval_mask(2, 5, 5, attention_mask=padding), (5, 5))

"""Visible intervals equal the masks that transformers itself would build, for every kind it composes."""

import pytest
import torch
from transformers import masking_utils as mu

from nc_patch import UnsupportedMaskError, masks
from nc_patch.masks import interval_mask
from nc_patch.ops.problem import visible_mask
from nc_patch.visibility import Visibility, visibility_of

LENGTH = 40
SEQUENCES = (3, 17, 20)  # lengths of packed sequences
BEGINS = [[0] * 3 + [3] * 17 + [20] * 20]
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
EACH_KIND = pytest.mark.parametrize(("function", "local"), KINDS.values(), ids=KINDS)
PLAIN_KINDS = pytest.mark.parametrize(
    ("function", "local"), [KINDS["causal"], KINDS["sliding"]], ids=["causal", "sliding"]
)
# Queries, keys, and the positions of the first of each: whole, against a cache, a static cache, one that dropped keys.
CALLS = pytest.mark.parametrize(
    "call",
    [(40, 40, 0, 0), (5, 40, 35, 0), (1, 40, 39, 0), (4, 12, 36, 28), (3, 64, 37, 0), (3, 64, torch.tensor(37), 0)],
)


def expected(function, call=(LENGTH, LENGTH, 0, 0), padding=None, batch=1):
    """The mask of transformers, bool ``[B, 1, Lq, Lk]``, in which padding queries see nothing."""
    call = [int(number) for number in call]
    mask = mu.sdpa_mask(batch, *call, function, padding, allow_is_causal_skip=False)[:, :1]
    return mask if padding is None else mask & padding[:, None, call[2] : call[2] + call[0], None]


def found(function, call=(LENGTH, LENGTH, 0, 0), padding=None, batch=1, local=None):
    mask = interval_mask(batch, *call, function, padding, local_size=local)
    return Visibility.unpack(mask, *call[:2])


def assert_sees(visibility, mask):
    """The keys that queries see are those of a mask, in the order in which padding with holes leaves them."""
    if visibility.order is not None:
        mask = mask.take_along_dim(visibility.order[:, None, None].long(), 3)
    assert torch.equal(visible_mask(visibility.visible, mask.shape[-1]), mask)


@EACH_KIND
def test_a_whole_sequence_sees_what_transformers_lets_it_see_while_compiling_too(function, local, monkeypatch):
    plain = found(function, local=local)
    assert_sees(plain, expected(function))
    monkeypatch.setattr(masks.torch.compiler, "is_compiling", lambda: True)
    probed = found(function, local=local)
    assert torch.equal(plain.visible, probed.visible)
    assert local is not None or torch.equal(plain.origin, probed.origin)


@PLAIN_KINDS
@CALLS
def test_padding_with_holes_leaves_the_keys_that_are_tokens(function, local, call):
    padding = torch.ones(4, LENGTH, dtype=torch.bool)
    padding[0, 7:20], padding[1, [0, 1, 2, 15, 33, 36]], padding[2, :30:2] = False, False, False
    visibility = found(function, call, padding, 4, local)
    assert visibility.order is not None
    assert_sees(visibility, expected(function, call, padding, 4))
    is_token = padding[:, int(call[2]) : int(call[2]) + call[0]]
    dropped = padding[:, : call[3]].sum(-1, keepdim=True)  # tokens whose keys the cache does not hold any more
    assert torch.equal(visibility.origin[is_token], (-dropped).expand_as(is_token)[is_token].int())


def test_chunks_and_origins_are_counted_from_where_sequences_begin_also_before_the_first_key():
    padding = torch.arange(LENGTH) >= torch.tensor([[0], [5]])
    function = mu.chunked_causal_mask_function(8, torch.tensor([0, 5]))
    assert_sees(found(function, padding=padding, batch=2), expected(function, padding=padding, batch=2))
    assert found(KINDS["packed sliding"][0]).origin.tolist() == BEGINS
    assert found(KINDS["sliding"][0], (1, 7, 30, 24), local=7).origin.tolist() == [[-24]]


IMAGES = torch.full((1, LENGTH), -1)
IMAGES[0, 5:12], IMAGES[0, 20:31] = 0, 1
PARTED = torch.where(IMAGES == 1, 0, IMAGES)
WITH_IMAGES = mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(IMAGES))


ONE_RUN = {
    "images": WITH_IMAGES,
    "images, sliding": mu.and_masks(WITH_IMAGES, mu.sliding_window_overlay(9)),
    "prefix": mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: k < 13),
    "every second key": mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: k % 2 == 0),
    "no end": mu.sliding_window_overlay(4),
    "both ways": mu.sliding_window_bidirectional_mask_function(4),
}


@pytest.mark.parametrize("function", ONE_RUN.values(), ids=ONE_RUN)
@pytest.mark.parametrize("left", [0, 6])
@pytest.mark.parametrize("elements", [50, 1 << 20])
def test_whatever_lets_a_query_see_one_run_of_the_keys_is_taken(function, left, elements, monkeypatch):
    monkeypatch.setattr(masks, "_ELEMENTS_AT_ONCE", elements)
    padding = torch.arange(LENGTH)[None] >= left
    visibility = found(function, padding=padding)
    assert_sees(visibility, expected(function, padding=padding))
    assert bool((visibility.origin[padding] <= visibility.visible[padding][:, 0]).all())


def test_a_mask_of_several_runs_becomes_what_sdpa_takes_and_is_refused_by_name():
    parted = mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(PARTED))
    every_second = mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0)
    for function, name in ((parted, "or_mask"), (every_second, "and_mask")):
        mask = interval_mask(1, LENGTH, LENGTH, mask_function=function)
        assert torch.equal(mask, expected(function))
        with pytest.raises(UnsupportedMaskError, match=rf"Layer got a custom.*{name}.*several runs of keys"):
            visibility_of(mask, 1, LENGTH, LENGTH, "Layer")


def test_masks_of_four_dimensions_are_taken_where_every_row_is_one_run_and_refused_with_the_reason_otherwise():
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    for mask in (causal, added, causal.expand(2, 3, 6, 6), torch.where(causal, 0.0, -torch.inf).bfloat16()):
        visibility = visibility_of(mask, 2, 6, 6, "Layer")
        assert visibility.order is None
        assert_sees(visibility, causal.expand(2, 1, 6, 6))
    documents = expected(KINDS["packed"][0])
    visibility = visibility_of(documents, 1, LENGTH, LENGTH, "Layer")
    assert visibility.origin.tolist() == BEGINS  # where the rows of each begin
    assert_sees(visibility, documents)
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


@pytest.mark.parametrize(("made", "called"), [(30, 20), (20, 30)])
def test_a_mask_of_another_call_is_refused(made, called):
    with pytest.raises(UnsupportedMaskError, match=f"another call than one of {called} queries"):
        visibility_of(interval_mask(1, made, called), 1, called, called, "Layer")

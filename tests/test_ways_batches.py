"""Batches, padding, packing, pieces, dtypes: a full budget is dense, and a row scores the same in any company."""

import itertools

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from ways import (
    EACH_FAMILY,
    EACH_SELECTION,
    FULL,
    SMALL,
    UNASKED,
    attended_fraction,
    full_and_small,
    left_padded,
    right_padded,
    rows_of,
    small,
)

from nc_patch import patch_model, unpatch_model
from nc_patch.ops.problem import MAX_DECODE_QUERIES

PADDED = {"left": left_padded, "right": right_padded}
# Of the norm of a token's logits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of the tokens of a model with experts: rounding sends one to another expert where two score nearly the same.
OTHER_EXPERT = 0.1


def logits_by_row(model, batch):
    """Logits of the tokens of each row; positions count tokens."""
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model(**batch, position_ids=positions).logits
    return [logits[row][kept.bool()] for row, kept in enumerate(batch["attention_mask"])]


@EACH_SELECTION
@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_batches_of_one_to_eight_rows_equal_dense_and_the_row_alone(family, side, selections):
    dense, model = tiny_model(family), tiny_model(family)
    rows = rows_of(8)
    for budget, reference in ((FULL, dense), (SMALL, model)):
        patch_model(model, *budget, **selections)
        with torch.inference_mode():
            expected = [reference(row[None]).logits[0] for row in rows]
        for count in range(1, 9):
            for row, found in enumerate(logits_by_row(model, PADDED[side](rows[:count]))):
                torch.testing.assert_close(found, expected[row], atol=2e-5, rtol=0, msg=f"{count} rows, row {row}")
    assert attended_fraction(model) < (0.95 if selections == UNASKED else 0.7)


@EACH_SELECTION
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_row_generates_in_a_batch_what_it_generates_alone(family, selections):
    model, rows = small(family, **selections), rows_of(8)
    alone = [model.generate(row[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, -6:] for row in rows]
    together = model.generate(**left_padded(rows), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(together[:, -6:], torch.stack(alone))


@EACH_SELECTION
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_packed_sequences_equal_dense_and_each_alone(family, selections):
    rows = rows_of(4)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    for model, reference in full_and_small(family, **selections):
        with torch.inference_mode():
            found = model(packed, position_ids=positions, use_cache=False).logits[0]
            expected = torch.cat([reference(row[None]).logits[0] for row in rows])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("key_index", ["auto", "always"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_padded_batch_in_pieces_equals_dense_and_the_whole(family, static, key_index):
    # The first pieces hold nothing but padding of some rows, the last ones decode several queries, and one.
    batch, cuts = left_padded(rows_of(3)), (0, 1, 17, 38, 39, 60, 61, 62)
    for model, reference in full_and_small(family, key_index=key_index):
        whole = logits_by_row(reference, batch)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = StaticCache(model.config, max_cache_len=70) if static else DynamicCache(config=model.config)
        pieces = []
        with torch.inference_mode():
            for first, last in itertools.pairwise(cuts):
                piece = model(
                    batch["input_ids"][:, first:last],
                    attention_mask=batch["attention_mask"][:, :last],
                    position_ids=positions[:, first:last],
                    past_key_values=cache,
                )
                pieces.append(piece.logits)
        logits = torch.cat(pieces, 1)
        for row, kept in enumerate(batch["attention_mask"]):
            torch.testing.assert_close(logits[row][kept.bool()], whole[row], atol=2e-5, rtol=0)


@EACH_SELECTION
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_each_dtype_equals_dense_and_the_row_alone(family, dtype, selections):
    rows = rows_of(3)
    dense, model = tiny_model(family).to(dtype), tiny_model(family).to(dtype)
    for budget, reference in ((FULL, dense), (SMALL, model)):
        patch_model(model, *budget, **selections)
        for row, found in enumerate(logits_by_row(model, left_padded(rows))):
            with torch.inference_mode():
                expected = reference(rows[row][None]).logits[0]
            assert found.dtype == dtype
            error = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
            share_beyond = (error > TOLERANCE[dtype]).float().mean()
            has_experts = hasattr(model.config, "num_local_experts")
            assert share_beyond <= (OTHER_EXPERT if has_experts else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_dtype_taken_after_patching_is_as_one_taken_before(dtype):
    ids = random_ids(2, 40)
    before, after = patch_model(tiny_model("llama").to(dtype), *SMALL, selection="topk"), small().to(dtype)
    with torch.inference_mode():
        assert torch.equal(after(ids).logits, before(ids).logits)
        assert torch.equal(unpatch_model(after)(ids).logits, tiny_model("llama").to(dtype)(ids).logits)


@pytest.mark.parametrize("cut", [100, 117, 118, 149])
def test_a_piece_of_at_most_32_tokens_that_continues_a_cache_decodes_and_a_longer_one_is_prefill(cut):
    dense, ids = tiny_model("llama"), random_ids(1, 150)
    model = patch_model(tiny_model("llama"), *SMALL, prefill="dense", decode="topk")
    with torch.inference_mode():
        expected, found = [], []
        for each, results in ((dense, expected), (model, found)):
            cache = DynamicCache()
            results.extend(each(piece, past_key_values=cache).logits for piece in (ids[:, :cut], ids[:, cut:]))
        torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=0)
        as_dense = torch.allclose(found[1], expected[1], atol=2e-5, rtol=0)
    assert as_dense == (150 - cut > MAX_DECODE_QUERIES)

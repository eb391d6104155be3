"""Masks through whole models: where packed sequences begin, soft prompts, images, and masks of the caller's."""

from typing import Any

import family_shapes
import pytest
import torch
import transformers
from family_shapes import Family
from tiny_models import VOCABULARY, random_ids, tiny_model
from transformers import DynamicCache
from ways import assert_close, attended_fraction, boundaries, full, generated, left_padded, rows_of, small

from nc_patch import UnsupportedMaskError, nc_stats, patch_model
from nc_patch.layers import told_boundaries
from nc_patch.masks import interval_mask

SELECTIONS = pytest.mark.parametrize("selection", ["topk", "window", "block"])


# Packed sequences


@SELECTIONS
def test_the_cache_of_packed_sequences_goes_on_as_one_sequence(selection):
    model, ids, cache, plain = small(selection=selection), random_ids(1, 110), DynamicCache(), DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, **boundaries("positions", [40, 70]))
        for number, held in enumerate(cache.layers):
            plain.update(held.keys, held.values, number)
        later = {"input_ids": random_ids(1, 1), "position_ids": torch.tensor([[70]])}
        assert_close(*(model(**later, past_key_values=each).logits for each in (cache, plain)))


@pytest.mark.parametrize(
    ("ends", "key_ends", "rows"), [((0, 12, 30), (0, 20, 40), 1), ((0, 12, 29), (0, 12, 29), 1), ((0, 30), (0, 30), 2)]
)
def test_boundaries_that_do_not_fit_are_refused(ends, key_ends, rows):
    named = {"cu_seq_lens_q": torch.tensor(ends).int(), "cu_seq_lens_k": torch.tensor(key_ends).int()}
    with pytest.raises(UnsupportedMaskError, match=r"cu_seq_lens_q must name the sequences of one row of 30 tokens"):
        small()(random_ids(rows, 30), **named)


def test_lengths_split_a_mask_of_four_dimensions_and_are_forgotten_after_the_call():
    model, ids, mask = small(), random_ids(1, 30), torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    with torch.inference_mode():
        whole = model(ids, attention_mask=mask).logits
        found = model(ids, attention_mask=mask, **boundaries("cu_seq_lens", [12, 18])).logits
        assert told_boundaries() == {}
        assert_close(found, torch.cat((whole[:, :12], model(ids[:, 12:]).logits), 1))


# Padding


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_tokens_that_the_padding_mask_does_not_reach_see_what_dense_attention_lets_them_see(selection):
    batch, pieces = left_padded(rows_of(3)), random_ids(3, 6).split([1, 1, 3, 1], 1)
    settings = {"selection": selection, "block_size": 16}
    pairs = [(full(**settings), tiny_model("llama")), [small(**settings, key_index=use) for use in ("always", "never")]]
    for models in pairs:
        logits = []
        for model in models:
            mask, cache = batch["attention_mask"], DynamicCache()
            with torch.inference_mode():
                model(**batch, past_key_values=cache)
                steps = [model(ids, attention_mask=mask, past_key_values=cache).logits for ids in pieces]
                mask = torch.cat((mask, torch.ones(3, 7).long()), 1)
                logits.append([*steps, model(pieces[0], attention_mask=mask, past_key_values=cache).logits])
        assert_close(*logits)


@SELECTIONS
def test_prompt_tuning_before_left_padding_equals_dense_at_a_full_budget_and_trains(selection):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    batch = left_padded(rows_of(4))
    kept = batch["attention_mask"].bool()
    model = peft.get_peft_model(tiny_model("llama"), settings).eval()

    def logits_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(**batch).logits[:, -kept.shape[1] :][kept]
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    dense, tokens = logits_and_gradients(), generated(model, batch)
    patch_model(model, 1e6, 0.0, selection=selection)
    torch.testing.assert_close(logits_and_gradients(), dense, atol=2e-5, rtol=1e-3)
    assert len(dense) > 1
    assert torch.equal(generated(model, batch), tokens)


# Image prompts


# What says which tokens are of images; and how far rounding takes the logits of rows alone, which Gemma 4 has larger.
VISION = {
    "gemma3 Gemma3ForConditionalGeneration": ("token_type_ids", 2e-5),
    "gemma4 Gemma4ForConditionalGeneration": ("mm_token_type_ids", 1e-4),
    "gemma4_unified Gemma4UnifiedForConditionalGeneration": ("mm_token_type_ids", 1e-4),
}
GEMMA_3 = next(iter(VISION))


def vision_model(name: str = GEMMA_3) -> Any:
    """A tiny model whose image tokens see one another both ways, in layers that slide and in those that do not."""
    folder, class_name = name.split()
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    module = f"transformers.models.{folder}.modeling_{folder}"
    model = family_shapes.tiny_model(Family(name, module, class_name), "sdpa")
    if name != GEMMA_3:
        model.config.get_text_config().use_bidirectional_attention = "vision"
    return model


def text_with_images(shape: tuple[int, int], *images: tuple[int, int, int], name: str = GEMMA_3) -> dict[str, Any]:
    """Ids, and which of them are of images: from one place to another in a row."""
    kinds = torch.zeros(shape, dtype=torch.long)
    for row, first, last in images:
        kinds[row, first:last] = 1
    return {"input_ids": torch.randint(2, VOCABULARY - 2, shape), VISION[name][0]: kinds}


@SELECTIONS
@pytest.mark.parametrize("name", VISION)
def test_image_prompts_equal_dense_at_a_full_budget_and_score_as_alone_with_a_small_one(name, selection):
    model, (kinds, rounding) = vision_model(name), VISION[name]
    prompt = text_with_images((2, 200), (0, 9, 28), (0, 40, 45), (0, 100, 171), (1, 3, 11), name=name)
    prompt["attention_mask"] = torch.ones(2, 200, dtype=torch.long)
    prompt["attention_mask"][0, :7] = 0
    kept = prompt["attention_mask"].bool()
    with torch.inference_mode():
        dense, tokens = model(**prompt).logits[kept], generated(model, prompt)
        causal = model(**prompt | {kinds: None}).logits[kept]
        assert not torch.allclose(dense, causal, atol=1e-2), "the images' tokens see one another"
        assert_close(patch_model(model, 1.0, 1.0)(**prompt).logits[kept], dense)
        patch_model(model, 1e6, 0.0, selection=selection)
        assert_close(model(**prompt).logits[kept], dense)
        assert torch.equal(generated(model, prompt), tokens)
        assert attended_fraction(model) == 1.0
        patch_model(model, 2.0, 0.5, selection=selection, block_size=16)
        together = model(**prompt).logits
        assert attended_fraction(model) < 0.8
        for row, first in ((0, 7), (1, 0)):
            alone = model(**{name: tensor[row : row + 1, first:] for name, tensor in prompt.items()}).logits[0]
            assert_close(together[row, first:], alone, rounding)


def test_blocks_hold_every_key_of_a_long_image_where_a_cache_goes_on():
    model, prompt = vision_model(), text_with_images((1, 200), (0, 9, 80), (0, 100, 171))

    def logits() -> torch.Tensor:
        cache, (ids, kinds) = DynamicCache(config=model.config), prompt.values()
        model(ids[:, :90], token_type_ids=kinds[:, :90], past_key_values=cache)
        # Where a cache goes on, transformers takes the kinds of all tokens for the keys.
        return model(ids[:, 90:], token_type_ids=kinds, past_key_values=cache).logits

    with torch.inference_mode():
        dense = logits()
        patch_model(model, 1e6, 0.0, selection="block")
        assert_close(logits(), dense)


def test_a_packed_sequence_may_begin_with_an_image():
    model, prompt = patch_model(vision_model(), 1e6, 0.0, selection="topk"), text_with_images((1, 54), (0, 24, 32))
    with torch.inference_mode():
        # Without a cache transformers makes the mask, which has images of packed sequences elsewhere where it slides.
        named = {**boundaries("positions", [24, 30]), "past_key_values": DynamicCache()}
        found = model(**prompt, **named).logits[:, 24:]
        assert_close(found, model(**{name: tensor[:, 24:] for name, tensor in prompt.items()}).logits)


# Masks of the caller's


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_of_several_runs_is_refused_by_name_and_taken_and_counted_by_layers_that_stay_dense(family):
    ids, seen = random_ids(1, 12), torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    seen[..., 5, 2] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        dense = tiny_model(family)(ids, attention_mask=added).logits
        message = r"Attention got a custom attention mask \(torch.bool \(1, 1, 12, 12\)\)"
        with pytest.raises(UnsupportedMaskError, match=message):
            small(family)(ids, attention_mask=seen)
        for mask in (seen, added):
            model = small(family, dense_layers=[0, 1, 2])
            assert_close(model(ids, attention_mask=mask).logits, dense)
    layer = nc_stats(model)["layers"][0]
    assert layer["dense_calls"] == {"the layer is in dense_layers": 1}
    assert layer["mean_keys"] == seen.sum().item() / 12


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_a_few_tokens_of_several_sequences_that_continue_a_cache_see_their_own(selection):
    model, dense = full(prefill="topk", decode=selection, block_size=16), tiny_model("llama")
    first, a, b, cache, plain = random_ids(1, 20), random_ids(1, 14), random_ids(1, 14), DynamicCache(), DynamicCache()
    positions = torch.cat((torch.arange(20, 34), torch.arange(14)))[None]
    with torch.inference_mode():
        model(first, past_key_values=cache), dense(first, past_key_values=plain)
        found = model(torch.cat((a, b), 1), past_key_values=cache, position_ids=positions).logits
        assert_close(found, torch.cat((dense(a, past_key_values=plain).logits, dense(b).logits), 1))


def test_a_mask_that_is_handed_in_again_with_other_boundaries_is_split_again():
    model, ids, mask = small(), random_ids(1, 30), interval_mask(1, 30, 30)
    with torch.inference_mode():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for cut, begin in ((10, 0), (17, 3)):
            positions = torch.cat((torch.arange(cut), torch.arange(begin, begin + 30 - cut)))[None]
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            assert_close(found, torch.cat((whole[:, :cut], model(ids[:, cut:]).logits), 1))


@pytest.mark.parametrize("grad", [True, False])
def test_a_mask_that_is_written_to_between_calls_is_looked_at_again(grad):
    model, ids = small(), random_ids(1, 30)
    with torch.set_grad_enabled(grad):
        mask = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
        first = model(ids, attention_mask=mask, use_cache=False).logits
        mask[..., 10:, :10] = False
        found = model(ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask.clone(), use_cache=False).logits
    assert not torch.allclose(first, expected, atol=1e-3)
    assert torch.equal(found, expected)

"""Masks through whole models: packed sequences, padding with holes, image prompts, and masks of the caller's."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from ways import EACH_FAMILY, attended_fraction, full, full_and_small, left_padded, rows_of, small

from nc_patch import UnsupportedMaskError, nc_stats, patch_model
from nc_patch.common import say_once
from nc_patch.masks import interval_mask

SELECTIONS = ("topk", "window", "block")
NEW = 5


def generated(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, "disable_compile": True} | options
    return model.generate(**batch, **options)[:, -NEW:]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


# Packed sequences


def boundaries(kind: str, lengths: list[int]) -> dict[str, torch.Tensor | int]:
    """What a caller may say of where sequences begin."""
    restarting = torch.cat([torch.arange(length) for length in lengths])[None]
    if kind == "positions":
        return {"position_ids": restarting}
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    if kind == "seq_idx":
        named = {"seq_idx": torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None].int()}
    else:
        named = {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    return {**named, "position_ids": restarting}


@pytest.mark.parametrize("kind", ["positions", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_packed_sequences_are_each_as_alone_with_a_cache_too(family, use_cache, kind):
    rows = [*rows_of(3), random_ids(1), random_ids(1)]
    for model, reference in full_and_small(family):
        with torch.inference_mode():
            named = boundaries(kind, [len(row) for row in rows])
            found = model(torch.cat(rows)[None], use_cache=use_cache, **named).logits[0]
            expected = torch.cat([reference(row[None]).logits[0] for row in rows])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_packed_row_with_a_mask_of_ones_is_split_too_and_its_cache_decodes_as_one_sequence(selection):
    model, rows = small(selection=selection), [random_ids(40), random_ids(70)]
    ids, cache = torch.cat(rows)[None], DynamicCache()
    named = boundaries("positions", [40, 70])
    with torch.inference_mode():
        packed = model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **named).logits[0]
        expected = torch.cat([model(row[None]).logits[0] for row in rows])
        torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)
        plain = DynamicCache()
        plain.layers = [type(layer)() for layer in cache.layers]
        for layer, held in zip(plain.layers, cache.layers, strict=True):
            layer.update(held.keys, held.values)
        later = random_ids(1, 1)
        found, expected = (
            model(later, past_key_values=c, position_ids=torch.tensor([[70]])).logits for c in (cache, plain)
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_compiled_call_splits_packed_sequences():
    rows = [random_ids(21), random_ids(34)]
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for kind in ("positions", "cu_seq_lens"):
            found = compiled(torch.cat(rows)[None], use_cache=False, **boundaries(kind, [21, 34])).logits[0]
            expected = torch.cat([model(row[None]).logits[0] for row in rows])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("named_by", ["positions", "cu_seq_lens", "seq_idx"])
def test_padding_between_packed_sequences_hides_no_boundary(named_by):
    rows, pads = [random_ids(20), random_ids(25), random_ids(9)], [4, 1, 7]
    zeros = [torch.zeros(count, dtype=torch.long) for count in pads]
    ids = torch.cat([part for pair in zip(rows, zeros, strict=True) for part in pair])[None]
    mask = torch.cat([torch.cat((torch.ones_like(row), pad)) for row, pad in zip(rows, zeros, strict=True)])[None]
    named = boundaries(named_by, [len(row) + count for row, count in zip(rows, pads, strict=True)])
    for filler in (0, 1, 99):  # what positions of padding are filled with
        named["position_ids"] = named["position_ids"].masked_fill(mask == 0, filler)
        with torch.inference_mode():
            for model, reference in full_and_small("llama"):
                found = model(ids, attention_mask=mask, **named).logits[mask.bool()]
                expected = torch.cat([reference(row[None]).logits[0] for row in rows])
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_a_few_tokens_of_several_sequences_that_continue_a_cache_see_their_own(selection):
    model = full(prefill="topk", decode=selection, block_size=16)
    first, a, b, cache, plain = random_ids(1, 20), random_ids(14), random_ids(14), DynamicCache(), DynamicCache()
    positions = torch.cat((torch.arange(20, 34), torch.arange(14)))[None]
    dense = tiny_model("llama")
    with torch.inference_mode():
        model(first, past_key_values=cache), dense(first, past_key_values=plain)
        found = model(torch.cat((a, b))[None], past_key_values=cache, position_ids=positions).logits[0]
        expected = torch.cat((dense(a[None], past_key_values=plain).logits[0], dense(b[None]).logits[0]))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_mask_that_is_handed_in_again_with_other_boundaries_is_split_again():
    model, ids, mask = small(), random_ids(1, 30), interval_mask(1, 30, 30)
    with torch.inference_mode():
        whole = model(ids, attention_mask=mask, use_cache=False).logits[0]
        for cut in (10, 17):
            positions = torch.cat((torch.arange(cut), torch.arange(30 - cut)))[None]
            found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
            expected = torch.cat((whole[:cut], model(ids[:, cut:]).logits[0]))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_boundaries_count_beside_a_mask_of_four_dimensions():
    rows = [random_ids(20), random_ids(25)]
    mask = torch.ones(45, 45, dtype=torch.bool).tril()[None, None]
    with torch.inference_mode():
        model = small()
        found = model(torch.cat(rows)[None], attention_mask=mask, **boundaries("cu_seq_lens", [20, 25])).logits[0]
        expected = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("wrong", ["keys", "length", "rows"])
def test_boundaries_that_do_not_fit_are_refused(wrong):
    named = boundaries("cu_seq_lens", [12, 18])
    ids = random_ids(2 if wrong == "rows" else 1, 30)
    if wrong == "keys":
        named["cu_seq_lens_k"] = torch.tensor([0, 20, 40], dtype=torch.int32)
    if wrong == "length":
        named["cu_seq_lens_q"] = named["cu_seq_lens_k"] = torch.tensor([0, 12, 29], dtype=torch.int32)
    with pytest.raises(UnsupportedMaskError, match=r"cu_seq_lens_q must name the sequences of one row of 30 tokens"):
        small()(ids, **named)


# Padding with holes


def with_holes(rows: list[torch.Tensor], at: int = 9) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A left-padded batch whose rows have holes in three of four cases, and its rows' tokens."""
    pieces = [torch.zeros(3 + 4 * (place % 4), dtype=torch.long) for place in range(len(rows))]
    gapped = [torch.cat((row[:at], piece, row[at:])) for row, piece in zip(rows, pieces, strict=True)]
    batch = left_padded(gapped)
    for place, (row, piece) in enumerate(zip(gapped, pieces, strict=True)):
        begin = batch["input_ids"].shape[1] - len(row) + at
        batch["attention_mask"][place, begin : begin + len(piece)] = 0
    return batch, rows


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_rows_with_holes_of_padding_score_as_alone(selection, cache):
    batch, rows = with_holes(rows_of(4, shortest=40))
    kept, length = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    for model, reference in full_and_small("llama", selection=selection, block_size=16):
        held = {
            "none": lambda: None,
            "dynamic": DynamicCache,
            "static": lambda m=model: StaticCache(config=m.config, max_cache_len=length + 9),
        }[cache]()
        with torch.inference_mode():
            positions = positions_of(batch["attention_mask"])
            found = model(**batch, position_ids=positions, past_key_values=held, use_cache=cache != "none").logits
            for place, row in enumerate(rows):
                expected = reference(row[None]).logits[0]
                torch.testing.assert_close(found[place][kept[place]], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_padding_with_holes_equals_dense_at_a_full_budget(family):
    batch, _ = with_holes(rows_of(4))
    kept = batch["attention_mask"].bool()
    positions = positions_of(batch["attention_mask"])
    with torch.inference_mode():
        expected = tiny_model(family)(**batch, position_ids=positions).logits[kept]
        for options in ({}, {"selection": "block"}, {"dense_layers": [0, 1]}, {"selection": "dense"}):
            found = full(family, **options)(**batch, position_ids=positions).logits[kept]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    dense = generated(tiny_model(family), batch)
    for options in ({}, {"selection": "block"}, {"track": True}, {"on_drop": "dense", "max_dropped_mass": 0.5}):
        assert torch.equal(generated(full(family, **options), batch), dense)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_second_turn_of_a_batched_chat_generates_what_each_row_would_alone(selection, options):
    batch, rows = with_holes(rows_of(4, shortest=40))
    for model, reference in full_and_small("llama", selection=selection, block_size=16):
        alone = [generated(reference, {"input_ids": row[None]}, **options)[0] for row in rows]
        assert torch.equal(generated(model, batch, **options), torch.stack(alone))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_chat_goes_on_with_its_cache_over_turns_padded_each_on_its_own(selection):
    model, new = small(selection=selection, block_size=16), 4
    first, second = rows_of(3, shortest=30), rows_of(3, shortest=21, step=3)
    turn = left_padded(first)
    cache = DynamicCache()
    out = model.generate(
        **turn, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, disable_compile=True
    )
    padded = left_padded(second)
    ids = torch.cat((out, padded["input_ids"]), 1)
    mask = torch.cat((turn["attention_mask"], torch.ones(3, new, dtype=torch.long), padded["attention_mask"]), 1)
    found = generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    whole = [
        torch.cat((row, out[place, -new:], later))[None]
        for place, (row, later) in enumerate(zip(first, second, strict=True))
    ]
    assert torch.equal(found, torch.cat([generated(model, {"input_ids": ids}) for ids in whole]))


@pytest.mark.parametrize("selection", ["topk", pytest.param("window", marks=pytest.mark.wide), "block"])
def test_a_compiled_static_cache_takes_holes_that_were_there_from_the_first_call(selection):
    batch, _ = with_holes(rows_of(3, shortest=30))
    torch._dynamo.reset()
    model = small(selection=selection, block_size=16)
    eager = generated(model, batch, cache_implementation="static")
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(generated(model, batch, cache_implementation="static"), eager)


def test_a_compiled_call_refuses_holes_that_come_once_the_cache_has_an_index():
    torch._dynamo.reset()
    model, batch = small(selection="block"), left_padded(rows_of(3))
    length = batch["input_ids"].shape[1]
    cache = StaticCache(config=model.config, max_cache_len=80)
    with torch.inference_mode():
        model(**batch, past_key_values=cache)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        mask[:, length - 9] = 0  # a token that later ones are not to see
        inputs, position = torch.zeros(3, 1, 64), torch.full((3, 1), length)
        packed = transformers.masking_utils.create_masks_for_generate(model.config, inputs, mask, cache, position)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"mask has holes.*drop the key index"):
            step(random_ids(3, 1), attention_mask=packed, past_key_values=cache, position_ids=position)
        eager = model(random_ids(3, 1), attention_mask=mask, past_key_values=cache, position_ids=position)
    assert bool(eager.logits.isfinite().all())


def test_holes_are_said_once_in_the_log(caplog):
    model, (batch, _) = small(), with_holes(rows_of(3))
    say_once.cache_clear()
    for _ in range(2):
        model(**batch)
    assert sum("mask of a call has holes" in record.message for record in caplog.records) == 1


def test_a_hole_before_the_last_token_of_a_prompt_is_no_right_padding():
    rows = [random_ids(1), random_ids(9)]
    batch = left_padded([torch.cat((torch.full((7,), 5), row)) for row in rows])
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"].clone(), torch.ones_like(batch["attention_mask"])
    batch["input_ids"][0] = torch.cat((torch.full((7,), 5), torch.zeros(8, dtype=torch.long), rows[0]))
    batch["attention_mask"][0, 7:15] = 0
    assert torch.equal(generated(full(), batch), generated(tiny_model("llama"), batch))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_prompt_tuning_before_left_padding_equals_dense_at_a_full_budget_and_trains(selection):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    batch = left_padded(rows_of(4))
    kept = batch["attention_mask"].bool()
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_model("llama"), settings).eval()
    found, gradients = [], []
    for budget in (None, 1e6):
        if budget:
            patch_model(model, budget, 0.0, selection=selection)
        model.zero_grad()
        logits = model(**batch).logits
        logits = logits[:, -kept.shape[1] :][kept]
        logits.square().mean().backward()
        found.append(logits.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=0)
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)
    tokens = [generated(model, batch)]
    patch_model(model, selection="dense", alpha=1.0, C=1.0)
    assert torch.equal(generated(model, batch), tokens[0])


# Image prompts


def vision_model() -> Any:
    """A tiny Gemma 3 whose image tokens see one another both ways, in a layer that slides and in one that does not."""
    text = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCABULARY - 1
    )
    torch.manual_seed(1)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.set_attn_implementation("sdpa")
    return model


def image_prompt(length: int = 60) -> dict[str, torch.Tensor]:
    """Two rows of text, one of them padded on the left, with images of several tokens in them."""
    ids = torch.randint(2, VOCABULARY - 2, (2, length))
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    mask[0, :7] = 0
    kinds[0, 9:28], kinds[0, 40:45], kinds[1, 3:11] = 1, 1, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_image_prompts_equal_dense_at_a_full_budget(selection):
    model, prompt = vision_model(), image_prompt()
    kept = prompt["attention_mask"].bool()
    with torch.inference_mode():
        dense, causal = model(**prompt).logits[kept], model(**prompt | {"token_type_ids": None}).logits[kept]
        assert not torch.allclose(dense, causal, atol=1e-2), "the images' tokens see one another"
        tokens = generated(model, prompt)
        patch_model(model, 1e6, 0.0, selection=selection)
        torch.testing.assert_close(model(**prompt).logits[kept], dense, atol=2e-5, rtol=0)
        assert torch.equal(generated(model, prompt), tokens)
        assert attended_fraction(model) == 1.0


@pytest.mark.parametrize("cuts", [[0, 200], [0, 90, 200]])
def test_blocks_hold_every_key_of_a_long_image_at_a_full_budget(cuts):
    model, ids = vision_model(), torch.randint(2, VOCABULARY - 2, (1, 200))
    kinds = torch.zeros_like(ids)
    kinds[0, 9:80] = kinds[0, 100:171] = 1

    def logits() -> torch.Tensor:
        cache, pieces = DynamicCache(config=model.config), []
        for first, last in itertools.pairwise(cuts):
            # Where a cache goes on, transformers takes the kinds of all tokens for the keys.
            piece = {"token_type_ids": kinds[:, :last] if len(cuts) > 2 else kinds, "past_key_values": cache}
            pieces.append(model(ids[:, first:last], **piece).logits)
        return torch.cat(pieces, 1)

    with torch.inference_mode():
        dense = logits()
        patch_model(model, 1e6, 0.0, selection="block")
        torch.testing.assert_close(logits(), dense, atol=2e-5, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_packed_sequence_may_begin_with_an_image(selection):
    model, ids, kinds = vision_model(), torch.randint(2, VOCABULARY - 2, (1, 54)), torch.zeros(1, 54, dtype=torch.long)
    kinds[0, 24:32] = 1
    positions = torch.cat((torch.arange(24), torch.arange(30)))[None]
    patch_model(model, 1e6, 0.0, selection=selection)
    with torch.inference_mode():
        # Without a cache transformers makes the mask, which has images of packed sequences elsewhere where it slides.
        named = {"token_type_ids": kinds, "position_ids": positions, "past_key_values": DynamicCache()}
        found = model(ids, **named).logits[0, 24:]
        alone = model(ids[:, 24:], token_type_ids=kinds[:, 24:]).logits[0]
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_image_prompt_scores_in_a_batch_as_alone_with_a_small_budget(selection):
    model, prompt = vision_model(), image_prompt(200)
    patch_model(model, 2.0, 0.5, selection=selection, block_size=16)
    with torch.inference_mode():
        together = model(**prompt).logits
        assert attended_fraction(model) < 0.8
        for row, first in ((0, 7), (1, 0)):
            alone = model(**{name: tensor[row : row + 1, first:] for name, tensor in prompt.items()}).logits[0]
            torch.testing.assert_close(together[row, first:], alone, atol=2e-5, rtol=0)


# Masks of the caller's


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_mask_of_four_dimensions_scores_as_the_padding_mask_that_says_the_same(selection, kind):
    model, batch = small(selection=selection), left_padded(rows_of(3))
    kept, length = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & kept[:, None, None]
    if kind == "added":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    positions = positions_of(batch["attention_mask"])
    with torch.inference_mode():
        expected = model(**batch, position_ids=positions).logits[kept]
        found = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits[kept]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_an_int32_mask_of_three_keys_is_refused_and_not_taken_for_intervals():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.int32).tril()
    with pytest.raises(UnsupportedMaskError, match=r"torch.int32 \(1, 1, 3, 3\).*should be bool"):
        small()(random_ids(1, 3), attention_mask=mask)


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
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("added", [True, False])
def test_dense_layers_with_a_soft_cap_or_sinks_take_any_mask(family, added):
    ids, seen = random_ids(1, 12), torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    seen[..., 5, 2] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        dense = tiny_model(family)(ids, attention_mask=mask).logits
        found = small(family, dense_layers=[0, 1, 2])(ids, attention_mask=mask if added else seen).logits
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=0)


def test_dense_layers_take_any_mask_and_count_it():
    ids, mask = random_ids(1, 12), torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    mask[..., 5, 2] = False
    with torch.inference_mode():
        dense = tiny_model("llama")(ids, attention_mask=mask).logits
        model = small(dense_layers=[0, 1, 2])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, dense, atol=1e-6, rtol=0)
    layer = nc_stats(model)["layers"][0]
    assert layer["dense_calls"] == {"the layer is in dense_layers": 1}
    assert layer["mean_keys"] == mask.sum().item() / 12

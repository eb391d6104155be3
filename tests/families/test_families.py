"""Every causal language model of the installed transformers gives the same numbers, or is refused by name."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from family_shapes import Family, families, tiny_model
from family_suite import examine
from transformers import DynamicCache, masking_utils
from ways import wide_but

from nc_patch import UnsupportedMaskError, UnsupportedModelError, patch_model, unpatch_model
from nc_patch.attention import nc_attention_forward
from nc_patch.masks import interval_mask

# What a plain run goes through, with needs of their own: latent attention with values of another width than keys,
# chunks and layers without rotary positions, linear attention, recurrences, convolutions, soft-caps, sinks, own
# scaling, keys or modules that layers share, masks built in a lambda, cross-attention, a vision tower, attention twice
# a layer, an encoder made a decoder; and one for each reason to be refused.
PLAIN = {
    *("bart", "beam", "bert", "cohere2", "deepseek_v3", "diffllama", "gemma2", "gemma3n Gemma3nForCausalLM"),
    *("gpt_oss", "granite", "jamba", "llama4", "mllama", "phi4_multimodal", "qwen3_next", "smollm3", "zamba2"),
    *("doge", "falcon", "mamba", "deepseek_v32", "deepseek_v4", "inkling", "kosmos2"),
}
BY_NAME = {family.name: family for family in families()}
_RECORD = json.loads((Path(__file__).parents[2] / "docs" / "results" / "families.json").read_text(encoding="utf-8"))
RECORDED = {each["class_name"]: each for each in _RECORD["families"]}
RECORDED_WITH = _RECORD["versions"]["transformers"]


def family_named(name: str) -> Family:
    if name not in BY_NAME:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return BY_NAME[name]


def test_every_family_that_is_found_has_an_outcome_in_the_record():
    found = [family.class_name for family in families()]
    missing = [name for name in found if name not in RECORDED]
    assert not missing, f"{missing}: run scripts/family_table.py (the record is of transformers {RECORDED_WITH})"
    assert transformers.__version__ != RECORDED_WITH or sorted(found) == sorted(RECORDED)


@pytest.mark.parametrize("name", wide_but(PLAIN, BY_NAME))
def test_every_family_gives_the_same_numbers_or_is_refused_as_the_record_says(name):
    outcome = examine(BY_NAME[name])
    recorded = RECORDED[outcome.class_name]
    assert outcome.wrong == []
    assert (outcome.refused is None, outcome.not_built) == (recorded["refused"] is None, recorded["not_built"])
    if transformers.__version__ == RECORDED_WITH:
        assert asdict(outcome) == recorded


def test_an_index_is_not_kept_of_keys_or_values_that_the_cache_does_not_hold():
    ids = torch.randint(2, 90, (1, 40))
    kept = {}
    for name in ("llama", "diffllama"):
        model = patch_model(tiny_model(family_named(name)), 2.0, 0.5, key_index="always", tail="mean")
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        kept[name] = set(cache.layers[0].nc_indexes)
    assert kept == {"llama": {"codes", "means"}, "diffllama": {"codes"}}  # its values differ between its two runs


@pytest.mark.parametrize("padded", [slice(11, 17), slice(5, 8)], ids=["at the end", "in between"])
def test_cross_attention_runs_dense_beside_patched_self_attention(padded):
    model, ids = tiny_model(family_named("bart")), torch.randint(2, 90, (2, 30))
    states, padding = torch.randn(2, 17, 64), torch.ones(2, 17, dtype=torch.long)
    padding[1, padded] = 0
    run = lambda _: model(ids, encoder_hidden_states=states, encoder_attention_mask=padding).logits  # noqa: E731
    with torch.inference_mode():
        dense = run(model)
        torch.testing.assert_close(run(patch_model(model, 500.0, 0.0)), dense, atol=2e-5, rtol=0)
        sparse = run(patch_model(model, 1.0, 0.5, selection="topk", sink_keys=1))
        assert not torch.allclose(sparse, dense, atol=1e-3)
        assert torch.equal(run(unpatch_model(model)), dense)


def test_a_patched_module_refuses_a_bidirectional_mask():
    model, ids = patch_model(tiny_model(family_named("llama")), 2.0, 0.5), torch.randint(2, 90, (1, 12))
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="LlamaAttention asks for attention that is not causal"):
        model(ids)
    mask = interval_mask(1, 12, 12, mask_function=masking_utils.bidirectional_mask_function)
    tensors = [torch.randn(1, heads, 12, 16) for heads in (4, 2, 2)]
    with pytest.raises(UnsupportedMaskError, match="LlamaAttention got a bidirectional mask"):
        nc_attention_forward(model.model.layers[0].self_attn, *tensors, mask)


def test_packed_sequences_with_a_cache_are_refused_where_attention_goes_by_chunks():
    model, ids = patch_model(tiny_model(family_named("llama4")), 1e6, 0.0), torch.randint(2, 90, (1, 40))
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    with torch.inference_mode():
        with pytest.raises(UnsupportedMaskError, match=r"Llama4TextAttention attends by chunks.*use_cache=False"):
            model(ids, position_ids=positions)
        found = model(ids, position_ids=positions, use_cache=False).logits[0, 15:]
        torch.testing.assert_close(found, model(ids[:, 15:]).logits[0], atol=2e-5, rtol=0)

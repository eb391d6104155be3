"""However a model is run, a full budget gives dense attention's numbers, and a small one those of each row alone."""

import contextlib

import pytest
import torch
import transformers
import ways
from packaging.version import Version
from tiny_models import random_ids, tiny_model
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer
from ways import assert_close, full, full_and_small, generated, left_padded, rows_of, slides, small, with_holes

from nc_patch import UnsupportedMaskError, patch_model
from nc_patch.config import NCConfig
from nc_patch.ops.problem import MAX_DECODE_QUERIES
from nc_patch.selections import selection_names

NAMES = selection_names()  # before tests register more


def test_the_settings_hold_every_selection():
    configs = [NCConfig(1.0, 0.5, **settings) for settings in ways.SETTINGS.values()]
    assert {phase.name for config in configs for phase in (config.prefill, config.decode)} | {"dense"} == set(NAMES)


class NoStream(contextlib.nullcontext):
    """What stands in for a stream of an accelerator where there is none."""

    def wait_stream(self, stream: object) -> None:
        """Nothing runs apart, so that there is nothing to wait for."""


@pytest.fixture
def no_streams(monkeypatch):
    """Offloaded caches on a machine without an accelerator: the same steps, from one memory to the same one."""
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: NoStream())


@pytest.fixture(scope="module", params=ways.EACH_FAMILY)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=ways.SETTINGS)
def compared(family, request):
    """Models of a family with a full and with a small budget, rows, and what each row scores alone."""
    torch.manual_seed(0)
    rows, scores = [*rows_of(4, shortest=40, step=25), random_ids(1)], []
    for model, reference in full_and_small(family, **ways.SETTINGS[request.param]):
        with torch.inference_mode():
            scores.append((model, ways.alone(reference, rows)))
    # All layers of Mistral slide, over fewer keys than a block holds.
    assert family == "mistral" or ways.attended_fraction(model) < 0.75
    return request.param, rows, scores


@pytest.mark.parametrize("way", ways.WAYS)
def test_logits_are_dense_with_a_full_budget_and_those_of_the_row_alone_with_a_small_one(family, compared, way):
    setting, rows, ((full_model, dense), (small_model, own)) = compared
    with torch.inference_mode():
        if way in ways.WITHOUT_WINDOWS and slides(family):
            pytest.skip("a mask of the caller's takes the place of the windows")
        if way in ways.BY_PLACE and slides(family):
            assert_close(ways.WAYS[way](full_model, rows), ways.WAYS[way](tiny_model(family), rows))
            return
        found = ways.WAYS[way](full_model, rows)
        assert_close(found, dense[: len(found)])
        if setting in ways.CUT_ANYWHERE or way not in ways.CUTS:
            found = ways.WAYS[way](small_model, rows)
            assert_close(found, own[: len(found)])


@pytest.mark.parametrize("way", ["padded left", "packed by lengths", "cut at query blocks"])
def test_blocks_that_are_chosen_by_scores_are_those_of_the_row_alone(way):
    # Beyond 256 keys the budget is four blocks, of which three are attended always; every other or fourth row chooses.
    model = patch_model(tiny_model("llama"), 3.0, 0.5, query_block_size=32, local_keys=0)
    rows = [random_ids(length) for length in (300, 450)]
    with torch.inference_mode():
        assert_close(ways.WAYS[way](model, rows), ways.alone(model, rows))


# Ways to generate that give each row what it gets alone.
GENERATION = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "offloaded static cache": {"cache_implementation": "offloaded_static"},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
}
# What transformers itself cannot do, with dense attention either.
NOT_DENSE_EITHER = {
    ("gpt_oss", "early exit"): "the skipped layers' kinds are looked up by place",
    ("mistral", "offloaded static cache"): "a static cache whose layers all slide has nothing to offload",
}
if Version(transformers.__version__) < Version("5.23"):
    NOT_DENSE_EITHER["gemma2", "early exit"] = "layers of a cache that nothing has run yet are cropped"


def each_alone(model, rows, **options):
    options.pop("cache_implementation", None)
    return torch.cat([generated(model, row[None], **options) for row in rows])


@ways.EACH_FAMILY_AND_SETTING
@pytest.mark.parametrize("way", GENERATION)
def test_generation_is_dense_with_a_full_budget_and_that_of_the_row_alone_with_a_small_one(
    family, way, settings, no_streams
):
    if (family, way) in NOT_DENSE_EITHER:
        pytest.skip(f"transformers cannot: {NOT_DENSE_EITHER[family, way]}")
    # The hole of the last row stands before its last token, which is no right padding.
    rows, options = [*rows_of(3, shortest=40), random_ids(10)], GENERATION[way]
    for model, reference in full_and_small(family, **settings):
        expected = each_alone(reference, rows, **options)
        assert torch.equal(generated(model, left_padded(rows), **options), expected)
        beside = generated(reference, with_holes(rows), **options) if slides(family) else expected
        assert torch.equal(generated(model, with_holes(rows), **options), beside)
    never = small(family, **settings | {"key_index": "never"})
    assert torch.equal(generated(never, left_padded(rows), **options), expected)


def test_what_an_assistant_proposes_changes_no_token(family):
    proposals = [
        {"assistant_model": tiny_model("llama")},
        {"assistant_model": small()},
        {"prompt_lookup_num_tokens": 3},
    ]
    if (family, "early exit") not in NOT_DENSE_EITHER:
        proposals.append({"assistant_early_exit": 1})
    for ids in (random_ids(1, 40), random_ids(1, 9).repeat(1, 4)):  # and where there is something to look up
        for model, reference in full_and_small(family, key_index="always"):
            expected = generated(reference, ids)
            for how in proposals:
                assert torch.equal(generated(model, ids, **how), expected)
    assert torch.equal(generated(tiny_model("llama"), ids), generated(tiny_model("llama"), ids, assistant_model=model))


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
def test_a_chat_goes_on_with_its_cache_over_turns_padded_each_on_its_own(selection):
    model = small(selection=selection, block_size=16)
    first, second = rows_of(3, shortest=30), rows_of(3, shortest=21, step=3)
    turn, padded, cache = left_padded(first), left_padded(second), DynamicCache()
    answer = generated(model, turn, past_key_values=cache)
    ids = torch.cat((turn["input_ids"], answer, padded["input_ids"]), 1)
    mask = torch.cat((turn["attention_mask"], torch.ones_like(answer), padded["attention_mask"]), 1)
    found = generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
    assert torch.equal(found, each_alone(model, map(torch.cat, zip(first, answer, second, strict=True))))


class InEightBits(QuantizedLayer):
    """A layer of a quantised cache that needs no other package."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.float8_e4m3fn)

    def _dequantize(self, tensor):
        return tensor.float()


def test_a_quantised_cache_gives_the_logits_of_dense_over_the_same_cache():
    pieces, logits = random_ids(2, 48).split([40] + [1] * 8, 1), []
    for model in (tiny_model("llama"), full(), small(key_index="always")):
        cache = Cache(layers=[InEightBits(residual_length=4) for _ in range(3)])
        with torch.inference_mode():
            logits.append(torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1))
    assert_close(logits[1], logits[0])
    assert not torch.allclose(logits[2], logits[0], atol=1e-3)
    assert ways.attended_fraction(model) < 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generating_after_right_padding_is_refused_as_it_would_leave_a_hole(options):
    with pytest.raises(UnsupportedMaskError, match=r"holes.*to generate, to the left"):
        generated(small(), ways.right_padded(rows_of(3)), **options)


@pytest.mark.parametrize("new_cache", [ways.dynamic_cache, ways.static_cache])
@pytest.mark.parametrize("cut", [100, 117, 118, 149])
def test_a_piece_of_at_most_32_tokens_that_continues_a_cache_decodes_and_a_longer_one_is_prefill(cut, new_cache):
    dense, ids = tiny_model("llama"), random_ids(1, 150)
    model = patch_model(tiny_model("llama"), *ways.SMALL, prefill="dense", decode="topk")
    with torch.inference_mode():
        expected, found = [], []
        for each, results in ((dense, expected), (model, found)):
            cache = new_cache(model.config)
            results.extend(each(piece, past_key_values=cache).logits for piece in (ids[:, :cut], ids[:, cut:]))
    assert_close(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=2e-5, rtol=0) == (150 - cut > MAX_DECODE_QUERIES)

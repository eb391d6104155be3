"""The key index of a cache: dropped when the cache changes behind its back, kept in its reserve, saved as nothing.

``test_cache_sequences.py`` drives caches at random.
"""

import contextlib
import copy
import io
import pickle
import pickletools
import zipfile
from functools import partial

import pytest
import torch
from test_cache_sequences import assert_equals_fresh
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from ways import BLOCKS, SETTINGS, TOPK, assert_close

from nc_patch import forget_index, patch_model, patched, unpatch_model
from nc_patch.cache import layer_cache
from nc_patch.ops.problem import Problem

OPTIONS = {
    "topk": SETTINGS["topk by codes"],
    "block": BLOCKS,
    "tail": TOPK | {"key_index": "always"},
}
EACH_INDEX = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def indexed_model(selection="topk", **options):
    return patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS[selection] | options)


@torch.no_grad()
def run(model, cache, ids, *lengths):
    """Logits of the pieces of ids ``[B, L]``, one after the other."""
    return [model(piece, past_key_values=cache).logits for piece in ids.split(lengths, 1)]


def test_keys_written_in_inference_mode_need_forget_index():
    model, ids, cache = indexed_model(), random_ids(1, 60), DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.layers[0].keys.mul_(0.5)
        forget_index(cache)
        assert all(not layer.nc_indexes for layer in cache.layers)
        model(ids[:, -1:], past_key_values=cache)
        assert_equals_fresh(cache.layers[0].nc_indexes["codes"], cache.layers[0], 61)
        forget_index(EncoderDecoderCache(cache, DynamicCache()))
        assert all(not layer.nc_indexes for layer in cache.layers)


@pytest.mark.parametrize("inference", [(1, 1, 0, 1, 0), (0, 1, 1, 0, 0)], ids=str)
@EACH_INDEX
def test_a_cache_goes_in_and_out_of_inference_mode(options, inference):
    model, ids, logits = patch_model(tiny_model("llama"), 2.0, 0.5, **options), random_ids(2, 71), []
    for modes in (inference, (0,) * 5):
        cache = DynamicCache()
        for mode, piece in zip(modes, ids.split([50, 1, 1, 18, 1], 1), strict=True):
            with torch.inference_mode() if mode else torch.no_grad():
                logits.append(model(piece, past_key_values=cache).logits)
        assert all(layer.nc_indexes for layer in cache.layers)
    assert all(map(torch.equal, logits[:5], logits[5:]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@EACH_INDEX
def test_an_index_that_missed_calls_is_not_trusted(options, static, mode):
    """Calls of an unpatched model, by another selection, and with a gradient, among those that keep one."""
    model, ids, logits = tiny_model("llama"), random_ids(1, 80), []
    for use in ({}, {"key_index": "never"}):
        cache, found = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache(), []
        calls = (None, options, None, options, {"decode": "window"}, options, "with a gradient", options)
        for call, piece in zip(calls, ids[:, :79].split([20, 20, 32, 1, 1, 1, 1, 3], 1), strict=True):
            settings = call if isinstance(call, dict) else options
            patches = contextlib.nullcontext() if call is None else patched(model, 2.0, 0.5, **settings | use)
            with patches, torch.enable_grad() if call == "with a gradient" and mode is torch.no_grad else mode():
                found.append(model(piece, past_key_values=cache).logits.detach())
        assert bool(use) or cache.layers[0].nc_indexes
        logits.append(torch.cat(found, 1))
    assert_close(*logits)


@pytest.mark.parametrize("changed", ["keys", "values"])
@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@EACH_INDEX
@torch.no_grad()
def test_an_index_is_made_anew_where_keys_or_values_were_changed(options, static, in_place, changed):
    model, ids, logits = patch_model(tiny_model("llama"), 2.0, 0.5, **options), random_ids(1, 82), []
    for fresh in (False, True):
        cache, found = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache(), []
        for piece in ids.split([80, 1, 1], 1):
            found.append(model(piece, past_key_values=cache).logits[:, -1])
            for layer in cache.layers:
                held = getattr(layer, changed)
                setattr(layer, changed, held.mul_(-1.5) if in_place else held * -1.5)
            if fresh:
                forget_index(cache)
        logits.append(torch.stack(found))
    assert_close(*logits)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@EACH_INDEX
@torch.no_grad()
def test_an_index_is_made_anew_where_sequences_begin_elsewhere_than_before(options, static):
    """Rows that a later mask begins later, or earlier, and a cache that goes on from nothing with other padding."""
    model, ids, logits = patch_model(tiny_model("llama"), 2.0, 0.5, **options), random_ids(2, 66), []
    for fresh in (False, True):
        cache, found = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache(), []
        for padding, lengths in ((0, [60, 1, 1]), (10, [1, 1]), (3, [1, 1]), (7, [50, 1, 1])):
            first = int(cache.get_seq_length())
            if len(lengths) == 3 and first:
                cache.reset() if static else cache.crop(-first)
                first = 0
            for piece in ids[:, first : first + sum(lengths)].split(lengths, 1):
                first += piece.shape[1]
                mask = torch.ones(2, first, dtype=torch.long)
                mask[0, :padding] = 0
                if fresh:
                    forget_index(cache)
                found.append(model(piece, attention_mask=mask, past_key_values=cache).logits[:, -1])
        assert cache.layers[0].nc_indexes
        logits.append(torch.stack(found))
    assert_close(*logits)


def _named_in(content):
    """What a pickle names; ``torch.save`` packs it into an archive."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return {str(argument) for _, argument, _ in pickletools.genops(content)}


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_saved_cache_is_of_transformers_alone_and_goes_on_where_it_was_patched_or_not(static, way):
    model, ids, file = indexed_model(), random_ids(1, 60), io.BytesIO()
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
    run(model, cache, ids[:, :50], 50)
    (pickle.dump if way == "pickle" else torch.save)(cache, file)
    assert not any("nc_" in name for name in _named_in(file.getvalue()))
    load = pickle.load if way == "pickle" else partial(torch.load, weights_only=False)
    found, dense = (load(io.BytesIO(file.getvalue())) for _ in range(2))
    plain = DynamicCache()
    assert_close(run(model, cache, ids[:, 50:], *[1] * 10), run(model, found, ids[:, 50:], *[1] * 10))
    assert found.layers[0].nc_indexes
    run(patch_model(model, 1.0, 0.7, **OPTIONS["topk"] | {"key_index": "never"}), plain, ids[:, :50], 50)
    unpatch_model(model)
    assert_close(run(model, dense, ids[:, 50:], 10), run(model, plain, ids[:, 50:], 10))


HEADS, DIM = 2, 8


def append(layer, new):
    """What a call of attention does to a layer and its index."""
    keys, values = layer.update(new, new)
    end = torch.arange(keys.shape[2] - new.shape[2], keys.shape[2]) + 1
    visible = torch.stack((torch.zeros_like(end), end), -1)[None].int()
    call = Problem(new, keys, values, visible, visible[..., 0], visible.new_empty(0), scale=1.0)
    layer.nc_update(call, "codes", 16, "torch")
    layer.nc_settle()


def test_an_index_that_grows_a_key_at_a_time_keeps_within_its_reserve():
    layer, new = layer_cache(DynamicCache(), 0).layer, torch.randn(1, 1, 1, 16)
    for step in range(6000):
        if step % 2000 == 1999:
            layer.crop(-1500)
        append(layer, new)
    index, longest = layer.nc_indexes["codes"], 2000 + 2 * 500
    assert index.capacity <= longest + max(128, longest // 64)
    assert index.nbytes() <= index.capacity * (16 + 8) + 2 * 16 * 4 + 4


@pytest.mark.parametrize("first_in_inference_mode", [True, False])
def test_room_for_keys_to_come_is_shared_by_nobody(first_in_inference_mode):
    layer, pieces = layer_cache(DynamicCache(), 0).layer, [torch.randn(2, HEADS, 1 + i % 3, DIM) for i in range(40)]
    with torch.inference_mode(first_in_inference_mode), torch.no_grad():
        for piece in pieces[:20]:
            layer.update(piece, -piece)
    with torch.no_grad():
        copies = [copy.copy(layer), copy.deepcopy(layer)]
        layer.update(pieces[20], -pieces[20])
        for other in copies:
            other.update(pieces[30], -pieces[30])
        held, before = layer.keys, layer.keys.clone()
        layer.crop(-5)
        for piece in pieces[21:]:
            layer.update(piece, -piece)
    assert torch.equal(held, before)
    expected = torch.cat((torch.cat(pieces[:21], 2)[:, :, :-5], *pieces[21:]), 2)
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, -expected)
    for other in copies:
        assert torch.equal(other.keys, torch.cat((*pieces[:20], pieces[30]), 2))


def test_blocks_decode_the_same_where_a_gradient_is_recorded_and_refuse_to_give_it():
    model, ids, results = indexed_model("block"), random_ids(1, 60), []
    for recorded in (False, True):
        cache = DynamicCache()
        run(model, cache, ids[:, :-1], 59)
        with torch.set_grad_enabled(recorded):
            results.append(model(ids[:, -1:], past_key_values=cache).logits)
    assert_close(results[0], results[1].detach())
    with pytest.raises(RuntimeError, match=r"has no gradient. Train on whole sequences"):
        results[1].sum().backward()

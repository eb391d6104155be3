"""The key index follows its cache through everything, and is dropped when the cache changes behind its back."""

import copy
import io
import pickle
import pickletools
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from nc_patch import KeyIndex, forget_index, patch_model, patched, unpatch_model
from nc_patch.cache import IndexedDynamicLayer, IndexedStaticLayer, layer_cache
from nc_patch.ops.problem import Problem
from nc_patch.selections.topk.codes import KeyCodes, encode_keys

HEADS, DIM, BLOCK = 2, 8, 16


def call_of(key, value, visible, origin) -> Problem:
    """What an index needs to know of a call of attention."""
    query = key[:, :, -visible.shape[1] :]
    return Problem(query, key, value, visible, origin, visible.new_empty(0), scale=1.0)


def assert_equals_fresh(index: KeyIndex, layer: CacheLayerMixin, lengths: list[int]) -> None:
    """The index equals one built from the keys: bit for bit where a key or a whole page decides, to rounding else."""
    keys = layer.keys
    if index.kind == "codes":
        held = KeyCodes(*index.tensors())
        fresh = encode_keys(keys, held.center, held.spread)
        for b, length in enumerate(lengths):
            for field in range(2):
                assert torch.equal(held[field][b, :, :length], fresh[field][b, :, :length])
            torch.testing.assert_close(held.residual[b, :, :length], fresh[2][b, :, :length], atol=0, rtol=1e-5)
        return
    if index.kind == "means":
        fresh = KeyIndex.build(keys, "means", value=layer.values, start=index.origin, backend=index._backend)
        for b, length in enumerate(lengths):
            begin = int(index.origin[b])
            slots = [(begin + 16 * j) // 16 for j in range((length - begin) // 16)]
            for held_tensor, fresh_tensor in zip(index.tensors(), fresh.tensors(), strict=True):
                assert torch.equal(held_tensor[b, :, slots], fresh_tensor[b, :, slots])
        return
    settings = {"block_size": index.block_size, "backend": index._backend}
    fresh = KeyIndex.build(keys, "pages", start=index.origin, **settings).tensors()
    for b, length in enumerate(lengths):
        whole = (length - int(index.origin[b])) // index.block_size
        for held_tensor, fresh_tensor in zip(index.tensors(), fresh, strict=True):
            torch.testing.assert_close(held_tensor[b, :, :whole], fresh_tensor[b, :, :whole], atol=1e-6, rtol=1e-5)


class CacheMachine(RuleBasedStateMachine):
    """A cache layer driven at random, its index beside it."""

    kind: str

    @initialize(
        batch=st.integers(1, 3),
        length=st.integers(1, 60),
        static=st.booleans(),
        backend=st.sampled_from(("torch", "cpu")),
        seed=st.integers(0, 9999),
    )
    def prefill(self, batch, length, static, backend, seed):
        self.backend = backend
        self.generator = torch.Generator().manual_seed(seed)
        self.static = static
        self.cache = StaticCache(config=tiny_model("llama").config, max_cache_len=400) if static else DynamicCache()
        self.layer = layer_cache(self.cache, 0).layer
        assert type(self.layer) is (IndexedStaticLayer if static else IndexedDynamicLayer)
        self.batch, self.length = batch, 0
        self.start = torch.randint(0, length, (batch,), generator=self.generator)
        self.append(length)

    def append(self, count):
        new = torch.randn(self.batch, HEADS, count, DIM, generator=self.generator)
        new_values = new.flip(-1)
        found = layer_cache(self.cache, 0)
        assert found.layer is self.layer
        keys, values = self.layer.update(new, new_values)
        self.length += count
        end = torch.arange(self.length - count + 1, self.length + 1).expand(self.batch, -1)
        start = self.start[:, None].expand_as(end)
        visible = torch.stack((start, torch.maximum(start, end)), -1).int()
        self.layer.nc_update(call_of(keys, values, visible, start.int()), self.kind, BLOCK, self.backend)
        self.layer.nc_settle()

    @rule(count=st.integers(1, 20))
    def update(self, count):
        if self.length + count <= 400:
            self.append(count)

    @precondition(lambda self: not self.static)
    @rule(share=st.floats(0, 1))
    def crop(self, share):
        removed = int(share * (self.length - int(self.start.max()) - 1))
        if removed > 0:
            self.cache.crop(-removed)
            self.length -= removed

    @rule(data=st.data())
    def reorder(self, data):
        order = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        self.cache.reorder_cache(order)
        self.start = self.start[order]

    @precondition(lambda self: not self.static)
    @rule(data=st.data())
    def select(self, data):
        kept = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3)))
        self.cache.batch_select_indices(kept)
        self.start, self.batch = self.start[kept], len(kept)

    @precondition(lambda self: not self.static and self.batch <= 2)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.start, self.batch = self.start.repeat_interleave(2), 2 * self.batch

    @rule(length=st.integers(1, 40))
    def reset(self, length):
        self.cache.reset()
        assert not self.layer.nc_indexes
        self.length, self.start = 0, torch.zeros(self.batch, dtype=torch.int64)
        self.append(length)

    @rule()
    def copy(self):
        self.cache = copy.deepcopy(self.cache)
        self.layer = self.cache.layers[0]
        assert self.layer.nc_indexes

    @rule()
    def write_behind_its_back(self):
        self.layer.keys.mul_(2.0)
        self.layer.nc_check()
        assert not self.layer.nc_indexes
        self.append(1) if self.length < 400 else self.reset(3)

    @invariant()
    def index_equals_a_fresh_one(self):
        if hasattr(self, "layer"):
            assert self.layer.nc_indexes
            assert_equals_fresh(self.layer.nc_indexes[self.kind], self.layer, [self.length] * self.batch)


class CodesMachine(CacheMachine):
    kind = "codes"


class PagesMachine(CacheMachine):
    kind = "pages"


class MeansMachine(CacheMachine):
    kind = "means"


for machine in (CodesMachine, PagesMachine, MeansMachine):
    machine.TestCase.settings = settings(
        max_examples=40,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
TestCodes, TestPages, TestMeans = CodesMachine.TestCase, PagesMachine.TestCase, MeansMachine.TestCase


OPTIONS = {
    "topk": {"selection": "topk", "key_index": "always"},
    "block": {"selection": "block", "block_size": 16},
    "tail": {"selection": "topk", "key_index": "always", "tail": "mean"},
}


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("selection", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"padded": True}],
    ids=["dynamic", "static", "beams", "left-padding"],
)
def test_generation_is_the_same_with_the_index_and_without(family, selection, options):
    model, ids = tiny_model(family), random_ids(2, 90)
    if options.pop("padded", False):
        mask = torch.ones_like(ids)
        mask[0, :30] = 0
        options["attention_mask"] = mask
    results = {}
    for use in ("always", "never"):
        patch_model(model, 1.0, 0.7, **OPTIONS[selection] | {"key_index": use})
        results[use] = generated(model, ids, **options)
    assert torch.equal(results["always"], results["never"])


def test_assisted_generation_gives_the_tokens_of_plain_generation():
    # With blocks it need not: the first call holds the prompt and what is proposed, and chooses for whole query blocks.
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["topk"]), random_ids(1, 90)
    plain = generated(model, ids)
    assert torch.equal(plain, generated(model, ids, prompt_lookup_num_tokens=4))
    assert torch.equal(plain, generated(model, ids, assistant_model=tiny_model("llama")))


@pytest.mark.parametrize("selection", OPTIONS)
def test_a_cache_that_the_user_passes_in_is_used_and_goes_on(selection):
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS[selection]), random_ids(1, 80)
    plain = generated(model, ids)
    for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=120)):
        with torch.no_grad():
            model(ids[:, :50], past_key_values=cache)
        assert all(layer.nc_indexes for layer in cache.layers)
        prefix = copy.deepcopy(cache)
        assert torch.equal(generated(model, ids, past_key_values=cache), plain)
        assert torch.equal(generated(model, ids, past_key_values=prefix), plain)


def test_a_cache_filled_by_an_unpatched_model_is_indexed_when_it_is_met():
    model, ids = tiny_model("llama"), random_ids(1, 80)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        patch_model(model, 1.0, 0.7, **OPTIONS["topk"])
        with_index = model(ids[:, -1:], past_key_values=cache).logits
        assert cache.layers[0].nc_indexes
        patch_model(model, 1.0, 0.7, key_index="never", selection="topk")
        torch.testing.assert_close(with_index, model(ids[:, -1:], past_key_values=twin).logits, atol=1e-5, rtol=0)


def test_keys_written_in_inference_mode_need_forget_index():
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["topk"]), random_ids(1, 60)
    cache = DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.layers[0].keys.mul_(0.5)
        forget_index(cache)
        assert all(not layer.nc_indexes for layer in cache.layers)
        model(ids[:, -1:], past_key_values=cache)
        assert_equals_fresh(cache.layers[0].nc_indexes["codes"], cache.layers[0], [61])
        both = EncoderDecoderCache(cache, DynamicCache())
        forget_index(both)
        assert all(not layer.nc_indexes for layer in cache.layers)


@pytest.mark.parametrize("inference", [(1, 1, 0, 1, 0), (0, 1, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("selection", OPTIONS)
def test_a_cache_goes_in_and_out_of_inference_mode(selection, inference):
    model, ids, logits = patch_model(tiny_model("llama"), 2.0, 0.5, **OPTIONS[selection]), random_ids(2, 71), []
    for modes in (inference, (0,) * 5):
        cache = DynamicCache()
        for mode, piece in zip(modes, ids.split([50, 1, 1, 18, 1], 1), strict=True):
            with torch.inference_mode() if mode else torch.no_grad():
                logits.append(model(piece, past_key_values=cache).logits)
        assert all(layer.nc_indexes for layer in cache.layers)
    assert all(map(torch.equal, logits[:5], logits[5:]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("selection", OPTIONS)
def test_an_index_that_missed_the_steps_of_an_unpatched_model_is_not_trusted(selection, static, mode):
    model, ids, logits = tiny_model("llama"), random_ids(1, 80), []
    for forget in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
        with mode():
            with patched(model, 2.0, 0.5, **OPTIONS[selection]):
                model(ids[:, :40], past_key_values=cache)
            model(ids[:, 40:72], past_key_values=cache)
            if forget:
                forget_index(cache)
            with patched(model, 2.0, 0.5, **OPTIONS[selection]):
                logits.append([model(step, past_key_values=cache).logits for step in ids[:, 72:].split(1, 1)])
    assert all(map(torch.equal, *logits))


def test_settings_of_another_kind_build_the_index_again():
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["topk"]), random_ids(1, 60)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for selection, kind in (("block", "pages"), ("topk", "codes")):
            patch_model(model, 1.0, 0.7, **OPTIONS[selection])
            model(ids[:, -1:], past_key_values=cache)
            assert set(cache.layers[0].nc_indexes) - {"means"} == {kind}


def test_an_indexed_cache_pickles_and_serves_an_unpatched_model():
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["topk"]), random_ids(1, 60)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        shallow = copy.copy(cache.layers[0])
        assert shallow.nc_indexes["codes"] is not cache.layers[0].nc_indexes["codes"]
        assert copy.deepcopy(cache).layers[0].nc_indexes
        cache = pickle.load(io.BytesIO(pickle.dumps(cache)))
        patch_model(model, 1.0, 0.7, key_index="never", selection="topk")
        plain = DynamicCache()
        model(ids[:, :50], past_key_values=plain)
        unpatch_model(model)
        cache.crop(-10)
        expected, found = (model(ids[:, 50:51], past_key_values=c).logits for c in (plain, cache))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_a_saved_cache_is_of_transformers_alone_and_goes_on_where_it_was(make, way):
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["topk"]), random_ids(1, 60)
    cache = make() if make is DynamicCache else make(config=model.config, max_cache_len=64)
    file = io.BytesIO()
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
        (pickle.dump if way == "pickle" else torch.save)(cache, file)
        named = {str(argument) for _, argument, _ in pickletools.genops(_pickled(file, way))}
        assert not any("nc_" in name for name in named)
        file.seek(0)
        found = pickle.load(file) if way == "pickle" else torch.load(file, weights_only=False)
        steps = [[model(ids[:, n : n + 1], past_key_values=c).logits for n in range(50, 60)] for c in (cache, found)]
    assert found.layers[0].nc_indexes
    torch.testing.assert_close(*(torch.cat(logits) for logits in steps))


def _pickled(file, way):
    """The pickle in a file, which ``torch.save`` packs into an archive."""
    if way == "pickle":
        return file.getvalue()
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def test_offloading_moves_the_index_when_attention_is_done_with_it():
    cache = DynamicCache()
    layer = layer_cache(cache, 0).layer
    new = torch.randn(1, HEADS, 20, DIM)
    keys, values = layer.update(new, new)
    visible = torch.tensor([[[0, i + 1] for i in range(20)]], dtype=torch.int32)
    layer.nc_update(call_of(keys, values, visible, visible[..., 0]), "codes", BLOCK, "torch")
    layer.nc_settle()
    layer.offload()
    layer.nc_settle()
    assert layer.nc_indexes["codes"].tensors()[0].device == layer.keys.device
    layer.prefetch()
    layer.nc_check()
    assert layer.nc_indexes


def test_an_index_that_grows_a_key_at_a_time_keeps_within_its_reserve():
    layer = layer_cache(DynamicCache(), 0).layer
    new = torch.randn(1, 1, 1, 16)
    for step in range(10_000):
        if step % 2000 == 1999:
            layer.crop(-1500)
        keys, values = layer.update(new, new)
        visible = torch.tensor([[[0, keys.shape[2]]]], dtype=torch.int32)
        layer.nc_update(call_of(keys, values, visible, visible[..., 0]), "codes", BLOCK, "torch")
        layer.nc_settle()
    length, longest = layer.keys.shape[2], 2000 + 4 * 500
    assert layer.nc_indexes["codes"].capacity <= longest + max(128, longest // 64), length
    assert layer.nc_indexes["codes"].nbytes() <= layer.nc_indexes["codes"].capacity * (16 + 8) + 2 * 16 * 4 + 4


@pytest.mark.parametrize("first_in_inference_mode", [True, False])
def test_room_for_keys_to_come_is_shared_by_nobody(first_in_inference_mode):
    layer, plain = layer_cache(DynamicCache(), 0).layer, DynamicCache()
    pieces = [torch.randn(2, HEADS, 1 + i % 3, DIM) for i in range(40)]
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
        expected = torch.cat(pieces[:21], 2)[:, :, :-5]
        for piece in pieces[21:]:
            plain.update(piece, -piece, 0)
        expected = torch.cat((expected, plain.layers[0].keys), 2)
        assert torch.equal(layer.keys, expected)
        assert torch.equal(layer.values, -expected)
        for other in copies:
            assert torch.equal(other.keys, torch.cat((*pieces[:20], pieces[30]), 2))


def test_an_index_that_missed_a_call_is_not_trusted():
    model, ids = tiny_model("llama"), random_ids(1, 60)
    cache, plain = DynamicCache(), DynamicCache()
    steps = [
        {"key_index": "always"},
        {"decode": "window", "key_index": "always"},
        {"key_index": "always"},
        {"key_index": "always", "with_gradient": True},
        {"key_index": "always"},
    ]
    for i, options in enumerate(steps):
        with torch.set_grad_enabled(options.pop("with_gradient", False)):
            new = ids[:, :50] if i == 0 else ids[:, 49 + i : 50 + i]
            patch_model(model, 1.0, 0.7, **options)
            found = model(new, past_key_values=cache).logits.detach()
            patch_model(model, 1.0, 0.7, **options | {"key_index": "never"})
            expected = model(new, past_key_values=plain).logits.detach()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_blocks_decode_the_same_where_a_gradient_is_recorded_and_refuse_to_give_it():
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **OPTIONS["block"]), random_ids(1, 60)
    results = []
    for recorded in (False, True):
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        with torch.set_grad_enabled(recorded):
            results.append(model(ids[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(results[0], results[1].detach(), atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match=r"has no gradient. Train on whole sequences"):
        results[1].sum().backward()

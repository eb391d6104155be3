"""Random sequences of everything that a cache goes through: its index equals a new one, and models notice nothing.

``Layer`` holds the index of a single layer against one that is built anew from the keys; ``Models`` holds a whole
model with an index to the same model without one.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from nc_patch import KeyIndex, forget_index, patch_model
from nc_patch.cache import IndexedDynamicLayer, IndexedStaticLayer, KeyIndexMixin, layer_cache
from nc_patch.ops.problem import Problem
from nc_patch.selections.topk.codes import KeyCodes, encode_keys

HEADS, DIM, BLOCK, LONGEST = 2, 8, 16, 400
OPTIONS = {
    "topk": {"selection": "topk", "tail": "drop"},
    "tail": {"selection": "topk", "tail": "mean"},
    "block": {"selection": "block", "block_size": 16},
    "window": {"selection": "window"},
    "blocks-then-topk": {"prefill": "block", "block_size": 16, "tail": "drop"},
    "topk-then-blocks": {"prefill": "topk", "decode": "block", "block_size": 16},
}


def call_of(key, value, visible, origin) -> Problem:
    """What an index needs to know of a call of attention."""
    query = key[:, :, -visible.shape[1] :]
    return Problem(query, key, value, visible, origin, visible.new_empty(0), scale=1.0)


def assert_equals_fresh(index: KeyIndex, layer: CacheLayerMixin, lengths: list[int]) -> None:
    """The index equals one built from the keys: bit for bit where a key or a whole page decides, to rounding else."""
    keys, origins = layer.keys, index.origin.tolist()
    if index.kind == "codes":
        held = KeyCodes(*index.tensors())
        fresh = encode_keys(keys, held.center, held.spread)
        for b, length in enumerate(lengths):
            for field in range(2):
                assert torch.equal(held[field][b, :, :length], fresh[field][b, :, :length])
            torch.testing.assert_close(held.residual[b, :, :length], fresh[2][b, :, :length], atol=0, rtol=1e-5)
        return
    if index.kind == "means":
        given, atol, rtol = {"value": layer.values}, 0.0, 0.0
    else:
        given, atol, rtol = {"block_size": index.block_size}, 1e-6, 1e-5
    fresh = KeyIndex.build(keys, index.kind, start=index.origin, backend=index._backend, **given).tensors()
    for b, (length, begin) in enumerate(zip(lengths, origins, strict=True)):
        # Means lie at the places of their keys, pages one after the other.
        slots = [(begin + 16 * j) // 16 if index.kind == "means" else j for j in range((length - begin) // 16)]
        for held_tensor, fresh_tensor in zip(index.tensors(), fresh, strict=True):
            torch.testing.assert_close(held_tensor[b, :, slots], fresh_tensor[b, :, slots], atol=atol, rtol=rtol)


class Caches(RuleBasedStateMachine):
    """What happens to the caches of either machine: ``changed`` says that rows moved, and how."""

    static = False
    batch, length, padding = 0, 0, 0

    def change(self, change):
        raise NotImplementedError

    def changed(self, rows):
        raise NotImplementedError

    @rule(data=st.data())
    def reorder(self, data):
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        self.change(lambda cache: cache.reorder_cache(rows))
        self.changed(rows)

    @precondition(lambda self: not self.static)
    @rule(data=st.data())
    def select(self, data):
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3)))
        self.change(lambda cache: cache.batch_select_indices(rows))
        self.changed(rows)

    @precondition(lambda self: not self.static and self.batch <= 2)
    @rule()
    def repeat(self):
        self.change(lambda cache: cache.batch_repeat_interleave(2))
        self.changed(torch.arange(self.batch).repeat_interleave(2))

    @precondition(lambda self: not self.static)
    @rule(share=st.floats(0, 1))
    def crop(self, share):
        removed = int(share * (self.length - self.padding - 1))
        if removed > 0:
            self.change(lambda cache: cache.crop(-removed))
            self.length -= removed


class Layer(Caches):
    """A cache layer, its index beside it."""

    kind = "codes"

    @initialize(
        batch=st.integers(1, 3),
        length=st.integers(1, 60),
        static=st.booleans(),
        backend=st.sampled_from(("torch", "cpu")),
        seed=st.integers(0, 9999),
    )
    def prefill(self, batch, length, static, backend, seed):
        self.backend, self.static, self.batch = backend, static, batch
        self.generator = torch.Generator().manual_seed(seed)
        config = tiny_model("llama", num_hidden_layers=1).config
        self.cache = StaticCache(config=config, max_cache_len=LONGEST) if static else DynamicCache()
        self.layer = layer_cache(self.cache, 0).layer
        assert type(self.layer) is (IndexedStaticLayer if static else IndexedDynamicLayer)
        self.start = torch.randint(0, length, (batch,), generator=self.generator)
        self.append(length)

    def append(self, count):
        new = torch.randn(self.batch, HEADS, count, DIM, generator=self.generator)
        assert layer_cache(self.cache, 0).layer is self.layer
        keys, values = self.layer.update(new, new.flip(-1))
        self.length, self.padding = self.length + count, int(self.start.max())
        end = torch.arange(self.length - count + 1, self.length + 1).expand(self.batch, -1)
        start = self.start[:, None].expand_as(end)
        visible = torch.stack((start, torch.maximum(start, end)), -1).int()
        self.layer.nc_update(call_of(keys, values, visible, start.int()), self.kind, BLOCK, self.backend)
        self.layer.nc_settle()

    def change(self, change):
        change(self.cache)

    def changed(self, rows):
        self.start, self.batch = self.start[rows], len(rows)

    @rule(count=st.integers(1, 20))
    def update(self, count):
        if self.length + count <= LONGEST:
            self.append(count)

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
        self.append(1) if self.length < LONGEST else self.reset(3)

    @invariant()
    def index_equals_a_fresh_one(self):
        if hasattr(self, "layer"):
            assert self.layer.nc_indexes
            assert_equals_fresh(self.layer.nc_indexes[self.kind], self.layer, [self.length] * self.batch)


class Models(Caches):
    """Two caches of one model: the calls of one keep an index, those of the other none."""

    family = "llama"

    @initialize(
        batch=st.integers(1, 3),
        length=st.integers(1, 70),
        padded=st.booleans(),
        use=st.sampled_from(["always", "auto"]),
        options=st.sampled_from(sorted(OPTIONS)),
        seed=st.integers(0, 999),
    )
    def start(self, batch, length, padded, use, options, seed):
        torch.manual_seed(seed)
        self.model = tiny_model(self.family)
        self.use, self.options, self.batch = use, OPTIONS[options], batch
        config = self.model.config
        self.caches = [StaticCache(config, max_cache_len=LONGEST) if self.static else DynamicCache() for _ in range(2)]
        self.begin_anew(length, padded)

    def begin_anew(self, length, padded):
        # Left padding: the first row has no token of the sequence at its first places.
        self.mask = torch.ones(self.batch, 0, dtype=torch.long)
        self.length, self.padding = 0, length // 2 if padded else 0
        self.call(length)

    @torch.no_grad()
    def call(self, count):
        new_mask = torch.ones(self.batch, count, dtype=torch.long)
        if self.length == 0:
            new_mask[0, : self.padding] = 0
        self.mask = torch.cat((self.mask[:, : self.length], new_mask), 1)
        self.length += count
        ids, logits = random_ids(self.batch, count), []
        for use, cache in zip((self.use, "never"), self.caches, strict=True):
            patch_model(self.model, 1.0, 0.7, **self.options, key_index=use)
            logits.append(self.model(ids, attention_mask=self.mask, past_key_values=cache).logits[new_mask.bool()])
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)

    def change(self, change):
        for cache in self.caches:
            change(cache)

    def changed(self, rows):
        self.mask, self.batch = self.mask[rows], len(rows)

    @precondition(lambda self: self.length < LONGEST - 60)
    @rule(pieces=st.sampled_from([1, 17]) | st.lists(st.integers(2, 50), min_size=1, max_size=1))
    def go_on(self, pieces):
        for count in pieces if isinstance(pieces, list) else [1] * pieces:
            self.call(count)

    @rule(options=st.sampled_from(sorted(OPTIONS)))
    def select_otherwise(self, options):
        self.options = OPTIONS[options]

    @rule(length=st.integers(1, 40), padded=st.booleans())
    def reset(self, length, padded):
        self.change(lambda cache: cache.reset())
        self.begin_anew(length, padded)

    @rule()
    def forget(self):
        forget_index(self.caches[0])

    @rule()
    def copy(self):
        self.caches = copy.deepcopy(self.caches)

    @precondition(lambda self: not self.static)
    @rule()
    def offload_and_write_behind_its_back(self):
        for layer in (layer for cache in self.caches for layer in cache.layers):
            layer.offload()
            layer.prefetch()
            layer.keys.mul_(1.5)

    def teardown(self):
        if hasattr(self, "caches"):
            assert all(isinstance(layer, KeyIndexMixin) for layer in self.caches[0].layers)


def explore(machine: type[Caches], examples: int, steps: int, **attributes: object) -> None:
    run_state_machine_as_test(
        type("Machine", (machine,), attributes),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            # Shrinking a sequence of model calls takes longer than reading it.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("kind", ["codes", "pages", "means"])
def test_an_index_equals_one_that_is_built_anew_whatever_its_cache_goes_through(kind):
    explore(Layer, examples=25, steps=20, kind=kind)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_random_sequences_give_the_same_with_an_index_and_without(static):
    explore(Models, examples=8, steps=10, static=static)


@pytest.mark.wide
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3"])
def test_long_random_sequences_give_the_same_with_an_index_and_without(family, static):
    if static and family in ("gemma2", "gpt_oss"):
        pytest.skip("sliding layers of a static cache keep no index")
    explore(Models, examples=40, steps=40, family=family, static=static)

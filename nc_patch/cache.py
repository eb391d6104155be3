"""Cache layers of ``transformers`` that carry a key index, and keep it right through everything a cache goes through.

They take the place of the layers of a cache that a patched model meets, and serve any other model as before. An index
is trusted only while its keys and values are the very ones that it was last seen with, unchanged; otherwise it is
dropped, and built again when attention runs.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from nc_patch.config import NCConfig
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.problem import Problem
from nc_patch.selections.index import LAYOUTS, KeyIndex, reserve_for


class LayerCache(NamedTuple):
    """The cache layer that a call's keys come from, if it can carry an index, and whether it held keys before."""

    layer: "KeyIndexMixin | None"
    started: bool


NO_CACHE = LayerCache(None, False)


def _state(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Size, int | None, int | None]:
    """The shape of keys, and how often they and their values were written."""
    keys_written = None if keys.is_inference() else keys._version
    return keys.shape, keys_written, None if values.is_inference() else values._version


class KeyIndexMixin:
    """A cache layer with key indexes, at most one of a kind.

    In-place writes to keys and values from outside are noticed by the tensor's version, which counts neither in
    inference mode nor in a compiled graph: call ``forget_index`` after writing there.
    """

    _layer_type = None
    keys: torch.Tensor | None
    values: torch.Tensor
    # Never changed in place: the class's empty one is shared.
    nc_indexes: "dict[str, KeyIndex]" = {}  # noqa: RUF012
    # The keys and values that the indexes describe, and their state; None where some have come that no attention has
    # taken in.
    _nc_seen: "tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], tuple[Any, ...]] | None" = None
    _nc_updated: frozenset[str] = frozenset()
    # The kinds of index that have yet to take in the last keys: in a compiled graph, which cannot look whether keys are
    # those that indexes describe, this alone says it.
    nc_awaiting: tuple[str, ...] = ()
    # Where each sequence began and ended when it was last attended, see ``visibility.begins_by``; None if unknown.
    _nc_begins: "tuple[int, ...] | None" = None
    # Of which kinds no index may be kept: a model may attend keys that the layer does not hold, because it computes
    # them from what is cached, because a module stands for several layers, or because the cache has offloaded them.
    nc_never: frozenset[str] = frozenset()
    # Of a ``DynamicLayer``: memory for keys and values to come, and the views of it that the layer holds. What is there
    # may be held by others too, and is never written again: where the layer holds other views, shorter ones too, it
    # gets other memory.
    _nc_room: tuple[torch.Tensor, ...] | None = None
    # Of a ``StaticLayer``: whether it holds keys. Its length lies on the device, and is not read at every call.
    nc_filled = False

    def nc_compare(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps no index any more where the keys or values of a call of attention are not what ``update`` returned."""
        if self.keys is not key:
            self.nc_never = frozenset(LAYOUTS)
        elif self.values is not value:
            self.nc_never |= {kind for kind, layout in LAYOUTS.items() if layout.takes_values}
        if self.nc_never:
            self.nc_indexes = {kind: index for kind, index in self.nc_indexes.items() if kind not in self.nc_never}

    def nc_check(self) -> None:
        """Drops the indexes if the keys or values are not those they were made of."""
        if self.nc_indexes:
            seen, keys, values = self._nc_seen, self.keys, self.values
            same = seen is not None and keys is not None and seen[0]() is keys and seen[1]() is values
            if self.nc_awaiting or not same or seen[2] != _state(keys, values):  # type: ignore[index, arg-type]
                self.nc_forget()

    def nc_begin(self, begins: tuple[int, ...] | None) -> None:
        """Drops the indexes if sequences begin elsewhere than when they were made, from where pages are counted, or had
        padding behind them, of which indexes hold nothing.
        """
        if begins is not None:
            if self._nc_begins not in (None, begins):
                self.nc_forget()
            self._nc_begins = begins

    def nc_forget(self) -> None:
        """Drops the indexes; attention builds new ones from the keys."""
        self.nc_indexes, self._nc_seen, self.nc_awaiting = {}, None, ()

    def nc_await(self) -> None:
        """To be called before keys come: drops what has not taken in those before, as steps of other settings do."""
        if self.nc_awaiting:
            self.nc_indexes = {kind: index for kind, index in self.nc_indexes.items() if kind not in self.nc_awaiting}
        self.nc_awaiting = tuple(self.nc_indexes)

    def nc_update(self, problem: Problem, kind: str, block_size: int, backend: str, later: bool = False) -> KeyIndex:
        """The index of one kind, with the keys of this call; with ``later`` it has room, and who asks takes them in."""
        key, compiling = problem.key, torch.compiler.is_compiling()
        index = self.nc_indexes.get(kind)
        if index is None or index.block_size != block_size or not index.fits(key):
            index = _built(problem, kind, block_size, backend)
            if isinstance(self, StaticLayer):
                for tensor in index.everything():
                    torch._dynamo.mark_static_address(tensor)
        else:
            if not compiling and index.is_frozen():
                index = index.clone()
            if later:
                index.make_room(key.shape[2])
            else:
                index.extend(key, problem.visible.shape[1], problem.visible[..., 1].amax(-1), problem.value)
        if index is not self.nc_indexes.get(kind):
            self.nc_indexes = {**self.nc_indexes, kind: index}
        self.nc_awaiting = tuple(other for other in self.nc_awaiting if other != kind)
        if not compiling:  # nothing settles there, and a graph would guard what it left
            self._nc_updated |= {kind}
        return index

    def nc_ready(self, kinds: tuple[tuple[str, int, int], ...], key: torch.Tensor) -> list[KeyIndex] | None:
        """The indexes of these kinds, page sizes and capacities, with room for ``key``; None unless they are all that
        there is, and only have to take in new keys, which who asks does.
        """
        indexes = self.nc_indexes
        if len(indexes) != len(kinds):
            return None
        found = []
        for kind, block_size, capacity in kinds:
            index = indexes.get(kind)
            if index is None or index.block_size != block_size or not index.fits(key):
                return None
            index.make_room(key.shape[2])
            if index.capacity != capacity or index.is_frozen():
                return None
            found.append(index)
        return found

    def nc_done(self) -> None:
        """To be called at the end of each call of attention: an index that did not take in its keys is dropped."""
        if len(self.nc_indexes) != len(self._nc_updated):
            self.nc_indexes = {kind: index for kind, index in self.nc_indexes.items() if kind in self._nc_updated}
        self.nc_settle()
        self._nc_updated = frozenset()

    def nc_settle(self) -> None:
        """Takes note that the indexes belong to the keys as they are now."""
        keys, self.nc_awaiting = self.keys, ()
        if keys is not None and self.nc_indexes:
            values = self.values
            self._nc_seen = (weakref.ref(keys), weakref.ref(values), _state(keys, values))

    def offload(self) -> None:
        self._nc_room = None
        super().offload()  # type: ignore[misc]

    def reset(self) -> None:
        self.nc_forget()
        self._nc_room = None
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._nc_reorder(lambda index: index.select(beam_idx), beam_idx)

    def _nc_reorder(self, change: Callable[[KeyIndex], None], beam_idx: torch.Tensor) -> None:
        self._nc_follow(change, "reorder_cache", beam_idx)
        if not self.nc_indexes:
            self._nc_begins = None
        elif self._nc_begins:
            firsts, lasts = torch.tensor(self._nc_begins, device="cpu").view(2, -1)[:, beam_idx.cpu()].tolist()
            self._nc_begins = (*firsts, *lasts) if any(firsts + lasts) else ()

    def _nc_follow(self, change: Callable[[KeyIndex], None], method: str, *arguments: Any) -> None:
        self.nc_check()
        getattr(super(), method)(*arguments)
        for index in self.nc_indexes.values():
            change(index)
        self.nc_settle()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles hold a layer of transformers, which loads where this library is not installed; where it is
        # the index is built again.
        plain: Any = object.__new__(DynamicLayer if isinstance(self, DynamicLayer) else StaticLayer)
        plain.__dict__ = {name: value for name, value in self.__dict__.items() if not name.startswith(("nc_", "_nc_"))}
        for name in ("keys", "values"):
            held = getattr(plain, name, None)
            # All memory of a view would be saved, and that for keys to come holds whatever was there before.
            if isinstance(held, torch.Tensor) and held.untyped_storage().nbytes() > held.nbytes:
                setattr(plain, name, held.clone())
        return copy.copy, (plain,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # What a shallow copy has cloned is taken as it is: the memo would hold it beside a second clone.
        plain = copy.copy(self)
        for name in ("keys", "values"):
            held = plain.__dict__.get(name)
            if held is not self.__dict__.get(name):
                memo[id(held)] = held
        return copy.deepcopy(plain, memo)


class IndexedDynamicLayer(KeyIndexMixin, DynamicLayer):
    """``DynamicLayer`` with a key index, and with room for keys to come, so that a step does not copy all of them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        room, self._nc_room = self._nc_room, None
        self.nc_await()
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        self._nc_seen = None
        if self.keys is None or not self._nc_may_grow(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        length, new = self.keys.shape[2], key_states.shape[2]
        keys, values, *held = room or (self.keys, self.values)
        right = bool(held) and held[0] is self.keys and held[1] is self.values
        if not right or keys.is_inference() != torch.is_inference_mode_enabled() or keys.shape[2] < length + new:
            keys, values = (_with_room(tensor, length + new) for tensor in (self.keys, self.values))
        keys.narrow(2, length, new).copy_(key_states)
        values.narrow(2, length, new).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, length + new), values.narrow(2, 0, length + new)
        self._nc_room = (keys, values, self.keys, self.values)
        return self.keys, self.values

    def _nc_may_grow(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether new keys may be written into memory that is there: not where a gradient may be recorded. One of the
        query alone keeps the keys of its step too.
        """
        keys, values = self.keys, self.values
        assert keys is not None
        if torch.is_grad_enabled():
            return False
        alike = key_states.dtype == keys.dtype and value_states.dtype == values.dtype and keys.numel() > 0
        return alike and key_states.shape[0] == keys.shape[0] and value_states.shape[0] == values.shape[0]

    def crop(self, *arguments: Any) -> None:
        # Nothing of an index depends on later keys, but for the page of the last one, which is written again when the
        # next key comes.
        self._nc_follow(lambda index: None, "crop", *arguments)


class IndexedStaticLayer(KeyIndexMixin, StaticLayer):
    """``StaticLayer`` with a key index at static addresses."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.nc_await()
        if not torch.compiler.is_compiling():
            self.nc_filled, self._nc_seen = True, None
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        self.nc_filled = False
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if any(index.is_frozen() for index in self.nc_indexes.values()):
            self.nc_forget()
        self._nc_reorder(lambda index: index.copy_selected_(beam_idx), beam_idx)


# Exactly these classes: a subclass may keep its keys in another form.
_INDEXED: dict[type, Any] = {DynamicLayer: IndexedDynamicLayer, StaticLayer: IndexedStaticLayer}


def layer_cache(cache: Any, layer: int | None) -> LayerCache:
    """What a cache, if any, holds for an attention layer that is about to run.

    Replaces the cache's layer by one that carries an index where it can, but not while ``torch.compile`` traces.
    """
    if isinstance(cache, EncoderDecoderCache):  # patched modules are those of self-attention
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache) or layer is None:
        return NO_CACHE
    while len(cache.layers) <= layer:
        if getattr(cache, "layer_class_to_replicate", None) is None:
            return NO_CACHE
        cache.layers.append(cache.layer_class_to_replicate())
    found: Any = cache.layers[layer]
    if not torch.compiler.is_compiling():
        if type(found) in _INDEXED:
            plain, found = found, object.__new__(_INDEXED[type(found)])
            found.__dict__ = plain.__dict__  # whoever holds the plain layer sees the same keys
            cache.layers[layer] = found
            found.nc_filled = found.is_initialized and bool(found.get_seq_length() > 0)
        if isinstance(found, KeyIndexMixin):
            found.nc_check()
    length = getattr(found, "get_seq_length", lambda: 0)()
    started = length > 0 if isinstance(length, int) else getattr(found, "nc_filled", False)
    return LayerCache(found if isinstance(found, KeyIndexMixin) else None, started)


class Indexes(NamedTuple):
    """What a layer decodes by: the index that its selection chooses by, and page means, where there are any; ``new``:
    how many keys of each sequence both have to take in before.
    """

    choosing: KeyIndex | None = None
    means: KeyIndex | None = None
    new: int = 0


def indexes_of(config: NCConfig, problem: Problem, layer: KeyIndexMixin | None, decoding: bool, later: bool) -> Indexes:
    """The indexes of a layer, built for the call or kept by the cache and brought up to date; with ``later`` these have
    room for the new keys, which decoding takes in itself.
    """
    selection, kind = config.decode, config.decode.index_kind
    if not problem.visible.numel():
        return Indexes()

    def kept(kind: str, page_size: int) -> KeyIndex | None:
        if layer is None:
            return None
        if torch.compiler.is_compiling():
            index = layer.nc_indexes.get(kind)
            if index is None or index.block_size != page_size or not index.fits(problem.key):
                return None  # what would have to be built waits for a call outside the graph
        elif kind in layer.nc_never:
            return None
        return layer.nc_update(problem, kind, page_size, config.backend, later)

    index = means = None
    if kind is not None:
        backend, _ = choose_backend(config.backend, problem.key.device, head_dims=problem.head_dims)
        if config.key_index == "always" or (config.key_index == "auto" and backend in LAYOUTS[kind].pays_on):
            index = kept(kind, selection.page_size)
    if selection.uses_means and config.key_index != "never":
        means = kept("means", 1)
    new = problem.visible.shape[1] if later and (index is not None or means is not None) else 0
    if index is None and decoding and selection.needs_index and kind is not None:
        # The same choice as with an index that is kept, from one that is not.
        return Indexes(_built(problem, kind, selection.page_size, config.backend), means)
    return Indexes(index, means, new)


def _built(problem: Problem, kind: str, block_size: int, backend: str) -> KeyIndex:
    """An index of one kind of all keys of a call."""
    # The key at which the sequence starts: its interval may start later.
    start, end = problem.origin[:, -1].clamp(min=0), problem.visible[..., 1].amax(-1)
    key, value = problem.key, problem.value
    return KeyIndex.build(key, kind, value=value, start=start, end=end, block_size=block_size, backend=backend)


def forget_index(cache: Cache) -> None:
    """Drops the key indexes of a cache, after its keys were written from outside; the next call builds them again.

    Raises:
        TypeError: ``cache`` is no cache of ``transformers``.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache must be a cache of transformers, for example a DynamicCache, got {type(cache).__name__}"
        )
    for layer in cache.layers:
        if isinstance(layer, KeyIndexMixin):
            layer.nc_forget()


def _with_room(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A buffer ``[B, H, N, D]`` that begins with ``tensor`` and has room for ``length`` and some more, N in all."""
    room = tensor.new_empty(*tensor.shape[:2], reserve_for(length), tensor.shape[3])
    room[:, :, : tensor.shape[2]] = tensor
    return room

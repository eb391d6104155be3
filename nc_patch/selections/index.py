"""The key index: what a layer keeps beside its keys so that decoding can choose among them almost for free.

Three kinds. ``"codes"``: one byte an element and eight a key besides, which bound every score (``topk/codes.py``);
``topk`` decodes by them. ``"pages"``: statistics of each run of ``block_size`` keys (``block/pages.py``); ``block``
decodes by them. ``"means"``: means of keys and values of each run of 16 (``ops/means.py``), by which ``topk``
approximates what it leaves out. An index is an accelerator: what it holds follows from the keys, and it can be dropped
and built again.
"""

from collections.abc import Callable
from typing import Literal

import torch

from nc_patch.common import as_integer, autocast_off
from nc_patch.config import BACKENDS
from nc_patch.ops import decode_ops
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.means import PageMeans, slot_count
from nc_patch.selections.block.pages import VECTORS, PageStatistics, page_count, update_pages_
from nc_patch.selections.topk.codes import KeyCodes, channel_moments

IndexKind = Literal["codes", "pages", "means"]
INDEX_KINDS: tuple[IndexKind, ...] = ("codes", "pages", "means")
# The kind that a selection decodes by.
KIND_OF: dict[str, IndexKind] = {"topk": "codes", "block": "pages"}

# A growing index reserves this many keys, or this part of its length if more, so that few steps copy it.
_SMALLEST_RESERVE = 128
# Buffers hold a multiple of so many keys: the strides that kernels are compiled for do not depend on a prompt's length.
_CAPACITY_UNIT = 128
_RESERVED_PART = 64


def reserve_for(length: int) -> int:
    """How many keys a growing buffer makes room for when it has to hold ``length``: more, a multiple of 128."""
    room = length + max(_SMALLEST_RESERVE, length // _RESERVED_PART)
    return room // _CAPACITY_UNIT * _CAPACITY_UNIT


class KeyIndex:
    """Index of the keys ``[B, Hkv, L, D]`` of one layer; made by ``build``, extended as keys arrive.

    Attributes:
        kind: ``"codes"``, ``"pages"`` or ``"means"``.
        block_size: keys per page of ``"pages"``.
        origin: int32 ``[B]``, the position of each sequence's first key, which pages are counted from.
        capacity: how many keys fit without a new allocation.
        dtype: that of the keys.
        unstarted: whether a sequence had no keys yet when the index was built; as a tensor until somebody reads it.
    """

    unstarted: torch.Tensor | bool = False

    def __init__(
        self,
        kind: IndexKind,
        block_size: int,
        origin: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        capacity: int,
        backend: str,
        dtype: torch.dtype,
    ) -> None:
        self.kind, self.block_size, self.capacity, self.dtype = kind, block_size, capacity, dtype
        self.origin = origin
        self._tensors, self._backend = tensors, backend

    @classmethod
    def build(
        cls,
        key: torch.Tensor,
        kind: IndexKind,
        *,
        value: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
        block_size: int = 32,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> "KeyIndex":
        """Indexes keys that are there; reads nothing back from the device.

        Args:
            key: ``[B, Hkv, L, D]``, bfloat16, float16 or float32.
            kind: ``"codes"``, ``"pages"`` or ``"means"``.
            value: ``[B, Hkv, L, Dv]``, for ``"means"``.
            start, end: int ``[B]``, where each sequence begins and ends within L; by default everywhere 0 and L.
            block_size: keys per page.
            capacity: how many keys to make room for; by default L.
            backend: as in ``NCConfig``.

        Raises:
            ValueError: a kind or a shape that does not fit.
        """
        if kind not in INDEX_KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, INDEX_KINDS))}, got {kind!r}")
        if not isinstance(key, torch.Tensor):
            raise TypeError(f"key must be a tensor [batch, heads, length, head_dim], got {type(key).__name__}")
        if key.ndim != 4:
            raise ValueError(f"key must be [batch, heads, length, head_dim], got shape {tuple(key.shape)}")
        if not key.dtype.is_floating_point or key.dtype == torch.float64:
            raise ValueError(f"key must be bfloat16, float16 or float32, got {key.dtype}")
        given, block_size = block_size, as_integer(block_size) or 0
        if block_size < 1:
            raise ValueError(f"block_size must be a positive number of keys, got {given!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        B, Hkv, L, D = key.shape
        start = torch.zeros(B, dtype=torch.int32, device=key.device) if start is None else start
        end = torch.full((B,), L, dtype=torch.int32, device=key.device) if end is None else end
        for name, tensor in (("start", start), ("end", end)):
            _check_ends(name, tensor, B, key)
        check_value(kind, key, value)
        asked, capacity = capacity, L if capacity is None else as_integer(capacity)
        if capacity is None or capacity < L:
            raise ValueError(f"capacity must be a number of at least the {L} keys that are there, got {asked!r}")
        room = -(-capacity // _CAPACITY_UNIT) * _CAPACITY_UNIT
        new = lambda *shape, dtype: torch.zeros(B, Hkv, *shape, dtype=dtype, device=key.device)  # noqa: E731
        if kind == "codes":
            with autocast_off(key):
                center, spread = channel_moments(key, start, end) if L else (new(D, dtype=torch.float32),) * 2
            tensors = {
                # Whose last axis is D, first: ``fits`` looks at it.
                "center": center,
                "spread": spread,
                "high": new(room, (D + 1) // 2, dtype=torch.int8),
                "low": new(room, (D + 1) // 2, dtype=torch.int8),
                "scale": new(room, dtype=torch.float32),
                "coarse": new(room, dtype=torch.bfloat16),
                "residual": new(room, dtype=torch.bfloat16),
            }
        elif kind == "pages":
            pages = page_count(room, block_size)
            tensors = {
                "page_codes": new(pages, VECTORS, D, dtype=torch.int8),
                "page_scales": new(pages, VECTORS, dtype=torch.float32),
            }
        else:
            assert value is not None
            slots = slot_count(room)
            tensors = {"key": new(slots, D, dtype=key.dtype), "value": new(slots, value.shape[3], dtype=value.dtype)}
        head_dims = (D,) if value is None else (D, value.shape[-1])
        chosen, _ = choose_backend(backend, kind, key.device, head_dims=head_dims)
        index = cls(kind, block_size, start.to(torch.int32).clone(), tensors, capacity, chosen, key.dtype)
        if L:
            index._write(key, value, torch.zeros_like(index.origin), L, end)
        return index

    def extend(self, key: torch.Tensor, count: int, end: torch.Tensor, value: torch.Tensor | None = None) -> None:
        """Takes in the last ``count`` keys before ``end[b]`` of each sequence b.

        Args:
            key: ``[B, Hkv, L, D]``, all keys of the layer.
            count: how many are new.
            end: int ``[B]``, where each sequence ends now.
            value: ``[B, Hkv, L, Dv]``, for ``"means"``.

        Raises:
            ValueError: keys or values that do not fit, or fewer of them than are new.
        """
        new = as_integer(count)
        if new is None or not self.fits(key) or not 0 <= new <= key.shape[2]:
            raise ValueError(
                f"an index takes in keys like those it was built from, {self.dtype}, with at least the {count} new "
                f"ones among them, got {key.dtype} {tuple(key.shape)} on {key.device}"
            )
        count = new
        check_value(self.kind, key, value)
        _check_ends("end", end, key.shape[0], key)
        if key.shape[2] > self.capacity:
            self._reserve(key.shape[2])
        self._write(key, value, end - count, count, end)

    def codes(self) -> KeyCodes:
        """The codes of all keys; what lies beyond the sequences' ends means nothing."""
        return KeyCodes(*(self._tensors[name] for name in KeyCodes._fields))

    def pages(self) -> PageStatistics:
        """The statistics of all pages; only those of whole pages mean something."""
        return PageStatistics(self._tensors["page_codes"], self._tensors["page_scales"])

    def means(self) -> PageMeans:
        """The means of all pages of 16 by slot; only those of full pages mean something."""
        return PageMeans(self._tensors["key"], self._tensors["value"])

    def fits(self, key: torch.Tensor) -> bool:
        """Whether the index can belong to ``key`` ``[B, Hkv, L, D]``: the same B, Hkv, D, dtype and device."""
        tensor = next(iter(self._tensors.values()))
        return (
            self.dtype == key.dtype
            and tensor.shape[:2] == key.shape[:2]
            and tensor.shape[-1] == key.shape[-1]
            and tensor.device == key.device
        )

    def select(self, indices: torch.Tensor) -> None:
        """Keeps the sequences ``indices``, int64 ``[B']``, of the batch, in this order; they may repeat (beams)."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def copy_selected_(self, indices: torch.Tensor) -> None:
        """``select`` with int64 ``[B]``, as many as sequences, into the same memory: static addresses stay."""
        for tensor in (*self._tensors.values(), self.origin):
            tensor.copy_(tensor.index_select(0, indices.to(tensor.device)))

    def repeat(self, repeats: int) -> None:
        """Repeats every sequence ``repeats`` times, copies side by side."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def clone(self) -> "KeyIndex":
        """A copy in memory of its own."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
        copy = KeyIndex(
            self.kind, self.block_size, self.origin.clone(), tensors, self.capacity, self._backend, self.dtype
        )
        copy.unstarted = self.unstarted
        return copy

    def is_frozen(self) -> bool:
        """Whether it was made or grew in inference mode, which is over: then only its clone may be written to."""
        return not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in self.tensors())

    def to(self, device: torch.device | str) -> None:
        """Moves the index to a device."""
        self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """Everything that the index keeps."""
        return [*self._tensors.values(), self.origin]

    def nbytes(self) -> int:
        """Bytes that the index takes, reserve included."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def _write(
        self, key: torch.Tensor, value: torch.Tensor | None, first: torch.Tensor, count: int, end: torch.Tensor
    ) -> None:
        with autocast_off(key):
            self._write_exactly(key, value, first, count, end)

    def _write_exactly(
        self, key: torch.Tensor, value: torch.Tensor | None, first: torch.Tensor, count: int, end: torch.Tensor
    ) -> None:
        t = self._tensors
        if self.kind == "codes":
            decode_ops.encode_keys_(key, first, count, *self.codes(), self._backend)
        elif self.kind == "means":
            assert value is not None
            decode_ops.page_means_(key, value, self.origin, first, count, t["key"], t["value"], self._backend)
        elif self._backend == "torch" and decode_ops.runs_directly(key, self.origin, first, end):
            update_pages_(key, self.origin, first, count, end, self.pages(), self.block_size)
        else:
            decode_ops.summarize_pages_(
                key, self.origin, first, count, end, t["page_codes"], t["page_scales"], self.block_size, self._backend
            )

    def _reserve(self, length: int) -> None:
        capacity = reserve_for(length)
        rows = {"codes": capacity, "pages": page_count(capacity, self.block_size), "means": slot_count(capacity)}[
            self.kind
        ]
        for name in [name for name in self._tensors if name not in ("center", "spread")]:
            old = self._tensors[name]
            grown = old.new_zeros(*old.shape[:2], rows, *old.shape[3:])
            grown[:, :, : old.shape[2]] = old
            self._tensors[name] = grown
        self.capacity = capacity

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensors = {name: change(tensor) for name, tensor in self._tensors.items()}
        self.origin = change(self.origin)


def _check_ends(name: str, ends: torch.Tensor, batch: int, key: torch.Tensor) -> None:
    """Refuses starts or ends of sequences that are not one whole number each, where the keys lie."""
    if not isinstance(ends, torch.Tensor):
        raise TypeError(f"{name} must be an int tensor [{batch}], got {type(ends).__name__}")
    if ends.shape != (batch,) or ends.dtype.is_floating_point or ends.device != key.device:
        got = f"{ends.dtype} {list(ends.shape)} on {ends.device}"
        raise ValueError(f"{name} must be int [{batch}] on {key.device}, got {got}")


def check_value(kind: IndexKind, key: torch.Tensor, value: torch.Tensor | None) -> None:
    """Raises ValueError unless the values that an index of this kind needs are there and fit ``key``."""
    if kind == "means" and (value is None or value.ndim != 4 or value.shape[:3] != key.shape[:3]):
        got = "none" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f'an index of kind "means" needs the values {[*key.shape[:3], "Dv"]} of the keys, got {got}')

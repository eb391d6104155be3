"""``KeyIndex``: what a layer keeps beside its keys so that decoding can choose among them almost for free.

It follows from the keys, so that it can be dropped and built again. What one of a kind holds, its ``Layout`` says.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nc_patch.common import as_integer, autocast_off, check_choice, check_integer
from nc_patch.ops.backends import BACKENDS, READS_HOST, choose_backend
from nc_patch.ops.derivatives import runs_directly
from nc_patch.ops.problem import Problem, check_tensor, describe

# Buffers hold a multiple of so many keys: the strides that kernels are compiled for do not depend on a prompt's length.
_CAPACITY_UNIT = 128


LAYOUTS: dict[str, type["Layout"]] = {}


class Layout:
    """What an index of one kind holds; subclasses say which kind.

    Attributes:
        growing: how many of its tensors ``[B, Hkv, ...]``, the first ones, grow with the keys; the others never change.
        span: the keys that one row of these is of. paged: whether these are pages, of ``block_size`` keys, which are
            counted from the index's origin.
        takes_values: whether it indexes values too. pays_on: the backends on which keeping one saves time.
    """

    growing: ClassVar[int] = 2
    span: ClassVar[int] = 1
    paged: ClassVar[bool] = False
    takes_values: ClassVar[bool] = False
    pays_on: ClassVar[tuple[str, ...]] = ("triton", "cpu", "torch")

    def __init_subclass__(cls, kind: str) -> None:
        LAYOUTS[kind] = cls

    @classmethod
    def rows(cls, capacity: int, block_size: int) -> int:
        """How long the tensors that grow are for ``capacity`` keys."""
        return -(-capacity // (block_size if cls.paged else cls.span))

    @staticmethod
    def allocate(
        key: torch.Tensor, value: torch.Tensor | None, ends: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """The tensors, of which the first ends in D; ``ends`` are int ``[B]``, where each sequence begins and ends."""
        raise NotImplementedError

    @staticmethod
    def write(
        index: list[torch.Tensor], tensors: list[torch.Tensor], count: int, block_size: int, backend: str
    ) -> None:
        """Takes in the ``count`` keys from ``first[b]`` on of each sequence b, in place.

        ``tensors``: key ``[B, Hkv, N, D]``; origin, first and end, int ``[B]``; value where the layout takes it.
        """
        raise NotImplementedError


def reserve_for(length: int) -> int:
    """How many keys a growing buffer makes room for when it has to hold ``length``: more, so that few steps copy it."""
    return (length + max(_CAPACITY_UNIT, length // 64)) // _CAPACITY_UNIT * _CAPACITY_UNIT


def extend(problem: Problem, kind: str | None, backend: str) -> Problem:
    """The problem after its index, of a kind, and its means have taken in its new keys, in place."""
    end = problem.visible[..., 1].amax(-1)
    tensors = [problem.key.detach(), problem.origin[:, -1], end - problem.new, end, problem.value.detach()]
    for of_kind, index in (("means", problem.means), (kind, problem.key_index)):
        if index and of_kind is not None:
            _write([*index], tensors, of_kind, problem.new, problem.page_size, backend)
    return problem._replace(new=0)


def _write(
    index: list[torch.Tensor], tensors: list[torch.Tensor], kind: str, count: int, block_size: int, backend: str
) -> None:
    """Takes new keys into the tensors of an index of one kind; ``tensors`` as in ``Layout.write``, value or not."""
    tensors = tensors[: 4 + LAYOUTS[kind].takes_values]
    write = _write_directly if runs_directly([*index, *tensors]) else _EXTEND[backend != "triton"]
    write(index, tensors, kind, count, block_size, backend)


def _write_directly(
    index: list[torch.Tensor], tensors: list[torch.Tensor], kind: str, count: int, block_size: int, backend: str
) -> None:
    with autocast_off(tensors[0]):
        LAYOUTS[kind].write(index, tensors, count, block_size, backend)


# The same as operations, for what traces a call; PyTorch's implementations may read the device on the host.
_EXTEND: dict[bool, Any] = {}
for _reads_host, _suffix in ((False, ""), (True, "_on_host")):
    _EXTEND[_reads_host] = torch.library.custom_op(
        f"nc_patch::extend_index{_suffix}", _write_directly, mutates_args=("index",),
        tags=READS_HOST if _reads_host else (),
    )  # fmt: skip
    _EXTEND[_reads_host].register_fake(lambda *_: None)


@dataclass(eq=False, repr=False)
class KeyIndex:
    """Index of the keys ``[B, Hkv, L, D]`` of one layer; made by ``build``, extended as keys arrive.

    Attributes:
        kind: ``"codes"``, ``"pages"`` or ``"means"``. block_size: keys per page of ``"pages"``.
        origin: int32 ``[B]``, the position of each sequence's first key, which pages are counted from.
        capacity: how many keys fit without a new allocation. dtype: that of the keys.
    """

    kind: str
    block_size: int
    origin: torch.Tensor
    capacity: int
    dtype: torch.dtype
    _backend: str
    _tensors: list[torch.Tensor]
    _row_origins: torch.Tensor | None = None

    @classmethod
    def build(
        cls, key: torch.Tensor, kind: str, *, value: torch.Tensor | None = None, start: torch.Tensor | None = None,
        end: torch.Tensor | None = None, block_size: int = 16, capacity: int | None = None, backend: str = "auto",
    ) -> "KeyIndex":  # fmt: skip
        """Indexes keys that are there; reads nothing back from the device.

        Args:
            key: ``[B, Hkv, L, D]``, bfloat16, float16 or float32.
            kind: ``"codes"``, ``"pages"`` or ``"means"``.
            value: ``[B, Hkv, L, Dv]``, for ``"means"``.
            start, end: int ``[B]``, where each sequence begins and ends within L; by default 0 and L.
            block_size: keys per page.
            capacity: how many keys to make room for; by default L.
            backend: as in ``NCConfig``.

        Raises:
            ValueError, TypeError: a kind or a shape that does not fit.
        """
        check_choice("kind", kind, tuple(LAYOUTS))
        check_tensor("key", key)
        check_choice("backend", backend, BACKENDS)
        block_size = check_integer("block_size", block_size, 1)
        B, _, L, D = key.shape
        start = torch.zeros(B, dtype=torch.int32, device=key.device) if start is None else start
        end = torch.full((B,), L, dtype=torch.int32, device=key.device) if end is None else end
        _check(kind, key, value, start=start, end=end)
        capacity = L if capacity is None else check_integer("capacity", capacity, L)
        head_dims = (D,) if value is None else (D, value.shape[-1])
        chosen, _ = choose_backend(backend, key.device, head_dims=head_dims)
        layout, room = LAYOUTS[kind], -(-capacity // _CAPACITY_UNIT) * _CAPACITY_UNIT
        tensors = layout.allocate(key, value, (start, end), layout.rows(room, block_size))
        origin = start.to(torch.int32).clone()
        if L:
            given = [key, origin, torch.zeros_like(origin), end, key if value is None else value]
            _write(tensors, given, kind, L, block_size, chosen)
        return cls(kind, block_size, origin, capacity, key.dtype, chosen, tensors)

    def extend(self, key: torch.Tensor, count: int, end: torch.Tensor, value: torch.Tensor | None = None) -> None:
        """Takes in the last ``count`` keys before ``end[b]``, int ``[B]``, of each sequence b.

        ``key`` and, for ``"means"``, ``value`` are all those of the layer, ``[B, Hkv, L, D or Dv]``.

        Raises:
            ValueError: keys or values that do not fit, or fewer of them than are new.
        """
        new = as_integer(count)
        if new is None or not self.fits(key) or not 0 <= new <= key.shape[2]:
            raise ValueError(
                f"an index takes in keys like those it was built from, {self.dtype}, with at least the {count} new "
                f"ones among them, got {describe(key)}"
            )
        _check(self.kind, key, value, end=end)
        self.make_room(key.shape[2])
        given = [key, self.origin, end - new, end, key if value is None else value]
        _write(self._tensors, given, self.kind, new, self.block_size, self._backend)

    def make_room(self, length: int) -> None:
        """Makes room for ``length`` keys, with which what ``tensors`` returned before may be stale."""
        if length <= self.capacity:
            return
        layout, self.capacity = LAYOUTS[self.kind], reserve_for(length)
        rows = layout.rows(self.capacity, self.block_size)
        for number, old in enumerate(self._tensors[: layout.growing]):
            self._tensors[number] = old.new_zeros(*old.shape[:2], rows, *old.shape[3:])
            self._tensors[number][:, :, : old.shape[2]] = old

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What the kernels read, in the order of the layout; what lies beyond the sequences' ends means nothing."""
        return tuple(self._tensors)

    def row_origins(self, query_length: int) -> torch.Tensor:
        """``origin`` of each query, int32 ``[B, query_length]``."""
        found = self._row_origins
        if found is None or found.shape[1] != query_length:
            found = self._row_origins = self.origin[:, None].expand(-1, query_length).contiguous()
        return found

    def fits(self, key: torch.Tensor) -> bool:
        """Whether the index can belong to ``key`` ``[B, Hkv, L, D]``: the same B, Hkv, D, dtype and device."""
        tensor = self._tensors[0]
        alike = self.dtype == key.dtype and tensor.device == key.device
        return alike and tensor.shape[:2] == key.shape[:2] and tensor.shape[-1] == key.shape[-1]

    def select(self, indices: torch.Tensor) -> None:
        """Keeps the sequences ``indices``, int64 ``[B']``, of the batch, in this order; they may repeat (beams)."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def copy_selected_(self, indices: torch.Tensor) -> None:
        """``select`` with int64 ``[B]``, as many as sequences, into the same memory: static addresses stay."""
        self._map(lambda tensor: tensor.copy_(tensor.index_select(0, indices.to(tensor.device))))

    def clone(self) -> "KeyIndex":
        """A copy in memory of its own."""
        twin = copy.copy(self)
        twin._map(torch.clone)
        return twin

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensors = [change(tensor) for tensor in self._tensors]
        self.origin, self._row_origins = change(self.origin), None

    def is_frozen(self) -> bool:
        """Whether it was made or grew in inference mode, which is over: then only its clone may be written to."""
        return not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in self.everything())

    def everything(self) -> list[torch.Tensor]:
        """Everything that the index keeps."""
        return [*self._tensors, self.origin]

    def nbytes(self) -> int:
        """Bytes that the index takes, reserve included."""
        return sum(tensor.nbytes for tensor in self.everything())


def _check(kind: str, key: torch.Tensor, value: torch.Tensor | None, **given: torch.Tensor) -> None:
    """Refuses values that do not fit, and starts or ends of sequences that are not an integer each, beside the keys."""
    if LAYOUTS[kind].takes_values and (value is None or value.ndim != 4 or value.shape[:3] != key.shape[:3]):
        got = "none" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f'an index of kind "{kind}" needs the values {[*key.shape[:3], "Dv"]} of the keys, got {got}')
    batch = key.shape[0]
    for name, ends in given.items():
        if not isinstance(ends, torch.Tensor):
            raise TypeError(f"{name} must be an int tensor [{batch}], got {type(ends).__name__}")
        if ends.shape != (batch,) or ends.dtype.is_floating_point or ends.device != key.device:
            raise ValueError(f"{name} must be int [{batch}] on {key.device}, got {describe(ends)}")

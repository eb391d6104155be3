"""A GPU's memory for Triton's interpreter: races, reads of what nothing wrote, and accesses outside all tensors."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle

Array = NDArray[Any]
# Memory that nothing has written: in every two bytes, a NaN of bfloat16 and float16; in every four, of float32.
POISON = np.array([0x7FA5], "<u2")
# Whose lines are not the kernel's.
INTERNAL = (os.path.dirname(triton.__file__), os.path.join(os.path.dirname(__file__), "gpu_"))
READ, WRITE, ATOMIC = range(3)
DOES = ("reads", "writes", "changes atomically")
# What each may not meet at one address.
CONFLICTS = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}


class Memory:
    """The memory of the tensors of one launch, and which accesses touched what in it.

    A *cell* is an element of the smallest type that the launch sees a tensor's storage as. Accesses are numbered from 1
    in the order in which they run; ``_first`` and ``_last[kind]`` hold the number of the first and the last access of a
    kind to each cell, or 0. ``_reader`` holds the lane that has read a cell since the last barrier, or 0 for several.

    An atomic access that releases and acquires (``meet``) orders what its program did before its last barrier, and what
    was ordered before that, before what another does after meeting it at the same address. ``_released`` are these
    ranges of numbers for each such address, ``_before`` those that are ordered before what the program does now.
    """

    def __init__(self, kernel: str, tensors: Iterable[torch.Tensor], findings: "Counter[str]") -> None:
        self._kernel, self._findings = kernel, findings
        storages: dict[int, tuple[Array, int]] = {0: (np.zeros(0, np.uint8), 8)}  # every address is above one of them
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{kernel} was given a tensor on {tensor.device}; gpu_semantics takes the CPU's")
            storage = tensor.untyped_storage()
            base, size = storage.data_ptr(), min(tensor.itemsize, storages.get(storage.data_ptr(), (None, 8))[1])
            storages[base] = torch.tensor([], dtype=torch.uint8).set_(storage).numpy(), size
        bases = sorted(storages)
        self._base = np.array(bases, np.uint64)
        self._bytes = np.array([len(storages[base][0]) for base in bases])
        self._cell = np.array([storages[base][1] for base in bases])
        counts = self._bytes // self._cell
        self._start = np.cumsum(counts) - counts
        self._unwritten = np.concatenate([unwritten(*storages[base]) for base in bases])
        self._first, self._last = np.zeros((2, 3, counts.sum()), np.int32)
        self._reader = np.zeros(counts.sum(), np.int32)
        self._sites = [""]
        self._released: dict[int, set[tuple[int, int]]] = {}
        self.begin_program()

    def begin_program(self) -> None:
        self._program = self._phase = len(self._sites)
        self._before: set[tuple[int, int]] = set()

    def barrier(self) -> None:
        self._phase = len(self._sites)

    def meet(self, pointers: TensorHandle, mask: Array) -> None:
        """An atomic access, which is noted apart, releases and acquires."""
        address, active = np.broadcast_arrays(pointers.data, mask.astype(bool))
        for place in address[active].tolist():
            released = self._released.setdefault(place, set())
            self._before |= released
            released |= {*self._before, (self._program, self._phase)}

    def access(self, kind: int, pointers: TensorHandle, mask: Array, values: Array | None = None) -> TensorHandle:
        """Notes an access, of a store with its ``values``; returns the mask without what is outside all tensors."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address, active = np.broadcast_arrays(pointers.data, mask.astype(bool))
        storage = np.searchsorted(self._base, address, side="right") - 1
        offset = (address - self._base[storage]).astype(np.int64)
        touched = active & (offset + width <= self._bytes[storage])
        if (active & ~touched).any():
            self._found(kind, "outside the tensors that it was given")
        if touched.any():
            storage, offset = storage[touched], offset[touched]
            cell = self._start[storage] + offset // self._cell[storage]
            if values is not None and differ(cell, np.broadcast_to(values, touched.shape)[touched]):
                self._found(kind, "different values to one address")
            # Sizes are powers of two, so that tensors of different sizes have no lane in common.
            lane = touched.size + np.flatnonzero(touched)
            parts = width // self._cell[storage]
            several = [np.flatnonzero(parts > i) for i in range(1, parts.max())]
            cell = np.concatenate([cell, *(cell[wide] + i for i, wide in enumerate(several, 1))])
            self._note(kind, cell, np.concatenate([lane, *(lane[wide] for wide in several)]))
        return TensorHandle(touched, tl.int1)

    def _note(self, kind: int, cell: Array, lane: Array) -> None:
        first, last = self._first, self._last
        for other in CONFLICTS[kind]:
            foreign = cell[self._unordered(first[other][cell]) | self._unordered(last[other][cell])]
            own = last[other][cell] >= self._phase
            own = cell[own & (self._reader[cell] != lane) if (kind, other) == (WRITE, READ) else own]
            for racing, whose in ((foreign, "in another program"), (own, "with no barrier between")):
                if racing.size:
                    self._found(kind, f"what {self._sites[last[other][racing[0]]]} {DOES[other]} {whose}")
        if kind != WRITE and (self._unwritten[cell] & (last[WRITE][cell] == 0)).any():
            self._found(kind, "memory that nothing has written")
        if kind == READ:
            alone = (last[READ][cell] < self._phase) | (self._reader[cell] == lane)
            self._reader[cell] = np.where(alone, lane, 0)
            self._reader[cell[self._reader[cell] != lane]] = 0
        number = len(self._sites)
        self._sites.append(site())
        first[kind][cell] = np.where(first[kind][cell] > 0, first[kind][cell], number)
        last[kind][cell] = number

    def _unordered(self, number: Array) -> Array:
        """Which accesses are those of other programs, and not ordered before what this one does."""
        found = (number > 0) & (number < self._program)
        for begin, end in self._before:
            found &= (number < begin) | (number >= end)
        return found

    def _found(self, kind: int, what: str) -> None:
        self._findings[f"{self._kernel}: {site()} {DOES[kind]} {what}"] += 1


def differ(cell: Array, values: Array) -> bool:
    """Whether values for one cell differ in their bits."""
    order = np.argsort(cell, kind="stable")
    bits = np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
    return bool(((np.diff(cell[order]) == 0) & (bits[1:] != bits[:-1])).any())


def unwritten(data: Array, cell: int) -> Array:
    """bool ``[cells]``: which cells of ``data``, bytes, hold the poison. Single bytes do where four together do."""
    size = 4 if cell == 1 else cell
    whole = data[: len(data) // size * size].view(f"u{size}") == np.repeat(POISON, size // 2).view(f"u{size}")
    found = np.zeros(len(data) // cell, bool)
    found[: len(whole) * size // cell] = np.repeat(whole, size // cell)
    return found


def poisoned(plain: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
    """A new tensor, of which the CPU's memory holds the poison; not that of booleans, which have no such values."""
    tensor = plain(*arguments, **options)
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.dtype != torch.bool:
        data = tensor.untyped_storage()
        torch.tensor([], dtype=torch.int16).set_(data, 0, (data.nbytes() // 2,), (1,)).fill_(int(POISON[0]))
    return tensor


def site() -> str:
    """The line of the kernel, or of a device function, that runs, and the line that called it."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while len(lines) < 2 and frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(INTERNAL):
            lines.append(f"{os.path.basename(path)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)

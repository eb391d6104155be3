"""How kernels are compiled and launched: on the threads that PyTorch has, each taking one item of work after another.

A kernel is a C function of one address, that of a record of its arguments. What an item computes depends on the item
alone, so that results do not depend on the number of threads. PyTorch's own OpenMP threads run it, which its operations
before and after keep awake; a second pool would fight with them for the cores.
"""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from nc_patch.common import say_once
from nc_patch.ops.cpu.vectors import add_to

ENTRY = types.void(types.voidptr)
# The first fields of every record; the launch fills them in.
_HEADER = ("items", "item", "worker", "memory", "scratch")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Kernel:
    """A compiled function over items of work; compiled when it is first called, and kept on the disk for later processes.

    Args:
        fields: names of its arguments. A tensor ``[B, H, N, D]`` gives ``name``, an address, and ``name_b``,
            ``name_h`` and ``name_n``, steps in bytes; one of another rank an address alone.
        make: given the record's dtype and the digest of all kernels' sources, returns the function for ``cfunc``.
    """

    def __init__(self, fields: str, make: Callable[[Any, str], Any]) -> None:
        names = [*_HEADER, *fields.split()]
        floats = {name.removesuffix(":f") for name in names if name.endswith(":f")}
        self.record = np.dtype([(n.removesuffix(":f"), "f8" if n.removesuffix(":f") in floats else "i8") for n in names])
        self._make = make

    @functools.cached_property
    def _compiled(self) -> Any:
        return numba.cfunc(ENTRY, cache=True, nopython=True, error_model="numpy")(self._make(self.record, sources()))

    def __call__(self, items: int, scratch: int = 0, **arguments: Any) -> None:
        """Runs ``items`` items.

        Args:
            scratch: bytes of scratch memory that each thread has for itself.
        """
        if items <= 0:
            return
        record = np.zeros(1, self.record)
        row = record[0]
        row["items"] = items
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                row[name] = value.data_ptr()
                if value.ndim == 4:
                    size = value.element_size()
                    for suffix, step in zip("bhn", value.stride(), strict=False):
                        row[f"{name}_{suffix}"] = step * size
            else:
                row[name] = value
        threads = min(items, _threads())
        scratch = -(-scratch // 4096) * 4096 + 64
        memory = torch.empty(threads * scratch, dtype=torch.uint8)
        row["memory"], row["scratch"] = memory.data_ptr(), scratch
        run(self._compiled.address, record.ctypes.data, threads)


@functools.cache
def sources() -> str:
    """A digest of the sources of all kernels, on which what is kept on the disk depends."""
    package = Path(__file__).parent.parent.parent
    found = hashlib.sha256()
    for path in sorted([*package.glob("ops/cpu/*.py"), *package.glob("selections/**/cpu*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def _threads() -> int:
    return 1 if os.getpid() != _PROCESS else torch.get_num_threads()


# OpenMP's threads do not live on in a forked process, where a parallel region would wait for them for ever.
_PROCESS = os.getpid()


def run(function: int, arguments: int, threads: int) -> None:
    """Calls a C function with one address on so many threads, which take the work from each other."""
    parallel = _gomp_parallel()
    if parallel is None or threads == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(arguments)
    else:
        parallel(function, arguments, threads, 0)


@functools.cache
def _gomp_parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch uses, or None."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        say_once("PyTorch's OpenMP threads were not found: the CPU kernels run on one thread.")
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_ITEM, _WORKER = (8 * _HEADER.index(name) for name in ("item", "worker"))


@numba.njit(nogil=True, error_model="numpy")
def next_item(pointer: int) -> int:
    """The next item of work of a launch, from 0 on; ``items`` or more where none is left."""
    return add_to(pointer + _ITEM, 1)


@numba.njit(nogil=True, error_model="numpy")
def scratch_of(p, pointer):
    """The address of this thread's scratch memory, from a multiple of 64 on."""
    return (p.memory + add_to(pointer + _WORKER, 1) * p.scratch + 63) // 64 * 64

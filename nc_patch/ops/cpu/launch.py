"""How kernels are compiled and launched: on the threads that PyTorch has, each taking one item of work after another.

What an item computes depends on the item alone, so that results do not depend on the number of threads. PyTorch's own
OpenMP threads run a launch, which its operations before and after keep awake; a second pool would fight with them for
the cores.
"""

import ctypes
import functools
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.core.datamodel import models, register_default

from nc_patch.common import say_once
from nc_patch.ops.cpu.vectors import add_to, address_of, call

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The first fields of every record, which a launch fills in.
_HEADER = ("items", "item", "worker", "memory", "scratch", "function")


class Arguments(types.Record):
    """The arguments of a kernel, named in compiled code by what they are.

    A ``types.Record`` is named by a number that another process gives to other arguments: of two kernels that different
    processes have kept on the disk one would run the other's functions, whose arguments lie elsewhere.
    """

    @classmethod
    def of(cls, record: np.dtype[Any]) -> "Arguments":
        like = numba.from_dtype(record)
        fields = [(name, {"type": field.type, "offset": field.offset}) for name, field in like.fields.items()]
        return cls(fields, like.size, like.aligned)

    @property
    def mangling_args(self) -> tuple[str, tuple[int, ...]]:
        return type(self).__name__, (int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big"),)


register_default(Arguments)(models.RecordModel)


class Kernel:
    """A function over items of work, compiled when it is first called and kept on the disk for later processes.

    It is given a pointer to a record of the arguments, the number of an item, and the address of scratch memory.

    Args:
        fields: names of the arguments, ``name:f`` for floats. One called ``name:4`` is a tensor ``[B, H, N, D]``, which
            gives its address and, as ``name_b``, ``name_h`` and ``name_n``, steps in bytes; other tensors give an
            address.
    """

    def __init__(self, function: Callable[..., None], fields: str) -> None:
        self._function = function
        self._types = dict.fromkeys(_HEADER, "i8")
        self._tensors = frozenset(field[:-2] for field in fields.split() if field.endswith(":4"))
        for field in fields.split():
            name, _, kind = field.partition(":")
            steps = [f"{name}_{step}" for step in "bhn"] if kind == "4" else []
            self._types |= {name: "f8" if kind == "f" else "i8"} | dict.fromkeys(steps, "i8")
        # What is kept on the disk depends on the sources of all kernels, as its key has the record's fields.
        self._types[f"sources_{_sources()}"] = "i8"
        self.record = np.dtype(list(self._types.items()))
        self._packed = struct.Struct("".join("d" if kind == "f8" else "q" for kind in self._types.values()))

    @functools.cached_property
    def _address(self) -> int:
        return _compile(self._function, types.CPointer(Arguments.of(self.record)), types.int64, types.int64)

    def __call__(self, items: int, floats: int = 0, **arguments: Any) -> None:
        """Runs ``items`` items; each thread has scratch memory of so many floats, which begins at a multiple of 64."""
        if items <= 0:
            return
        threads = 1 if os.getpid() != _PROCESS else min(items, torch.get_num_threads())
        scratch = -(-4 * floats // 4096) * 4096 + 64
        memory = torch.empty(threads * scratch, dtype=torch.uint8, device="cpu")
        values = dict.fromkeys(self._types, 0)
        for name, value in arguments.items():
            values[name] = value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
            if name in self._tensors:
                size = value.element_size()
                values |= {f"{name}_{suffix}": step * size for suffix, step in zip("bhn", value.stride(), strict=False)}
        values |= {"items": items, "memory": memory.data_ptr(), "scratch": scratch, "function": self._address}
        record = ctypes.create_string_buffer(self._packed.pack(*values.values()))
        run = _gomp_parallel() if threads > 1 else _alone
        run(_loop(), ctypes.addressof(record), threads, 0)


# OpenMP's threads do not live on in a forked process, where a parallel region would wait for them for ever.
_PROCESS = os.getpid()


def kernel(fields: str) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator that makes a ``Kernel`` of a function of a pointer, an item and scratch memory."""
    return lambda function: Kernel(function, fields)


def _compile(function: Callable[..., None], *arguments: Any) -> int:
    """The address of a compiled function of such arguments."""
    signature = types.void(*arguments)
    try:
        compiled = numba.cfunc(signature, cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError) as error:
        if "cannot cache" not in str(error) and not isinstance(error, OSError):
            raise
        say_once(
            "The compiled kernels for CPUs cannot be kept on the disk, so that every process compiles them anew: set "
            f"NUMBA_CACHE_DIR to a directory that can be written to ({error})."
        )
        compiled = numba.cfunc(signature, error_model="numpy")(function)
    return int(compiled.address)


@functools.cache
def _sources() -> str:
    """A digest of the sources of all kernels."""
    package = Path(__file__).parent.parent.parent
    found = hashlib.sha256()
    for path in sorted([*package.glob("ops/cpu/*.py"), *package.glob("selections/**/cpu*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def _loop() -> Any:
    """What a thread of a launch runs."""
    address = _compile(_run_items, types.CPointer(Arguments.of(Kernel(_run_items, "").record)))
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _run_items(pointer):
    """Takes the items that are left, one after the other."""
    p, at = carray(pointer, 1)[0], address_of(pointer)
    scratch = (p.memory + add_to(at + _WORKER, 1) * p.scratch + 63) // 64 * 64
    item = add_to(at + _ITEM, 1)
    while item < p.items:
        call(p.function, at, item, scratch)
        item = add_to(at + _ITEM, 1)


_ITEM, _WORKER = (8 * _HEADER.index(name) for name in ("item", "worker"))


@functools.cache
def _gomp_parallel() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch uses; without it one thread."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        say_once("PyTorch's OpenMP threads were not found: the CPU kernels run on one thread.")
        return _alone
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def _alone(function: Any, arguments: int, threads: int, flags: int) -> None:
    function(arguments)

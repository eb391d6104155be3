"""How kernels are compiled and launched: on the threads that PyTorch has, each taking one item of work after another.

What an item computes depends on the item alone, so that results do not depend on the number of threads. PyTorch's own
OpenMP threads run a launch, which its operations before and after keep awake; a second pool would fight with them for
the cores.
"""

import ctypes
import functools
import hashlib
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Flags, compile_internal
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate

from nc_patch.common import say_once
from nc_patch.ops.cpu.vectors import add_to, call

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _sources() -> str:
    """A name for the sources of all kernels."""
    package = Path(__file__).parent.parent.parent
    found = hashlib.sha256()
    for path in sorted([*package.glob("ops/cpu/*.py"), *package.glob("selections/**/cpu*.py")]):
        found.update(path.read_bytes())
    return f"sources_{found.hexdigest()[:16]}"


# What kernels may be told. All have one record of it, so that they share compiled functions. The first fields are what
# a launch fills in. Of tensors ``[B, H, N, ...]`` the record has the address and, as ``name_b``, ``name_h`` and
# ``name_n``, steps in bytes; of other tensors the address alone.
_HEADER = ("items", "item", "worker", "memory", "scratch", "function", "here")
_TENSORS = ("query", "key", "value", "output", "codes", "scales", "mean_key", "mean_value", "choice", "kept")
_STEPS = {name: [f"{name}_{step}" for step in "bhn"] for name in _TENSORS}
_INTEGERS = """
    visible origin budget budget_b budget_h sinks kind new group heads Lq N D Dv width lse lse_kept attended
    rows first queries sink_keys recent_keys columns slots size room count mean_count plan blocks law recent samples
    table table_b pages key_block key_row value_block value_row estimates
    residuals center spread coded bounds bounds_n first_new tile squares pairs converts
"""
# Where the arrays of a launch lie in scratch memory, in bytes.
_ARRAYS = [f"array{number}" for number in range(15)]
_FLOATS = ("factor", "scale", "softcap", "per_scale")
# What is kept on the disk depends on the sources of all kernels, as its key has the record's fields.
_FIELDS = [*_HEADER, *_TENSORS, *chain(*_STEPS.values()), *_INTEGERS.split(), *_ARRAYS, _sources(), *_FLOATS]
_NOTHING = dict.fromkeys(_FIELDS, 0)
_PACKED = struct.Struct(f"{len(_FIELDS) - len(_FLOATS)}q{len(_FLOATS)}d")
_ARGUMENTS = numba.from_dtype(np.dtype([(name, "f8" if name in _FLOATS else "i8") for name in _FIELDS]))


class _Part(JITCodeLibrary):
    """What kernels call: LLVM optimises it, and makes machine code of it, as a part of each of them alone."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator of what kernels call; returns it as it is. Numba compiles it once for arguments of the same types."""
    target, flags, found = cpu_target.target_context, Flags(), {}
    flags.error_model = "numpy"
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True

    class Template(AbstractTemplate):
        key = function

        def generic(self, given: Any, _: Any) -> Any:
            if given not in found:
                library = _Part(target.codegen(), function.__qualname__)
                part = compile_internal(self.context, target, library, function, given, None, flags, {})
                target.insert_user_function(function, part.fndesc, [library])
                found[given] = part.signature
            return found[given]

    cpu_target.typing_context.insert_user_function(function, Template)
    return function


class Kernel:
    """A function over items of work, compiled when it is first called and kept on the disk for later processes.

    It is given the record of the arguments, the number of an item, and the address of scratch memory.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    @functools.cached_property
    def _address(self) -> int:
        return _compile(self._function, _ARGUMENTS, types.int64, types.int64)

    def __call__(self, items: int, arrays: Sequence[int] = (), **arguments: Any) -> None:
        """Runs ``items`` items; each thread has scratch memory for arrays of so many floats, see ``memory_of``."""
        if items <= 0:
            return
        threads = 1 if os.getpid() != _PROCESS else min(items, torch.get_num_threads())
        values, end = _NOTHING.copy(), 0
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                values[name] = value or 0
                continue
            values[name] = value.data_ptr()
            if name in _STEPS:
                size = value.element_size()
                values.update(zip(_STEPS[name], [step * size for step in value.stride()], strict=False))
        for name, floats in zip(_ARRAYS, arrays, strict=False):
            values[name], end = end, end + -(-floats // 16) * 64
        scratch = -(-end // 4096) * 4096 + 64
        memory = torch.empty(threads * scratch, dtype=torch.uint8, device="cpu")
        record = ctypes.create_string_buffer(_PACKED.size)
        values |= {"items": items, "memory": memory.data_ptr(), "scratch": scratch, "function": self._address}
        values["here"] = here = ctypes.addressof(record)
        _PACKED.pack_into(record, 0, *values.values())
        run = _gomp_parallel() if threads > 1 else _alone
        run(_loop(), here, threads, 0)


@compiled
def memory_of(p, scratch):
    """The addresses of the arrays that a launch has asked for; each begins at a multiple of 64."""
    return (scratch + p.array0, scratch + p.array1, scratch + p.array2, scratch + p.array3, scratch + p.array4,
            scratch + p.array5, scratch + p.array6, scratch + p.array7, scratch + p.array8, scratch + p.array9,
            scratch + p.array10, scratch + p.array11, scratch + p.array12, scratch + p.array13,
            scratch + p.array14)  # fmt: skip


# OpenMP's threads do not live on in a forked process, where a parallel region would wait for them for ever.
_PROCESS = os.getpid()


def _compile(function: Callable[..., None], *arguments: Any) -> int:
    """The address of a compiled function of such arguments."""
    compiled = functools.partial(numba.cfunc(types.void(*arguments), cache=True, error_model="numpy"), function)
    try:
        return int(compiled().address)
    except (AttributeError, EOFError, ImportError, pickle.UnpicklingError):
        FunctionCache(function).flush()  # what an earlier version has kept may name what is gone
        return int(compiled().address)
    except (RuntimeError, OSError) as error:
        if "cannot cache" not in str(error) and not isinstance(error, OSError):
            raise
        say_once(
            "The compiled kernels for CPUs cannot be kept on the disk, so that every process compiles them anew: set "
            f"NUMBA_CACHE_DIR to a directory that can be written to ({error})."
        )
        return int(numba.cfunc(types.void(*arguments), error_model="numpy")(function).address)


@functools.cache
def _loop() -> Any:
    """What a thread of a launch runs."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_compile(_run_items, _ARGUMENTS))


def _run_items(p):
    """Takes the items that are left, one after the other."""
    scratch = (p.memory + add_to(p.here + _WORKER, 1) * p.scratch + 63) // 64 * 64
    item = add_to(p.here + _ITEM, 1)
    while item < p.items:
        call(p.function, p.here, item, scratch)
        item = add_to(p.here + _ITEM, 1)


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

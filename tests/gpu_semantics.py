"""Triton's interpreter with a GPU's semantics, as a pytest plugin and as a context manager.

The interpreter runs one program after another, each as if it were one thread, with numpy's arithmetic. On a GPU they
come in any order, the threads of one see each other's stores only past a barrier, and arithmetic is what PTX allows.
``GpuSemantics(seed).active()`` makes the interpreter do what a GPU may do, and collects ``findings``:

- *order*: the programs of a launch run in an order drawn from the seed;
- *races*: an address that two programs touch, or one program twice with no ``tl.debug_barrier`` between, where one of
  the two accesses is a store, or atomic and the other not; one store of different values to one address. A program may
  store over what the same place in a tensor of that size has loaded, as in ``x[i] += 1``;
- *memory*: what ``torch.empty`` returns holds a pattern. Reading it is found, and so is leaving the tensors that the
  launch was given, unless a mask forbids the access; what a mask forbids and no ``other`` replaces holds the pattern;
- *arithmetic*: see ``Arithmetic``.

As a plugin it is active in every test, and a test with findings fails; ``GPU_SEMANTICS_SEED`` (0) is the seed:

    TRITON_INTERPRET=1 PYTHONPATH=tests GPU_SEMANTICS_SEED=3 python -m pytest -p gpu_semantics tests/test_triton_tail.py

It replaces parts of the interpreter of Triton 3.7. Where another version lacks one, ``active`` raises and names it.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

Array = NDArray[Any]
Plain = Callable[..., Any]  # what is replaced: the first argument of what replaces it
TRITON = os.path.dirname(triton.__file__)
# Memory that nothing has written: in every two bytes, a NaN of bfloat16 and float16; in every four, of float32.
POISON = np.array([0x7FA5], "<u2")
# What division, square root, and powers and logarithms to base 2 may be off by, in units in the last place.
ULPS = 2.0
# How many products a matrix unit adds to its sum at once.
PRODUCTS_AT_ONCE = 16
INEXACT = {"create_fdiv": np.divide, "create_exp2": np.exp2, "create_log2": np.log2, "create_sqrt": np.sqrt}


class Arithmetic:
    """What PTX allows where it differs from numpy.

    - A product that is added to something is not rounded first.
    - ``x / y``, ``exp2``, ``log2`` and ``sqrt`` are off by up to ``ULPS``, by the bits of their operands and the seed:
      the same operands give the same result. Powers of two below float32's normal numbers are zero.
    - The larger, and the smaller, of a NaN and a number is the number.
    - Of numbers beyond an integer type the nearest integer is taken, of NaN 0; 8 bits are the lower half of 16.
    - bfloat16 is rounded to nearest, ties to even.
    - A matrix product is summed in groups, each sum cut toward zero. Other sums are folded in halves.
    """

    def __init__(self, seed: int) -> None:
        self._hash = np.uint32(seed * 0x9E3779B1 % 2**32)

    def multiply(self, plain: Plain, builder: Any, left: TensorHandle, right: TensorHandle) -> TensorHandle:
        """A product that remembers its factors, for ``add``."""
        result = plain(builder, left, right)
        if result.data.dtype == np.float32:
            result.attr["factors"] = left.data.astype(np.float64), right.data.astype(np.float64)
        return result

    def add(self, plain: Plain, builder: Any, left: TensorHandle, right: TensorHandle, sign: int = 1) -> TensorHandle:
        """``left + sign * right``, rounded once where one of the two is a product."""
        if "factors" in left.attr:
            first, second = left.attr["factors"]
            total = first * second + sign * right.data.astype(np.float64)
        elif "factors" in right.attr:
            first, second = right.attr["factors"]
            total = left.data.astype(np.float64) + sign * first * second
        else:
            return plain(builder, left, right)
        return TensorHandle(total.astype(np.float32), left.dtype.scalar)

    subtract = partialmethod(add, sign=-1)

    def inexact(self, operation: np.ufunc, plain: Plain, builder: Any, *operands: TensorHandle) -> TensorHandle:
        """``operation`` off by up to ``ULPS``, of which rounding takes half a unit."""
        values = np.broadcast_arrays(*(operand.data for operand in operands))
        if values[0].dtype != np.float32:
            return plain(builder, *operands)
        bits = np.full(values[0].shape, self._hash)
        for value in values:
            bits = (bits ^ np.ascontiguousarray(value).view(np.uint32)) * np.uint32(0x9E3779B1)
            bits ^= bits >> np.uint32(15)
        exact = operation(*(value.astype(np.float64) for value in values))
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        if operation is np.log2:  # off by as much near 0 as near 1
            unit = np.maximum(unit, 2.0**-23)
        moved = exact + unit * (ULPS - 0.5) * (bits / 2.0**31 - 1)
        result = np.where(np.isfinite(moved) & (exact != 0), moved, exact).astype(np.float32)
        if operation is np.exp2:
            result[result < 2.0**-126] = 0
            result[values[0] == 0] = 1
        return TensorHandle(result, operands[0].dtype.scalar)

    def larger(self, plain: Plain, builder: Any, left: TensorHandle, right: TensorHandle) -> TensorHandle:
        return builder.binary_op(left, right, np.fmax)

    def smaller(self, plain: Plain, builder: Any, left: TensorHandle, right: TensorHandle) -> TensorHandle:
        return builder.binary_op(left, right, np.fmin)

    def to_integer(self, plain: Plain, builder: Any, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        target = interpreter._get_np_dtype(to)
        wide = np.promote_types(target, np.int16 if target.kind == "i" else np.uint16)
        low, high = np.iinfo(wide).min, np.iinfo(wide).max
        cut = np.nan_to_num(np.trunc(source.data.astype(np.float64)), nan=0.0)
        within = np.where((cut > low) & (cut < high), cut, 0).astype(wide)
        whole = np.where(cut >= high, wide.type(high), np.where(cut <= low, wide.type(low), within))
        return TensorHandle(whole.astype(target), to.scalar)

    def cast(self, plain: Plain, builder: Any, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return plain(builder, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)

    def dot(
        self, plain: Plain, builder: Any, left: TensorHandle, right: TensorHandle, start: TensorHandle, *options: Any
    ) -> TensorHandle:
        if left.data.dtype not in (np.float32, np.float16) or start.data.dtype != np.float32:
            return plain(builder, left, right, start, *options)
        rows, columns = left.data.astype(np.float64), right.data.astype(np.float64)
        total = start.data
        for first in range(0, rows.shape[-1], PRODUCTS_AT_ONCE):
            part = slice(first, first + PRODUCTS_AT_ONCE)
            exact = total + rows[..., part] @ columns[..., part, :]
            total = exact.astype(np.float32)
            beyond = np.isfinite(total) & (np.abs(total) > np.abs(exact))
            total = np.where(beyond, np.nextafter(total, np.float32(0)), total)
        return TensorHandle(total, start.dtype.scalar)

    def reduce(self, plain: Plain, reduction: interpreter.ReduceOps, tensors: tuple[tl.tensor, ...]) -> Any:
        data = tensors[0].handle.data
        if data.dtype.kind != "f" or reduction.combine_fn != tl.standard._sum_combine:
            return plain(reduction, tensors)  # whose maxima and minima drop NaN
        axes = tuple(range(data.ndim)) if reduction.axis is None else (reduction.axis,)
        for axis in axes:
            while data.shape[axis] > 1:
                data = np.add(*np.split(data, 2, axis))
        return reduction.to_tensor(data if reduction.keep_dims else data.squeeze(axes), tensors[0].dtype)


READ, WRITE, ATOMIC = range(3)
DOES = ("reads", "writes", "changes atomically")
# What each may not meet at one address.
CONFLICTS = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}


class Memory:
    """The memory of the tensors of one launch, and which accesses touched what in it.

    A *cell* is an element of the smallest type that the launch sees a tensor's storage as. Accesses are numbered from 1
    in the order in which they run; ``_first`` and ``_last[kind]`` hold the number of the first and the last access of a
    kind to each cell, or 0. ``_reader`` holds the lane that has read a cell since the last barrier, or 0 for several.
    """

    def __init__(self, kernel: str, tensors: Iterable[torch.Tensor], findings: "Counter[str]") -> None:
        self._kernel, self._findings = kernel, findings
        storages: dict[int, tuple[Array, int]] = {0: (np.zeros(0, np.uint8), 8)}  # every address is above one of them
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{kernel} was given a tensor on {tensor.device}; gpu_semantics takes those on the CPU"
                )
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
        self.begin_program()

    def begin_program(self) -> None:
        self._program = self._phase = len(self._sites)

    def barrier(self) -> None:
        self._phase = len(self._sites)

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
            lane = touched.size + np.flatnonzero(
                touched
            )  # which no tensor of another size has: sizes are powers of two
            parts = width // self._cell[storage]
            several = [np.flatnonzero(parts > i) for i in range(1, parts.max())]
            cell = np.concatenate([cell, *(cell[wide] + i for i, wide in enumerate(several, 1))])
            self._note(kind, cell, np.concatenate([lane, *(lane[wide] for wide in several)]))
        return TensorHandle(touched, tl.int1)

    def _note(self, kind: int, cell: Array, lane: Array) -> None:
        first, last = self._first, self._last
        for other in CONFLICTS[kind]:
            foreign = cell[(first[other][cell] > 0) & (first[other][cell] < self._program)]
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


def poisoned(plain: Plain, *arguments: Any, **options: Any) -> torch.Tensor:
    """A new tensor, of which the CPU's memory holds the poison; not that of booleans, which have no such values."""
    tensor = plain(*arguments, **options)
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.dtype != torch.bool:
        data = tensor.untyped_storage()
        torch.tensor([], dtype=torch.int16).set_(data, 0, (data.nbytes() // 2,)).fill_(int(POISON[0]))
    return tensor


def site() -> str:
    """The line of the kernel, or of a device function, that runs, and the line that called it."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while len(lines) < 2 and frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith(TRITON):
            lines.append(f"{os.path.basename(path)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


def tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


class GpuSemantics:
    """Triton's interpreter as a GPU may be, while ``active``.

    Attributes:
        findings: what was found, by the kernel and its line, and how often.
        launches, programs: how many ran.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.findings: Counter[str] = Counter()
        self.launches = self.programs = 0

    @contextmanager
    def active(self) -> Iterator["GpuSemantics"]:
        """While it is entered. Each time begins with the same orders of programs.

        Raises:
            RuntimeError: kernels are not interpreted, or the interpreter lacks what is replaced.
        """
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("gpu_semantics needs kernels that are interpreted: set TRITON_INTERPRET=1")
        self._random = random.Random(self.seed)
        builder, arithmetic = interpreter.InterpreterBuilder, Arithmetic(self.seed)
        replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (interpreter.GridExecutor, "__call__", self._launch),
            (interpreter.ReduceOps, "apply_impl", arithmetic.reduce),
            (builder, "set_grid_dim", self._set_grid_dim),
            (builder, "set_grid_idx", self._set_grid_idx),
            (builder, "create_masked_load", self._load),
            (builder, "create_masked_store", self._store),
            (builder, "create_atomic_rmw", self._atomic),
            (builder, "create_atomic_cas", self._compare_and_swap),
            (builder, "create_barrier", lambda plain, builder: self._memory.barrier()),
            (builder, "create_fmul", arithmetic.multiply),
            (builder, "create_fadd", arithmetic.add),
            (builder, "create_fsub", arithmetic.subtract),
            *((builder, name, partial(arithmetic.inexact, operation)) for name, operation in INEXACT.items()),
            (builder, "create_maxnumf", arithmetic.larger),
            (builder, "create_minnumf", arithmetic.smaller),
            (builder, "create_fp_to_si", arithmetic.to_integer),
            (builder, "create_fp_to_ui", arithmetic.to_integer),
            (builder, "cast_impl", arithmetic.cast),
            (builder, "create_dot", arithmetic.dot),
            (torch, "empty", poisoned),
            (torch, "empty_like", poisoned),
            (torch.Tensor, "new_empty", poisoned),
        )
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, replacement in replacements:
                if not hasattr(owner, name):
                    missing = f"no {owner.__name__}.{name}, which gpu_semantics replaces"
                    raise RuntimeError(f"the interpreter of Triton {triton.__version__} has {missing}")
                patch.setattr(owner, name, method(replacement, getattr(owner, name)))
            yield self

    def take_findings(self) -> list[str]:
        """The findings as lines, which are then forgotten."""
        lines = [f"{what} ({count} times)" for what, count in sorted(self.findings.items())]
        self.findings.clear()
        return lines

    def _launch(self, plain: Plain, executor: interpreter.GridExecutor, *arguments: Any, **options: Any) -> None:
        self.launches += 1
        self._memory = Memory(executor.fn.__name__, tensors_in((*arguments, *options.values())), self.findings)
        with np.errstate(all="ignore"):
            plain(executor, *arguments, **options)

    def _set_grid_dim(self, plain: Plain, builder: Any, *sizes: int) -> None:
        programs = list(product(*map(range, sizes)))
        self._random.shuffle(programs)
        self._programs = iter(programs)
        plain(builder, *sizes)

    def _set_grid_idx(self, plain: Plain, builder: Any, *_: int) -> None:
        self.programs += 1
        self._memory.begin_program()
        plain(builder, *next(self._programs))

    def _load(
        self,
        plain: Plain,
        builder: Any,
        pointers: TensorHandle,
        mask: TensorHandle,
        other: TensorHandle | None,
        *rest: Any,
    ) -> TensorHandle:
        if other is None:
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            anything = np.repeat(POISON, 4).view(np.bool_ if dtype == np.bool_ else dtype)[0]
            other = TensorHandle(np.full(pointers.data.shape, anything), element)
        return plain(builder, pointers, self._memory.access(READ, pointers, mask.data), other, *rest)

    def _store(
        self, plain: Plain, builder: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
    ) -> None:
        plain(builder, pointers, value, self._memory.access(WRITE, pointers, mask.data, value.data), *rest)

    def _atomic(
        self,
        plain: Plain,
        builder: Any,
        operation: Any,
        pointers: TensorHandle,
        value: TensorHandle,
        mask: TensorHandle,
        *rest: Any,
    ) -> TensorHandle:
        return plain(builder, operation, pointers, value, self._memory.access(ATOMIC, pointers, mask.data), *rest)

    def _compare_and_swap(self, plain: Plain, builder: Any, pointers: TensorHandle, *rest: Any) -> TensorHandle:
        self._memory.access(ATOMIC, pointers, np.ones(pointers.data.shape, bool))
        return plain(builder, pointers, *rest)


def method(replacement: Callable[..., Any], plain: Plain) -> Callable[..., Any]:
    return lambda *arguments, **options: replacement(plain, *arguments, **options)


STATE = pytest.StashKey[GpuSemantics]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STATE] = GpuSemantics(int(os.environ.get("GPU_SEMANTICS_SEED", "0")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Runs a test as on a GPU. One that passes with findings fails; one that fails shows them beside its error."""
    semantics = item.config.stash[STATE]
    try:
        with semantics.active():
            yield
    except BaseException:
        item.add_report_section("call", "gpu_semantics", "\n".join(semantics.take_findings()))
        raise
    if findings := semantics.take_findings():
        pytest.fail(f"As on a GPU, with seed {semantics.seed}:\n" + "\n".join(findings), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    semantics = config.stash[STATE]
    ran = f"{semantics.launches} launches of {semantics.programs} programs"
    terminalreporter.write_line(f"gpu_semantics: {ran}, seed {semantics.seed}")

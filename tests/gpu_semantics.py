"""Triton's interpreter with a GPU's semantics, as a pytest plugin and as a context manager.

The interpreter runs one program after another, each as if it were one thread, with numpy's arithmetic. On a GPU they
come in any order, the threads of one see each other's stores only past a barrier, and arithmetic is what PTX allows.
``GpuSemantics(seed).active()`` makes the interpreter do what a GPU may do, and collects ``findings``:

- *order*: the programs of a launch run in an order drawn from the seed;
- *races*: an address that two programs touch, or one program twice with no ``tl.debug_barrier`` between, where one of
  the two accesses is a store, or atomic and the other not; one store of different values to one address. A program may
  store over what the same place in a tensor of that size has loaded, as in ``x[i] += 1``. Atomic accesses that release
  and acquire order what programs do before a barrier in front of them;
- *memory*: what ``torch.empty`` returns holds a pattern. Reading it is found, and so is leaving the tensors that the
  launch was given, unless a mask forbids the access; what a mask forbids and no ``other`` replaces holds the pattern;
- *arithmetic*: see ``ArithmeticBuilder``.

As a plugin it is active in every test, and a test with findings fails; ``GPU_SEMANTICS_SEED`` (0) is the seed:

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p gpu_semantics tests/test_attention.py

It replaces parts of the interpreter of Triton 3.7; ``test_gpu_semantics.py`` fails where another has them no more.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
from gpu_arithmetic import ArithmeticBuilder
from gpu_memory import ATOMIC, POISON, READ, WRITE, Memory, poisoned
from triton._C.libtriton.ir import MEM_SEMANTIC
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


class GpuSemantics(ArithmeticBuilder):
    """Triton's interpreter as a GPU may be, while ``active``: a builder in place of the interpreter's.

    Attributes:
        findings: what was found, by the kernel and its line, and how often.
        launches, programs: how many ran.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.findings: Counter[str] = Counter()
        self.launches = self.programs = 0

    @contextmanager
    def active(self) -> Iterator["GpuSemantics"]:
        """While it is entered. Each time begins with the same orders of programs.

        Raises:
            RuntimeError: kernels are not interpreted. AttributeError: the interpreter lacks what is replaced.
        """
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("gpu_semantics needs kernels that are interpreted: set TRITON_INTERPRET=1")
        self._random = random.Random(self.seed)
        replacements: dict[tuple[Any, str], Callable[..., Any]] = {
            (interpreter.GridExecutor, "__call__"): self._launch,
            (interpreter, "_patch_lang"): self._patch_language,
            (torch, "empty"): poisoned,
            (torch, "empty_like"): poisoned,
            (torch.Tensor, "new_empty"): poisoned,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter, "interpreter_builder", self)
            patch.setattr(interpreter.interpreter_semantic, "builder", self)
            for (owner, name), replacement in replacements.items():
                patch.setattr(owner, name, method(replacement, getattr(owner, name)))
            yield self

    def take_findings(self) -> list[str]:
        """The findings as lines, which are then forgotten."""
        lines = [f"{what} ({count} times)" for what, count in sorted(self.findings.items())]
        self.findings.clear()
        return lines

    def _launch(self, plain: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> None:
        self.launches += 1
        self._memory = Memory(executor.fn.__name__, tensors_in((*arguments, *options.values())), self.findings)
        self._patched: set[str] = set()
        with np.errstate(all="ignore"):
            plain(executor, *arguments, **options)

    def _patch_language(self, plain: Callable[..., Any], function: Any) -> Any:
        """Once a launch for what each module sees; the interpreter would in every call of a device function."""
        first = function.__module__ not in self._patched
        self._patched.add(function.__module__)
        return plain(function) if first else None

    def set_grid_dim(self, *sizes: int) -> None:
        programs = list(product(*map(range, sizes)))
        self._random.shuffle(programs)
        self._programs = iter(programs)
        super().set_grid_dim(*sizes)

    def set_grid_idx(self, *_: int) -> None:
        self.programs += 1
        self._memory.begin_program()
        super().set_grid_idx(*next(self._programs))

    def create_masked_load(self, pointers: TensorHandle, mask: Any, other: Any, *rest: Any) -> TensorHandle:
        if other is None:
            element = pointers.get_element_ty()
            anything = np.repeat(POISON, 4).view(interpreter._get_np_dtype(element))[0]
            other = TensorHandle(np.full(pointers.data.shape, anything), element)
        return super().create_masked_load(pointers, self._memory.access(READ, pointers, mask.data), other, *rest)

    def create_masked_store(self, pointers: TensorHandle, value: TensorHandle, mask: Any, *rest: Any) -> None:
        allowed = self._memory.access(WRITE, pointers, mask.data, value.data)
        super().create_masked_store(pointers, value, allowed, *rest)

    def create_atomic_rmw(self, op: Any, pointers: TensorHandle, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        allowed = self._memory.access(ATOMIC, pointers, mask.data)
        if sem == MEM_SEMANTIC.ACQUIRE_RELEASE:
            self._memory.meet(pointers, allowed.data)
        return super().create_atomic_rmw(op, pointers, value, allowed, sem, scope)

    def create_atomic_cas(self, pointers: TensorHandle, *rest: Any) -> TensorHandle:
        self._memory.access(ATOMIC, pointers, np.ones(pointers.data.shape, bool))
        return super().create_atomic_cas(pointers, *rest)

    def create_barrier(self) -> None:
        self._memory.barrier()


def method(replacement: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``replacement``, which is given ``plain``, what it takes the place of."""
    return lambda *arguments, **options: replacement(plain, *arguments, **options)


# The plugin's.
SEMANTICS = GpuSemantics(int(os.environ.get("GPU_SEMANTICS_SEED", "0")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Runs a test as on a GPU. One that passes with findings fails; one that fails shows them beside its error."""
    try:
        with SEMANTICS.active():
            yield
    except BaseException:
        item.add_report_section("call", "gpu_semantics", "\n".join(SEMANTICS.take_findings()))
        raise
    if findings := SEMANTICS.take_findings():
        pytest.fail(f"As on a GPU, with seed {SEMANTICS.seed}:\n" + "\n".join(findings), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = f"{SEMANTICS.launches} launches of {SEMANTICS.programs} programs"
    terminalreporter.write_line(f"gpu_semantics: {ran}, seed {SEMANTICS.seed}")

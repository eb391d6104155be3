"""What ahead-of-time compilation has to know of a kernel; every module with kernels lists its own specialisations.

Such a module exports ``specialisations(target)``, which yields, for an architecture of ``launch.tiles_for``, the
variants of its kernels that are held to the target's registers and shared memory. The names must be the same for every
target. ``compile.SOURCES`` collects them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Specialisation:
    """One variant of a kernel, as the launch would have it compiled.

    Attributes:
        name: unique among all kernels, such as ``"topk-bf16-d128-sinks"``.
        kernel: the ``triton.jit`` function.
        constants: its compile-time arguments.
        types: Triton's names of the types of the other arguments: ``"*bf16"``, ``"i32"``, ``"fp32"``. ``"i32"`` and
            ``"fp32"`` where the name is absent: integers, and the scale and soft-cap of the scores.
        options: of the compiler: ``num_warps``, ``num_stages`` and so on.
        aligned: integer arguments that are multiples of 16 at run time and are specialised on it. Pointers always are.
    """

    name: str
    kernel: Any
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    options: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()

    def type_of(self, argument: str) -> str:
        """Triton's name for the type of an argument."""
        if argument in self.constants:
            return "constexpr"
        return self.types.get(argument, "fp32" if argument in ("scale", "softcap") else "i32")


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to elements of a floating dtype."""
    return f"*{DTYPE_NAMES[dtype]}"


def data_strides(kernel: Any, prefixes: str = "qkv") -> frozenset[str]:
    """The arguments named as strides of queries, keys and values, such as ``stride_qb``: multiples of 16."""
    names = {f"stride_{tensor}{axis}" for tensor in prefixes for axis in "bhlp"}
    return frozenset(names.intersection(kernel.arg_names))

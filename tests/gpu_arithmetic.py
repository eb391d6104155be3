"""A GPU's arithmetic for Triton's interpreter: what PTX allows where it differs from numpy."""

from dataclasses import replace
from functools import partialmethod
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

# What division, square root, and powers and logarithms to base 2 may be off by, in units in the last place.
ULPS = 2.0
# How many products a matrix unit adds to its sum at once.
PRODUCTS_AT_ONCE = 16


class ArithmeticBuilder(interpreter.InterpreterBuilder):
    """The interpreter's builder, by whose methods kernels compute, with what PTX allows.

    - A product that is added to something is not rounded first.
    - ``x / y``, ``exp2``, ``log2`` and ``sqrt`` are off by up to ``ULPS``, by the bits of their operands and ``seed``:
      the same operands give the same result. Powers of two below float32's normal numbers are zero.
    - The larger, and the smaller, of a NaN and a number is the number.
    - Of numbers beyond an integer type the nearest integer is taken, of NaN 0; 8 bits are the lower half of 16.
    - bfloat16 is rounded to nearest, ties to even.
    - A matrix product is summed in groups, each sum cut toward zero.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        # Only with ``debug`` would anyone hear of an overflow.
        self.options = replace(self.options, sanitize_overflow=False)

    def create_fmul(self, left: TensorHandle, right: TensorHandle) -> TensorHandle:
        """A product that remembers its factors, for what it is added to."""
        result = super().create_fmul(left, right)
        if result.data.dtype == np.float32:
            result.attr["factors"] = left.data, right.data
        return result

    def create_reshape(self, source: TensorHandle, shape: list[int], *rest: Any) -> TensorHandle:
        """A product stays one in another shape."""
        result = super().create_reshape(source, shape, *rest)
        if "factors" in source.attr:
            result.attr["factors"] = tuple(
                np.broadcast_to(x, source.data.shape).reshape(shape) for x in source.attr["factors"]
            )
        return result

    def _add(self, operation: np.ufunc, left: TensorHandle, right: TensorHandle) -> TensorHandle:
        """A sum or a difference, rounded once where one of the two is a product."""
        if "factors" in left.attr:
            first, second = left.attr["factors"]
            total = operation(first.astype(np.float64) * second, right.data.astype(np.float64))
        elif "factors" in right.attr:
            first, second = right.attr["factors"]
            total = operation(left.data.astype(np.float64), first.astype(np.float64) * second)
        else:
            return self.binary_op(left, right, operation)
        return TensorHandle(total.astype(np.float32), left.dtype.scalar)

    create_fadd = partialmethod(_add, np.add)
    create_fsub = partialmethod(_add, np.subtract)

    def _inexact(self, operation: np.ufunc, *operands: TensorHandle) -> TensorHandle:
        """``operation`` off by up to ``ULPS``, of which rounding takes half a unit."""
        values = np.broadcast_arrays(*(operand.data for operand in operands))
        if values[0].dtype != np.float32:
            return TensorHandle(operation(*values), operands[0].dtype.scalar)
        bits = np.full(values[0].shape, self.seed * 0x9E3779B1 % 2**32, np.uint32)
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

    create_fdiv = partialmethod(_inexact, np.divide)
    create_exp2 = partialmethod(_inexact, np.exp2)
    create_log2 = partialmethod(_inexact, np.log2)
    create_sqrt = partialmethod(_inexact, np.sqrt)
    create_maxnumf = partialmethod(interpreter.InterpreterBuilder.binary_op, op=np.fmax)
    create_minnumf = partialmethod(interpreter.InterpreterBuilder.binary_op, op=np.fmin)

    def create_fp_to_si(self, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        target = interpreter._get_np_dtype(to)
        wide = np.promote_types(target, np.int16 if target.kind == "i" else np.uint16)
        low, high = np.iinfo(wide).min, np.iinfo(wide).max
        cut = np.nan_to_num(np.trunc(source.data.astype(np.float64)), nan=0.0)
        within = np.where((cut > low) & (cut < high), cut, 0).astype(wide)
        whole = np.where(cut >= high, wide.type(high), np.where(cut <= low, wide.type(low), within))
        return TensorHandle(whole.astype(target), to.scalar)

    create_fp_to_ui = create_fp_to_si

    def cast_impl(self, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return super().cast_impl(source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)

    def create_dot(self, left: TensorHandle, right: TensorHandle, start: TensorHandle, *options: Any) -> TensorHandle:
        if left.data.dtype not in (np.float32, np.float16) or start.data.dtype != np.float32:
            return super().create_dot(left, right, start, *options)
        rows, columns = left.data.astype(np.float64), right.data.astype(np.float64)
        total = start.data
        for first in range(0, rows.shape[-1], PRODUCTS_AT_ONCE):
            part = slice(first, first + PRODUCTS_AT_ONCE)
            exact = total + rows[..., part] @ columns[..., part, :]
            total = exact.astype(np.float32)
            beyond = np.isfinite(total) & (np.abs(total) > np.abs(exact))
            total = np.where(beyond, np.nextafter(total, np.float32(0)), total)
        return TensorHandle(total, start.dtype.scalar)

"""Memory, and rows of floats, for compiled code: functions of addresses, of counts that are multiples of 16.

Nothing here reads or writes outside of what it is told.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nc_patch.ops.cpu import llvm as vec
from nc_patch.ops.cpu.llvm import LANES, Builder, Float, Int, Value, constant, instruction, load, loop, store

# Numbers and memory.


@instruction
def f32(b: Builder, address: Int, index: Int) -> Float:
    """The float at ``address[index]``."""
    return load(b, address, index, vec.F32)


@instruction
def set_f32(b: Builder, address: Int, index: Int, value: Float) -> None:
    """``address[index] = value``."""
    store(b, value, address, index)


def _integers(kind: Any) -> tuple[Any, Any]:
    """Instructions that read and write the integer at ``address[index]``."""

    def read(b: Builder, address: Int, index: Int) -> Int:
        return b.sext(load(b, address, index, kind), vec.I64)

    def write(b: Builder, address: Int, index: Int, value: Int) -> None:
        store(b, b.trunc(value, kind), address, index)

    return instruction(read), instruction(write)


(i32, set_i32), (i8, set_i8) = _integers(vec.I32), _integers(vec.I8)


@instruction
def element_of(b: Builder, address: Int, index: Int, kind: vec.AnyKind) -> Float:
    """One element of a kind, see ``as_floats``, as a float."""
    return vec.as_floats(b, address, index, kind, lanes=1)


@intrinsic
def address_of(context: Any, pointer: Any) -> Any:
    """The address that a pointer holds."""
    return types.int64(pointer), lambda context, builder, signature, values: builder.ptrtoint(values[0], vec.I64)


@instruction
def call(b: Builder, function: Int, arguments: Int, item: Int, scratch: Int) -> None:
    """Calls a kernel, by its address, with the address of its arguments."""
    pointer = vec.I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, vec.I64, vec.I64])
    b.call(b.inttoptr(function, kind.as_pointer()), [b.inttoptr(arguments, pointer), item, scratch])


@instruction
def ask_for(b: Builder, address: Int) -> None:
    """Has 512 bytes from an address on brought into the caches; an address where nothing is does no harm."""
    vec.prefetch(b, address, 512)


@instruction
def add_to(b: Builder, address: Int, value: Int) -> Int:
    """Adds to an int64 that all threads share; what it was."""
    return b.atomic_rmw("add", b.inttoptr(address, vec.I64.as_pointer()), value, "monotonic")


# Rows of floats, ``count`` a multiple of 16.


@instruction
def fill(b: Builder, address: Int, count: Int, value: Float) -> None:
    """Writes ``count`` floats."""
    vector = vec.splat(b, value)
    loop(b, count, LANES, [], lambda i: store(b, vector, address, i))


@instruction
def to_floats(b: Builder, target: Int, source: Int, count: Int, kind: vec.Kind) -> None:
    """Converts elements of a kind, see ``as_floats``."""
    loop(b, count, LANES, [], lambda i: store(b, vec.as_floats(b, source, i, kind), target, i))


@instruction
def from_floats(b: Builder, target: Int, source: Int, count: Int, factor: Float, kind: vec.Kind) -> None:
    """Converts floats times a factor to elements of a kind, rounded to the nearest, ties to even."""
    times = vec.splat(b, factor)

    def body(i: Value) -> None:
        value = b.fmul(load(b, source, i), times)
        if kind == 1:
            bits = b.bitcast(value, vec.INTS)
            half, one, below, nan = (constant(vec.INTS, word) for word in (16, 1, 0x7FFF, 0x7FC0))
            odd = b.and_(b.lshr(bits, half), one)
            rounded = b.lshr(b.add(b.add(bits, below), odd), half)
            bits = b.select(b.fcmp_unordered("uno", value, value), nan, rounded)
            value = b.trunc(bits, ir.VectorType(vec.I16, LANES))
        elif kind == 2:
            value = b.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
        store(b, value, target, i)

    loop(b, count, LANES, [], body)


@instruction
def scale_row(b: Builder, row: Int, count: Int, factor: Float) -> None:
    """Multiplies floats by a factor."""
    times = vec.splat(b, factor)
    loop(b, count, LANES, [], lambda i: store(b, b.fmul(load(b, row, i), times), row, i))


@instruction
def largest(b: Builder, row: Int, count: Int) -> Float:
    """The largest float, leaving out NaN; -inf of nothing."""
    found = loop(b, count, LANES, [vec.LOWEST], lambda i, most: [vec.larger(b, load(b, row, i), most)])
    return vec.largest_lane(b, found[0])


@instruction
def exponentials(b: Builder, row: Int, count: Int, shift: Float, factor: Float) -> Float:
    """Each float becomes ``2 ** ((x - shift) * factor)``; their sum."""
    minus, times = vec.splat(b, shift), vec.splat(b, factor)

    def body(i: Value, total: Value) -> list[Value]:
        value = vec.exp2(b, b.fmul(b.fsub(load(b, row, i), minus), times))
        store(b, value, row, i)
        return [b.fadd(total, value)]

    return vec.lane_sum(b, loop(b, count, LANES, [vec.ZERO], body)[0])


@instruction
def times_counts(b: Builder, row: Int, counts: Int, count: Int) -> Float:
    """Each float is multiplied by one of ``counts``, and is zero where that is; their sum."""

    def body(i: Value, total: Value) -> list[Value]:
        many = load(b, counts, i)
        value = b.select(b.fcmp_ordered("==", many, vec.ZERO), vec.ZERO, b.fmul(load(b, row, i), many))
        store(b, value, row, i)
        return [b.fadd(total, value)]

    return vec.lane_sum(b, loop(b, count, LANES, [vec.ZERO], body)[0])


# Selection. A NaN counts as larger than every number.


@instruction
def count_from(b: Builder, row: Int, count: Int, threshold: Float) -> Int:
    """How many floats are not below a threshold."""
    least = vec.splat(b, threshold)

    def body(i: Value, found: Value) -> list[Value]:
        return [b.sub(found, b.sext(b.fcmp_unordered(">=", load(b, row, i), least), vec.INTS))]

    lanes = loop(b, count, LANES, [constant(vec.INTS, 0)], body)[0]
    return b.zext(vec.call_llvm(b, "llvm.vector.reduce.add.v16i32", vec.I32, [lanes]), vec.I64)


@instruction
def take_from(
    b: Builder, row: Int, count: Int, threshold: Float, values: Int, places: Int, first: Int, numbered: vec.Known
) -> Int:
    """Copies the floats that are not below a threshold to ``values``, and to ``places`` where they stand; how many.

    Up to 16 more than these are written. ``numbered`` 1: the places are read from ``first``, an address, else they are
    ``first``, ``first + 1``, ... ``values`` and ``places`` may be ``row`` and ``first`` themselves.
    """
    least = vec.splat(b, threshold)
    begin = [] if numbered else [vec.counted_from(b, first)]

    def body(i: Value, found: Value, *place: Value) -> list[Value]:
        value = load(b, row, i)
        here = place[0] if place else load(b, first, i, vec.INTS)
        more = vec.compress(b, b.fcmp_unordered(">=", value, least), [(value, values), (here, places)], found)
        return [b.add(found, more), *(b.add(p, constant(vec.INTS, LANES)) for p in place)]

    return loop(b, count, LANES, [constant(vec.I64, 0), *begin], body)[0]

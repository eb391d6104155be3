"""Memory, and rows of floats, for compiled code: functions of addresses, of counts that are multiples of 16.

Nothing here reads or writes outside of what it is told.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nc_patch.ops.cpu.llvm import (
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    AnyKind,
    Builder,
    Float,
    Int,
    Kind,
    Known,
    Value,
    as_floats,
    call_llvm,
    compress,
    const_int,
    const_ints,
    const_vector,
    element_at,
    exp2,
    instruction,
    lane_sum,
    larger,
    largest_lane,
    load,
    loop,
    prefetch,
    splat,
    store,
)

# Numbers and memory.


@instruction
def f32(b: Builder, address: Int, index: Int) -> Float:
    """The float at ``address[index]``."""
    return load(b, element_at(b, address, index, 4), F32)


@instruction
def set_f32(b: Builder, address: Int, index: Int, value: Float) -> None:
    """``address[index] = value``."""
    store(b, value, element_at(b, address, index, 4))


@instruction
def i32(b: Builder, address: Int, index: Int) -> Int:
    """The int32 at ``address[index]``."""
    return b.sext(load(b, element_at(b, address, index, 4), I32), I64)


@instruction
def set_i32(b: Builder, address: Int, index: Int, value: Int) -> None:
    """``address[index] = value``, an int32."""
    store(b, b.trunc(value, I32), element_at(b, address, index, 4))


@instruction
def set_i8(b: Builder, address: Int, index: Int, value: Int) -> None:
    """``address[index] = value``, an int8."""
    store(b, b.trunc(value, I8), b.add(address, index))


@intrinsic
def address_of(context: Any, pointer: Any) -> Any:
    """The address that a pointer holds."""
    return types.int64(pointer), lambda context, builder, signature, values: builder.ptrtoint(values[0], I64)


@instruction
def call(b: Builder, function: Int, arguments: Int, item: Int, scratch: Int) -> None:
    """Calls a kernel, by its address, with the address of its arguments."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I64, I64])
    b.call(b.inttoptr(function, kind.as_pointer()), [b.inttoptr(arguments, pointer), item, scratch])


@instruction
def element_of(b: Builder, address: Int, index: Int, kind: AnyKind) -> Float:
    """One element of a kind, see ``as_floats``, as a float."""
    if kind == 0:
        return load(b, element_at(b, address, index, 4), F32)
    if kind == 3:
        return b.sitofp(load(b, b.add(address, index), I8), F32)
    half = load(b, element_at(b, address, index, 2), I16)
    if kind == 1:
        return b.bitcast(b.shl(b.zext(half, I32), ir.Constant(I32, 16)), F32)
    return b.fpext(b.bitcast(half, ir.HalfType()), F32)


@instruction
def i8(b: Builder, address: Int, index: Int) -> Int:
    """The int8 at ``address[index]``."""
    return b.sext(load(b, b.add(address, index), I8), I64)


@instruction
def ask_for(b: Builder, address: Int) -> None:
    """Has 512 bytes from an address on brought into the caches; an address where nothing is does no harm."""
    prefetch(b, address, 512)


@instruction
def add_to(b: Builder, address: Int, value: Int) -> Int:
    """Adds to an int64 that all threads share; what it was."""
    return b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), value, "monotonic")


@instruction
def fill(b: Builder, address: Int, count: Int, value: Float) -> None:
    """Writes ``count`` floats, a multiple of 16."""
    vector = splat(b, value)

    def body(i: Value) -> list[Value]:
        store(b, vector, element_at(b, address, i, 4))
        return []

    loop(b, count, LANES, [], body)


@instruction
def fill_i32(b: Builder, address: Int, count: Int, value: Int) -> None:
    """Writes ``count`` int32, a multiple of 16."""
    vector = splat(b, b.trunc(value, I32), INTS)

    def body(i: Value) -> list[Value]:
        store(b, vector, element_at(b, address, i, 4))
        return []

    loop(b, count, LANES, [], body)


# Rows of floats, ``count`` a multiple of 16.


@instruction
def to_floats(b: Builder, target: Int, source: Int, count: Int, kind: Kind) -> None:
    """Converts elements of a kind, see ``as_floats``."""

    def body(i: Value) -> list[Value]:
        store(b, as_floats(b, source, i, kind), element_at(b, target, i, 4))
        return []

    loop(b, count, LANES, [], body)


@instruction
def from_floats(b: Builder, target: Int, source: Int, count: Int, factor: Float, kind: Kind) -> None:
    """Converts floats times a factor to elements of a kind, rounded to the nearest, ties to even."""
    times = splat(b, factor)

    def body(i: Value) -> list[Value]:
        value = b.fmul(load(b, element_at(b, source, i, 4)), times)
        if kind == 0:
            store(b, value, element_at(b, target, i, 4))
        elif kind == 1:
            bits = b.bitcast(value, INTS)
            words = [const_ints(word) for word in (16, 1, 0x7FFF, 0x7FC0)]
            odd = b.and_(b.lshr(bits, words[0]), words[1])
            rounded = b.lshr(b.add(b.add(bits, words[2]), odd), words[0])
            rounded = b.select(b.fcmp_unordered("uno", value, value), words[3], rounded)
            store(b, b.trunc(rounded, HALVES), element_at(b, target, i, 2))
        else:
            store(b, b.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), element_at(b, target, i, 2))
        return []

    loop(b, count, LANES, [], body)


@instruction
def scale_row(b: Builder, row: Int, count: Int, factor: Float) -> None:
    """Multiplies floats by a factor."""
    times = splat(b, factor)

    def body(i: Value) -> list[Value]:
        at = element_at(b, row, i, 4)
        store(b, b.fmul(load(b, at), times), at)
        return []

    loop(b, count, LANES, [], body)


@instruction
def largest(b: Builder, row: Int, count: Int) -> Float:
    """The largest float, leaving out NaN; -inf of nothing."""

    def body(i: Value, found: Value) -> list[Value]:
        return [larger(b, load(b, element_at(b, row, i, 4)), found)]

    return largest_lane(b, loop(b, count, LANES, [const_vector(-float("inf"))], body)[0])


@instruction
def exponentials(b: Builder, row: Int, count: Int, shift: Float, factor: Float) -> Float:
    """Each float becomes ``2 ** ((x - shift) * factor)``; their sum."""
    minus, times = splat(b, shift), splat(b, factor)

    def body(i: Value, total: Value) -> list[Value]:
        at = element_at(b, row, i, 4)
        value = exp2(b, b.fmul(b.fsub(load(b, at), minus), times))
        store(b, value, at)
        return [b.fadd(total, value)]

    return lane_sum(b, loop(b, count, LANES, [const_vector(0.0)], body)[0])


@instruction
def times_counts(b: Builder, row: Int, counts: Int, count: Int) -> Float:
    """Each float is multiplied by an int32 of ``counts``, and is zero where that is; their sum."""

    def body(i: Value, total: Value) -> list[Value]:
        at = element_at(b, row, i, 4)
        many = b.sitofp(load(b, element_at(b, counts, i, 4), INTS), FLOATS)
        zero = const_vector(0.0)
        value = b.select(b.fcmp_ordered("==", many, zero), zero, b.fmul(load(b, at), many))
        store(b, value, at)
        return [b.fadd(total, value)]

    return lane_sum(b, loop(b, count, LANES, [const_vector(0.0)], body)[0])


# Selection. A NaN counts as larger than every number.


@instruction
def count_from(b: Builder, row: Int, count: Int, threshold: Float) -> Int:
    """How many floats are not below a threshold."""
    least = splat(b, threshold)

    def body(i: Value, found: Value) -> list[Value]:
        return [b.sub(found, b.sext(b.fcmp_unordered(">=", load(b, element_at(b, row, i, 4)), least), INTS))]

    lanes = loop(b, count, LANES, [const_ints(0)], body)[0]
    return b.zext(call_llvm(b, "llvm.vector.reduce.add.v16i32", I32, [lanes]), I64)


@instruction
def take_from(
    b: Builder, row: Int, count: Int, threshold: Float, values: Int, places: Int, first: Int, numbered: Known
) -> Int:
    """Copies the floats that are not below a threshold to ``values``, and to ``places`` where they stand; how many.

    Up to 16 more than these are written. ``numbered`` 1: the places are read from ``first``, an address, else they are
    ``first``, ``first + 1``, ... ``values`` and ``places`` may be ``row`` and ``first`` themselves.
    """
    least = splat(b, threshold)
    lanes = ir.Constant(INTS, list(range(LANES)))
    begin = [const_int(0)] if numbered else [const_int(0), b.add(lanes, splat(b, b.trunc(first, I32), INTS))]

    def body(i: Value, found: Value, *place: Value) -> list[Value]:
        value = load(b, element_at(b, row, i, 4))
        here = place[0] if place else load(b, element_at(b, first, i, 4), INTS)
        mask = b.fcmp_unordered(">=", value, least)
        more = compress(b, mask, [(value, element_at(b, values, found, 4)), (here, element_at(b, places, found, 4))])
        return [b.add(found, more), *(b.add(p, const_ints(LANES)) for p in place)]

    return loop(b, count, LANES, begin, body)[0]

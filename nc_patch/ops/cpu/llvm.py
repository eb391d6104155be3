"""LLVM's instructions on vectors of 16 or 32 floats, as functions of Numba's compiler are made of them.

Numba has no vectors of its own and vectorises few loops well; what is written here LLVM cuts to what the CPU has. An
address is an int64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NewType

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16
# Columns of a tile, such as the scores of 32 queries: a row of them is one vector too.
COLUMNS = 32
# As Numba compiles for.
_FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
# Whether a vector of 16 is one register, of 32; else it takes two or four, of 16 or 32.
_WIDE = "+avx512f" in _FEATURES
# Whether there is an instruction that multiplies pairs of bfloat16.
_PAIRS = "+avx512bf16" in _FEATURES
# Rows of a tile whose sums stay in registers.
TILE_ROWS = 8 if _WIDE else 2

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
_ELEMENTS = (F32, I16, ir.HalfType(), I8)
_BYTES = {"float": 4, "half": 2, "i8": 1, "i16": 2, "i32": 4}
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
TILE_FLOATS, TILE_INTS = ir.VectorType(F32, COLUMNS), ir.VectorType(I32, COLUMNS)

Builder = Any
Value = Any


def constant(kind: Any, value: float) -> Value:
    """A number of a type, or a vector of that number."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


ZERO, LOWEST = constant(FLOATS, 0.0), constant(FLOATS, -float("inf"))


def call_llvm(b: Builder, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    """Calls an intrinsic of LLVM's by its name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def element_at(b: Builder, address: Value, index: Value | int, size: int) -> Value:
    """The address of the element ``index`` of so many bytes."""
    return b.add(address, b.mul(constant(I64, index) if isinstance(index, int) else index, constant(I64, size)))


def load(b: Builder, address: Value, index: Value | int = 0, kind: Any = FLOATS) -> Value:
    """What lies at an array's element ``index``: 16 floats unless another type is given."""
    return b.load(_pointer(b, address, index, kind), align=1)


def store(b: Builder, value: Value, address: Value, index: Value | int = 0) -> None:
    """Writes a value, or a vector's, from an array's element ``index`` on."""
    b.store(value, _pointer(b, address, index, value.type), align=1)


def _pointer(b: Builder, address: Value, index: Value | int, kind: Any) -> Value:
    size = _BYTES[str(kind.element if isinstance(kind, ir.VectorType) else kind)]
    return b.inttoptr(element_at(b, address, index, size), kind.as_pointer())


def splat(b: Builder, value: Value, kind: Any = FLOATS) -> Value:
    """A vector of one value."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, value, constant(I32, 0))
    return b.shuffle_vector(first, undefined, constant(_integers_of(kind), 0))


def _integers_of(kind: Any) -> Any:
    """Vectors of as many int32."""
    return ir.VectorType(I32, kind.count)


def counted_from(b: Builder, first: Value) -> Value:
    """The vector of ``first``, an int64, and the 15 integers after it."""
    return b.add(ir.Constant(INTS, list(range(LANES))), splat(b, b.trunc(first, I32), INTS))


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z of vectors, rounded once."""
    return call_llvm(b, f"llvm.fma.v{x.type.count}f32", x.type, (x, y, z))


class _BFloat16(ir.HalfType):
    """The type, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()
_PAIRS_OF_BFLOAT16 = ir.VectorType(_BFloat16(), 2 * LANES)


def add_pairs(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """z and, for each lane, the products of the two bfloat16 that a lane of x and of y holds, the upper one first."""
    if _PAIRS:
        pairs = [b.bitcast(each, _PAIRS_OF_BFLOAT16) for each in (x, y)]
        return call_llvm(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, (z, *pairs))
    words, upper, half = [b.bitcast(each, INTS) for each in (x, y)], constant(INTS, -(1 << 16)), constant(INTS, 16)
    for halves in ([b.and_(word, upper) for word in words], [b.shl(word, half) for word in words]):
        one, other = (b.bitcast(each, FLOATS) for each in halves)
        z = fma(b, one, other, z)
    return z


def _fold(b: Builder, vectors: Sequence[Value], width: int, join: Callable[[Value, Value], Value]) -> Value:
    """Each run of twice ``width`` lanes joined, half to half; of two vectors the runs follow each other by turns."""
    count = vectors[0].type.count
    lanes = [[run + half + i + count * side for run in range(0, count, 2 * width) for side in range(len(vectors))
              for i in range(width)] for half in (0, width)]  # fmt: skip
    kind = ir.VectorType(I32, len(lanes[0]))
    return join(*(b.shuffle_vector(vectors[0], vectors[-1], ir.Constant(kind, each)) for each in lanes))


def _folded(b: Builder, vector: Value, join: Callable[[Value, Value], Value]) -> Value:
    """The lanes joined to one, always in the same order."""
    while vector.type.count > 1:
        vector = _fold(b, [vector], vector.type.count // 2, join)
    return b.extract_element(vector, constant(I32, 0))


def lane_sum(b: Builder, vector: Value) -> Value:
    """The sum of the lanes."""
    return _folded(b, vector, b.fadd)


def four_sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """The sums of the lanes of each of four vectors, as a vector of four; added up as in ``lane_sum``."""
    whole = _fold(b, [_fold(b, vectors[first::2], 8, b.fadd) for first in (0, 1)], 4, b.fadd)
    return _fold(b, [_fold(b, [whole], 2, b.fadd)], 1, b.fadd)


def larger(b: Builder, x: Value, y: Value) -> Value:
    """The larger of both, ``y`` where ``x`` is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def larger_or_nan(b: Builder, x: Value, y: Value) -> Value:
    """The larger of both, NaN where one is."""
    return b.select(b.or_(b.fcmp_ordered("<=", x, y), b.fcmp_unordered("uno", y, y)), y, x)


def largest_lane(b: Builder, vector: Value) -> Value:
    """The greatest lane; a NaN may hide others."""
    return _folded(b, vector, lambda x, y: larger(b, x, y))


def lanes_of(kind: Any, lanes: int) -> Any:
    """A type, or the vector of so many of it."""
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def as_floats(b: Builder, address: Value, index: Value | int, kind: int, lanes: int = LANES) -> Value:
    """16 elements, or one, from an array's ``index`` on: of float32 (0), bfloat16 (1), float16 (2) or int8 (3)."""
    read = load(b, address, index, lanes_of(_ELEMENTS[kind], lanes))
    floats, words = lanes_of(F32, lanes), lanes_of(I32, lanes)
    if kind == 1:
        return b.bitcast(b.shl(b.zext(read, words), constant(words, 16)), floats)
    if kind == 2:
        return b.fpext(read, floats)
    return read if kind == 0 else b.sitofp(b.sext(read, words), floats)


# LLVM 20 unrolls some loops as if they ran twice at least. What must not be moved to other threads is not unrolled.
_UNROLLS_ONE = llvm.llvm_version_info < (22,)


def loop(
    b: Builder, stop: Value, step: int, begin: Sequence[Value], body: Callable[..., Sequence[Value] | None]
) -> list[Value]:
    """Runs ``body(index, *values)``, which returns new values, for 0, step, ... below ``stop``; the last values."""
    entry, head = b.block, b.append_basic_block("head")
    inside, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(head)
    b.position_at_end(head)
    index, *values = (b.phi(first.type) for first in (constant(I64, 0), *begin))
    for phi, first in zip((index, *values), (constant(I64, 0), *begin), strict=True):
        phi.add_incoming(first, entry)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    if _UNROLLS_ONE:
        b.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], True).attributes.add("convergent")
    changed = body(index, *values) or ()
    index.add_incoming(b.add(index, constant(I64, step)), b.block)
    for phi, value in zip(values, changed, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return values


def each(b: Builder, count: Value, body: Callable[[Value, int], None]) -> None:
    """Runs ``body(index, lanes)`` for whole vectors of ``count`` elements, and then for one element after the other."""
    whole = whole_vectors(b, count)
    loop(b, whole, LANES, [], lambda i: body(i, LANES))
    loop(b, b.sub(count, whole), 1, [], lambda i: body(b.add(whole, i), 1))


def whole_vectors(b: Builder, count: Value) -> Value:
    """``count``, rounded down to whole vectors."""
    return b.and_(count, constant(I64, -LANES))


# 2 ** x for x in [-0.5, 0.5], by interpolation at Chebyshev's points: to 1e-7.
_EXP2 = (1.0, 0.6931471824645996, 0.24022650718688965, 0.05550327152013779, 0.009618056938052177, 0.0013400427997112274,
         0.00015461444854736328)  # fmt: skip
_TO_INTEGER = 1.5 * 2**23


def exp2(b: Builder, x: Value) -> Value:
    """2 ** x for x below 127; zero from -126 down."""
    floats, integers = x.type, _integers_of(x.type)
    low, to_integer = constant(floats, -126.0), constant(floats, _TO_INTEGER)
    vanishes = b.fcmp_ordered("<", x, low)
    held = b.select(vanishes, low, x)
    shifted = b.fadd(held, to_integer)
    fraction = b.fsub(held, b.fsub(shifted, to_integer))
    power = constant(floats, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = fma(b, power, fraction, constant(floats, coefficient))
    exponent = b.shl(b.bitcast(shifted, integers), constant(integers, 23))
    value = b.bitcast(b.add(b.bitcast(power, integers), exponent), floats)
    return b.select(b.fcmp_unordered("uno", x, x), x, b.select(vanishes, constant(floats, 0.0), value))


def prefetch(b: Builder, address: Value, size: int) -> None:
    """Asks for ``size`` bytes from an address on; an address where nothing is does no harm."""
    flags = [constant(I32, flag) for flag in (0, 3, 1)]
    for offset in range(0, size, 64):
        pointer = b.inttoptr(b.add(address, constant(I64, offset)), I8.as_pointer())
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


def compress(b: Builder, mask: Value, pairs: Sequence[tuple[Value, Value]], index: Value) -> Value:
    """Writes the lanes of vectors where a mask holds side by side, from element ``index`` of arrays on; how many.

    Up to 16 elements are written to each array.
    """
    bits = b.bitcast(mask, I16)
    count = b.zext(call_llvm(b, "llvm.ctpop.i16", I16, [bits]), I64)
    if _WIDE:
        for vector, target in pairs:
            name = f"llvm.experimental.vector.compress.v16{'f32' if vector.type == FLOATS else 'i32'}"
            joined = call_llvm(b, name, vector.type, (vector, mask, ir.Constant(vector.type, ir.Undefined)))
            store(b, joined, target, index)
        return count
    # Without an instruction for it: one lane after the other, by the lowest bit of the mask that is left.
    copies = [cgutils.alloca_once(b, vector.type) for vector, _ in pairs]
    for (vector, _), copy in zip(pairs, copies, strict=True):
        b.store(vector, copy)

    def body(i: Value, left: Value) -> list[Value]:
        lane = b.zext(call_llvm(b, "llvm.cttz.i16", I16, [left, constant(I1, 1)]), I64)
        for (vector, target), copy in zip(pairs, copies, strict=True):
            store(b, load(b, b.ptrtoint(copy, I64), lane, vector.type.element), target, b.add(index, i))
        return [b.and_(left, b.sub(left, constant(I16, 1)))]

    loop(b, count, 1, [bits], body)
    return count


# What an argument of an instruction is: an int64, of which addresses are some; a float32; the address of rows and the
# bytes from one to the next; an integer that is known when the instructions are written.
Int = NewType("Int", int)
Float = NewType("Float", float)
Rows = NewType("Rows", tuple)
Known = NewType("Known", int)
# Or, as the last, one that is known when they run: what elements are, float32 (0), bfloat16 (1) or float16 (2); that or
# int8 (3); how many rows; or whether something is so (1).
Kind = NewType("Kind", int)
AnyKind = NewType("AnyKind", int)
Few = NewType("Few", int)
Flag = NewType("Flag", int)

_VARIANTS = {Kind: (0, 1, 2), AnyKind: (0, 1, 2, 3), Few: (1, 2, 4), Flag: (0, 1)}
_TYPES = dict.fromkeys((Int, *_VARIANTS), types.int64)
_TYPES |= {Rows: types.UniTuple(types.int64, 2), Float: types.float32, None: types.void}


def instruction(write: Callable[..., Any]) -> Any:
    """Decorator that makes a function for compiled code of one that writes LLVM's instructions.

    The annotations say what its arguments are, after the builder. Where the last is known when they run, instructions
    are written for each number that it may be, and the right ones run.
    """
    annotations = dict(write.__annotations__)
    result = _TYPES[annotations.pop("return")]
    kinds = list(annotations.values())[1:]
    variants = _VARIANTS.get(kinds[-1])

    def as_written(b: Builder, kind: Any, got: Any, value: Value) -> Any:
        if kind is Known:
            return got.literal_value
        return cgutils.unpack_tuple(b, value) if kind is Rows else value

    @functools.wraps(write)
    def typing(context: Any, *given: Any) -> Any:
        wanted = [_TYPES.get(kind, got) for kind, got in zip(kinds, given, strict=True)]

        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = [as_written(builder, *each) for each in zip(kinds, wanted, values, strict=True)]
            found = _one_of(builder, write, given, variants) if variants else write(builder, *given)
            return context.get_dummy_value() if result is types.void else found

        return result(*wanted), lower

    return intrinsic(prefer_literal=Known in kinds)(typing)


def _one_of(b: Builder, write: Callable[..., Any], given: Sequence[Value], variants: Sequence[int]) -> Value | None:
    """What ``write`` returns of ``given``, the last of which is one of ``variants``; any other number is the last."""
    after, blocks = b.append_basic_block("after"), [b.append_basic_block(f"of{number}") for number in variants]
    switch, found = b.switch(given[-1], blocks[-1]), []
    for number, block in zip(variants, blocks, strict=True):
        if block is not blocks[-1]:
            switch.add_case(constant(I64, number), block)
        b.position_at_end(block)
        found.append((write(b, *given[:-1], number), b.block))
        b.branch(after)
    b.position_at_end(after)
    if found[0][0] is None:
        return None
    result = b.phi(found[0][0].type)
    for value, block in found:
        result.add_incoming(value, block)
    return result

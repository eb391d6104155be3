"""LLVM's instructions on vectors of 16 floats, as functions of Numba's compiler are made of them.

Numba has no vectors of its own and vectorises few loops well; what is written here LLVM cuts to what the CPU has. An
address is an int64.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# Whether a vector is one register, of 32; else it takes two or four, of 16 or 32.
_WIDE = "+avx512f" in (config.CPU_FEATURES or llvm.get_host_cpu_features().flatten())
# Rows of a tile 32 columns wide whose sums stay in registers.
TILE_ROWS = 8 if _WIDE else 2

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
FLOATS, INTS, MASK, HALVES = (ir.VectorType(kind, LANES) for kind in (F32, I32, I1, I16))

Builder = Any
Value = Any


def const_int(value: int) -> Value:
    """A constant int64."""
    return ir.Constant(I64, value)


def const_ints(value: int) -> Value:
    """A vector of one int32."""
    return ir.Constant(INTS, [value] * LANES)


def const_vector(value: float) -> Value:
    """A vector of one float."""
    return ir.Constant(FLOATS, [value] * LANES)


def call_llvm(b: Builder, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    """Calls an intrinsic of LLVM's by its name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def element_at(b: Builder, address: Value, index: Value | int, size: int) -> Value:
    """The address of the element ``index`` of so many bytes."""
    index = const_int(index) if isinstance(index, int) else index
    return b.add(address, b.mul(index, const_int(size)))


def load(b: Builder, address: Value, kind: Any = FLOATS) -> Value:
    """What lies at an address, 16 floats unless another type is given."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def store(b: Builder, value: Value, address: Value) -> None:
    """Writes a value to an address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def splat(b: Builder, value: Value, kind: Any = FLOATS) -> Value:
    """A vector of one value."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), const_ints(0))


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z of vectors, rounded once."""
    return call_llvm(b, "llvm.fma.v16f32", FLOATS, (x, y, z))


def _folded(b: Builder, vector: Value, join: Callable[[Value, Value], Value]) -> Value:
    """The lanes joined to one, always in the same order: halves are joined to halves."""
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(I32, width)
        halves = (ir.Constant(kind, list(range(first, first + width))) for first in (0, width))
        vector = join(*(b.shuffle_vector(vector, vector, half) for half in halves))
    return b.extract_element(vector, ir.Constant(I32, 0))


def lane_sum(b: Builder, vector: Value) -> Value:
    """The sum of the lanes."""
    return _folded(b, vector, b.fadd)


def larger(b: Builder, x: Value, y: Value) -> Value:
    """The larger of both, ``y`` where ``x`` is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def largest_lane(b: Builder, vector: Value) -> Value:
    """The greatest lane; a NaN may hide others."""
    return _folded(b, vector, lambda x, y: larger(b, x, y))


def as_floats(b: Builder, address: Value, index: Value | int, kind: int) -> Value:
    """16 elements from an array's element ``index`` on: of float32 (0), bfloat16 (1), float16 (2) or int8 (3)."""
    if kind == 0:
        return load(b, element_at(b, address, index, 4))
    if kind == 1:
        half = load(b, element_at(b, address, index, 2), HALVES)
        return b.bitcast(b.shl(b.zext(half, INTS), const_ints(16)), FLOATS)
    if kind == 2:
        return b.fpext(load(b, element_at(b, address, index, 2), ir.VectorType(ir.HalfType(), LANES)), FLOATS)
    return b.sitofp(b.sext(load(b, element_at(b, address, index, 1), ir.VectorType(I8, LANES)), INTS), FLOATS)


def loop(
    b: Builder, stop: Value, step: int, begin: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """Runs ``body(index, *values)``, which returns new values, for 0, step, ... below ``stop``; the last values."""
    entry, head = b.block, b.append_basic_block("head")
    inside, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(const_int(0), entry)
    values = []
    for value in begin:
        phi = b.phi(value.type)
        phi.add_incoming(value, entry)
        values.append(phi)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    changed = body(index, *values)
    index.add_incoming(b.add(index, const_int(step)), b.block)
    for phi, value in zip(values, changed, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return values


# 2 ** x for x in [-0.5, 0.5], by interpolation at Chebyshev's points: to 1e-7.
_EXP2 = (1.0, 0.6931471824645996, 0.24022650718688965, 0.05550327152013779, 0.009618056938052177, 0.0013400427997112274,
         0.00015461444854736328)  # fmt: skip
_TO_INTEGER = 1.5 * 2**23


def exp2(b: Builder, x: Value) -> Value:
    """2 ** x for x below 127; zero from -126 down."""
    low = const_vector(-126.0)
    vanishes = b.fcmp_ordered("<", x, low)
    shifted = b.fadd(b.select(vanishes, low, x), const_vector(_TO_INTEGER))
    fraction = b.fsub(b.select(vanishes, low, x), b.fsub(shifted, const_vector(_TO_INTEGER)))
    power = const_vector(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = fma(b, power, fraction, const_vector(coefficient))
    exponent = b.shl(b.bitcast(shifted, INTS), const_ints(23))
    value = b.select(vanishes, const_vector(0.0), b.bitcast(b.add(b.bitcast(power, INTS), exponent), FLOATS))
    return b.select(b.fcmp_unordered("uno", x, x), x, value)


def prefetch(b: Builder, address: Value, size: int) -> None:
    """Asks for ``size`` bytes from an address on; an address where nothing is does no harm."""
    kind = I8.as_pointer()
    flags = [ir.Constant(I32, flag) for flag in (0, 3, 1)]
    for offset in range(0, size, 64):
        pointer = b.inttoptr(b.add(address, const_int(offset)), kind)
        call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


def compress(b: Builder, mask: Value, pairs: Sequence[tuple[Value, Value]]) -> Value:
    """Writes the lanes of vectors where a mask holds side by side to addresses; how many those are.

    Up to 16 elements are written to each address.
    """
    bits = b.bitcast(mask, I16)
    count = b.zext(call_llvm(b, "llvm.ctpop.i16", I16, [bits]), I64)
    if _WIDE:
        for vector, target in pairs:
            suffix = "f32" if vector.type == FLOATS else "i32"
            name = f"llvm.experimental.vector.compress.v16{suffix}"
            store(b, call_llvm(b, name, vector.type, (vector, mask, ir.Constant(vector.type, ir.Undefined))), target)
        return count
    # Without an instruction for it: one lane after the other, by the lowest bit of the mask that is left.
    copies = [cgutils.alloca_once(b, vector.type) for vector, _ in pairs]
    for (vector, _), copy in zip(pairs, copies, strict=True):
        b.store(vector, copy)

    def body(i: Value, left: Value) -> list[Value]:
        lane = b.zext(call_llvm(b, "llvm.cttz.i16", I16, [left, ir.Constant(I1, 1)]), I64)
        for (vector, target), copy in zip(pairs, copies, strict=True):
            value = load(b, element_at(b, b.ptrtoint(copy, I64), lane, 4), vector.type.element)
            store(b, value, element_at(b, target, i, 4))
        return [b.and_(left, b.sub(left, ir.Constant(I16, 1)))]

    loop(b, count, 1, [bits], body)
    return count


def four_sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """The sums of the lanes of each of four vectors, as a vector of four; added up as in ``lane_sum``."""

    def folded(x: Value, y: Value, width: int) -> Value:
        lanes = [[run + offset + i + other for run in range(0, LANES, 2 * width) for other in (0, LANES)
                  for i in range(width)] for offset in (0, width)]  # fmt: skip
        kind = ir.VectorType(I32, LANES)
        return b.fadd(*(b.shuffle_vector(x, y, ir.Constant(kind, each)) for each in lanes))

    whole = folded(folded(vectors[0], vectors[2], 8), folded(vectors[1], vectors[3], 8), 4)
    for width, count in ((2, 16), (1, 8)):
        lanes = [
            [run + offset + i for run in range(0, count, 2 * width) for i in range(width)] for offset in (0, width)
        ]
        kind = ir.VectorType(I32, count // 2)
        whole = b.fadd(*(b.shuffle_vector(whole, whole, ir.Constant(kind, each)) for each in lanes))
    return whole


class Int:
    """An int64, of which addresses are some."""


class Float:
    """A float32."""


class Known(int):
    """An integer that is known when the instructions are written."""


class Kind(int):
    """What elements are: float32 (0), bfloat16 (1) or float16 (2), which is known when the instructions run."""

    kinds = 3


class AnyKind(Kind):
    """One of these or int8 (3)."""

    kinds = 4


_TYPES = {Int: types.int64, Kind: types.int64, AnyKind: types.int64, Float: types.float32, None: types.void}


def instruction(write: Callable[..., Any]) -> Any:
    """Decorator that makes a function for compiled code of one that writes LLVM's instructions.

    The annotations say what its arguments are, after the builder. Where the last is a ``Kind``, instructions are
    written for each kind, and those of the right one run.
    """
    annotations = dict(write.__annotations__)
    result = _TYPES[annotations.pop("return")]
    kinds = list(annotations.values())[1:]
    known, variants = [kind is Known for kind in kinds], getattr(kinds[-1], "kinds", 0)

    def typing(context: Any, *given: Any) -> Any:
        literals = [got.literal_value if is_known else None for is_known, got in zip(known, given, strict=True)]
        wanted = [got if is_known else _TYPES[k] for is_known, got, k in zip(known, given, kinds, strict=True)]

        def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            given = [v if x is None else x for v, x in zip(values, literals, strict=True)]
            found = _by_kind(builder, write, given, variants) if variants else write(builder, *given)
            return context.get_dummy_value() if result is types.void else found

        return result(*wanted), lower

    typing.__name__, typing.__doc__, typing.__module__ = write.__name__, write.__doc__, write.__module__
    names = ("context", *list(annotations)[1:])
    typing.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(prefer_literal=any(known))(typing)


def _by_kind(b: Builder, write: Callable[..., Any], given: Sequence[Value], kinds: int) -> Value | None:
    """What ``write`` returns of the arguments ``given``, the last of which is a kind below ``kinds``."""
    after, blocks = b.append_basic_block("after"), [b.append_basic_block(f"kind{kind}") for kind in range(kinds)]
    switch, found = b.switch(given[-1], blocks[0]), []
    for kind, block in enumerate(blocks):
        if kind:
            switch.add_case(const_int(kind), block)
        b.position_at_end(block)
        found.append((write(b, *given[:-1], kind), b.block))
        b.branch(after)
    b.position_at_end(after)
    if found[0][0] is None:
        return None
    result = b.phi(found[0][0].type)
    for value, block in found:
        result.add_incoming(value, block)
    return result

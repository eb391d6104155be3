"""Vector instructions for Numba's compiler, as functions of addresses: products of tiles, rows of scores, gathered rows.

Numba has no vectors of its own and vectorises few loops well; these functions write LLVM's vectors of 16 floats
directly, which LLVM cuts to what the CPU has. An address is an int64; counts of elements are multiples of 16 where a
function says so. Nothing here reads or writes outside of what it is told.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
# Rows of a tile whose products stay in registers: of 32 with AVX-512, of 16 without.
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
TILE_ROWS = 8 if _WIDE else 4

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_V, _VI, _VM, _VH = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, _I1, _I16))
_UNDEFINED = ir.Undefined

Builder = Any
Value = Any


def _int(value: int) -> Value:
    return ir.Constant(_I64, value)


def _constant(value: float) -> Value:
    return ir.Constant(_V, [value] * LANES)


def _call(b: Builder, name: str, result: Any, arguments: Sequence[Value]) -> Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _at(b: Builder, address: Value, index: Value | int, size: int) -> Value:
    """The address of the element ``index`` of so many bytes."""
    index = _int(index) if isinstance(index, int) else index
    return b.add(address, b.mul(index, _int(size)))


def _load(b: Builder, address: Value, kind: Any = _V) -> Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: Builder, value: Value, address: Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _splat(b: Builder, value: Value, kind: Any = _V) -> Value:
    first = b.insert_element(ir.Constant(kind, _UNDEFINED), value, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, _UNDEFINED), ir.Constant(_VI, [0] * LANES))


def _fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return _call(b, "llvm.fma.v16f32", _V, (x, y, z))


def _sum(b: Builder, vector: Value) -> Value:
    """The sum of the lanes, always in the same order: halves are added to halves."""
    width = LANES
    while width > 1:
        width //= 2
        parts = [
            b.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        vector = b.fadd(*parts)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _max(b: Builder, x: Value, y: Value) -> Value:
    """The larger of both, ``y`` where ``x`` is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _greatest(b: Builder, vector: Value) -> Value:
    """The greatest lane; a NaN may hide others."""
    width = LANES
    while width > 1:
        width //= 2
        parts = [
            b.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        vector = _max(b, *parts)
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _as_floats(b: Builder, address: Value, index: Value | int, kind: int) -> Value:
    """16 elements from an array's element ``index`` on: of float32 (0), bfloat16 (1), float16 (2) or int8 (3)."""
    if kind == 0:
        return _load(b, _at(b, address, index, 4))
    if kind == 1:
        half = _load(b, _at(b, address, index, 2), _VH)
        return b.bitcast(b.shl(b.zext(half, _VI), ir.Constant(_VI, [16] * LANES)), _V)
    if kind == 2:
        return b.fpext(_load(b, _at(b, address, index, 2), ir.VectorType(ir.HalfType(), LANES)), _V)
    return b.sitofp(b.sext(_load(b, _at(b, address, index, 1), ir.VectorType(_I8, LANES)), _VI), _V)


def _loop(
    b: Builder, stop: Value, step: int, begin: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """Runs ``body(index, *values)``, which returns new values, for 0, step, ... below ``stop``; the last values."""
    entry, head = b.block, b.append_basic_block("head")
    inside, after = b.append_basic_block("body"), b.append_basic_block("after")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(_I64)
    index.add_incoming(_int(0), entry)
    values = []
    for value in begin:
        phi = b.phi(value.type)
        phi.add_incoming(value, entry)
        values.append(phi)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    changed = body(index, *values)
    index.add_incoming(b.add(index, _int(step)), b.block)
    for phi, value in zip(values, changed, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return values


def _function(result: Any, *arguments: Any) -> Callable[[Callable[..., Value]], Any]:
    """Decorator that makes an intrinsic of what writes its instructions; a ``...`` argument must be a known integer.

    The decorated function is given the builder, and the arguments as values or, where known, as ints.
    """
    count = sum(kind is ... for kind in arguments)

    def make(write: Callable[..., Value]) -> Any:
        def typing(context: Any, *given: Any) -> Any:
            wanted = [got if kind is ... else kind for kind, got in zip(arguments, given, strict=True)]
            literals = [got.literal_value for kind, got in zip(arguments, given, strict=True) if kind is ...]

            def lower(context: Any, builder: Any, signature: Any, values: Any) -> Value:
                known = iter(literals)
                passed = [next(known) if kind is ... else v for kind, v in zip(arguments, values, strict=True)]
                found = write(builder, *passed)
                return context.get_dummy_value() if result is types.void else found

            return result(*wanted), lower

        names = ("context", *(f"a{i}" for i in range(len(arguments))))
        typing.__name__, typing.__doc__, typing.__module__ = write.__name__, write.__doc__, write.__module__
        typing.__signature__ = Signature(
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )  # type: ignore[attr-defined]
        return intrinsic(prefer_literal=count > 0)(typing)

    return make


# Numbers and memory.


@_function(types.float32, types.int64, types.int64)
def f32(b: Builder, address: Value, index: Value) -> Value:
    """The float at ``address[index]``."""
    return _load(b, _at(b, address, index, 4), _F32)


@_function(types.void, types.int64, types.int64, types.float32)
def set_f32(b: Builder, address: Value, index: Value, value: Value) -> None:
    """``address[index] = value``."""
    _store(b, value, _at(b, address, index, 4))


@_function(types.int64, types.int64, types.int64)
def i32(b: Builder, address: Value, index: Value) -> Value:
    """The int32 at ``address[index]``."""
    return b.sext(_load(b, _at(b, address, index, 4), _I32), _I64)


@_function(types.void, types.int64, types.int64, types.int64)
def set_i32(b: Builder, address: Value, index: Value, value: Value) -> None:
    """``address[index] = value``, an int32."""
    _store(b, b.trunc(value, _I32), _at(b, address, index, 4))


@_function(types.void, types.int64, types.int64, types.int64)
def set_i8(b: Builder, address: Value, index: Value, value: Value) -> None:
    """``address[index] = value``, an int8."""
    _store(b, b.trunc(value, _I8), b.add(address, index))


@_function(types.int64, types.voidptr)
def address_of(b: Builder, pointer: Value) -> Value:
    """The address that a pointer holds."""
    return b.ptrtoint(pointer, _I64)


@_function(types.float32, types.int64, types.int64, ...)
def element(b: Builder, address: Value, index: Value, kind: int) -> Value:
    """One element of a kind, see ``_as_floats``, as a float."""
    if kind == 0:
        return _load(b, _at(b, address, index, 4), _F32)
    if kind == 3:
        return b.sitofp(_load(b, b.add(address, index), _I8), _F32)
    half = _load(b, _at(b, address, index, 2), _I16)
    if kind == 1:
        return b.bitcast(b.shl(b.zext(half, _I32), ir.Constant(_I32, 16)), _F32)
    return b.fpext(b.bitcast(half, ir.HalfType()), _F32)


@_function(types.int64, types.int64, types.int64)
def i8(b: Builder, address: Value, index: Value) -> Value:
    """The int8 at ``address[index]``."""
    return b.sext(_load(b, b.add(address, index), _I8), _I64)


@_function(types.int64, types.int64, types.int64)
def add_to(b: Builder, address: Value, value: Value) -> Value:
    """Adds to an int64 that all threads share; what it was."""
    return b.atomic_rmw("add", b.inttoptr(address, _I64.as_pointer()), value, "monotonic")


@_function(types.void, types.int64, types.int64, types.float32)
def fill(b: Builder, address: Value, count: Value, value: Value) -> None:
    """Writes ``count`` floats, a multiple of 16."""
    vector = _splat(b, value)

    def body(i: Value) -> list[Value]:
        _store(b, vector, _at(b, address, i, 4))
        return []

    _loop(b, count, LANES, [], body)


@_function(types.void, types.int64, types.int64, types.int64)
def fill_i32(b: Builder, address: Value, count: Value, value: Value) -> None:
    """Writes ``count`` int32, a multiple of 16."""
    vector = _splat(b, b.trunc(value, _I32), _VI)

    def body(i: Value) -> list[Value]:
        _store(b, vector, _at(b, address, i, 4))
        return []

    _loop(b, count, LANES, [], body)


# Rows of floats, ``count`` a multiple of 16.


@_function(types.void, types.int64, types.int64, types.int64, ...)
def to_floats(b: Builder, target: Value, source: Value, count: Value, kind: int) -> None:
    """Converts elements of a kind, see ``_as_floats``."""

    def body(i: Value) -> list[Value]:
        _store(b, _as_floats(b, source, i, kind), _at(b, target, i, 4))
        return []

    _loop(b, count, LANES, [], body)


@_function(types.void, types.int64, types.int64, types.int64, types.float32, ...)
def from_floats(b: Builder, target: Value, source: Value, count: Value, factor: Value, kind: int) -> None:
    """Converts floats times a factor to elements of a kind, rounded to the nearest, ties to even."""
    times = _splat(b, factor)

    def body(i: Value) -> list[Value]:
        value = b.fmul(_load(b, _at(b, source, i, 4)), times)
        if kind == 0:
            _store(b, value, _at(b, target, i, 4))
        elif kind == 1:
            bits = b.bitcast(value, _VI)
            words = [ir.Constant(_VI, [word] * LANES) for word in (16, 1, 0x7FFF, 0x7FC0)]
            odd = b.and_(b.lshr(bits, words[0]), words[1])
            rounded = b.lshr(b.add(b.add(bits, words[2]), odd), words[0])
            rounded = b.select(b.fcmp_unordered("uno", value, value), words[3], rounded)
            _store(b, b.trunc(rounded, _VH), _at(b, target, i, 2))
        else:
            _store(b, b.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), _at(b, target, i, 2))
        return []

    _loop(b, count, LANES, [], body)


@_function(types.void, types.int64, types.int64, types.float32)
def scale_row(b: Builder, row: Value, count: Value, factor: Value) -> None:
    """Multiplies floats by a factor."""
    times = _splat(b, factor)

    def body(i: Value) -> list[Value]:
        at = _at(b, row, i, 4)
        _store(b, b.fmul(_load(b, at), times), at)
        return []

    _loop(b, count, LANES, [], body)


@_function(types.void, types.int64, types.int64, types.int64)
def raise_to(b: Builder, target: Value, source: Value, count: Value) -> None:
    """Each float of ``target`` becomes the larger of it and that of ``source``; NaN where that is."""

    def body(i: Value) -> list[Value]:
        old, new = _load(b, _at(b, target, i, 4)), _load(b, _at(b, source, i, 4))
        stays = b.or_(b.fcmp_unordered("uno", old, old), b.fcmp_ordered("<=", new, old))
        _store(b, b.select(stays, old, new), _at(b, target, i, 4))
        return []

    _loop(b, count, LANES, [], body)


@_function(types.float32, types.int64, types.int64)
def largest(b: Builder, row: Value, count: Value) -> Value:
    """The largest float, leaving out NaN; -inf of nothing."""

    def body(i: Value, found: Value) -> list[Value]:
        return [_max(b, _load(b, _at(b, row, i, 4)), found)]

    return _greatest(b, _loop(b, count, LANES, [_constant(-float("inf"))], body)[0])


# 2 ** x for x in [-0.5, 0.5], by interpolation at Chebyshev's points: to 1e-7.
_EXP2 = (1.0, 0.6931471824645996, 0.24022650718688965, 0.05550327152013779, 0.009618056938052177, 0.0013400427997112274,
         0.00015461444854736328)  # fmt: skip
_TO_INTEGER = 1.5 * 2**23


def _exp2(b: Builder, x: Value) -> Value:
    """2 ** x for x below 127; zero from -126 down."""
    low = _constant(-126.0)
    vanishes = b.fcmp_ordered("<", x, low)
    shifted = b.fadd(b.select(vanishes, low, x), _constant(_TO_INTEGER))
    fraction = b.fsub(b.select(vanishes, low, x), b.fsub(shifted, _constant(_TO_INTEGER)))
    power = _constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = _fma(b, power, fraction, _constant(coefficient))
    exponent = b.shl(b.bitcast(shifted, _VI), ir.Constant(_VI, [23] * LANES))
    return b.select(vanishes, _constant(0.0), b.bitcast(b.add(b.bitcast(power, _VI), exponent), _V))


@_function(types.float32, types.int64, types.int64, types.float32, types.float32)
def exponentials(b: Builder, row: Value, count: Value, shift: Value, factor: Value) -> Value:
    """Each float becomes ``2 ** ((x - shift) * factor)``; their sum."""
    minus, times = _splat(b, shift), _splat(b, factor)

    def body(i: Value, total: Value) -> list[Value]:
        at = _at(b, row, i, 4)
        value = _exp2(b, b.fmul(b.fsub(_load(b, at), minus), times))
        _store(b, value, at)
        return [b.fadd(total, value)]

    return _sum(b, _loop(b, count, LANES, [_constant(0.0)], body)[0])


@_function(types.float32, types.int64, types.int64, types.int64)
def times_counts(b: Builder, row: Value, counts: Value, count: Value) -> Value:
    """Each float is multiplied by an int32 of ``counts``, and is zero where that is; their sum."""

    def body(i: Value, total: Value) -> list[Value]:
        at = _at(b, row, i, 4)
        many = b.sitofp(_load(b, _at(b, counts, i, 4), _VI), _V)
        zero = _constant(0.0)
        value = b.select(b.fcmp_ordered("==", many, zero), zero, b.fmul(_load(b, at), many))
        _store(b, value, at)
        return [b.fadd(total, value)]

    return _sum(b, _loop(b, count, LANES, [_constant(0.0)], body)[0])


# Selection. A NaN counts as larger than every number.


@_function(types.int64, types.int64, types.int64, types.float32)
def count_from(b: Builder, row: Value, count: Value, threshold: Value) -> Value:
    """How many floats are not below a threshold."""
    least = _splat(b, threshold)

    def body(i: Value, found: Value) -> list[Value]:
        return [b.sub(found, b.sext(b.fcmp_unordered(">=", _load(b, _at(b, row, i, 4)), least), _VI))]

    lanes = _loop(b, count, LANES, [ir.Constant(_VI, [0] * LANES)], body)[0]
    return b.zext(_call(b, "llvm.vector.reduce.add.v16i32", _I32, [lanes]), _I64)


@_function(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64, types.int64, ...)
def take_from(
    b: Builder, row: Value, count: Value, threshold: Value, values: Value, places: Value, first: Value, numbered: int
) -> Value:
    """Copies the floats that are not below a threshold to ``values``, and to ``places`` where they stand; how many.

    Up to 16 more than these are written. ``numbered`` 1: the places are read from ``first``, an address, else they are
    ``first``, ``first + 1``, ... ``values`` and ``places`` may be ``row`` and ``first`` themselves.
    """
    least = _splat(b, threshold)
    lanes = ir.Constant(_VI, list(range(LANES)))
    begin = [_int(0)] if numbered else [_int(0), b.add(lanes, _splat(b, b.trunc(first, _I32), _VI))]

    def body(i: Value, found: Value, *place: Value) -> list[Value]:
        value = _load(b, _at(b, row, i, 4))
        here = place[0] if place else _load(b, _at(b, first, i, 4), _VI)
        mask = b.fcmp_unordered(">=", value, least)
        for vector, target, suffix in ((value, values, "f32"), (here, places, "i32")):
            packed = _call(
                b, f"llvm.experimental.vector.compress.v16{suffix}", vector.type,
                (vector, mask, ir.Constant(vector.type, _UNDEFINED)),
            )  # fmt: skip
            _store(b, packed, _at(b, target, found, 4))
        more = b.zext(_call(b, "llvm.ctpop.i16", _I16, [b.bitcast(mask, _I16)]), _I64)
        return [b.add(found, more), *(b.add(p, ir.Constant(_VI, [LANES] * LANES)) for p in place)]

    return _loop(b, count, LANES, begin, body)[0]


# Columns of floats: 32 side by side, such as the scores of 32 queries, one row for each key.


@_function(types.void, types.int64, types.int64, types.int64)
def column_maxima(b: Builder, z: Value, rows: Value, found: Value) -> None:
    """The largest float of each column and of those at ``found``, NaN where there is one; written there."""
    begin = [_load(b, b.add(found, _int(64 * v))) for v in range(2)]

    def body(i: Value, *most: Value) -> list[Value]:
        new = [_load(b, b.add(_at(b, z, i, 128), _int(64 * v))) for v in range(2)]
        # Where the new one is NaN, neither comparison holds.
        keep = [b.or_(b.fcmp_ordered("<=", x, m), b.fcmp_unordered("uno", m, m)) for x, m in zip(new, most, strict=True)]
        return [b.select(k, m, x) for k, m, x in zip(keep, most, new, strict=True)]

    for v, value in enumerate(_loop(b, rows, 1, begin, body)):
        _store(b, value, b.add(found, _int(64 * v)))


@_function(types.void, types.int64, types.int64, types.int64, types.float32, types.int64)
def column_exponentials(b: Builder, z: Value, rows: Value, shifts: Value, factor: Value, sums: Value) -> None:
    """Each float becomes ``2 ** ((x - shift) * factor)``; the sums of the columns are added to those at ``sums``."""
    times = _splat(b, factor)
    minus = [_load(b, b.add(shifts, _int(64 * v))) for v in range(2)]
    begin = [_load(b, b.add(sums, _int(64 * v))) for v in range(2)]

    def body(i: Value, *totals: Value) -> list[Value]:
        added = []
        for v in range(2):
            at = b.add(_at(b, z, i, 128), _int(64 * v))
            value = _exp2(b, b.fmul(b.fsub(_load(b, at), minus[v]), times))
            _store(b, value, at)
            added.append(b.fadd(totals[v], value))
        return added

    for v, value in enumerate(_loop(b, rows, 1, begin, body)):
        _store(b, value, b.add(sums, _int(64 * v)))


@_function(types.float32, types.int64, types.int64, types.float32)
def largest_product(b: Builder, row: Value, factors: Value, least: Value) -> Value:
    """The largest of 32 floats times as many factors, and of ``least``; NaN where there is one."""
    most = _splat(b, least)
    for v in range(2):
        value = b.fmul(_load(b, b.add(row, _int(64 * v))), _load(b, b.add(factors, _int(64 * v))))
        most = b.select(b.or_(b.fcmp_ordered("<=", value, most), b.fcmp_unordered("uno", most, most)), most, value)
    broken = b.bitcast(b.fcmp_unordered("uno", most, most), _I16)
    nan = ir.Constant(_F32, float("nan"))
    return b.select(b.icmp_unsigned("==", broken, ir.Constant(_I16, 0)), _greatest(b, most), nan)


@_function(types.void, types.int64, types.int64, types.int64, types.int64)
def hide_columns(b: Builder, z: Value, rows: Value, first: Value, limits: Value) -> None:
    """Makes the floats of keys ``first``, ``first + 1``, ... -inf in the columns that do not see or attend them.

    ``limits``: int32 ``[4, 32]``, a column sees the keys from the first up to the second, but for those from the third
    up to the fourth.
    """
    found = [[_load(b, b.add(limits, _int(128 * row + 64 * v)), _VI) for v in range(2)] for row in range(4)]
    hidden = _constant(-float("inf"))

    def body(i: Value) -> list[Value]:
        place = _splat(b, b.trunc(b.add(first, i), _I32), _VI)
        for v in range(2):
            start, end, gap, after = (row[v] for row in found)
            seen = b.and_(b.icmp_signed(">=", place, start), b.icmp_signed("<", place, end))
            kept = b.or_(b.icmp_signed("<", place, gap), b.icmp_signed(">=", place, after))
            at = b.add(_at(b, z, i, 128), _int(64 * v))
            _store(b, b.select(b.and_(seen, kept), _load(b, at), hidden), at)
        return []

    _loop(b, rows, 1, [], body)


# Products.


@_function(
    types.void, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64,
    types.int64, ..., ..., ...,
)  # fmt: skip
def product(
    b: Builder, x: Value, x_step: Value, x_next: Value, y: Value, y_step: Value, y_next: Value, z: Value, z_step: Value,
    depth: Value, rows: int, vectors: int, adds: int,
) -> None:  # fmt: skip
    """The product z ``[rows, 16 * vectors]`` of x ``[rows, depth]`` and y ``[depth, 16 * vectors]``; steps in bytes.

    Each element is one chain of multiply-adds along the depth. Elements of x lie ``x_next`` apart in a row, vectors of
    y ``y_next``. ``adds`` 1: z is added to.
    """
    x_rows = [b.add(x, b.mul(x_step, _int(r))) for r in range(rows)]
    targets = [b.add(b.add(z, b.mul(z_step, _int(r))), _int(64 * v)) for r in range(rows) for v in range(vectors)]
    begin = [_load(b, target) if adds else _constant(0.0) for target in targets]

    def body(k: Value, at: Value, along: Value, *sums: Value) -> list[Value]:
        columns = [_load(b, b.add(at, b.mul(y_next, _int(v)))) for v in range(vectors)]
        of_rows = [_splat(b, _load(b, b.add(row, along), _F32)) for row in x_rows]
        added = [_fma(b, row, column, sums[r * vectors + v]) for r, row in enumerate(of_rows)
                 for v, column in enumerate(columns)]  # fmt: skip
        return [b.add(at, y_step), b.add(along, x_next), *added]

    for target, value in zip(targets, _loop(b, depth, 1, [y, _int(0), *begin], body)[2:], strict=True):
        _store(b, value, target)


@_function(types.float32, types.int64, types.int64, types.int64, ...)
def dot(b: Builder, x: Value, y: Value, count: Value, kind: int) -> Value:
    """The dot product of floats and elements of a kind."""

    def body(i: Value, total: Value) -> list[Value]:
        return [_fma(b, _load(b, _at(b, x, i, 4)), _as_floats(b, y, i, kind), total)]

    return _sum(b, _loop(b, count, LANES, [_constant(0.0)], body)[0])


@_function(
    types.void, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, ..., ...
)  # fmt: skip
def add_rows(
    b: Builder, out: Value, weights: Value, places: Value, count: Value, rows: Value, step: Value, vectors: int, kind: int
) -> None:  # fmt: skip
    """Adds to ``16 * vectors`` floats the rows at ``places``, ``step`` bytes apart, each times its weight.

    ``count`` is a multiple of 4: two sums run side by side, so that one addition need not wait for the one before.
    """
    targets = [b.add(out, _int(64 * v)) for v in range(vectors)]
    begin = [_load(b, t) for t in targets] + [_constant(0.0)] * vectors

    def body(i: Value, *sums: Value) -> list[Value]:
        changed = list(sums)
        for k in range(4):
            at = b.add(i, _int(k))
            row = b.add(rows, b.mul(b.sext(_load(b, _at(b, places, at, 4), _I32), _I64), step))
            weight = _splat(b, _load(b, _at(b, weights, at, 4), _F32))
            for v in range(vectors):
                number = k % 2 * vectors + v
                changed[number] = _fma(b, weight, _as_floats(b, row, LANES * v, kind), changed[number])
        return changed

    sums = _loop(b, count, 4, begin, body)
    for target, one, other in zip(targets, sums[:vectors], sums[vectors:], strict=True):
        _store(b, b.fadd(one, other), target)


def _four_sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """The sums of the lanes of each of four vectors, as a vector of four; halves are added to halves, as in ``_sum``."""

    def folded(x: Value, y: Value, width: int) -> Value:
        lanes = [[run + offset + i + other for run in range(0, LANES, 2 * width) for other in (0, LANES)
                  for i in range(width)] for offset in (0, width)]  # fmt: skip
        kind = ir.VectorType(_I32, LANES)
        return b.fadd(*(b.shuffle_vector(x, y, ir.Constant(kind, each)) for each in lanes))

    whole = folded(folded(vectors[0], vectors[2], 8), folded(vectors[1], vectors[3], 8), 4)
    for width, count in ((2, 16), (1, 8)):
        lanes = [[run + offset + i for run in range(0, count, 2 * width) for i in range(width)] for offset in (0, width)]
        kind = ir.VectorType(_I32, count // 2)
        whole = b.fadd(*(b.shuffle_vector(whole, whole, ir.Constant(kind, each)) for each in lanes))
    return whole


@_function(
    types.void, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, ...
)  # fmt: skip
def code_products(
    b: Builder, x: Value, x_step: Value, codes: Value, code_step: Value, depth: Value, out: Value, out_step: Value, rows: int
) -> None:  # fmt: skip
    """Dot products of 1, 2 or 4 rows of floats with 4, 2 or 1 rows of int8; that of row r and key j at out[r, j]."""
    keys = 4 // rows

    def body(i: Value, *sums: Value) -> list[Value]:
        of_keys = [_as_floats(b, b.add(codes, b.mul(code_step, _int(j))), i, 3) for j in range(keys)]
        of_rows = [_load(b, _at(b, b.add(x, b.mul(x_step, _int(r))), i, 4)) for r in range(rows)]
        return [_fma(b, row, key, sums[r * keys + j]) for r, row in enumerate(of_rows) for j, key in enumerate(of_keys)]

    found = _four_sums(b, _loop(b, depth, LANES, [_constant(0.0)] * 4, body))
    for r in range(rows):
        for j in range(keys):
            value = b.extract_element(found, ir.Constant(_I32, r * keys + j))
            _store(b, value, b.add(b.add(out, b.mul(out_step, _int(r))), _int(4 * j)))


@_function(
    types.void, types.int64, types.int64, types.int64, types.int64, types.int64, types.float32, types.float32,
    types.float32, types.float32,
)  # fmt: skip
def to_lower_bounds(
    b: Builder, products: Value, row: Value, count: Value, scales: Value, residuals: Value, middle: Value, norm: Value, per_scale: Value,
    slack: Value,
) -> None:  # fmt: skip
    """Writes lower bounds of scores from products with codes; -inf where a score is no finite number."""
    constants = [_splat(b, value) for value in (middle, norm, per_scale, slack)]

    def body(i: Value) -> list[Value]:
        at = _at(b, row, i, 4)
        scale, residual = _load(b, _at(b, scales, i, 4)), _load(b, _at(b, residuals, i, 4))
        score = _fma(b, _load(b, _at(b, products, i, 4)), scale, constants[0])
        off = _fma(b, scale, constants[2], residual)
        lower = b.fsub(score, _fma(b, constants[1], off, constants[3]))
        finite = b.fcmp_ordered("<", _call(b, "llvm.fabs.v16f32", _V, [score]), _constant(float("inf")))
        _store(b, b.select(finite, lower, _constant(-float("inf"))), at)
        return []

    _loop(b, count, LANES, [], body)


@_function(
    types.int64, types.int64, types.int64, types.int64, types.int64, types.float32, types.float32, types.float32,
    types.float32, types.int64, types.int64,
)  # fmt: skip
def take_bounded(
    b: Builder, row: Value, count: Value, scales: Value, residuals: Value, norm: Value, per_scale: Value, slack: Value,
    threshold: Value, places: Value, first: Value,
) -> None:  # fmt: skip
    """Lists the places, from ``first`` on, of lower bounds whose upper bounds reach a threshold; how many.

    Where the lower bound is -inf the upper one is not known. Up to 16 more places are written.
    """
    constants = [_splat(b, value) for value in (norm, per_scale, slack, threshold)]
    begin = b.add(ir.Constant(_VI, list(range(LANES))), _splat(b, b.trunc(first, _I32), _VI))

    def body(i: Value, found: Value, place: Value) -> list[Value]:
        lower = _load(b, _at(b, row, i, 4))
        scale, residual = _load(b, _at(b, scales, i, 4)), _load(b, _at(b, residuals, i, 4))
        off = _fma(b, constants[0], _fma(b, scale, constants[1], residual), constants[2])
        upper = b.fadd(lower, b.fadd(off, off))
        unknown = b.fcmp_ordered("==", lower, _constant(-float("inf")))
        mask = b.or_(b.fcmp_unordered(">=", upper, constants[3]), unknown)
        packed = _call(
            b, "llvm.experimental.vector.compress.v16i32", _VI, (place, mask, ir.Constant(_VI, _UNDEFINED))
        )
        _store(b, packed, _at(b, places, found, 4))
        more = b.zext(_call(b, "llvm.ctpop.i16", _I16, [b.bitcast(mask, _I16)]), _I64)
        return [b.add(found, more), b.add(place, ir.Constant(_VI, [LANES] * LANES))]

    return _loop(b, count, LANES, [_int(0), begin], body)[0]

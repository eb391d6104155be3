"""Instructions for compiled code, functions of addresses: memory, rows of floats, tiles of 32 columns, products.

Counts are multiples of 16, but where elements are converted. Nothing here reads or writes outside of what it is told.
"""

import itertools
from typing import Any

from llvmlite import ir

from nc_patch.ops.cpu import llvm as vec
from nc_patch.ops.cpu.llvm import LANES, Builder, Float, Int, Rows, Value, constant, instruction, load, loop, store

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


(i32, set_i32), (_, set_i8) = _integers(vec.I32), _integers(vec.I8)


@instruction
def element_of(b: Builder, address: Int, index: Int, kind: vec.AnyKind) -> Float:
    """One element of a kind, see ``as_floats``, as a float."""
    return vec.as_floats(b, address, index, kind, lanes=1)


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


# Rows of floats.


@instruction
def fill(b: Builder, address: Int, count: Int, value: Float) -> None:
    """Writes ``count`` floats."""
    vector = vec.splat(b, value)
    loop(b, count, LANES, [], lambda i: store(b, vector, address, i))


@instruction
def to_floats(b: Builder, target: Int, source: Int, count: Int, kind: vec.Kind) -> None:
    """Converts elements of a kind, see ``as_floats``, as many as there may be."""
    vec.each(b, count, lambda i, lanes: store(b, vec.as_floats(b, source, i, kind, lanes), target, i))


@instruction
def from_floats(b: Builder, target: Int, source: Int, count: Int, factor: Float, kind: vec.Kind) -> None:
    """Converts floats times a factor to elements of a kind, rounded to the nearest, ties to even."""
    times = {LANES: vec.splat(b, factor), 1: factor}

    def body(i: Value, lanes: int) -> None:
        value, words = b.fmul(vec.as_floats(b, source, i, 0, lanes), times[lanes]), vec.lanes_of(vec.I32, lanes)
        if kind == 1:
            bits = b.bitcast(value, words)
            half, one, below, nan = (constant(words, word) for word in (16, 1, 0x7FFF, 0x7FC0))
            odd = b.and_(b.lshr(bits, half), one)
            rounded = b.lshr(b.add(b.add(bits, below), odd), half)
            bits = b.select(b.fcmp_unordered("uno", value, value), nan, rounded)
            value = b.trunc(bits, vec.lanes_of(vec.I16, lanes))
        elif kind == 2:
            value = b.fptrunc(value, vec.lanes_of(ir.HalfType(), lanes))
        store(b, value, target, i)

    vec.each(b, count, body)


@instruction
def largest(b: Builder, row: Int, count: Int) -> Float:
    """The largest float, leaving out NaN; -inf of nothing."""
    found = loop(b, count, LANES, [vec.LOWEST], lambda i, most: [vec.larger(b, load(b, row, i), most)])
    return vec.largest_lane(b, found[0])


@instruction
def exponentials(
    b: Builder, row: Int, count: Int, shift: Float, factor: Float, counts: Int, counted: vec.Known
) -> Float:
    """Each float becomes ``2 ** ((x - shift) * factor)``; their sum.

    ``counted`` 1: each times one of ``counts``, and zero where that is.
    """
    minus, times = vec.splat(b, shift), vec.splat(b, factor)

    def body(i: Value, total: Value) -> list[Value]:
        value = vec.exp2(b, b.fmul(b.fsub(load(b, row, i), minus), times))
        if counted:
            many = load(b, counts, i)
            value = b.select(b.fcmp_ordered("==", many, vec.ZERO), vec.ZERO, b.fmul(value, many))
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


# Tiles: rows of 32 floats, such as the scores of 32 queries, one row for each key.


def _row(b: Builder, tile: Value, row: Value | int = 0, kind: Any = vec.TILE_FLOATS) -> Value:
    return load(b, vec.element_at(b, tile, row, 128), kind=kind)


def _set_row(b: Builder, value: Value, tile: Value, row: Value | int = 0) -> None:
    store(b, value, vec.element_at(b, tile, row, 128))


@instruction
def column_maxima(b: Builder, z: Int, rows: Int, found: Int) -> None:
    """The largest float of each column and of those at ``found``, NaN where there is one; written there."""
    body = lambda i, most: [vec.larger_or_nan(b, _row(b, z, i), most)]  # noqa: E731
    _set_row(b, loop(b, rows, 1, [_row(b, found)], body)[0], found)


@instruction
def column_exponentials(b: Builder, z: Int, rows: Int, shifts: Int, factor: Float, sums: Int) -> None:
    """Each float becomes ``2 ** ((x - shift) * factor)``; the sums of the columns are added to those at ``sums``.

    They are summed apart first: one running sum over a million keys would lose three digits.
    """
    times, minus = vec.splat(b, factor, vec.TILE_FLOATS), _row(b, shifts)

    def body(i: Value, total: Value) -> list[Value]:
        value = vec.exp2(b, b.fmul(b.fsub(_row(b, z, i), minus), times))
        _set_row(b, value, z, i)
        return [b.fadd(total, value)]

    added = loop(b, rows, 1, [constant(vec.TILE_FLOATS, 0.0)], body)[0]
    _set_row(b, b.fadd(_row(b, sums), added), sums)


@instruction
def largest_product(b: Builder, row: Int, factors: Int, least: Float) -> Float:
    """The largest of 32 floats times as many factors, and of ``least``; NaN where there is one."""
    product = b.fmul(_row(b, row), _row(b, factors))
    most = vec.larger_or_nan(b, product, vec.splat(b, least, vec.TILE_FLOATS))
    broken = b.bitcast(b.fcmp_unordered("uno", most, most), vec.I32)
    sound = b.icmp_unsigned("==", broken, constant(vec.I32, 0))
    return b.select(sound, vec.largest_lane(b, most), constant(vec.F32, float("nan")))


@instruction
def hide_columns(b: Builder, z: Int, rows: Int, first: Int, limits: Int) -> None:
    """Makes the floats of keys ``first``, ``first + 1``, ... -inf in the columns that do not see or attend them.

    ``limits``: int32 ``[4, 32]``, a column sees the keys from the first up to the second, but for those from the third
    up to the fourth.
    """
    start, end, gap, after = (_row(b, limits, row, vec.TILE_INTS) for row in range(4))

    def body(i: Value) -> None:
        place = vec.splat(b, b.trunc(b.add(first, i), vec.I32), vec.TILE_INTS)
        seen = b.and_(b.icmp_signed(">=", place, start), b.icmp_signed("<", place, end))
        kept = b.or_(b.icmp_signed("<", place, gap), b.icmp_signed(">=", place, after))
        _set_row(b, b.select(b.and_(seen, kept), _row(b, z, i), constant(vec.TILE_FLOATS, -float("inf"))), z, i)

    loop(b, rows, 1, [], body)


# Products.


@instruction
def product(
    b: Builder, x: Rows, x_next: Int, y: Rows, z: Rows, depth: Int, rows: vec.Known, columns: vec.Known,
    adds: vec.Known, pairs: vec.Flag,
) -> None:  # fmt: skip
    """The product z ``[rows, columns]`` of x ``[rows, depth]`` and y ``[depth, columns]``.

    Each element is one chain of multiply-adds along the depth. Elements of a row of x lie ``x_next`` bytes apart.
    ``columns`` are 16 or 32. ``adds`` 1: the whole product is added to z. ``pairs`` 1: elements of x and y are pairs of
    bfloat16, whose products are both added.
    """
    vectors, multiply = range(0, columns, LANES), vec.add_pairs if pairs else vec.fma
    x_rows, z_rows = ([b.add(at, b.mul(step, constant(vec.I64, r))) for r in range(rows)] for at, step in (x, z))

    def body(k: Value, at: Value, along: Value, *sums: Value) -> list[Value]:
        of_y = [load(b, at, first) for first in vectors]
        of_x = [vec.splat(b, load(b, b.add(row, along), kind=vec.F32)) for row in x_rows]
        terms = zip(itertools.product(of_x, of_y), sums, strict=True)
        return [b.add(at, y[1]), b.add(along, x_next), *(multiply(b, *term, total) for term, total in terms)]

    begin = [y[0], constant(vec.I64, 0), *[vec.ZERO] * (rows * len(vectors))]
    places = itertools.product(z_rows, vectors)
    for (at, first), value in zip(places, loop(b, depth, 1, begin, body)[2:], strict=True):
        store(b, b.fadd(load(b, at, first), value) if adds else value, at, first)


@instruction
def dot(b: Builder, x: Int, y: Int, count: Int, kind: vec.AnyKind) -> Float:
    """The dot product of floats and elements of a kind, as many as there may be."""
    whole = vec.whole_vectors(b, count)

    def add(i: Value, total: Value) -> list[Value]:
        return [vec.fma(b, load(b, x, i), vec.as_floats(b, y, i, kind), total)]

    def add_one(i: Value, total: Value) -> list[Value]:
        one, other = (vec.as_floats(b, at, b.add(whole, i), of, 1) for at, of in ((x, 0), (y, kind)))
        return [b.fadd(total, b.fmul(one, other))]

    total = vec.lane_sum(b, loop(b, whole, LANES, [vec.ZERO], add)[0])
    return loop(b, b.sub(count, whole), 1, [total], add_one)[0]


# How many listed rows ahead of their use are asked for.
_AHEAD = 16


def _listed_row(b: Builder, rows: Rows, places: Value, i: Value, further: int) -> Value:
    """The address of a listed row, so many places further than the i-th."""
    place = load(b, places, b.add(i, constant(vec.I64, further)), vec.I32)
    return b.add(rows[0], b.mul(b.sext(place, vec.I64), rows[1]))


@instruction
def listed_products(
    b: Builder, x: Int, rows: Rows, places: Int, count: Int, depth: Int, out: Int, kind: vec.Kind
) -> None:
    """Dot products of a row of floats and those of ``rows``, of a kind, at ``places``; ``count`` of four.

    They are what ``dot`` gives. Places are read ``_AHEAD + 4`` further than there are any.
    """

    def body(i: Value) -> None:
        keys = [_listed_row(b, rows, places, i, k) for k in range(4)]
        for k in range(4):
            vec.prefetch(b, _listed_row(b, rows, places, i, _AHEAD + k), 512)

        def add(d: Value, *sums: Value) -> list[Value]:
            row = load(b, x, d)
            return [
                vec.fma(b, row, vec.as_floats(b, key, d, kind), total) for key, total in zip(keys, sums, strict=True)
            ]

        store(b, vec.four_sums(b, loop(b, depth, LANES, [vec.ZERO] * 4, add)), out, i)

    loop(b, count, 4, [], body)


@instruction
def add_rows(
    b: Builder, out: Int, weights: Int, places: Int, count: Int, rows: Rows, vectors: vec.Known, kind: vec.Kind
) -> None:
    """Adds to ``16 * vectors`` floats those of ``rows`` that are at ``places``, each times its weight.

    ``count`` is a multiple of 4: two sums run side by side, so that one addition need not wait for the one before.
    Places are read ``_AHEAD`` further than there are any.
    """

    def body(i: Value, *sums: Value) -> list[Value]:
        changed = list(sums)
        for k in range(4):
            row, later = (_listed_row(b, rows, places, i, k + ahead) for ahead in (0, _AHEAD))
            vec.prefetch(b, later, 16 * vectors * (4 if kind == 0 else 2))
            weight = vec.splat(b, load(b, weights, b.add(i, constant(vec.I64, k)), vec.F32))
            for v in range(vectors):
                number = k % 2 * vectors + v
                changed[number] = vec.fma(b, weight, vec.as_floats(b, row, LANES * v, kind), changed[number])
        return changed

    sums = loop(b, count, 4, [vec.ZERO] * (2 * vectors), body)
    for v, (one, other) in enumerate(zip(sums[:vectors], sums[vectors:], strict=True)):
        store(b, b.fadd(load(b, out, LANES * v), b.fadd(one, other)), out, LANES * v)


@instruction
def code_products(b: Builder, x: Rows, codes: Int, count: Int, depth: Int, out: Rows, rows: vec.Few) -> None:
    """Dot products of 1, 2, or else 4 rows of floats with ``count`` rows of int8; that of row r and key j at out[r, j].

    4, 2 or 1 keys are taken at once, and as many products written: the last key stands for those that are not there.
    """
    last = b.sub(count, constant(vec.I64, 1))

    def body(j: Value) -> None:
        numbers = [b.add(j, constant(vec.I64, key)) for key in range(4 // rows)]
        numbers = [b.select(b.icmp_signed("<", number, last), number, last) for number in numbers]
        starts = [b.add(codes, b.mul(depth, number)) for number in numbers]

        def add(i: Value, *sums: Value) -> list[Value]:
            of_keys = [vec.as_floats(b, start, i, 3) for start in starts]
            of_rows = [load(b, b.add(x[0], b.mul(x[1], constant(vec.I64, r))), i) for r in range(rows)]
            pairs = itertools.product(of_rows, of_keys)
            return [vec.fma(b, row, key, total) for (row, key), total in zip(pairs, sums, strict=True)]

        found = vec.four_sums(b, loop(b, depth, LANES, [vec.ZERO] * 4, add))
        for number in range(4):
            row, key = divmod(number, 4 // rows)
            at = b.add(out[0], b.mul(out[1], constant(vec.I64, row)))
            store(b, b.extract_element(found, constant(vec.I32, number)), at, b.add(j, constant(vec.I64, key)))

    loop(b, count, 4 // rows, [], body)


# Bounds of scores by codes. What they follow from is at ``of_query``, four floats: q.center, the norm of the weighted
# query, how far off a product may be in parts of a key's scale, and rounding.


def _of_query(b: Builder, address: Value) -> list[Value]:
    return [vec.splat(b, load(b, address, number, vec.F32)) for number in range(4)]


def _error(b: Builder, scales: Value, residuals: Value, i: Value, norm: Value, per_scale: Value, slack: Value) -> Value:
    """How far scores by codes may be off, of 16 keys."""
    of_keys = vec.fma(b, load(b, scales, i), per_scale, load(b, residuals, i))
    return vec.fma(b, norm, of_keys, slack)


@instruction
def to_lower_bounds(
    b: Builder, products: Int, row: Int, count: Int, scales: Int, residuals: Int, of_query: Int
) -> None:
    """Writes lower bounds of scores from products with codes; -inf where a score is no finite number."""
    center, *rest = _of_query(b, of_query)

    def body(i: Value) -> None:
        score = vec.fma(b, load(b, products, i), load(b, scales, i), center)
        lower = b.fsub(score, _error(b, scales, residuals, i, *rest))
        size = vec.call_llvm(b, "llvm.fabs.v16f32", vec.FLOATS, [score])
        finite = b.fcmp_ordered("<", size, constant(vec.FLOATS, float("inf")))
        store(b, b.select(finite, lower, vec.LOWEST), row, i)

    loop(b, count, LANES, [], body)


@instruction
def to_upper_bounds(b: Builder, row: Int, count: Int, scales: Int, residuals: Int, of_query: Int) -> None:
    """Makes upper bounds of the lower bounds of scores; infinite where the lower one is, of which nothing is known."""
    _, *rest = _of_query(b, of_query)

    def body(i: Value) -> None:
        lower, off = load(b, row, i), _error(b, scales, residuals, i, *rest)
        known = b.fcmp_unordered("!=", lower, vec.LOWEST)
        store(b, b.select(known, b.fadd(lower, b.fadd(off, off)), constant(vec.FLOATS, float("inf"))), row, i)

    loop(b, count, LANES, [], body)

"""Products of tiles, of rows at listed places and of codes, for compiled code; and softmax over columns of scores."""

from typing import Any

from nc_patch.ops.cpu import llvm as vec
from nc_patch.ops.cpu.llvm import FLOATS, LANES, Builder, Float, Int, Value, constant, instruction, load, loop, store

# Columns of floats: 32 side by side, such as the scores of 32 queries, one row for each key.


def _pair(b: Builder, address: Value, row: Value | int = 0, kind: Any = FLOATS) -> list[Value]:
    """A row of 32 columns, as two vectors."""
    at = vec.element_at(b, address, row, 128)
    return [load(b, at, first, kind) for first in (0, LANES)]


def _set_pair(b: Builder, values: list[Value], address: Value, row: Value | int = 0) -> None:
    """Writes a row of 32 columns."""
    at = vec.element_at(b, address, row, 128)
    for first, value in zip((0, LANES), values, strict=True):
        store(b, value, at, first)


@instruction
def column_maxima(b: Builder, z: Int, rows: Int, found: Int) -> None:
    """The largest float of each column and of those at ``found``, NaN where there is one; written there."""

    def body(i: Value, *most: Value) -> list[Value]:
        return [vec.larger_or_nan(b, x, m) for x, m in zip(_pair(b, z, i), most, strict=True)]

    _set_pair(b, loop(b, rows, 1, _pair(b, found), body), found)


@instruction
def column_exponentials(b: Builder, z: Int, rows: Int, shifts: Int, factor: Float, sums: Int) -> None:
    """Each float becomes ``2 ** ((x - shift) * factor)``; the sums of the columns are added to those at ``sums``.

    They are summed apart first: one running sum over a million keys would lose three digits.
    """
    times, minus = vec.splat(b, factor), _pair(b, shifts)

    def body(i: Value, *totals: Value) -> list[Value]:
        scores = zip(_pair(b, z, i), minus, strict=True)
        values = [vec.exp2(b, b.fmul(b.fsub(x, shift), times)) for x, shift in scores]
        _set_pair(b, values, z, i)
        return [b.fadd(total, value) for total, value in zip(totals, values, strict=True)]

    added = loop(b, rows, 1, [vec.ZERO] * 2, body)
    _set_pair(b, [b.fadd(total, more) for total, more in zip(_pair(b, sums), added, strict=True)], sums)


@instruction
def largest_product(b: Builder, row: Int, factors: Int, least: Float) -> Float:
    """The largest of 32 floats times as many factors, and of ``least``; NaN where there is one."""
    most = vec.splat(b, least)
    for x, factor in zip(_pair(b, row), _pair(b, factors), strict=True):
        most = vec.larger_or_nan(b, b.fmul(x, factor), most)
    broken = b.bitcast(b.fcmp_unordered("uno", most, most), vec.I16)
    sound = b.icmp_unsigned("==", broken, constant(vec.I16, 0))
    return b.select(sound, vec.largest_lane(b, most), constant(vec.F32, float("nan")))


@instruction
def hide_columns(b: Builder, z: Int, rows: Int, first: Int, limits: Int) -> None:
    """Makes the floats of keys ``first``, ``first + 1``, ... -inf in the columns that do not see or attend them.

    ``limits``: int32 ``[4, 32]``, a column sees the keys from the first up to the second, but for those from the third
    up to the fourth.
    """
    found = list(zip(*(_pair(b, limits, row, vec.INTS) for row in range(4)), strict=True))

    def body(i: Value) -> None:
        place = vec.splat(b, b.trunc(b.add(first, i), vec.I32), vec.INTS)
        shown = []
        for score, (start, end, gap, after) in zip(_pair(b, z, i), found, strict=True):
            seen = b.and_(b.icmp_signed(">=", place, start), b.icmp_signed("<", place, end))
            kept = b.or_(b.icmp_signed("<", place, gap), b.icmp_signed(">=", place, after))
            shown.append(b.select(b.and_(seen, kept), score, vec.LOWEST))
        _set_pair(b, shown, z, i)

    loop(b, rows, 1, [], body)


# Products.


@instruction
def product(
    b: Builder, x: Int, x_step: Int, x_next: Int, y: Int, y_step: Int, y_next: Int, z: Int, z_step: Int, depth: Int,
    rows: vec.Known, vectors: vec.Known, adds: vec.Known,
) -> None:  # fmt: skip
    """The product z ``[rows, 16 * vectors]`` of x ``[rows, depth]`` and y ``[depth, 16 * vectors]``; steps in bytes.

    Each element is one chain of multiply-adds along the depth. Elements of x lie ``x_next`` apart in a row, vectors of
    y ``y_next``. ``adds`` 1: the whole product is added to z.
    """
    x_rows, z_rows = ([b.add(at, b.mul(step, constant(vec.I64, r))) for r in range(rows)]
                      for at, step in ((x, x_step), (z, z_step)))  # fmt: skip

    def body(k: Value, at: Value, along: Value, *sums: Value) -> list[Value]:
        columns = [load(b, b.add(at, b.mul(y_next, constant(vec.I64, v)))) for v in range(vectors)]
        of_rows = [vec.splat(b, load(b, b.add(row, along), kind=vec.F32)) for row in x_rows]
        added = [vec.fma(b, row, column, sums[r * vectors + v]) for r, row in enumerate(of_rows)
                 for v, column in enumerate(columns)]  # fmt: skip
        return [b.add(at, y_step), b.add(along, x_next), *added]

    begin = [y, constant(vec.I64, 0), *[vec.ZERO] * (rows * vectors)]
    for number, value in enumerate(loop(b, depth, 1, begin, body)[2:]):
        row, column = z_rows[number // vectors], number % vectors * LANES
        store(b, b.fadd(load(b, row, column), value) if adds else value, row, column)


@instruction
def dot(b: Builder, x: Int, y: Int, count: Int, kind: vec.AnyKind) -> Float:
    """The dot product of floats and elements of a kind."""

    def body(i: Value, total: Value) -> list[Value]:
        return [vec.fma(b, load(b, x, i), vec.as_floats(b, y, i, kind), total)]

    return vec.lane_sum(b, loop(b, count, LANES, [vec.ZERO], body)[0])


# How many listed rows ahead of their use are asked for.
_AHEAD = 16


def _listed_row(b: Builder, rows: Value, step: Value, places: Value, i: Value, further: int) -> Value:
    """The address of a listed row, so many places further than the i-th."""
    place = load(b, places, b.add(i, constant(vec.I64, further)), vec.I32)
    return b.add(rows, b.mul(b.sext(place, vec.I64), step))


@instruction
def listed_products(
    b: Builder, x: Int, rows: Int, step: Int, places: Int, count: Int, depth: Int, out: Int, kind: vec.Kind
) -> None:
    """Dot products of a row of floats and rows of a kind at ``places``, ``step`` bytes apart; ``count`` of four.

    They are what ``dot`` gives. Places are read ``_AHEAD + 4`` further than there are any.
    """

    def body(i: Value) -> None:
        keys = [_listed_row(b, rows, step, places, i, k) for k in range(4)]
        for k in range(4):
            vec.prefetch(b, _listed_row(b, rows, step, places, i, _AHEAD + k), 512)

        def add(d: Value, *sums: Value) -> list[Value]:
            row = load(b, x, d)
            return [
                vec.fma(b, row, vec.as_floats(b, key, d, kind), total) for key, total in zip(keys, sums, strict=True)
            ]

        store(b, vec.four_sums(b, loop(b, depth, LANES, [vec.ZERO] * 4, add)), out, i)

    loop(b, count, 4, [], body)


@instruction
def add_rows(
    b: Builder, out: Int, weights: Int, places: Int, count: Int, rows: Int, step: Int, vectors: vec.Known,
    kind: vec.Kind,
) -> None:  # fmt: skip
    """Adds to ``16 * vectors`` floats the rows at ``places``, ``step`` bytes apart, each times its weight.

    ``count`` is a multiple of 4: two sums run side by side, so that one addition need not wait for the one before.
    Places are read ``_AHEAD`` further than there are any.
    """

    def body(i: Value, *sums: Value) -> list[Value]:
        changed = list(sums)
        for k in range(4):
            row, later = (_listed_row(b, rows, step, places, i, k + ahead) for ahead in (0, _AHEAD))
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
def code_products(
    b: Builder, x: Int, x_step: Int, codes: Int, left: Int, depth: Int, out: Int, out_step: Int, rows: vec.Known
) -> None:
    """Dot products of 1, 2 or 4 rows of floats with 4, 2 or 1 rows of int8; that of row r and key j at out[r, j].

    Where fewer keys are ``left``, the last of them stands for those that are not there.
    """
    keys = 4 // rows
    last = b.sub(left, constant(vec.I64, 1))
    numbers = [constant(vec.I64, j) for j in range(keys)]
    starts = [b.add(codes, b.mul(depth, b.select(b.icmp_signed("<", j, last), j, last))) for j in numbers]

    def body(i: Value, *sums: Value) -> list[Value]:
        of_keys = [vec.as_floats(b, start, i, 3) for start in starts]
        of_rows = [load(b, b.add(x, b.mul(x_step, constant(vec.I64, r))), i) for r in range(rows)]
        return [
            vec.fma(b, row, key, sums[r * keys + j]) for r, row in enumerate(of_rows) for j, key in enumerate(of_keys)
        ]

    found = vec.four_sums(b, loop(b, depth, LANES, [vec.ZERO] * 4, body))
    for number in range(4):
        value = b.extract_element(found, constant(vec.I32, number))
        store(b, value, b.add(out, b.mul(out_step, constant(vec.I64, number // keys))), number % keys)


def _error(b: Builder, scales: Value, residuals: Value, i: Value, norm: Value, per_scale: Value, slack: Value) -> Value:
    """How far scores by codes may be off, of 16 keys."""
    of_keys = vec.fma(b, load(b, scales, i), per_scale, load(b, residuals, i))
    return vec.fma(b, norm, of_keys, slack)


@instruction
def to_lower_bounds(
    b: Builder, products: Int, row: Int, count: Int, scales: Int, residuals: Int, middle: Float, norm: Float,
    per_scale: Float, slack: Float,
) -> None:  # fmt: skip
    """Writes lower bounds of scores from products with codes; -inf where a score is no finite number."""
    center, *of_query = (vec.splat(b, value) for value in (middle, norm, per_scale, slack))

    def body(i: Value) -> None:
        score = vec.fma(b, load(b, products, i), load(b, scales, i), center)
        lower = b.fsub(score, _error(b, scales, residuals, i, *of_query))
        size = vec.call_llvm(b, "llvm.fabs.v16f32", FLOATS, [score])
        finite = b.fcmp_ordered("<", size, constant(FLOATS, float("inf")))
        store(b, b.select(finite, lower, vec.LOWEST), row, i)

    loop(b, count, LANES, [], body)


@instruction
def take_bounded(
    b: Builder, row: Int, count: Int, scales: Int, residuals: Int, norm: Float, per_scale: Float, slack: Float,
    threshold: Float, places: Int, first: Int,
) -> Int:  # fmt: skip
    """Lists the places, from ``first`` on, of lower bounds whose upper bounds reach a threshold; how many.

    Where the lower bound is -inf the upper one is not known. Up to 16 more places are written.
    """
    *of_query, least = (vec.splat(b, value) for value in (norm, per_scale, slack, threshold))

    def body(i: Value, found: Value, place: Value) -> list[Value]:
        lower, off = load(b, row, i), _error(b, scales, residuals, i, *of_query)
        unknown = b.fcmp_ordered("==", lower, vec.LOWEST)
        mask = b.or_(b.fcmp_unordered(">=", b.fadd(lower, b.fadd(off, off)), least), unknown)
        more = vec.compress(b, mask, [(place, places)], found)
        return [b.add(found, more), b.add(place, constant(vec.INTS, LANES))]

    return loop(b, count, LANES, [constant(vec.I64, 0), vec.counted_from(b, first)], body)[0]

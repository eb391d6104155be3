"""Products of tiles, of rows at listed places and of codes, for compiled code; and softmax over columns of scores."""

from llvmlite import ir

from nc_patch.ops.cpu.llvm import (
    F32,
    FLOATS,
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
    fma,
    four_sums,
    instruction,
    lane_sum,
    largest_lane,
    load,
    loop,
    prefetch,
    splat,
    store,
)

# Columns of floats: 32 side by side, such as the scores of 32 queries, one row for each key.


@instruction
def column_maxima(b: Builder, z: Int, rows: Int, found: Int) -> None:
    """The largest float of each column and of those at ``found``, NaN where there is one; written there."""
    begin = [load(b, b.add(found, const_int(64 * v))) for v in range(2)]

    def body(i: Value, *most: Value) -> list[Value]:
        new = [load(b, b.add(element_at(b, z, i, 128), const_int(64 * v))) for v in range(2)]
        # Where the new one is NaN, neither comparison holds.
        keep = [
            b.or_(b.fcmp_ordered("<=", x, m), b.fcmp_unordered("uno", m, m)) for x, m in zip(new, most, strict=True)
        ]
        return [b.select(k, m, x) for k, m, x in zip(keep, most, new, strict=True)]

    for v, value in enumerate(loop(b, rows, 1, begin, body)):
        store(b, value, b.add(found, const_int(64 * v)))


@instruction
def column_exponentials(b: Builder, z: Int, rows: Int, shifts: Int, factor: Float, sums: Int) -> None:
    """Each float becomes ``2 ** ((x - shift) * factor)``; the sums of the columns are added to those at ``sums``.

    They are summed apart first: one running sum over a million keys would lose three digits.
    """
    times = splat(b, factor)
    minus = [load(b, b.add(shifts, const_int(64 * v))) for v in range(2)]

    def body(i: Value, *totals: Value) -> list[Value]:
        added = []
        for v in range(2):
            at = b.add(element_at(b, z, i, 128), const_int(64 * v))
            value = exp2(b, b.fmul(b.fsub(load(b, at), minus[v]), times))
            store(b, value, at)
            added.append(b.fadd(totals[v], value))
        return added

    for v, value in enumerate(loop(b, rows, 1, [const_vector(0.0)] * 2, body)):
        target = b.add(sums, const_int(64 * v))
        store(b, b.fadd(load(b, target), value), target)


@instruction
def largest_product(b: Builder, row: Int, factors: Int, least: Float) -> Float:
    """The largest of 32 floats times as many factors, and of ``least``; NaN where there is one."""
    most = splat(b, least)
    for v in range(2):
        value = b.fmul(load(b, b.add(row, const_int(64 * v))), load(b, b.add(factors, const_int(64 * v))))
        most = b.select(b.or_(b.fcmp_ordered("<=", value, most), b.fcmp_unordered("uno", most, most)), most, value)
    broken = b.bitcast(b.fcmp_unordered("uno", most, most), I16)
    nan = ir.Constant(F32, float("nan"))
    return b.select(b.icmp_unsigned("==", broken, ir.Constant(I16, 0)), largest_lane(b, most), nan)


@instruction
def hide_columns(b: Builder, z: Int, rows: Int, first: Int, limits: Int) -> None:
    """Makes the floats of keys ``first``, ``first + 1``, ... -inf in the columns that do not see or attend them.

    ``limits``: int32 ``[4, 32]``, a column sees the keys from the first up to the second, but for those from the third
    up to the fourth.
    """
    found = [[load(b, b.add(limits, const_int(128 * row + 64 * v)), INTS) for v in range(2)] for row in range(4)]
    hidden = const_vector(-float("inf"))

    def body(i: Value) -> list[Value]:
        place = splat(b, b.trunc(b.add(first, i), I32), INTS)
        for v in range(2):
            start, end, gap, after = (row[v] for row in found)
            seen = b.and_(b.icmp_signed(">=", place, start), b.icmp_signed("<", place, end))
            kept = b.or_(b.icmp_signed("<", place, gap), b.icmp_signed(">=", place, after))
            at = b.add(element_at(b, z, i, 128), const_int(64 * v))
            store(b, b.select(b.and_(seen, kept), load(b, at), hidden), at)
        return []

    loop(b, rows, 1, [], body)


# Products.


@instruction
def product(
    b: Builder,
    x: Int,
    x_step: Int,
    x_next: Int,
    y: Int,
    y_step: Int,
    y_next: Int,
    z: Int,
    z_step: Int,
    depth: Int,
    rows: Known,
    vectors: Known,
    adds: Known,
) -> None:
    """The product z ``[rows, 16 * vectors]`` of x ``[rows, depth]`` and y ``[depth, 16 * vectors]``; steps in bytes.

    Each element is one chain of multiply-adds along the depth. Elements of x lie ``x_next`` apart in a row, vectors of
    y ``y_next``. ``adds`` 1: the whole product is added to z.
    """
    x_rows = [b.add(x, b.mul(x_step, const_int(r))) for r in range(rows)]
    targets = [
        b.add(b.add(z, b.mul(z_step, const_int(r))), const_int(64 * v)) for r in range(rows) for v in range(vectors)
    ]
    begin = [const_vector(0.0)] * len(targets)

    def body(k: Value, at: Value, along: Value, *sums: Value) -> list[Value]:
        columns = [load(b, b.add(at, b.mul(y_next, const_int(v)))) for v in range(vectors)]
        of_rows = [splat(b, load(b, b.add(row, along), F32)) for row in x_rows]
        added = [fma(b, row, column, sums[r * vectors + v]) for r, row in enumerate(of_rows)
                 for v, column in enumerate(columns)]  # fmt: skip
        return [b.add(at, y_step), b.add(along, x_next), *added]

    for target, value in zip(targets, loop(b, depth, 1, [y, const_int(0), *begin], body)[2:], strict=True):
        store(b, b.fadd(load(b, target), value) if adds else value, target)


@instruction
def dot(b: Builder, x: Int, y: Int, count: Int, kind: AnyKind) -> Float:
    """The dot product of floats and elements of a kind."""

    def body(i: Value, total: Value) -> list[Value]:
        return [fma(b, load(b, element_at(b, x, i, 4)), as_floats(b, y, i, kind), total)]

    return lane_sum(b, loop(b, count, LANES, [const_vector(0.0)], body)[0])


# How many listed rows ahead of their use are asked for.
_AHEAD = 16


@instruction
def listed_products(
    b: Builder, x: Int, rows: Int, step: Int, places: Int, count: Int, depth: Int, out: Int, kind: Kind
) -> None:
    """Dot products of a row of floats and rows of a kind at ``places``, ``step`` bytes apart; ``count`` of four.

    They are what ``dot`` gives. Places are read ``_AHEAD + 4`` further than there are any.
    """

    def row_at(i: Value, k: int) -> Value:
        place = load(b, element_at(b, places, b.add(i, const_int(k)), 4), I32)
        return b.add(rows, b.mul(b.sext(place, I64), step))

    def body(i: Value) -> list[Value]:
        keys = [row_at(i, k) for k in range(4)]
        for k in range(4):
            prefetch(b, row_at(i, _AHEAD + k), 512)

        def add(d: Value, *sums: Value) -> list[Value]:
            row = load(b, element_at(b, x, d, 4))
            return [fma(b, row, as_floats(b, key, d, kind), total) for key, total in zip(keys, sums, strict=True)]

        store(b, four_sums(b, loop(b, depth, LANES, [const_vector(0.0)] * 4, add)), element_at(b, out, i, 4))
        return []

    loop(b, count, 4, [], body)


@instruction
def add_rows(
    b: Builder, out: Int, weights: Int, places: Int, count: Int, rows: Int, step: Int, vectors: Known, kind: Kind
) -> None:
    """Adds to ``16 * vectors`` floats the rows at ``places``, ``step`` bytes apart, each times its weight.

    ``count`` is a multiple of 4: two sums run side by side, so that one addition need not wait for the one before.
    Places are read ``_AHEAD`` further than there are any.
    """
    targets = [b.add(out, const_int(64 * v)) for v in range(vectors)]
    begin = [const_vector(0.0)] * (2 * vectors)

    def body(i: Value, *sums: Value) -> list[Value]:
        changed = list(sums)
        for k in range(4):
            at = b.add(i, const_int(k))
            row, later = (
                b.add(rows, b.mul(b.sext(load(b, element_at(b, places, place, 4), I32), I64), step))
                for place in (at, b.add(at, const_int(_AHEAD)))
            )
            prefetch(b, later, 16 * vectors * (4 if kind == 0 else 2))
            weight = splat(b, load(b, element_at(b, weights, at, 4), F32))
            for v in range(vectors):
                number = k % 2 * vectors + v
                changed[number] = fma(b, weight, as_floats(b, row, LANES * v, kind), changed[number])
        return changed

    sums = loop(b, count, 4, begin, body)
    for target, one, other in zip(targets, sums[:vectors], sums[vectors:], strict=True):
        store(b, b.fadd(load(b, target), b.fadd(one, other)), target)


@instruction
def code_products(
    b: Builder, x: Int, x_step: Int, codes: Int, code_step: Int, depth: Int, out: Int, out_step: Int, rows: Known
) -> None:
    """Dot products of 1, 2 or 4 rows of floats with 4, 2 or 1 rows of int8; that of row r and key j at out[r, j]."""
    keys = 4 // rows

    def body(i: Value, *sums: Value) -> list[Value]:
        of_keys = [as_floats(b, b.add(codes, b.mul(code_step, const_int(j))), i, 3) for j in range(keys)]
        of_rows = [load(b, element_at(b, b.add(x, b.mul(x_step, const_int(r))), i, 4)) for r in range(rows)]
        return [fma(b, row, key, sums[r * keys + j]) for r, row in enumerate(of_rows) for j, key in enumerate(of_keys)]

    found = four_sums(b, loop(b, depth, LANES, [const_vector(0.0)] * 4, body))
    for r in range(rows):
        for j in range(keys):
            value = b.extract_element(found, ir.Constant(I32, r * keys + j))
            store(b, value, b.add(b.add(out, b.mul(out_step, const_int(r))), const_int(4 * j)))


@instruction
def to_lower_bounds(
    b: Builder,
    products: Int,
    row: Int,
    count: Int,
    scales: Int,
    residuals: Int,
    middle: Float,
    norm: Float,
    per_scale: Float,
    slack: Float,
) -> None:
    """Writes lower bounds of scores from products with codes; -inf where a score is no finite number."""
    constants = [splat(b, value) for value in (middle, norm, per_scale, slack)]

    def body(i: Value) -> list[Value]:
        at = element_at(b, row, i, 4)
        scale, residual = load(b, element_at(b, scales, i, 4)), load(b, element_at(b, residuals, i, 4))
        score = fma(b, load(b, element_at(b, products, i, 4)), scale, constants[0])
        off = fma(b, scale, constants[2], residual)
        lower = b.fsub(score, fma(b, constants[1], off, constants[3]))
        finite = b.fcmp_ordered("<", call_llvm(b, "llvm.fabs.v16f32", FLOATS, [score]), const_vector(float("inf")))
        store(b, b.select(finite, lower, const_vector(-float("inf"))), at)
        return []

    loop(b, count, LANES, [], body)


@instruction
def take_bounded(
    b: Builder,
    row: Int,
    count: Int,
    scales: Int,
    residuals: Int,
    norm: Float,
    per_scale: Float,
    slack: Float,
    threshold: Float,
    places: Int,
    first: Int,
) -> Int:
    """Lists the places, from ``first`` on, of lower bounds whose upper bounds reach a threshold; how many.

    Where the lower bound is -inf the upper one is not known. Up to 16 more places are written.
    """
    constants = [splat(b, value) for value in (norm, per_scale, slack, threshold)]
    begin = b.add(ir.Constant(INTS, list(range(LANES))), splat(b, b.trunc(first, I32), INTS))

    def body(i: Value, found: Value, place: Value) -> list[Value]:
        lower = load(b, element_at(b, row, i, 4))
        scale, residual = load(b, element_at(b, scales, i, 4)), load(b, element_at(b, residuals, i, 4))
        off = fma(b, constants[0], fma(b, scale, constants[1], residual), constants[2])
        upper = b.fadd(lower, b.fadd(off, off))
        unknown = b.fcmp_ordered("==", lower, const_vector(-float("inf")))
        mask = b.or_(b.fcmp_unordered(">=", upper, constants[3]), unknown)
        more = compress(b, mask, [(place, element_at(b, places, found, 4))])
        return [b.add(found, more), b.add(place, const_ints(LANES))]

    return loop(b, count, LANES, [const_int(0), begin], body)[0]

"""Softmax times value of 32 queries at a time over runs of keys: scores have a row for each key, a column a query.

So keys are read as they lie, masks and maxima take whole vectors, and the product with the values reads the weights by
columns. Runs of keys longer than a piece are attended piece by piece, with a running maximum.
"""

from typing import Any, NamedTuple

import numpy as np

from nc_patch.ops.cpu import rows, vectors
from nc_patch.ops.cpu.launch import compiled, memory_of
from nc_patch.ops.cpu.llvm import COLUMNS, TILE_ROWS
from nc_patch.ops.cpu.rows import LARGEST, padded
from nc_patch.ops.cpu.vectors import f32, fill, i32, product, set_f32, set_i32

# Keys whose scores are held at once, and bytes of a key's.
PIECE, _KEY = 1024, 4 * COLUMNS


class Columns(NamedTuple):
    """Addresses of what 32 queries have in scratch memory: queries ``[D, 32]``, limits as of ``hide_columns``, scores
    ``[PIECE, 32]``, outputs ``[32, width]``, maxima and sums of exponentials, maxima of earlier pieces; a row; and
    values that are converted, ``[PIECE, width]``.
    """

    queries: int
    limits: int
    scores: int
    out: int
    maxima: int
    sums: int
    before: int
    row: int
    values: int


def sizes(arguments: dict[str, Any]) -> list[int]:
    """Floats of each of ``Columns``, the first arrays of a launch with such arguments."""
    D, width, converted = arguments["D"], arguments["width"], PIECE * arguments["converts"]
    return [COLUMNS * D, COLUMNS * 4, COLUMNS * PIECE, COLUMNS * width, *[COLUMNS] * 3, padded(D), converted * width]


@compiled
def columns_at(p, scratch):
    """Columns that are all zero and see nothing; where no score is finite, the largest number is taken from it."""
    at = Columns(*memory_of(p, scratch)[:9])
    fill(at.queries, COLUMNS * p.D, np.float32(0))
    fill(at.limits, COLUMNS * 4, np.float32(0))
    fill(at.maxima, COLUMNS, -LARGEST)
    fill(at.sums, COLUMNS, np.float32(0))
    return at


@compiled
def set_column(p, at, column, row, gap, after):
    """Makes a column the query of a row, which attends what it sees but for the keys of [gap, after)."""
    set_i32(at.limits, column, row.start)
    set_i32(at.limits, COLUMNS + column, row.end)
    set_i32(at.limits, 2 * COLUMNS + column, gap)
    set_i32(at.limits, 3 * COLUMNS + column, after)
    rows.read_query(p, at.row, row)
    for d in range(p.D):
        set_f32(at.queries, COLUMNS * d + column, f32(at.row, d))


@compiled
def clear_run(at, count):
    """The keys [from, to) that all of the first ``count`` columns see; and [gap, after) that some may not attend."""
    first, last, gap, after = 0, 1 << 31, 1 << 31, 0
    for column in range(count):
        first = max(first, i32(at.limits, column))
        last = min(last, i32(at.limits, COLUMNS + column))
        if i32(at.limits, 3 * COLUMNS + column) > i32(at.limits, 2 * COLUMNS + column):
            gap = min(gap, i32(at.limits, 2 * COLUMNS + column))
            after = max(after, i32(at.limits, 3 * COLUMNS + column))
    return first, last, gap, after


@compiled
def score_keys(p, head, at, z, first, last, clear):
    """Soft-capped raw scores of the keys ``first:last``; -inf where a column does not attend."""
    keys, queries, depth = p.key + head * p.key_h + first * p.key_n, (at.queries, _KEY), p.D
    count = last - first
    whole = count // TILE_ROWS * TILE_ROWS
    for row in range(0, whole, TILE_ROWS):
        x, out = (keys + row * p.key_n, p.key_n), (z + row * _KEY, _KEY)
        product(x, 4, queries, out, depth, TILE_ROWS, COLUMNS, 0, p.pairs)
    for row in range(whole, count):
        x, out = (keys + row * p.key_n, p.key_n), (z + row * _KEY, _KEY)
        product(x, 4, queries, out, depth, 1, COLUMNS, 0, p.pairs)
    rows.cap(z, count * COLUMNS, p.scale, p.softcap)
    seen_from, seen_to, gap, after = clear
    if first < seen_from or last > seen_to or (last > gap and first < after):
        vectors.hide_columns(z, count, first, at.limits)


@compiled
def _within(pieces, number, low, high):
    """The part of a run of keys that lies within [low, high)."""
    first, last = max(i32(pieces, 2 * number), low), min(i32(pieces, 2 * number + 1), high)
    return first, max(first, last)


@compiled
def attend_pieces(p, head, at, pieces, number, low, high, count):
    """Attends runs of keys within [low, high): ``number`` pairs of int32, ascending, none longer than ``PIECE``.

    Leaves the sums of weighted values, the maxima of scores and the sums of exponentials of ``count`` columns.
    """
    factor, clear = np.float32(p.factor), clear_run(at, count)
    fill(at.out, COLUMNS * p.width, np.float32(0))
    begin = 0
    while begin < number:
        held, stop = 0, begin
        while stop < number:
            first, last = _within(pieces, stop, low, high)
            if held + last - first > PIECE:
                break
            score_keys(p, head, at, at.scores + held * _KEY, first, last, clear)
            held += last - first
            stop += 1
        if begin > 0:
            for column in range(COLUMNS):  # kept for the rescaling
                set_f32(at.before, column, f32(at.maxima, column))
        vectors.column_maxima(at.scores, held, at.maxima)
        if begin > 0:
            for column in range(count):
                old, new = f32(at.before, column), f32(at.maxima, column)
                if new > old:
                    by = np.float32(2.0 ** ((old - new) * factor))
                    set_f32(at.sums, column, f32(at.sums, column) * by)
                    out = at.out + 4 * column * p.width
                    vectors.from_floats(out, out, p.width, by, 0)
        vectors.column_exponentials(at.scores, held, at.maxima, factor, at.sums)
        held = 0
        for piece in range(begin, stop):
            first, last = _within(pieces, piece, low, high)
            values = p.value + head * p.value_h + first * p.value_n, p.value_n
            if p.converts:
                for row in range(last - first):
                    rows.read_row(at.values + 4 * row * p.width, values[0] + row * p.value_n, p.Dv, p.kind)
                values = at.values, 4 * p.width
            weights, out = (at.scores + held * _KEY, 4), (at.out, 4 * p.width)
            rows.add_product(weights, _KEY, values, out, last - first, count, p.width)
            held += last - first
        begin = stop


@compiled
def write_column(p, at, column, row, attended):
    """Writes the output of a column's query, zeros where it attends nothing, and its log-sum-exp on request."""
    source, factor = at.out + 4 * column * p.width, np.float32(1)
    if attended == 0:
        fill(source, p.width, np.float32(0))
    else:
        shift, kept = f32(at.maxima, column), f32(at.sums, column)
        rows.write_log_sums(p, row, shift, kept, kept)
        factor = np.float32(1.0 / (kept + rows.sink_share(p, row, shift)))
    rows.write_output(p, row, source, factor)


@compiled
def add_run(pieces, number, first, last):
    """Appends the keys [first, last) to runs, joined to the last if they follow it; how many pieces there are now."""
    if number > 0 and i32(pieces, 2 * number - 1) == first:
        number -= 1
        first = i32(pieces, 2 * number)
    while first < last:
        set_i32(pieces, 2 * number, first)
        first = min(first + PIECE, last)
        set_i32(pieces, 2 * number + 1, first)
        number += 1
    return number

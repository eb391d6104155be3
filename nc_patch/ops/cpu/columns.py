"""Softmax times value of 32 queries at a time over runs of keys: scores have a row for each key, a column a query.

So keys are read as they lie, masks and maxima take whole vectors, and the product with the values reads the weights by
columns. Runs of keys longer than a piece are attended piece by piece, with a running maximum.
"""

import numpy as np

from nc_patch.ops.cpu.llvm import LANES, TILE_ROWS
from nc_patch.ops.cpu.products import column_exponentials, column_maxima, hide_columns, product
from nc_patch.ops.cpu.rows import INF, compiled, padded
from nc_patch.ops.cpu.softmax import cap, sink_share, write_log_sums
from nc_patch.ops.cpu.tiles import add_product, read_query, write_output
from nc_patch.ops.cpu.vectors import f32, fill, i32, scale_row, set_f32, set_i32

COLUMNS = 32
# Keys whose scores are held at once.
PIECE = 1024


@compiled
def room_floats(D, width):
    """Floats of scratch memory that 32 queries take; see ``addresses_of``."""
    return COLUMNS * (D + 4 + PIECE + width + 3) + COLUMNS * padded(D) + 2 * LANES


@compiled
def addresses_of(p, room):
    """Addresses in scratch memory: packed queries, limits, scores, output, maxima, sums, shifts, rows."""
    limits = room + 4 * COLUMNS * p.D
    scores = limits + 4 * COLUMNS * 4
    out = scores + 4 * PIECE * COLUMNS
    maxima = out + 4 * COLUMNS * p.width
    return room, limits, scores, out, maxima, maxima + 128, maxima + 256, maxima + 384


@compiled
def set_limits(room, p, column, start, end, gap, after):
    """Says what the query of a column attends: keys from ``start`` up to ``end``, but for those of [gap, after)."""
    limits = addresses_of(p, room)[1]
    set_i32(limits, column, start)
    set_i32(limits, COLUMNS + column, end)
    set_i32(limits, 2 * COLUMNS + column, gap)
    set_i32(limits, 3 * COLUMNS + column, after)


@compiled
def read_column(p, room, column, head, i):
    """Converts the query of a row, which ``pack_queries`` then packs."""
    read_query(p, addresses_of(p, room)[7] + column * 4 * padded(p.D), 0, head, i)


@compiled
def pack_queries(p, room, count):
    """Packs the first ``count`` queries that were read, ``[2, D, 16]``; the other columns are zero and see nothing."""
    parts = addresses_of(p, room)
    packed, rows = parts[0], parts[7]
    for column in range(count, COLUMNS):
        fill(rows + column * 4 * padded(p.D), padded(p.D), np.float32(0))
        set_limits(room, p, column, 0, 0, 0, 0)
    for column in range(COLUMNS):
        target = packed + column // LANES * 64 * p.D + column % LANES * 4
        for d in range(p.D):
            set_f32(target + 64 * d, 0, f32(rows + column * 4 * padded(p.D), d))


@compiled
def clear_run(limits, count):
    """The keys [from, to) that all of the first ``count`` columns see; and [gap, after) that some may not attend."""
    first, last, gap, after = 0, 1 << 31, 1 << 31, 0
    for column in range(count):
        first = max(first, i32(limits, column))
        last = min(last, i32(limits, COLUMNS + column))
        if i32(limits, 3 * COLUMNS + column) > i32(limits, 2 * COLUMNS + column):
            gap = min(gap, i32(limits, 2 * COLUMNS + column))
            after = max(after, i32(limits, 3 * COLUMNS + column))
    return first, last, gap, after


@compiled
def score_keys(p, head, room, target, first, last, clear):
    """Soft-capped raw scores of the keys ``first:last``, 128 bytes a key; -inf where a column does not attend."""
    parts = addresses_of(p, room)
    keys, depth, z = p.key + head * p.key_h + first * p.key_n, p.D, target
    count = last - first
    whole = count // TILE_ROWS * TILE_ROWS
    for row in range(0, whole, TILE_ROWS):
        product(keys + row * p.key_n, p.key_n, 4, parts[0], 64, 64 * depth, z + row * 128, 128, depth, TILE_ROWS, 2, 0)
    for row in range(whole, count):
        product(keys + row * p.key_n, p.key_n, 4, parts[0], 64, 64 * depth, z + row * 128, 128, depth, 1, 2, 0)
    cap(z, count * COLUMNS, p.scale, p.softcap)
    seen_from, seen_to, gap, after = clear
    if first < seen_from or last > seen_to or (last > gap and first < after):
        hide_columns(z, count, first, parts[1])


@compiled
def set_shifts(maxima, shifts):
    """What is taken from the scores of each column: the largest, or nothing where none is attended."""
    for column in range(COLUMNS):
        most = f32(maxima, column)
        set_f32(shifts, column, np.float32(0) if most == -INF else most)


@compiled
def _within(pieces, number, low, high):
    """The part of a run of keys that lies within [low, high)."""
    first, last = max(i32(pieces, 2 * number), low), min(i32(pieces, 2 * number + 1), high)
    return first, max(first, last)


@compiled
def attend_pieces(p, head, room, pieces, number, low, high, count):
    """Attends runs of keys within [low, high): ``number`` pairs of int32, ascending, none longer than ``PIECE``.

    Leaves the sums of weighted values, the maxima of scores and the sums of exponentials of ``count`` columns.
    """
    _, limits, scores, out, maxima, sums, shifts, _ = addresses_of(p, room)
    factor = np.float32(p.factor)
    clear = clear_run(limits, count)
    values = p.value + head * p.value_h
    fill(out, COLUMNS * p.width, np.float32(0))
    fill(maxima, COLUMNS, -INF)
    fill(sums, COLUMNS, np.float32(0))
    begin = 0
    while begin < number:
        held, stop = 0, begin
        while stop < number:
            first, last = _within(pieces, stop, low, high)
            if held + last - first > PIECE:
                break
            score_keys(p, head, room, scores + held * 128, first, last, clear)
            held += last - first
            stop += 1
        if begin > 0:
            for column in range(COLUMNS):  # kept for the rescaling
                set_f32(shifts, column, f32(maxima, column))
        column_maxima(scores, held, maxima)
        if begin > 0:
            for column in range(count):
                old, new = f32(shifts, column), f32(maxima, column)
                if new > old:
                    by = np.float32(2.0 ** ((old - new) * factor))
                    set_f32(sums, column, f32(sums, column) * by)
                    scale_row(out + 4 * column * p.width, p.width, by)
        set_shifts(maxima, shifts)
        column_exponentials(scores, held, shifts, factor, sums)
        held = 0
        for piece in range(begin, stop):
            first, last = _within(pieces, piece, low, high)
            if first < last:
                at = values + first * p.value_n
                add_product(scores + held * 128, 4, 128, at, p.value_n, out, 4 * p.width, last - first, count, p.width)
                held += last - first
        begin = stop


@compiled
def write_column(p, room, column, head, i, attended):
    """Writes the output of a column's query, zeros where it attends nothing, and its log-sum-exp on request."""
    parts = addresses_of(p, room)
    source, spare, factor = parts[3] + 4 * column * p.width, parts[7], np.float32(1)
    if attended == 0:
        fill(source, p.width, np.float32(0))
    else:
        shift, kept = f32(parts[6], column), f32(parts[5], column)
        write_log_sums(p, head, head * p.Lq + i, shift, kept, kept)
        factor = np.float32(1.0 / (kept + sink_share(p, head, shift)))
    write_output(p, 0, head, i, source, factor, spare)


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

"""Tiles of queries against the keys that they see: their scores, and softmax times value of all of those."""

import numpy as np

from nc_patch.ops.cpu.llvm import TILE_ROWS
from nc_patch.ops.cpu.products import product
from nc_patch.ops.cpu.rows import compiled, padded, read_row, write_row
from nc_patch.ops.cpu.vectors import fill, i32


@compiled
def span_of(p, first, last):
    """The keys [low, high) that any of the rows sees; twice 0 where none sees any."""
    low, high = 1 << 62, 0
    for i in range(first, last):
        start, end = i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)
        if end > start:
            low, high = min(low, start), max(high, end)
    return (low, high) if high > 0 else (0, 0)


@compiled
def leave_gap(low, high, start, end):
    """Whether keys lie between [low, high) and [start, end), if neither is empty, that are in none of the two."""
    return low < high and start < end and (start > high or end < low)


@compiled
def read_queries(p, target, head, first, last, count):
    """The queries of G heads and rows ``first:last`` as floats, rows beyond the last zero; ``count`` rows of a tile.

    Row ``g * (last - first) + i`` is that of head g and row ``first + i``.
    """
    rows, step = last - first, 4 * padded(p.D)
    for r in range(count):
        if r < p.group * rows:
            at = p.query + (head * p.group + r // rows) * p.query_h + (first + r % rows) * p.query_n
            read_row(target + r * step, at, p.D, p.kind)
        else:
            fill(target + r * step, padded(p.D), np.float32(0))


@compiled
def score(x, depth, panels, count, z, step, rows):
    """Scores ``[rows, 16 * count]`` of rows of floats against ``count`` panels, two at a time; steps in bytes."""
    for column in range(0, count, 2):
        for row in range(0, rows, TILE_ROWS):
            product(
                x + row * 4 * padded(depth), 4 * padded(depth), 4, panels + column * depth * 64, 64, depth * 64,
                z + row * step + column * 64, step, depth, TILE_ROWS, 2, 0,
            )  # fmt: skip


@compiled
def add_product(x, x_step, x_next, y, y_step, z, z_step, depth, rows, width):
    """Adds the product of x ``[rows, depth]`` and y ``[depth, width]`` to z; see ``product``, ``width`` of 16."""
    for row in range(0, rows, TILE_ROWS):
        column = 0
        while column + 32 <= width:
            product(x + row * x_step, x_step, x_next, y + 4 * column, y_step, 64, z + row * z_step + 4 * column, z_step,
                    depth, TILE_ROWS, 2, 1)  # fmt: skip
            column += 32
        if column < width:
            product(x + row * x_step, x_step, x_next, y + 4 * column, y_step, 64, z + row * z_step + 4 * column, z_step,
                    depth, TILE_ROWS, 1, 1)  # fmt: skip


@compiled
def write_output(p, head, row, source, factor, spare):
    """Writes a row of the output, ``source`` times a factor."""
    at = p.output + head * p.output_h + row * p.output_n
    write_row(at, source, p.Dv, factor, p.kind, spare)


@compiled
def tile_of(p, item):
    """Of an item: its head, and its rows [first, last); the last rows, which see most keys, come first."""
    tiles = (p.Lq + p.rows - 1) // p.rows
    first = (tiles - 1 - item // p.heads) * p.rows
    return item % p.heads, first, min(first + p.rows, p.Lq)

"""Rows of a problem as kernels read and write them, and tiles of queries against the keys that they see."""

import numpy as np

from nc_patch.ops.cpu.llvm import TILE_ROWS
from nc_patch.ops.cpu.products import product
from nc_patch.ops.cpu.rows import compiled, padded, read_row, write_row
from nc_patch.ops.cpu.vectors import fill, i32


@compiled
def tile_of(p, item):
    """Of an item: its head, and its rows [first, last); the last rows, which see most keys, come first."""
    tiles = (p.Lq + p.rows - 1) // p.rows
    first = (tiles - 1 - item // p.heads) * p.rows
    return item % p.heads, first, min(first + p.rows, p.Lq)


@compiled
def row_of(p, head, first, rows, r):
    """Row ``r`` of all heads of a group over positions: its head and position, and the interval that it sees."""
    i = first + r % rows
    return head * p.group + r // rows, i, i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)


@compiled
def budget_of(p, batch, head, i):
    """How many keys a row attends."""
    return i32(p.budget, batch * p.budget_b + head * p.budget_h + i)


@compiled
def read_query(p, target, batch, head, i):
    """A row's query as floats."""
    read_row(target, p.query + batch * p.query_b + head * p.query_h + i * p.query_n, p.D, p.kind)


@compiled
def write_output(p, batch, head, i, source, factor, spare):
    """Writes a row of the output, ``source`` times a factor; ``spare`` has room for a vector."""
    target = p.output + batch * p.output_b + head * p.output_h + i * p.output_n
    write_row(target, source, p.Dv, factor, p.kind, spare)


@compiled
def leave_gap(low, high, start, end):
    """Whether keys lie between [low, high) and [start, end), if neither is empty, that are in none of the two."""
    return low < high and start < end and (start > high or end < low)


@compiled
def read_queries(p, target, head, first, last, count):
    """The queries of G heads and rows ``first:last`` as floats, rows beyond the last zero; ``count`` rows of a tile."""
    rows, step = last - first, 4 * padded(p.D)
    for r in range(count):
        if r < p.group * rows:
            of_head, i, _, _ = row_of(p, head, first, rows, r)
            read_query(p, target + r * step, 0, of_head, i)
        else:
            fill(target + r * step, padded(p.D), np.float32(0))


@compiled
def score(x, depth, panels, count, z, step, rows):
    """Scores ``[rows, 16 * count]`` of rows of floats against ``count`` panels, two at a time; steps in bytes."""
    x_step = 4 * padded(depth)
    for column in range(0, count, 2):
        for row in range(0, rows, TILE_ROWS):
            product(x + row * x_step, x_step, 4, panels + column * depth * 64, 64, depth * 64,
                    z + row * step + column * 64, step, depth, TILE_ROWS, 2, 0)  # fmt: skip


@compiled
def add_product(x, x_step, x_next, y, y_step, z, z_step, depth, rows, width):
    """Adds the product of x ``[rows, depth]`` and y ``[depth, width]`` to z; see ``product``, ``width`` of 16."""
    whole = width // 32 * 32
    for row in range(0, rows, TILE_ROWS):
        x_row, z_row = x + row * x_step, z + row * z_step
        for column in range(0, whole, 32):
            product(
                x_row, x_step, x_next, y + 4 * column, y_step, 64, z_row + 4 * column, z_step, depth, TILE_ROWS, 2, 1
            )
        if whole < width:
            product(x_row, x_step, x_next, y + 4 * whole, y_step, 64, z_row + 4 * whole, z_step, depth, TILE_ROWS, 1, 1)

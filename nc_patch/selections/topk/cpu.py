"""Exact ``topk`` of many rows on a CPU: every score, the best of each row, and softmax times value over those alone.

An item of work is one key/value head and a few positions with all heads of the group. Their scores stay in a core's
cache. Each row lists its best keys, and the values at their places are added up; page means join as one more product
over the tile. Where all rows of a tile attend all that they see, their weights are multiplied as a whole.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numba import carray

from nc_patch.ops.cpu.launch import kernel
from nc_patch.ops.cpu.llvm import LANES, TILE_ROWS
from nc_patch.ops.cpu.parts import FIELDS, LogSums, Part, arguments_of, padded_length, parts_of
from nc_patch.ops.cpu.recent import dense_log_sums
from nc_patch.ops.cpu.rows import best_of, compiled, padded
from nc_patch.ops.cpu.softmax import add_listed, cap, hide_outside, softmax_row
from nc_patch.ops.cpu.tiles import (
    add_product,
    leave_gap,
    read_queries,
    score,
    span_of,
    tile_of,
    write_output,
)
from nc_patch.ops.cpu.vectors import f32, fill, i32, set_f32, set_i32
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.topk.cpu_list import PAGE, forced_of, pad_list, weigh_list

# Bytes of scores that a tile may have.
_TILE_BYTES = 1 << 21
_MOST_ROWS = 8
# Floats of a sample of scores.
_SPARE = 512


def cpu_topk_attention(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention of each row over its best keys; ``problem.means``, where there are any, stand for the others."""
    query, key, value, means = problem.query, problem.key, problem.value, problem.means
    B, Hq, Lq, D = query.shape
    N, Dv, group = key.shape[2], value.shape[3], problem.group
    output, sums = query.new_empty(B, Lq, Hq, Dv).transpose(1, 2), LogSums.of(problem)
    columns, slots = padded_length(N) + 2 * LANES, 0
    rows = _MOST_ROWS
    while rows > 1 and rows * group * columns * 4 > _TILE_BYTES:
        rows //= 2
    tile = -(-rows * group // TILE_ROWS) * TILE_ROWS
    of_means: Iterator[Part | None] = itertools.repeat(None)
    if means is not None:
        slots = padded_length(means.key.shape[2]) + 2 * LANES
        of_means = parts_of(means.key, means.value, panels=True, like=key)
    floats = tile * (columns + slots + padded_length(D) + padded_length(Dv) + 1) + 2 * columns + slots + 2 * _SPARE
    for part, its_means in zip(parts_of(key, value, panels=True), of_means, strict=False):
        arguments = arguments_of(problem, output, part, sums)
        if its_means is not None:
            arguments.update(means=its_means.keys, mean_values=its_means.values, slots=slots)
            arguments["mean_count"] = its_means.values.shape[2]
        _attend_kernel(
            -(-Lq // rows) * arguments["heads"], floats, rows=rows, sink_keys=sink_keys, recent_keys=recent_keys,
            columns=columns, **arguments,
        )  # fmt: skip
    return sums.result(problem, output, dense_log_sums(problem))


@kernel(f"{FIELDS} means:4 mean_values:4 mean_count rows sink_keys recent_keys columns slots")
def _attend_kernel(pointer, item, scratch):
    """One tile: its scores, then row by row the softmax and its product with the values."""
    p = carray(pointer, 1)[0]
    head, first, last = tile_of(p, item)
    low, high = span_of(p, first, last)
    rows = last - first
    tile = (p.group * rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    step, means_step, out_step = 4 * p.columns, 4 * p.slots, 4 * p.width
    x = scratch
    z = x + 4 * tile * padded(p.D)
    means = z + tile * step
    out = means + tile * means_step
    inverses = out + tile * out_step
    room = inverses + 4 * tile
    fill(out, padded(tile * p.width), np.float32(0))
    read_queries(p, x, head, first, last, tile)
    base = low // LANES * LANES
    width = padded(high - base)
    score(x, p.D, p.keys + head * p.keys_h + base // LANES * p.D * 64, width // LANES, z, step, tile)
    whole = _attends_all(p, head, first, last)
    slots = 0
    if p.means != 0 and not whole:
        slots = min(high // PAGE + 1, p.mean_count)
        score(x, p.D, p.means + head * p.means_h, padded(slots) // LANES, means, means_step, tile)
    # The slots of the pages that count for any row: what others hold may be of keys that no query sees.
    first_slot, last_slot = slots, 0
    values = p.values + head * p.values_h
    for r in range(p.group * rows):
        i, of_head = first + r % rows, head * p.group + r // rows
        start, end = i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)
        row = z + r * step + 4 * (start - base)
        inverse = np.float32(0)
        if end > start and whole:
            if p.softcap != 0:
                cap(row, end - start, p.scale, p.softcap)
            hide_outside(z + r * step, width, start - base, end - base)
            inverse = softmax_row(p, z + r * step, width, of_head, of_head * p.Lq + i)
        elif end > start:
            k = min(i32(p.budget + 4 * of_head * p.budget_h, i), end - start)
            taken = _list_best(p, row, start, end, k, room)
            scores, places, counts, _ = _parts_of(p, room)
            inverse, slot, counted = weigh_list(p, scores, places, taken, (start, end, i32(p.origin, i)), of_head,
                                       of_head * p.Lq + i, means + r * means_step, slots, counts)  # fmt: skip
            if counted > 0:
                first_slot, last_slot = min(first_slot, slot), max(last_slot, slot + counted)
            add_listed(out + r * out_step, p.width, scores, places, padded(taken), values, p.values_n, 0)
        else:
            fill(z + r * step, width, np.float32(0))
            fill(means + r * means_step, padded(slots), np.float32(0))
        set_f32(inverses, r, inverse)
    if whole:
        add_product(z + 4 * (low - base), step, 4, values + low * p.values_n, p.values_n, out, out_step, high - low,
                    tile, p.width)  # fmt: skip
    elif first_slot < last_slot:
        mean_values = p.mean_values + head * p.mean_values_h + first_slot * p.mean_values_n
        add_product(means + 4 * first_slot, means_step, 4, mean_values, p.mean_values_n, out, out_step,
                    last_slot - first_slot, tile, p.width)  # fmt: skip
    for r in range(p.group * rows):
        i, of_head = first + r % rows, head * p.group + r // rows
        if i32(p.visible, 2 * i + 1) <= i32(p.visible, 2 * i):
            fill(out + r * out_step, p.width, np.float32(0))
        write_output(p, of_head, i, out + r * out_step, f32(inverses, r), room)


@compiled
def _attends_all(p, head, first, last):
    """Whether every row has a budget of all that it sees, and no key lies between the rows' intervals, seen by none."""
    low, high = 1 << 62, 0
    for i in range(first, last):
        start, end = i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)
        seen = end - start
        if leave_gap(low, high, start, end):
            return False
        if seen > 0:
            low, high = min(low, start), max(high, end)
        for g in range(p.group if p.budget_h else 1):
            at = (head * p.group + g) * p.budget_h
            if i32(p.budget + 4 * at, i) < seen:
                return False
    return True


@compiled
def _list_best(p, row, start, end, k, room):
    """Lists the keys that a row attends, scores and positions, with -inf up to a whole vector; how many they are.

    Args:
        row: raw scores of the keys from ``start`` on. room: receives the list, see ``_parts_of``.
    """
    values, places, _, sample = _parts_of(p, room)
    seen = end - start
    sinks, recents = forced_of(p, k, seen)
    for j in range(sinks):
        set_f32(values, j, f32(row, j))
        set_i32(places, j, start + j)
    for j in range(recents):
        set_f32(values, sinks + j, f32(row, seen - recents + j))
        set_i32(places, sinks + j, end - recents + j)
    forced = sinks + recents
    if k > forced:
        best_of(row + 4 * sinks, seen - forced, k - forced, start + sinks, values + 4 * forced, places + 4 * forced,
                sample)  # fmt: skip
    pad_list(values, places, k)
    return k


@compiled
def _parts_of(p, room):
    """Addresses of a list's values and places, of counts of pages, and of a sample of 512 scores."""
    places = room + 4 * p.columns
    counts = places + 4 * p.columns
    return room, places, counts, counts + 4 * p.slots

"""Exact ``topk`` of many rows on a CPU: every score, the best of each row, and softmax times value over those alone.

An item of work is one key/value head and a few positions with all heads of the group. Their scores stay in a core's
cache. Each row lists its best keys, and the values at their places are added up; page means join as one more product
over the tile. Where all rows of a tile attend all that they see, their weights are multiplied as a whole.
"""

import numpy as np
from numba import carray

from nc_patch.ops.cpu.launch import kernel
from nc_patch.ops.cpu.llvm import LANES, TILE_ROWS
from nc_patch.ops.cpu.parts import FIELDS, Outputs, as_rows, in_panels, padded_length, parts_of
from nc_patch.ops.cpu.recent import dense_log_sums
from nc_patch.ops.cpu.rows import INF, compiled, fill_outside, padded
from nc_patch.ops.cpu.softmax import add_listed, cap, softmax_row
from nc_patch.ops.cpu.tiles import add_product, budget_of, leave_gap, read_queries, row_of, score, tile_of, write_output
from nc_patch.ops.cpu.vectors import f32, fill, i32, set_f32
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.topk.cpu_list import PAGE, list_best, weigh_list

# Bytes of scores that a tile may have.
_TILE_BYTES = 1 << 21
_MOST_ROWS = 8
# Floats of a sample of scores.
_SPARE = 512


def cpu_topk_attention(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention of each row over its best keys; ``problem.means``, where there are any, stand for the others."""
    means, group, outputs = problem.means, problem.group, Outputs.of(problem)
    columns = padded_length(problem.key.shape[2]) + 2 * LANES
    slots = 0 if means is None else padded_length(means.key.shape[2]) + 2 * LANES
    rows = _MOST_ROWS
    while rows > 1 and rows * group * columns * 4 > _TILE_BYTES:
        rows //= 2
    tile = -(-rows * group // TILE_ROWS) * TILE_ROWS
    floats = (
        tile * (columns + slots + sum(map(padded_length, problem.head_dims)) + 1) + 2 * columns + slots + 2 * _SPARE
    )
    for b, heads, arguments in parts_of(problem, outputs, panels=True):
        if means is not None:
            key, value = (mean[b : b + 1, heads] for mean in means)
            arguments |= {"means": in_panels(key), "mean_values": as_rows(value, LANES), "mean_count": key.shape[2]}
        items = -(-arguments["Lq"] // rows) * arguments["heads"]
        _attend_kernel(items, floats, rows=rows, sink_keys=sink_keys, recent_keys=recent_keys, columns=columns,
                       slots=slots, **arguments)  # fmt: skip
    return outputs.result(problem, dense_log_sums(problem))


@kernel(f"{FIELDS} means:4 mean_values:4 mean_count rows sink_keys recent_keys columns slots")
def _attend_kernel(pointer, item, scratch):
    """One tile: its scores, then row by row the softmax and its product with the values."""
    p = carray(pointer, 1)[0]
    head, first, last = tile_of(p, item)
    low, high, whole = _span_of(p, head, first, last)
    rows = last - first
    tile = (p.group * rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    step, means_step, out_step = 4 * p.columns, 4 * p.slots, 4 * p.width
    x = scratch
    z = x + 4 * tile * padded(p.D)
    means = z + tile * step
    out = means + tile * means_step
    inverses = out + tile * out_step
    scores = inverses + 4 * tile
    places = scores + step
    counts = places + step
    sample = counts + means_step
    fill(out, padded(tile * p.width), np.float32(0))
    read_queries(p, x, head, first, last, tile)
    base = low // LANES * LANES
    width = padded(high - base)
    score(x, p.D, p.key + head * p.key_h + base // LANES * p.D * 64, width // LANES, z, step, tile)
    slots = 0
    if p.means != 0 and not whole:
        slots = min(high // PAGE + 1, p.mean_count)
        score(x, p.D, p.means + head * p.means_h, padded(slots) // LANES, means, means_step, tile)
    # The slots of the pages that count for any row: what others hold may be of keys that no query sees.
    first_slot, last_slot = slots, 0
    values = p.value + head * p.value_h
    for r in range(p.group * rows):
        of_head, i, start, end = row_of(p, head, first, rows, r)
        at = of_head * p.Lq + i
        row, of_means, inverse = z + r * step, means + r * means_step, np.float32(0)
        if end <= start:
            fill(row, width, np.float32(0))
            fill(of_means, padded(slots), np.float32(0))
        elif whole:
            cap(row + 4 * (start - base), end - start, p.scale, p.softcap)
            fill_outside(row, width, start - base, end - base, -INF)
            inverse = softmax_row(p, row, width, 0, 0, 0, of_head, at)
        else:
            k = min(budget_of(p, 0, of_head, i), end - start)
            list_best(p, row + 4 * (start - base), start, end, k, scores, places, sample)
            seen = (start, end, i32(p.origin, i))
            inverse, slot, counted = weigh_list(p, scores, places, k, seen, of_head, at, of_means, slots, counts)
            fill_outside(of_means, slots, slot, slot + counted, np.float32(0))
            if counted > 0:
                first_slot, last_slot = min(first_slot, slot), max(last_slot, slot + counted)
            add_listed(out + r * out_step, p.width, scores, places, padded(k), values, p.value_n, 0)
        set_f32(inverses, r, inverse)
    if whole:
        add_product(z + 4 * (low - base), step, 4, values + low * p.value_n, p.value_n, out, out_step, high - low, tile,
                    p.width)  # fmt: skip
    elif first_slot < last_slot:
        mean_values = p.mean_values + head * p.mean_values_h + first_slot * p.mean_values_n
        add_product(means + 4 * first_slot, means_step, 4, mean_values, p.mean_values_n, out, out_step,
                    last_slot - first_slot, tile, p.width)  # fmt: skip
    for r in range(p.group * rows):
        of_head, i, start, end = row_of(p, head, first, rows, r)
        if end <= start:
            fill(out + r * out_step, p.width, np.float32(0))
        write_output(p, 0, of_head, i, out + r * out_step, f32(inverses, r), sample)


@compiled
def _span_of(p, head, first, last):
    """The keys [low, high) that any of the rows sees, twice 0 where none sees any; and whether all rows attend them so.

    They do where every row has a budget of all that it sees, and no key lies between the rows' intervals, seen by none.
    """
    low, high, whole = 1 << 62, 0, True
    for i in range(first, last):
        start, end = i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)
        whole = whole and not leave_gap(low, high, start, end)
        if end > start:
            low, high = min(low, start), max(high, end)
        for g in range(p.group):
            whole = whole and budget_of(p, 0, head * p.group + g, i) >= end - start
    return low if high > 0 else 0, high, whole

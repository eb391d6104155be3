"""Exact ``topk`` of many rows on a CPU: every score, the best of each row, and softmax times value over those alone.

An item of work is one key/value head and a few positions with all heads of the group. Their scores stay in a core's
cache. Each row lists its best keys, and the values at their places are added up; page means join as one more product
over the tile. Where all rows of a tile attend all that they see, their weights are multiplied as a whole.
"""

import numpy as np

from nc_patch.ops.cpu import rows as of_rows
from nc_patch.ops.cpu.launch import Kernel, compiled, memory_of
from nc_patch.ops.cpu.llvm import COLUMNS, LANES, TILE_ROWS
from nc_patch.ops.cpu.parts import Outputs, as_rows, in_pairs, in_panels, parts_of
from nc_patch.ops.cpu.recent import result_of
from nc_patch.ops.cpu.rows import INF, add_product, budget_of, cap, pad_row, padded, row_in, softmax_row
from nc_patch.ops.cpu.vectors import f32, fill, i32, product, set_f32, set_i32
from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.ops.problem import AttentionResult, Problem

PAGE = TAIL_PAGE_SIZE
# Bytes of scores that a tile may have.
_TILE_BYTES = 1 << 21
_MOST_ROWS = 8


def cpu_topk_attention(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention of each row over its best keys; ``problem.means``, where there are any, stand for the others."""
    means, group, outputs = problem.means, problem.group, Outputs.of(problem)
    columns = padded(problem.key.shape[2]) + 2 * LANES
    slots = 0 if means is None else padded(means.key.shape[2]) + 2 * LANES
    rows = _MOST_ROWS
    while rows > 1 and rows * group * columns * 4 > _TILE_BYTES:
        rows //= 2
    tile = -(-rows * group // TILE_ROWS) * TILE_ROWS
    for b, heads, arguments in parts_of(problem, outputs, panels=True):
        if means is not None:
            key, value = (mean[b : b + 1, heads] for mean in means)
            arguments |= {"mean_key": in_panels(in_pairs(key)), "mean_value": as_rows(value, LANES)}
            arguments["mean_count"] = key.shape[2]
        # Of a tile: queries, scores, those of page means, output, its factors; of a row: its best, their places, counts
        # of pages, and a sample.
        of_tile = (padded(arguments["D"]), columns, slots, arguments["width"], 1)
        arrays = [*(tile * size for size in of_tile), columns, columns, slots, of_rows.SAMPLED]
        _attend_kernel(-(-arguments["Lq"] // rows) * arguments["heads"], arrays, rows=rows, sink_keys=sink_keys,
                       recent_keys=recent_keys, columns=columns, slots=slots, **arguments)  # fmt: skip
    return result_of(problem, outputs)


@Kernel
def _attend_kernel(p, item, scratch):
    """One tile: its scores, then row by row the softmax and its product with the values."""
    head, first, last = of_rows.tile_of(p, item)
    rows = last - first
    tile = (p.group * rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    x_step, step, means_step, out_step = 4 * padded(p.D), 4 * p.columns, 4 * p.slots, 4 * p.width
    x, z, means, out, inverses, scores, places, counts, sample = memory_of(p, scratch)[:9]
    fill(x, tile * padded(p.D), np.float32(0))
    fill(out, tile * p.width, np.float32(0))
    low, high, whole = p.N, 0, True
    for r in range(p.group * rows):
        row = row_in(p, head, first, rows, r)
        of_rows.read_query(p, x + r * x_step, row)
        whole = whole and budget_of(p, row) >= row.end - row.start and not of_rows.leave_gap(low, high, row)
        if row.end > row.start:
            low, high = min(low, row.start), max(high, row.end)
    low = min(low, high)
    base = low // COLUMNS * COLUMNS
    width = high - base
    _score(p, (x, x_step), p.key + head * p.key_h + base // COLUMNS * p.key_n, width, (z, step), tile)
    slots = 0
    if p.mean_count != 0 and not whole:
        slots = min(high // PAGE + 1, p.mean_count)
        _score(p, (x, x_step), p.mean_key + head * p.mean_key_h, slots, (means, means_step), tile)
    # The slots of the pages that count for any row: what others hold may be of keys that no query sees.
    first_slot, last_slot = slots, 0
    values = p.value + head * p.value_h
    for r in range(p.group * rows):
        row = row_in(p, head, first, rows, r)
        raw, of_means, inverse = z + r * step, means + r * means_step, np.float32(0)
        sees = row.end > row.start  # else what is added up for it is zeroed below
        if sees and whole:
            seen_from, seen_to = row.start - base, row.end - base
            cap(raw + 4 * seen_from, seen_to - seen_from, p.scale, p.softcap)
            of_rows.fill_outside(raw, padded(width), seen_from, seen_to, -INF)
            inverse = softmax_row(p, row, raw, width, 0, 0, 0)
        elif sees:
            k = min(budget_of(p, row), row.end - row.start)
            list_best(p, row, raw + 4 * (row.start - base), k, scores, places, sample)
            inverse, slot, counted = weigh_list(p, row, scores, places, k, of_means, slots, counts)
            of_rows.fill_outside(of_means, slots, slot, slot + counted, np.float32(0))
            if counted > 0:
                first_slot, last_slot = min(first_slot, slot), max(last_slot, slot + counted)
            of_rows.add_listed(out + r * out_step, p.width, scores, places, padded(k), (values, p.value_n), 0)
        set_f32(inverses, r, inverse)
    if whole:
        weights, values = (z + 4 * (low - base), step), (values + low * p.value_n, p.value_n)
        add_product(weights, 4, values, (out, out_step), high - low, tile, p.width)
    elif first_slot < last_slot:
        values = p.mean_value + head * p.mean_value_h + first_slot * p.mean_value_n
        weights = (means + 4 * first_slot, means_step)
        add_product(weights, 4, (values, p.mean_value_n), (out, out_step), last_slot - first_slot, tile, p.width)
    for r in range(p.group * rows):
        row = row_in(p, head, first, rows, r)
        if row.end <= row.start:
            fill(out + r * out_step, p.width, np.float32(0))
        of_rows.write_output(p, row, out + r * out_step, f32(inverses, r))


@compiled
def _score(p, x, panels, count, z, rows):
    """Scores of rows of floats against the first ``count`` keys in panels, and against the rest of the last panel."""
    for panel in range(of_rows.tiles_in(count)):
        keys, target = (panels + panel * p.D * 4 * COLUMNS, 4 * COLUMNS), z[0] + panel * 4 * COLUMNS
        for row in range(0, rows, TILE_ROWS):
            x_row, out = (x[0] + row * x[1], x[1]), (target + row * z[1], z[1])
            product(x_row, 4, keys, out, p.D, TILE_ROWS, COLUMNS, 0, p.pairs)


@compiled
def list_forced(p, row, k, places):
    """Lists the first and last keys that a row attends whatever they score, all if it attends all; how many of each."""
    recents = min(k, p.recent_keys)
    sinks, recents = (k, 0) if k >= row.end - row.start else (min(k - recents, p.sink_keys), recents)
    for j in range(sinks + recents):
        set_i32(places, j, row.start + j if j < sinks else row.end - sinks - recents + j)
    return sinks, recents


@compiled
def list_best(p, row, raw, k, scores, places, sample):
    """Lists the scores and the positions of the ``k`` keys that a row attends, of raw scores of those that it sees."""
    sinks, recents = list_forced(p, row, k, places)
    forced = sinks + recents
    for j in range(forced):
        set_f32(scores, j, f32(raw, i32(places, j) - row.start))
    if k > forced:
        rivals, first = row.end - row.start - forced, row.start + sinks
        best, at = scores + 4 * forced, places + 4 * forced
        of_rows.best_of(raw + 4 * sinks, rivals, k - forced, first, best, at, sample)


@compiled
def weigh_list(p, row, scores, places, taken, means, slots, counts):
    """Makes weights of the scores of ``taken`` listed keys and of ``slots`` page means; fills up both lists.

    ``counts`` receives, as floats, how many keys of each page that counts for the row are not listed.

    Returns:
        (one over the sum of all weights, slot of the first page that counts, how many do).
    """
    slot = counted = 0
    of_rows.fill_up(p, scores, places, taken)
    if slots > 0 and taken < row.end - row.start:
        first = (row.start - row.origin + PAGE - 1) // PAGE
        slot, counted = row.origin // PAGE + first, max((row.end - 1 - row.origin) // PAGE - first, 0)
        fill(counts, padded(counted), np.float32(PAGE))
        for j in range(taken):
            place = i32(places, j) - row.origin - first * PAGE
            if 0 <= place < counted * PAGE:
                set_f32(counts, place // PAGE, f32(counts, place // PAGE) - np.float32(1))
        pad_row(counts, counted, np.float32(0))
        cap(means + 4 * slot, counted, p.scale, p.softcap)
        pad_row(means + 4 * slot, counted, -INF)
    return softmax_row(p, row, scores, taken, means + 4 * slot, counts, counted), slot, counted

"""Attention over the first and the most recent keys that each query sees, which may be all of them, on a CPU."""

import math

import numpy as np
import torch
from numba import carray

from nc_patch.ops.cpu import columns
from nc_patch.ops.cpu.columns import PIECE, add_run
from nc_patch.ops.cpu.launch import Kernel, memory_of
from nc_patch.ops.cpu.llvm import COLUMNS, LANES
from nc_patch.ops.cpu.parts import Outputs, arguments_of, parts_of
from nc_patch.ops.cpu.rows import (
    INF,
    LOG2E,
    budget_of,
    cap,
    leave_gap,
    pad_row,
    padded,
    read_query,
    row_in,
    row_of,
    score_listed,
    tile_of,
)
from nc_patch.ops.cpu.vectors import exponentials, largest, set_f32, set_i32
from nc_patch.ops.problem import AttentionResult, Problem

# Rows of an item of work: the keys that a core reads serve all of them.
_ROWS = 64
# So few queries of a group are scored one by one, where 32 at a time would mostly be empty columns.
_FEW = 12


def cpu_recent_attention(problem: Problem, first_keys: int) -> AttentionResult:
    """Attention over the first ``first_keys`` visible keys, of the budget all but one at most, and the most recent."""
    return _attend(problem, first_keys).result(problem, dense_log_sums(problem))


def dense_log_sums(problem: Problem) -> torch.Tensor | None:
    """The log-sum-exp of each row over all keys that it sees, float32 ``[B, Hq, Lq]``; None without ``stats``."""
    if not problem.stats:
        return None
    (B, Hq, Lq, D), (_, Hkv, N, _) = problem.query.shape, problem.key.shape
    if Lq * problem.group > _FEW:  # of values of no width nothing is added up
        return _attend(problem.over_all_keys()._replace(sinks=None, value=problem.value[..., :0]), 0).lse_kept
    runs = -(-N // PIECE)
    sums = torch.empty(runs, B, Hq, Lq, dtype=torch.float32, device="cpu")
    # The query, its scores, and places, of which more are read.
    arrays = [padded(D), PIECE, PIECE + 2 * LANES]
    _sum_kernel(B * Hkv * runs, arrays, rows=B * Hq * Lq, **arguments_of(problem, Outputs(problem.query, lse=sums)))
    return sums.logsumexp(0)


def _attend(problem: Problem, first_keys: int) -> Outputs:
    outputs = Outputs.of(problem)
    for _, _, arguments in parts_of(problem, outputs):
        items = -(-arguments["Lq"] // _ROWS) * arguments["heads"]
        arrays = [*columns.sizes(arguments["D"], arguments["width"]), 2 * (arguments["N"] // PIECE + 4)]
        _attend_kernel(items, arrays, sink_keys=first_keys, rows=_ROWS, **arguments)
    return outputs


@Kernel
def _attend_kernel(pointer, item, scratch):
    """The rows of a tile, up to 32 queries at a time, between whose intervals no key lies: none is read unseen."""
    p = carray(pointer, 1)[0]
    head, first, last = tile_of(p, item)
    rows = last - first
    pieces = memory_of(p, scratch)[8]
    begin = 0
    while begin < p.group * rows:
        at = columns.columns_at(p, scratch)
        low, left, right, high, count = p.N, 0, p.N, 0, 0
        while count < COLUMNS and begin + count < p.group * rows:
            row = row_in(p, head, first, rows, begin + count)
            if leave_gap(low, high, row):
                break
            seen = row.end - row.start
            budget = min(budget_of(p, row), seen)
            gap = row.start + min(max(budget - 1, 0), p.sink_keys)
            after = row.end - (budget - (gap - row.start))
            columns.set_column(p, at, count, row, gap, after)
            count += 1
            if seen > 0:
                low, left, right, high = min(low, row.start), max(left, gap), min(right, after), max(high, row.end)
        number = 0
        if low < high:
            number = add_run(pieces, add_run(pieces, 0, low, min(left, right)), min(left, right), left)
            number = add_run(pieces, number, max(left, right), high)
        columns.attend_pieces(p, head, at, pieces, number, 0, p.N, count)
        for column in range(count):
            row = row_in(p, head, first, rows, begin + column)
            columns.write_column(p, at, column, row, min(row.end - row.start, budget_of(p, row)))
        begin += count


@Kernel
def _sum_kernel(pointer, item, scratch):
    """A run of keys of one head: the log-sum-exp of each query of the group over those that it sees."""
    p = carray(pointer, 1)[0]
    runs = (p.N + PIECE - 1) // PIECE
    head, run = item // runs, item % runs
    batch, kv_head = head // p.heads, head % p.heads
    x, scores, places = memory_of(p, scratch)[:3]
    begin, keys = run * PIECE, p.key + batch * p.key_b + kv_head * p.key_h
    for j in range(PIECE + 2 * LANES):
        set_i32(places, j, begin + j)
    for r in range(p.group * p.Lq):
        row = row_of(p, batch, kv_head * p.group + r // p.Lq, r % p.Lq)
        first = max(begin, row.start)
        count = max(min(begin + PIECE, row.end) - first, 0)
        read_query(p, x, row)
        score_listed(p, x, keys, places + 4 * (first - begin), count, scores)
        cap(scores, count, p.scale, p.softcap)
        pad_row(scores, count, -INF)
        most = largest(scores, padded(count))
        shift = np.float32(0) if most == -INF else most
        total = exponentials(scores, padded(count), shift, np.float32(p.factor), 0, 0)
        set_f32(p.lse, run * p.rows + row.number, np.float32(shift * p.factor / LOG2E + math.log(total)))

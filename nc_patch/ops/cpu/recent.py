"""Attention over the first and the most recent keys that each query sees, which may be all of them, on a CPU."""

import torch
from numba import carray

from nc_patch.ops.cpu import columns
from nc_patch.ops.cpu.columns import COLUMNS, add_run
from nc_patch.ops.cpu.launch import kernel
from nc_patch.ops.cpu.parts import FIELDS, Outputs, parts_of
from nc_patch.ops.cpu.tiles import budget_of, leave_gap, row_of, tile_of
from nc_patch.ops.problem import AttentionResult, Problem

# Rows of an item of work: the keys that a core reads serve all of them.
_ROWS = 64


def cpu_recent_attention(problem: Problem, first_keys: int) -> AttentionResult:
    """Attention over the first ``first_keys`` visible keys, of the budget all but one at most, and the most recent."""
    return _attend(problem, first_keys).result(problem, dense_log_sums(problem))


def dense_log_sums(problem: Problem) -> torch.Tensor | None:
    """The log-sum-exp of each row over all keys that it sees, float32 ``[B, Hq, Lq]``; None without ``stats``."""
    return _attend(problem.over_all_keys()._replace(sinks=None), 0).lse_kept if problem.stats else None


def _attend(problem: Problem, first_keys: int) -> Outputs:
    outputs = Outputs.of(problem)
    for _, _, arguments in parts_of(problem, outputs):
        floats = columns.room_floats(arguments["D"], arguments["width"]) + 2 * (arguments["N"] // columns.PIECE + 4)
        items = -(-arguments["Lq"] // _ROWS) * arguments["heads"]
        _attend_kernel(items, floats, first_keys=first_keys, rows=_ROWS, **arguments)
    return outputs


@kernel(f"{FIELDS} first_keys rows")
def _attend_kernel(pointer, item, scratch):
    """The rows of a tile, up to 32 queries at a time, between whose intervals no key lies: none is read unseen."""
    p = carray(pointer, 1)[0]
    head, first, last = tile_of(p, item)
    rows = last - first
    pieces = scratch + 4 * columns.room_floats(p.D, p.width)
    begin = 0
    while begin < p.group * rows:
        low, left, right, high, count = p.N, 0, p.N, 0, 0
        while count < COLUMNS and begin + count < p.group * rows:
            of_head, i, start, end = row_of(p, head, first, rows, begin + count)
            if leave_gap(low, high, start, end):
                break
            budget = min(budget_of(p, 0, of_head, i), end - start)
            gap = start + min(max(budget - 1, 0), p.first_keys)
            after = end - (budget - (gap - start))
            columns.set_limits(scratch, p, count, start, end, gap, after)
            columns.read_column(p, scratch, count, of_head, i)
            count += 1
            if end > start:
                low, left, right, high = min(low, start), max(left, gap), min(right, after), max(high, end)
        number = 0
        if low < high:
            number = add_run(pieces, add_run(pieces, 0, low, min(left, right)), min(left, right), left)
            number = add_run(pieces, number, max(left, right), high)
        columns.pack_queries(p, scratch, count)
        columns.attend_pieces(p, head, scratch, pieces, number, 0, p.N, count)
        for column in range(count):
            of_head, i, start, end = row_of(p, head, first, rows, begin + column)
            columns.write_column(p, scratch, column, of_head, i, min(end - start, budget_of(p, 0, of_head, i)))
        begin += count

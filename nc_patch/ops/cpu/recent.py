"""Attention over the first and the most recent keys that each query sees, which may be all of them, on a CPU."""

import torch
from numba import carray

from nc_patch.ops.cpu.columns import (
    COLUMNS,
    add_run,
    attend_pieces,
    pack_queries,
    pieces_floats,
    read_query,
    room_floats,
    set_limits,
    write_column,
)
from nc_patch.ops.cpu.launch import kernel
from nc_patch.ops.cpu.parts import FIELDS, LogSums, arguments_of, parts_of
from nc_patch.ops.cpu.tiles import leave_gap, tile_of
from nc_patch.ops.cpu.vectors import i32
from nc_patch.ops.problem import AttentionResult, Problem

# Rows of an item of work: the keys that a core reads serve all of them.
_ROWS = 64


def cpu_recent_attention(problem: Problem, first_keys: int) -> AttentionResult:
    """Attention over the first ``first_keys`` visible keys, of the budget all but one at most, and the most recent."""
    sums = LogSums.of(problem)
    output = _attend(problem, first_keys, sums)
    return sums.result(problem, output, dense_log_sums(problem))


def _attend(problem: Problem, first_keys: int, sums: LogSums) -> torch.Tensor:
    query, value = problem.query, problem.value
    B, Hq, Lq, _ = query.shape
    output = query.new_empty(B, Lq, Hq, value.shape[3]).transpose(1, 2)
    for part in parts_of(problem.key, value):
        arguments = arguments_of(problem, output, part, sums)
        floats = room_floats(query.shape[3], arguments["width"]) + pieces_floats(problem.key.shape[2])
        items = -(-Lq // _ROWS) * arguments["heads"]
        _attend_kernel(items, floats, first_keys=first_keys, rows=_ROWS, **arguments)
    return output


def dense_log_sums(problem: Problem) -> torch.Tensor | None:
    """The log-sum-exp of each row over all keys that it sees, float32 ``[B, Hq, Lq]``; None without ``stats``."""
    if not problem.stats:
        return None
    every = problem.over_all_keys()._replace(sinks=None)
    sums = LogSums.of(every)
    _attend(every, 0, sums)
    return sums.kept


@kernel(f"{FIELDS} first_keys rows")
def _attend_kernel(pointer, item, scratch):
    """The rows of a tile, up to 32 queries at a time, between whose intervals no key lies: none is read unseen."""
    p = carray(pointer, 1)[0]
    head, first, last = tile_of(p, item)
    rows = last - first
    pieces = scratch + 4 * room_floats(p.D, p.width)
    begin = 0
    while begin < p.group * rows:
        low, left, right, high, count = p.Lk, 0, p.Lk, 0, 0
        while count < COLUMNS and begin + count < p.group * rows:
            column, r = count, begin + count
            of_head, i = head * p.group + r // rows, first + r % rows
            start, end = i32(p.visible, 2 * i), i32(p.visible, 2 * i + 1)
            if leave_gap(low, high, start, end):
                break
            count += 1
            budget = min(i32(p.budget + of_head * p.budget_h * 4, i), end - start)
            gap = start + min(max(budget - 1, 0), p.first_keys)
            after = end - (budget - (gap - start))
            set_limits(scratch, p, column, start, end, gap, after)
            read_query(p, scratch, column, of_head, i)
            if end > start:
                low, left, right, high = min(low, start), max(left, gap), min(right, after), max(high, end)
        number = 0
        if low < high:
            number = add_run(pieces, add_run(pieces, 0, low, min(left, right)), min(left, right), left)
            number = add_run(pieces, number, max(left, right), high)
        pack_queries(p, scratch, count)
        attend_pieces(p, head, scratch, pieces, number, count)
        for column in range(count):
            r = begin + column
            of_head, i = head * p.group + r // rows, first + r % rows
            seen = i32(p.visible, 2 * i + 1) - i32(p.visible, 2 * i)
            write_column(p, scratch, column, of_head, i, min(seen, i32(p.budget + of_head * p.budget_h * 4, i)))
        begin += count

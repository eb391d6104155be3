"""Attention over the first and the most recent keys that each query sees, which may be all of them, on a CPU."""

import math

import numpy as np
import torch

from nc_patch.ops.cpu import columns
from nc_patch.ops.cpu import rows as of_rows
from nc_patch.ops.cpu.columns import PIECE, add_run
from nc_patch.ops.cpu.launch import Kernel, memory_of
from nc_patch.ops.cpu.llvm import COLUMNS
from nc_patch.ops.cpu.parts import Outputs, arguments_of, parts_of
from nc_patch.ops.cpu.rows import INF, LARGEST, LOG2E, budget_of, padded, row_in
from nc_patch.ops.cpu.vectors import dot, exponentials, largest, set_f32
from nc_patch.ops.problem import AttentionResult, Problem

# Rows of an item of work: the keys that a core reads serve all of them.
_ROWS = 64
# So few queries of a group are scored one by one, where 32 at a time would mostly be empty columns.
_FEW = 12


def cpu_recent_attention(problem: Problem, first_keys: int) -> AttentionResult:
    """Attention over the first ``first_keys`` visible keys, of the budget all but one at most, and the most recent."""
    return result_of(problem, _attend(problem, first_keys))


def result_of(problem: Problem, outputs: Outputs) -> AttentionResult:
    """The result of what kernels have written; statistics take another look at every key."""
    if outputs.lse_kept is None:
        return AttentionResult(outputs.output, attended=outputs.attended)
    (B, Hkv, N, D), rows, norms = problem.key.shape, outputs.lse_kept.shape, None
    empty = (problem.visible[..., 1] <= problem.visible[..., 0])[:, None]
    if N > 0 and problem.group * rows[2] <= _FEW:
        runs = -(-N // PIECE)
        sums, squares = outputs.lse_kept.new_empty(runs, *rows), outputs.lse_kept.new_empty(B, Hkv, runs)
        arguments = arguments_of(problem, Outputs(problem.query, lse=sums)) | {"squares": squares}
        _look_kernel(squares.numel(), [padded(D), PIECE], rows=sums[0].numel(), **arguments)
        dense, norms = sums.logsumexp(0), squares.amax(-1).sqrt_()
    else:  # of values of no width nothing is added up
        every = problem.over_all_keys()._replace(sinks=None, value=problem.value[..., :0])
        dense = _attend(every, 0).lse_kept  # type: ignore[assignment]
    mass = torch.exp(outputs.lse_kept - dense).clamp_(max=1.0).masked_fill_(empty, 1.0)
    mass._nc_largest_norms = norms  # type: ignore[attr-defined]
    return AttentionResult(outputs.output, outputs.lse, mass, outputs.attended)


def _attend(problem: Problem, first_keys: int) -> Outputs:
    outputs = Outputs.of(problem)
    few = problem.group * problem.query.shape[2] <= COLUMNS
    for _, _, arguments in parts_of(problem, outputs, converts=few):
        items = -(-arguments["Lq"] // _ROWS) * arguments["heads"]
        arrays = [*columns.sizes(arguments), 2 * (arguments["N"] // PIECE + 4)]
        _attend_kernel(items, arrays, sink_keys=first_keys, rows=_ROWS, **arguments)
    return outputs


@Kernel
def _attend_kernel(p, item, scratch):
    """The rows of a tile, up to 32 queries at a time, between whose intervals no key lies: none is read unseen."""
    head, first, last = of_rows.tile_of(p, item)
    rows = last - first
    pieces = memory_of(p, scratch)[9]
    begin = 0
    while begin < p.group * rows:
        at = columns.columns_at(p, scratch)
        low, left, right, high, count = p.N, 0, p.N, 0, 0
        while count < COLUMNS and begin + count < p.group * rows:
            row = row_in(p, head, first, rows, begin + count)
            if of_rows.leave_gap(low, high, row):
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
def _look_kernel(p, item, scratch):
    """A run of keys of one head: their largest squared norm, and the log-sum-exp of each query of the group."""
    runs = (p.N + PIECE - 1) // PIECE
    head, run = item // runs, item % runs
    batch, kv_head = head // p.heads, head % p.heads
    x, scores = memory_of(p, scratch)[:2]
    keys, low, high, most = p.key + batch * p.key_b + kv_head * p.key_h, p.N, 0, np.float32(0)
    for r in range(p.group * p.Lq):
        row = of_rows.row_of(p, batch, kv_head * p.group + r // p.Lq, r % p.Lq)
        if row.end > row.start:
            low, high = min(low, row.start), max(high, row.end)
        first = max(run * PIECE, row.start)
        count = max(min((run + 1) * PIECE, row.end) - first, 0)
        of_rows.read_query(p, x, row)
        of_rows.score_rows(p, x, keys + first * p.key_n, p.key_n, count, scores)
        of_rows.cap(scores, count, p.scale, p.softcap)
        of_rows.pad_row(scores, count, -INF)
        shift = max(largest(scores, padded(count)), -LARGEST)
        total = exponentials(scores, padded(count), shift, np.float32(p.factor), 0, 0)
        set_f32(p.lse, run * p.rows + row.number, np.float32(shift * p.factor / LOG2E + math.log(total)))
    for j in range(max(low, run * PIECE), min(high, (run + 1) * PIECE)):
        key = keys + j * p.key_n
        if p.kind != 0:
            of_rows.read_row(x, key, p.D, p.kind)
            key = x
        square = dot(key, key, p.D, 0)
        if most == most and not square <= most:  # a NaN stays
            most = square
    set_f32(p.squares, item, most)

"""Block-sparse prefill on a CPU: a query block and a key/value head choose their key blocks and attend them at once.

The sampled queries are scored against all visible keys, 32 of them at a time; each key block leaves its highest scores.
Chosen blocks that lie side by side are attended as one run of keys, by 32 queries at a time.
"""

import numpy as np

from nc_patch.ops.cpu import columns, vectors
from nc_patch.ops.cpu.columns import PIECE, add_run
from nc_patch.ops.cpu.launch import Kernel, compiled, memory_of
from nc_patch.ops.cpu.llvm import COLUMNS, LANES
from nc_patch.ops.cpu.parts import Outputs, parts_of
from nc_patch.ops.cpu.recent import result_of
from nc_patch.ops.cpu.rows import INF, SAMPLED, best_of, leave_gap, padded, row_in, row_of, tiles_in
from nc_patch.ops.cpu.vectors import f32, fill, i32, set_f32, set_i32
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.block.audit import judged
from nc_patch.selections.block.blocks import PLAN_COLUMNS, BlockChoice, BlockOptions, PlannedBlock, plan_of


def cpu_block_attention(problem: Problem, options: BlockOptions) -> AttentionResult:
    """Attention over key blocks that a query block shares, as ``definition`` says; without ``min_mass``."""
    plan, outputs = plan_of(problem, options), Outputs.of(problem, attended=True)
    if bool((plan.owner < 0).any()):
        outputs.output.zero_()
    counts = [sum(block.batch == b for block in plan.listed) for b in range(len(problem.query))]
    widest = padded(max((block.width for block in plan.listed), default=0)) + 2 * LANES
    # For an audit the chosen blocks, what sampled queries keep on average, and the shares that this follows from.
    audits = problem.audit_seed >= 0
    choice = plan.law.new_full((*plan.law.shape, plan.capacity if audits else 0), -1)
    kept = (plan.table[:, -1, None, None] == 0).float().repeat(1, problem.key.shape[1], problem.group)
    tiles = tiles_in(problem.group * max((block.samples for block in plan.listed), default=0)) if audits else 1
    # The chosen runs of keys; of key blocks shares, weights, and those chosen; a sample.
    runs = 2 * (plan.capacity + problem.key.shape[2] // PIECE + 8)
    of_block = [runs, tiles * COLUMNS * widest, widest, widest, widest, SAMPLED]
    for b, heads, arguments in parts_of(problem, outputs):
        first = sum(counts[:b])
        _attend_kernel(
            counts[b] * arguments["heads"], [*columns.sizes(arguments), *of_block],
            plan=plan.table[first:], blocks=counts[b], size=options.size, samples=plan.samples,
            law=plan.law[first:, heads].contiguous(), recent=plan.recent[first:, heads].contiguous(),
            choice=choice[first:, heads], kept=kept[first:, heads], tile=4 * COLUMNS * widest * audits, **arguments,
        )  # fmt: skip
    result = result_of(problem, outputs)
    return judged(result, problem, plan, options, BlockChoice(choice, plan.law), kept.flatten(1) if audits else None)


@Kernel
def _attend_kernel(p, item, scratch):
    """One query block of one head; the last ones, which see most keys, come first."""
    head, number = item % p.heads, p.blocks - 1 - item // p.heads
    at = p.plan + 4 * PLAN_COLUMNS * number
    block = PlannedBlock(i32(at, 0), i32(at, 1), i32(at, 2), i32(at, 3), i32(at, 4), i32(at, 5), i32(at, 6), i32(at, 7),
                         i32(at, 8), i32(at, 9))  # fmt: skip
    rows, width, start = block.last - block.first, block.width, block.begin + block.lowest * p.size
    law, recent = i32(p.law, number * p.heads + head), i32(p.recent, number * p.heads + head)
    pieces, shares, weights, values, chosen, sample = memory_of(p, scratch)[9:]
    if law < width or p.tile > 0:
        _weigh(p, head, scratch, block, shares, weights)
    # The first block and the heaviest of those before the recent ones; the recent ones, or all.
    taken, number_of = 0, 0
    if law < width:
        taken = law - (width - recent)
        set_i32(chosen, 0, 0)
        if taken > 1:
            best_of(weights + 4, recent - 1, taken - 1, 1, values, chosen + 4, sample)
    for j in range(taken, law):
        set_i32(chosen, j, width - law + j)
    for j in range(law):
        at = start + i32(chosen, j) * p.size
        number_of = add_run(pieces, number_of, max(at, 0), min(at + p.size, p.N))
    if p.tile > 0:
        choice, mass = p.choice + number * p.choice_b + head * p.choice_h, p.kept + number * p.kept_b + head * p.kept_h
        for j in range(law):
            set_i32(choice, j, block.lowest + i32(chosen, j))
        for r in range(p.group * block.samples):
            of_row, g, kept = shares + r // COLUMNS * p.tile + r % COLUMNS * 4, r // block.samples, np.float32(0)
            for j in range(law):
                kept += f32(of_row, COLUMNS * i32(chosen, j))
            kept *= f32(of_row, COLUMNS * width)
            if kept > 0:  # and so a number
                set_f32(mass, g, f32(mass, g) + min(kept, np.float32(1)) / np.float32(block.samples))
    begin = 0
    while begin < p.group * rows:
        at = columns.columns_at(p, scratch)
        count, low, high = 0, p.N, 0
        while count < COLUMNS and begin + count < p.group * rows:
            row = row_in(p, head, block.first, rows, begin + count)
            if leave_gap(low, high, row):  # of keys that are not to be read
                break
            columns.set_column(p, at, count, row, 0, 0)
            low, high = min(low, row.start), max(high, row.end)
            count += 1
        columns.attend_pieces(p, head, at, pieces, number_of, low, high, count)
        for column in range(count):
            row, keys = row_in(p, head, block.first, rows, begin + column), 0
            for piece in range(number_of):
                keys += max(min(i32(pieces, 2 * piece + 1), row.end) - max(i32(pieces, 2 * piece), row.start), 0)
            columns.write_column(p, at, column, row, keys)
            set_i32(p.attended, row.number, keys)
        begin += count


@compiled
def _weigh(p, head, scratch, block, shares, weights):
    """Writes the weight of every key block: its largest share of any sampled query of the group.

    Leaves the shares of 32 queries a tile, ``[width, 32]`` without a factor, which follows them; see ``tile``.
    """
    width, samples, start = block.width, block.samples, block.begin + block.lowest * p.size
    fill(weights, padded(width), np.float32(0))
    at_once = PIECE // p.size
    for r in range(0, p.group * samples, COLUMNS):
        at, count = columns.columns_at(p, scratch), min(COLUMNS, p.group * samples - r)
        logits = shares + r // COLUMNS * p.tile
        factors = logits + 4 * COLUMNS * width
        for column in range(count):
            i = i32(p.samples, block.first_sample + (r + column) % samples)
            columns.set_column(p, at, column, row_of(p, 0, head * p.group + (r + column) // samples, i), 0, 0)
        clear = columns.clear_run(at, count)
        fill(logits, COLUMNS * width, -INF)
        for j in range(0, width, at_once):
            first = start + j * p.size
            last = min(first + at_once * p.size, start + width * p.size)
            from_key, to_key = max(first, 0), min(last, p.N)
            columns.score_keys(p, head, at, at.scores, from_key, to_key, clear)
            for k in range(j, min(j + at_once, width)):
                key = max(start + k * p.size, 0)
                keys = min(start + (k + 1) * p.size, p.N) - key
                vectors.column_maxima(at.scores + (key - from_key) * 4 * COLUMNS, keys, logits + 4 * COLUMNS * k)
        vectors.column_maxima(logits, width, at.maxima)
        vectors.column_exponentials(logits, width, at.maxima, np.float32(p.factor), at.sums)
        for column in range(COLUMNS):
            set_f32(factors, column, np.float32(1.0 / f32(at.sums, column)) if column < count else np.float32(0))
        for k in range(width):
            set_f32(weights, k, vectors.largest_product(logits + 4 * COLUMNS * k, factors, f32(weights, k)))

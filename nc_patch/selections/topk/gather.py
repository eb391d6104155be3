"""Softmax times value over the keys that a block of rows attends and the pages of a tail, and what bounds the rest.

A value is read once for all rows of the block that attend its key. The entries and the pages of a block are divided
among programs, and the last of them joins what all leave. Logits are in base 2.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import attended_keys, head_of, program_rows, select_keys, span
from nc_patch.ops.triton.scores import accumulate, accumulate_run, empty_softmax, load_queries, logits_base2, score_run
from nc_patch.ops.triton.split import finish_part, write_joined
from nc_patch.ops.triton.structs import PER_CALL, Limits
from nc_patch.ops.triton.tail import PAGE, pages_of_rows
from nc_patch.selections.topk.scan import add_masses, entries_at, entries_of, no_masses, store_masses


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "segment", "parts", "slots"])
def gather_kernel(
    query, value, means, inputs, scratch, sinks, output, lse, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys,
    recent_keys, splits, segment, parts, slots, settings, shape, join_shape, BOUNDS: tl.constexpr,
):  # fmt: skip
    """One part of the attention of a block of rows: of a split of its entries or, after those, of the pages.

    The last part writes the results. ``join_shape`` is ``shape`` with no more rows than a block has.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    softmax = empty_softmax(shape)
    if part < splits:
        limits = Limits(scratch.floats + scratch.threshold, scratch.integers + scratch.ties_end)
        selected = select_keys(rows, limits, sink_keys, recent_keys)
        values = head_of(value, rows.batch, rows.kv_head)
        softmax = gather_entries(softmax, values, rows, selected, scratch, splits, segment, settings, shape, BOUNDS)
    elif means is not None:
        begin = tl.load(inputs.origin + rows.batch * Lq + rows.index, mask=rows.valid, other=0)
        counts = scratch.integers + scratch.page_counts + rows.row * slots
        queries = load_queries(query, rows, shape)
        softmax = gather_pages(
            softmax, queries, means, rows, begin, counts, part - splits, parts - splits, settings, shape
        )  # fmt: skip
    joining = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, join_shape.BLOCK_M)
    last, softmax = finish_part(scratch, block, rows, softmax, part, parts, shape, joining, join_shape)
    if last:
        write_joined(softmax, joining, sinks, joining.wanted, output, lse, None, join_shape)


@triton.jit
def gather_entries(softmax, values, rows, selected, scratch, splits, segment, settings, shape, BOUNDS: tl.constexpr):
    """The ``Softmax`` of one split's entries; with ``BOUNDS`` their ``Masses`` are stored."""
    positions, count, first = entries_of(scratch, splits, segment)
    stop = first + tl.load(count)
    kept = no_masses(shape.BLOCK_M)
    others = kept
    for begin in range(first, stop, shape.BLOCK_N):
        at, position, here = entries_at(rows, positions, begin, stop, splits * segment, shape)
        inside = rows.valid[:, None] & here[None, :]
        score = tl.load(scratch.floats + scratch.scores + at, mask=inside, other=0.0)
        chosen = inside & attended_keys(score, position, selected)
        read = tl.max(chosen.to(tl.int32), axis=0) > 0
        logits = tl.where(chosen, logits_base2(score, settings), float("-inf"))
        softmax = accumulate(softmax, logits, values.data, position.to(tl.int64) * values.stride, read, shape)
        if BOUNDS:
            error = tl.load(scratch.floats + scratch.errors + at, mask=inside, other=0.0)
            seen = (position[None, :] >= rows.start[:, None]) & (position[None, :] < rows.end[:, None])
            kept = add_masses(kept, score, error, chosen, settings)
            others = add_masses(others, score, error, inside & seen & ~chosen, settings)
    if BOUNDS:
        store_masses(scratch, rows, splits, 1, kept)
        store_masses(scratch, rows, splits, 2, others)
    return softmax


@triton.jit
def gather_pages(softmax, queries, means, rows, origin, counts, split, splits, settings, shape):
    """The ``Softmax`` of one of ``splits`` shares of the pages, ``BLOCK_N`` at a time.

    A page counts as often as a row does not attend a key of it; ``counts`` points to how many it attends. A row's
    origin says where the pages in the slots begin for it, so that rows of several sequences go together.
    """
    residue, own = pages_of_rows(origin, rows.end)
    low, high = span(tl.cdiv(rows.start - residue, PAGE), (own - residue) // PAGE, own > rows.start)
    mean_keys = head_of(means.key, rows.batch, rows.kv_head)
    mean_values = head_of(means.value, rows.batch, rows.kv_head)
    tiles = tl.cdiv(high - low, shape.BLOCK_N)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=2):
        slot = low + tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        page_begin = slot[None, :] * PAGE + residue[:, None]
        within = (page_begin >= rows.start[:, None]) & (page_begin < own[:, None])
        missing = -tl.load(counts[:, None] + slot[None, :], mask=within, other=PAGE) + PAGE
        raw = score_run(queries, mean_keys, low + tile * shape.BLOCK_N, slot < high, shape, True)
        logits = logits_base2(raw, settings) + tl.log2(tl.maximum(missing, 1).to(tl.float32))
        logits = tl.where(missing > 0, logits, float("-inf"))
        # Pages that no row sees, between sequences, may hold anything.
        read = tl.max(missing, axis=0) > 0
        softmax = accumulate_run(softmax, logits, mean_values, low + tile * shape.BLOCK_N, read, shape)
    return softmax

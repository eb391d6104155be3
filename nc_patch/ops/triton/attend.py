"""The kernel that accumulates softmax times value over the keys each row attends."""

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import attended_keys, forced_keys, head_of, program_rows, select_keys, span
from nc_patch.ops.triton.scores import (
    LN_2,
    accumulate_run,
    empty_softmax,
    fold,
    join_sink,
    load_queries,
    logits_base2,
    score_run,
    write_rows,
)
from nc_patch.ops.triton.structs import PER_CALL, Selected
from nc_patch.ops.triton.tail import add_tail


@triton.jit(do_not_specialize=PER_CALL)
def attend_kernel(
    query, key, value, inputs, limits, tail, sinks, output, lse, kept_mass, budget_heads, num_kv_heads, group, Lq, Lk,
    sink_keys, recent_keys, settings, shape,
):  # fmt: skip
    """Output, and on request log-sum-exp and kept mass, of one block of rows.

    A row attends the first and the last keys that the selection forces and those that its ``limits`` (``Limits``)
    admit; without limits only tiles that may hold forced keys are read. With a ``tail`` (``Tail``) what it does not
    attend enters by the means of its pages.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    if limits is None:
        firsts, recents = forced_keys(rows.wanted, sink_keys, recent_keys, False)
        selected = Selected(rows.start, rows.end, rows.start + firsts, rows.end - recents, None, None)
    else:
        selected = select_keys(rows, limits, sink_keys, recent_keys)
    keys = head_of(key, rows.batch, rows.kv_head)
    values = head_of(value, rows.batch, rows.kv_head)
    queries = load_queries(query, rows, shape)
    kept = attend(queries, keys, values, selected, settings, shape)
    softmax = kept
    if tail is not None:
        origin = tl.load(inputs.origin + rows.batch * Lq + rows.index, mask=rows.valid, other=0)
        softmax = add_tail(
            kept, queries, keys, head_of(tail.key, rows.batch, rows.kv_head),
            head_of(tail.value, rows.batch, rows.kv_head), selected, origin, settings, shape, tail.shape,
        )  # fmt: skip
    base, share, denominator = join_sink(softmax.peak, softmax.total, sinks, rows.head, rows.valid)
    write_rows(output, rows, softmax.acc * (share / denominator)[:, None], rows.wanted, shape)
    if lse is not None:
        seen_peak, seen_total = sum_seen(load_queries(query, rows, shape), keys, selected, settings, shape)
        mass = kept.total * tl.exp2(kept.peak - seen_peak) / seen_total
        tl.store(lse + rows.row, (base + tl.log2(denominator)) * LN_2, mask=rows.valid)
        tl.store(kept_mass + rows.row, tl.where(rows.end > rows.start, mass, 1.0), mask=rows.valid)


@triton.jit
def attend(queries, keys, values, selected, settings, shape):
    """The ``Softmax`` of the keys that the rows attend.

    Goes from one run of keys that some row sees to the next, so that nothing between them is read: a zero weight times
    a value that is NaN would be NaN.
    """
    softmax = empty_softmax(shape)
    sees = selected.end > selected.start
    low, last = span(selected.start, selected.end, sees)
    while low < last:
        high = end_of_run(low, selected.start, selected.end)
        # The last tile may reach into what rows of a later run see.
        ends = tl.where(selected.start < high, selected.end, low)
        here = Selected(
            selected.start, ends, selected.sinks_end, selected.recents_start, selected.threshold, selected.ties_end
        )
        early_tiles = tl.cdiv(high - low, shape.BLOCK_N)
        late_low = high
        if selected.threshold is None:
            # Of the tiles only those that may hold forced keys: the first ones, and those from the first recent key on.
            among = sees & (selected.start >= low) & (selected.start < high)
            firsts_end = tl.where(among & (selected.sinks_end > selected.start), selected.sinks_end, low)
            early_tiles = tl.cdiv(tl.max(firsts_end, axis=0) - low, shape.BLOCK_N)
            recents = among & (selected.recents_start < selected.end)
            late_low = tl.min(tl.where(recents, selected.recents_start, high), axis=0)
            # The late run begins where the early one ends, if not later, so that no key counts twice.
            late_low = tl.maximum(late_low, low + early_tiles * shape.BLOCK_N)
        late_tiles = tl.cdiv(tl.maximum(high - late_low, 0), shape.BLOCK_N)
        for tile in range(early_tiles + late_tiles):
            begin = low + tile * shape.BLOCK_N
            if selected.threshold is None:
                begin = tl.where(tile < early_tiles, begin, late_low + (tile - early_tiles) * shape.BLOCK_N)
            columns = begin + tl.arange(0, shape.BLOCK_N)
            raw = score_run(queries, keys, begin, columns < high, shape, True)
            logits = logits_base2(raw, settings)
            logits = tl.where(attended_keys(raw, columns, here), logits, float("-inf"))
            softmax = accumulate_run(softmax, logits, values, begin, columns < high, shape)
        low = tl.min(tl.where(sees & (selected.start >= high), selected.start, last), axis=0)
    return softmax


@triton.jit
def end_of_run(low, start, end):
    """Where the keys that some row sees without a gap from ``low`` on end."""
    high = low
    reach = tl.max(tl.where(start == low, end, low), axis=0)
    while reach > high:
        high = reach
        reach = tl.max(tl.where((start >= low) & (start <= high), end, low), axis=0)
    return high


@triton.jit
def sum_seen(queries, keys, selected, settings, shape):
    """(peak, total) of the softmax over all visible keys, logits in base 2."""
    peak = tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
    low, high = span(selected.start, selected.end, selected.end > selected.start)
    for begin in range(low, high, shape.BLOCK_N):
        columns = begin + tl.arange(0, shape.BLOCK_N)
        raw = score_run(queries, keys, begin, columns < high, shape, True)
        seen = (columns[None, :] >= selected.start[:, None]) & (columns[None, :] < selected.end[:, None])
        logits = tl.where(seen, logits_base2(raw, settings), float("-inf"))
        peak, total, _weights, _shrink = fold(logits, peak, total)
    return peak, total

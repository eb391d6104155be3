"""Softmax times value over the keys that a block of rows attends, over the pages of a tail, and bounds of the rest.

The lists are those of ``candidates``. A value is read once for all rows of the block that attend its key. The keys and
the pages of a block are divided among programs, and ``split`` joins what they leave. Logits are in base 2.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import attended_keys, head_of, program_rows, select_keys, span
from nc_patch.ops.triton.scores import (
    accumulate,
    accumulate_run,
    empty_softmax,
    finite_or_zero,
    load_queries,
    logits_base2,
    score_run,
)
from nc_patch.ops.triton.structs import PER_CALL
from nc_patch.ops.triton.tail import PAGE, pages_of_rows
from nc_patch.selections.topk.candidates import flagged_rows
from nc_patch.selections.topk.scan import Mass, add_logits, empty_mass, logit_bounds, one_row, store_mass

# Relative width given to bounds of sums of exponentials, for their rounding in float32, and what underflow may lose.
_SUM_SLACK = tl.constexpr(1e-4)
_SMALLEST_MASS = tl.constexpr(1e-30)


@triton.jit(do_not_specialize=[*PER_CALL, "capacity", "chunks", "parts", "slots"])
def gather_kernel(
    value, inputs, candidates, choice, partial, page_counts, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys,
    recent_keys, capacity, chunks, parts, slots, settings, shape, FLAGGED: tl.constexpr,
):  # fmt: skip
    """The partial softmax of one of ``chunks`` parts of a block's list: what ``combine_splits`` joins, among ``parts``.

    Where ``inputs`` have an origin, every key attended is added to the count of its page, ``page_counts[row, slot]``.
    With ``FLAGGED`` only of flagged rows, whose list is all keys: an entry is its own position.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    # A row without a proof has an empty list.
    if FLAGGED:
        rows = flagged_rows(rows, choice.flags)
    chunk = tl.program_id(1)
    selected = select_keys(rows, choice, sink_keys, recent_keys)
    values = head_of(value, rows.batch, rows.kv_head)
    positions = candidates.positions + tl.program_id(0).to(tl.int64) * capacity
    count = tl.load(choice.listed + rows.row, mask=rows.valid, other=0)
    if inputs.origin is not None:
        residue = tl.load(inputs.origin + rows.batch * Lq + rows.index, mask=rows.valid, other=0) & (PAGE - 1)
    most = tl.max(count, axis=0)
    tiles = tl.cdiv(most, shape.BLOCK_N)
    dv = tl.arange(0, shape.BLOCK_DV)
    softmax = empty_softmax(shape)
    # Of the keys attended and of the rest of the list: at least, and at most.
    in_least = empty_mass(shape.BLOCK_M)
    in_most = in_least
    out_least = in_least
    out_most = in_least
    for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
        e = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        position = e
        if not FLAGGED:
            position = tl.load(positions + e, mask=e < most, other=0)
        here = e[None, :] < count[:, None]
        if FLAGGED:  # keys before the interval have no scores
            here = here & (position[None, :] >= rows.start[:, None])
        at = rows.row[:, None] * capacity + e[None, :]
        score = tl.load(candidates.scores + at, mask=here, other=0.0)
        chosen = here & attended_keys(score, position, selected)
        read = tl.max(chosen.to(tl.int32), axis=0) > 0
        places = values.data + position.to(tl.int64)[:, None] * values.stride + dv[None, :]
        tile_values = tl.load(places, mask=read[:, None] & (dv < shape.DV)[None, :], other=0.0)
        softmax = accumulate(softmax, tl.where(chosen, logits_base2(score, settings), float("-inf")), tile_values)
        if inputs.origin is not None:
            in_page = chosen & (position[None, :] >= residue[:, None])
            slot = (position[None, :] - residue[:, None]) // PAGE
            tl.atomic_add(page_counts + rows.row[:, None] * slots + slot, 1, mask=in_page, sem="relaxed")
        if candidates.errors is not None:
            lower, upper = logit_bounds(score, tl.load(candidates.errors + at, mask=here, other=0.0), settings)
            seen = (position[None, :] >= rows.start[:, None]) & (position[None, :] < rows.end[:, None])
            rest = here & seen & ~chosen
            in_least = add_logits(in_least, lower, chosen)
            in_most = add_logits(in_most, upper, chosen)
            out_least = add_logits(out_least, lower, rest)
            out_most = add_logits(out_most, upper, rest)
    store_part(partial, rows, softmax, chunk, parts, shape)
    if candidates.errors is not None:
        kept = partial.kept + (rows.row * chunks + chunk) * 8
        store_mass(kept, in_least, rows.valid)
        store_mass(kept + 2, in_most, rows.valid)
        store_mass(kept + 4, out_least, rows.valid)
        store_mass(kept + 6, out_most, rows.valid)


@triton.jit
def store_part(partial, rows, softmax, part, parts, shape):
    """Stores a ``Softmax`` as one of ``parts`` parts of each row; see ``split``."""
    at = rows.row * parts + part
    dv = tl.arange(0, shape.BLOCK_DV)
    inside = rows.valid[:, None] & (dv[None, :] < shape.DV)
    tl.store(partial.acc + at[:, None] * shape.DV + dv[None, :], softmax.acc, mask=inside)
    tl.store(partial.peak + at, softmax.peak, mask=rows.valid)
    tl.store(partial.total + at, softmax.total, mask=rows.valid)


@triton.jit(do_not_specialize=[*PER_CALL, "slots", "parts", "first_part"])
def tail_kernel(
    query, mean_key, mean_value, inputs, page_counts, partial, budget_heads, num_kv_heads, group, Lq, Lk, slots, parts,
    first_part, settings, shape,
):  # fmt: skip
    """The partial softmax of one of the splits of the pages, for a block of rows; tiles have ``BLOCK_N`` pages.

    ``page_counts[row, slot]`` is how many keys the row attends of the page in each slot. A row's origin says where the
    pages in the slots begin for it, so that rows of several sequences go together. Every page's mean key and mean value
    are read once for the block.
    """
    split = tl.program_id(1)
    splits = parts - first_part
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    mean_keys = head_of(mean_key, rows.batch, rows.kv_head)
    mean_values = head_of(mean_value, rows.batch, rows.kv_head)
    begin = tl.load(inputs.origin + rows.batch * Lq + rows.index, mask=rows.valid, other=0)
    residue, own = pages_of_rows(begin, rows.end)
    has_pages = own > rows.start
    low, high = span(tl.cdiv(rows.start - residue, PAGE), (own - residue) // PAGE, has_pages)
    queries = load_queries(query, rows, shape)
    softmax = empty_softmax(shape)
    tiles = tl.cdiv(high - low, shape.BLOCK_N)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        slot = low + tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        here = slot < high
        page_begin = slot[None, :] * PAGE + residue[:, None]
        within = (page_begin >= rows.start[:, None]) & (page_begin < own[:, None]) & has_pages[:, None] & here[None, :]
        counts = page_counts + rows.row[:, None] * slots + slot[None, :]
        missing = -tl.load(counts, mask=within, other=PAGE) + PAGE
        within = within & (missing > 0)
        raw = score_run(queries, mean_keys, low + tile * shape.BLOCK_N, here, shape, True)
        logits = logits_base2(raw, settings) + tl.log2(tl.maximum(missing, 1).to(tl.float32))
        # Pages that no row sees, between sequences, may hold anything.
        read = tl.max(within.to(tl.int32), axis=0) > 0
        logits = tl.where(within, logits, float("-inf"))
        softmax = accumulate_run(softmax, logits, mean_values, low + tile * shape.BLOCK_N, read, shape)
    store_part(partial, rows, softmax, first_part + split, parts, shape)


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "chunks"])
def bounds_kernel(
    inputs, choice, outside, partial, bounds, budget_heads, num_kv_heads, group, Lq, Lk, splits, chunks,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Kept mass of a row from below and above, ``bounds[row, 2]``. All keys of a flagged row are in its list."""
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    kept = partial.kept + row.row * chunks * 8
    unlisted = tl.where(tl.load(choice.flags + row.row) != 0, 0, splits)
    more = outside + row.row * splits * 4
    out_least = add_masses(join_masses(kept + 4, 8, chunks, BLOCK_C), join_masses(more, 4, unlisted, BLOCK_S))
    out_most = add_masses(join_masses(kept + 6, 8, chunks, BLOCK_C), join_masses(more + 2, 4, unlisted, BLOCK_S))
    lower = share_of(join_masses(kept, 8, chunks, BLOCK_C), out_most)
    upper = share_of(join_masses(kept + 2, 8, chunks, BLOCK_C), out_least)
    lower = lower * (1.0 - _SUM_SLACK) - _SMALLEST_MASS
    upper = upper * (1.0 + _SUM_SLACK) + _SMALLEST_MASS
    lower = tl.where(lower == lower, tl.minimum(tl.maximum(lower, 0.0), 1.0), 0.0)
    upper = tl.where(upper == upper, tl.minimum(tl.maximum(upper, 0.0), 1.0), 1.0)
    tl.store(bounds + row.row * 2, tl.where(row.end > row.start, lower, 1.0))
    tl.store(bounds + row.row * 2 + 1, tl.where(row.end > row.start, upper, 1.0))


@triton.jit
def join_masses(parts, stride, count, BLOCK: tl.constexpr):
    """The ``Mass`` of ``count`` of them that are stored ``stride`` apart."""
    at = tl.arange(0, BLOCK)
    peaks = tl.load(parts + at * stride, mask=at < count, other=float("-inf"))
    totals = tl.load(parts + at * stride + 1, mask=at < count, other=0.0)
    peak = tl.max(peaks, axis=0)
    return Mass(peak, tl.sum(relative(peaks, totals, finite_or_zero(peak)), axis=0))


@triton.jit
def add_masses(mass, other):
    """Two of ``Mass`` together."""
    peak = tl.maximum(mass.peak, other.peak)
    base = finite_or_zero(peak)
    return Mass(peak, relative(mass.peak, mass.total, base) + relative(other.peak, other.total, base))


@triton.jit
def share_of(mass, rest):
    """The share of one ``Mass`` in both together."""
    base = finite_or_zero(tl.maximum(mass.peak, rest.peak))
    own = relative(mass.peak, mass.total, base)
    return own / (own + relative(rest.peak, rest.total, base))


@triton.jit
def relative(peak, total, base):
    """A sum relative to ``2 ** base`` that is relative to its peak's."""
    return tl.where(total != 0.0, total * tl.exp2(finite_or_zero(peak) - base), 0.0)

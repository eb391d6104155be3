"""The kernels of block-sparse prefill: they score key blocks, choose some for each query block, and attend these.

Key blocks are counted from the beginning of each sequence. Logits are in base 2.
"""

from collections import namedtuple

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import FAR, head_of, visible_keys
from nc_patch.ops.triton.scores import (
    LN_2,
    LOG2_E,
    dot,
    dot_scores,
    factored_logits,
    finite_or_zero,
    fold,
    join_sink,
    load_queries,
    logits_base2,
    score_run,
    write_rows,
)
from nc_patch.ops.triton.structs import PER_CALL, Rows
from nc_patch.selections.block.blocks import PLAN_COLUMNS, PlannedBlock
from nc_patch.selections.block.heaviest import Weights, count_to_mass, find_cut, take

_COLUMNS = tl.constexpr(PLAN_COLUMNS)
# Entries of the list of blocks that are looked at in one step.
_LIST = tl.constexpr(128)


# The tensors of a ``blocks.BlockPlan`` that the kernels read.
Plan = namedtuple("Plan", "table samples sample_owner recent law limit")

# Where scores of key blocks are: pointers to those of block 0 of each row, which has ``blocks`` of them.
BlockScores = namedtuple("BlockScores", "data stride blocks")


@triton.jit
def load_query_block(table, number, mask):
    """The ``PlannedBlock`` of each number, from the plan's table; zeros where the mask has none."""
    row = table + number.to(tl.int64) * _COLUMNS
    return PlannedBlock(
        tl.load(row, mask=mask, other=0).to(tl.int64),
        tl.load(row + 1, mask=mask, other=0),
        tl.load(row + 2, mask=mask, other=0),
        tl.load(row + 3, mask=mask, other=0),
        tl.load(row + 4, mask=mask, other=0),
        tl.load(row + 5, mask=mask, other=0),
        tl.load(row + 6, mask=mask, other=0),
        tl.load(row + 7, mask=mask, other=0),
        tl.load(row + 8, mask=mask, other=0),
        tl.load(row + 9, mask=mask, other=0),
    )


@triton.jit(do_not_specialize=[*PER_CALL, "first_sample", "row_count", "width"])
def score_blocks_kernel(
    query, key, visible, plan, scores, row_lse, group, Lq, Lk, first_sample, row_count, width, settings, shape,
    BLOCK_SIZE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The logits of key blocks for sampled rows: ``scores [num_kv_heads, width, row_count]``.

    A block's logit is its highest, or with ``MASS`` the log-sum-exp of its keys'. Of each segment of the keys a row's
    log-sum-exp over the blocks goes to ``row_lse [segments, num_kv_heads, row_count]``. Rows are (sample, query head of
    the group), the head running fastest, from the plan's ``first_sample`` on; blocks are counted from the first that
    the row's query block sees.

    A program takes ``BLOCK_M`` consecutive rows of one key/value head, whatever query blocks they belong to, so that
    keys are read once for several query blocks. The third axis of the grid divides these keys into segments.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    flat = tl.program_id(0) * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
    sample = first_sample + flat // group
    valid = flat < row_count
    own = load_query_block(plan.table, tl.load(plan.sample_owner + sample, mask=valid, other=0), valid)
    index = tl.load(plan.samples + sample, mask=valid, other=0).to(tl.int64)
    start, end = visible_keys(visible + (own.batch * Lq + index) * 2, valid, Lk)
    rows = Rows(own.batch, kv_head, index, kv_head * group + flat % group, flat, valid, start, end, end)
    queries = load_queries(query, rows, shape)
    peak = tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([shape.BLOCK_M], dtype=tl.float32)

    # Blocks are counted from each sequence's beginning: rows of one sequence at a time, and mostly there is but one.
    remaining = valid
    while tl.max(remaining.to(tl.int32), axis=0) > 0:
        leads = flat == tl.min(tl.where(remaining, flat, FAR), axis=0)
        batch = tl.sum(tl.where(leads, own.batch, 0), axis=0)
        begin = tl.sum(tl.where(leads, own.begin, 0), axis=0)
        here = remaining & (own.batch == batch) & (own.begin == begin)
        lowest = tl.min(tl.where(here, own.lowest, FAR), axis=0)
        past = tl.max(tl.where(here, own.lowest + own.width, -FAR), axis=0)
        tiles = tl.cdiv((past - lowest) * BLOCK_SIZE, shape.BLOCK_N)
        share = tl.cdiv(tiles, tl.num_programs(2))
        low = begin + lowest * BLOCK_SIZE + segment * share * shape.BLOCK_N
        tiles = tl.minimum(tl.maximum(tiles - segment * share, 0), share)
        # Tiles that every row sees whole need no mask; those before and after them do.
        clear_from = tl.max(tl.where(here, start, 0), axis=0)
        clear_to = tl.min(tl.where(here, end, FAR), axis=0)
        before = tl.minimum(tl.cdiv(tl.maximum(clear_from - low, 0), shape.BLOCK_N), tiles)
        after = tl.minimum(tl.maximum(clear_to - low, 0) // shape.BLOCK_N, tiles)
        after = tl.maximum(after, before)
        keys = head_of(key, batch, kv_head)
        first_block = lowest - own.lowest + segment * share * (shape.BLOCK_N // BLOCK_SIZE)
        written = BlockScores(scores + kv_head * width * row_count + flat, row_count, tl.where(here, own.width, 0))
        peak, total = score_tiles(
            queries, keys, rows, low, 0, before, after, tiles, Lk, written, first_block, peak, total, settings, shape,
            BLOCK_SIZE, MASS, True,
        )  # fmt: skip
        peak, total = score_tiles(
            queries, keys, rows, low, before, after, 0, 0, Lk, written, first_block, peak, total, settings, shape,
            BLOCK_SIZE, MASS, False,
        )  # fmt: skip
        remaining = remaining & ~here
    places = row_lse + (segment * tl.num_programs(1) + kv_head) * row_count + flat
    tl.store(places, finite_or_zero(peak) + tl.log2(total), mask=valid)


@triton.jit
def score_tiles(
    queries, keys, rows, low, from_tile, to_tile, later_from, later_to, Lk, written, first_block, peak, total, settings,
    shape, BLOCK_SIZE: tl.constexpr, MASS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores the tiles ``from_tile:to_tile`` and ``later_from:later_to`` of the keys from ``low`` on.

    ``first_block`` is the number that each row gives to the block at ``low``. Returns ``peak`` and ``total`` of each
    row's softmax over blocks, with these.
    """
    blocks_of_tile: tl.constexpr = shape.BLOCK_N // BLOCK_SIZE
    for step in range(to_tile - from_tile + later_to - later_from):
        tile = from_tile + step
        if MASKED:
            tile = tl.where(tile < to_tile, tile, tile - to_tile + later_from)
        position = low + tile * shape.BLOCK_N
        columns = position + tl.arange(0, shape.BLOCK_N)
        raw = score_run(queries, keys, position, (columns >= 0) & (columns < Lk), shape, MASKED)
        seen = tl.full([1, 1], True, dtype=tl.int1)
        if MASKED:
            seen = (columns[None, :] >= rows.start[:, None]) & (columns[None, :] < rows.end[:, None])
        logits = block_logits(raw, seen, settings, shape.BLOCK_M, blocks_of_tile, BLOCK_SIZE, MASS, MASKED)
        block = first_block[:, None] + tile * blocks_of_tile + tl.arange(0, blocks_of_tile)[None, :]
        own = (block >= 0) & (block < written.blocks[:, None])
        tl.store(written.data[:, None] + block.to(tl.int64) * written.stride, logits, mask=own)
        peak, total, _weights, _shrink = fold(tl.where(own, logits, float("-inf")), peak, total)
    return peak, total


@triton.jit
def block_logits(
    raw, seen, settings, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The logit in base 2 of each block of a tile of raw scores ``[BLOCK_M, BLOCKS * BLOCK_SIZE]``."""
    if MASS:
        bent, factor = factored_logits(raw, settings)
        if MASKED:
            bent = tl.where(seen, bent, float("-inf"))
        by_block = tl.reshape(bent, (BLOCK_M, BLOCKS, BLOCK_SIZE))
        base = finite_or_zero(tl.max(by_block, axis=2) * factor)
        # A fused multiply-add by name: left to the compiler, tiles with and without a mask would round differently, and
        # a block's logit would depend on which other rows share its tile.
        factors = tl.full(by_block.shape, factor, dtype=tl.float32)
        total = tl.sum(tl.exp2(tl.fma(by_block, factors, tl.broadcast_to(-base[:, :, None], by_block.shape))), axis=2)
        logits = base + tl.log2(total)
    else:
        # A soft-cap and the scale keep the order of scores: they are applied to the highest alone.
        by_block = tl.reshape(tl.where(seen, raw, float("-inf")) if MASKED else raw, (BLOCK_M, BLOCKS, BLOCK_SIZE))
        highest = tl.max(by_block, axis=2)
        # A maximum passes over what is not a number; a sum does not.
        whole = tl.sum(tl.reshape(tl.where(seen, raw, 0.0) if MASKED else raw, by_block.shape), axis=2)
        logits = logits_base2(tl.where(whole == whole, highest, whole), settings)
    return logits


_CHANGING = ("first_number", "first_sample", "segments", "sample_count", "row_count", "width", "capacity")


@triton.jit(do_not_specialize=[*PER_CALL, *_CHANGING])
def choose_blocks_kernel(
    plan, scores, all_weights, all_masses, row_lse, choice, kept, num_kv_heads, group, first_number, first_sample,
    segments, sample_count, row_count, width, capacity, min_mass, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The ``BlockChoice`` of query block ``first_number + program_id(0)`` and key/value head ``program_id(1)``.

    Reads ``scores`` and ``row_lse``, as ``score_blocks_kernel`` writes them, for the largest share that any row puts on
    each block, which goes to the program's row of ``all_weights``, and for its mass, to ``all_masses``; and once more
    for what each sampled row keeps, ``kept [num_kv_heads, sample_count, group]``. ``all_masses`` and ``min_mass`` are
    None for no ``min_mass``, ``kept`` where it is not wanted.
    """
    local = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    number = (first_number + local).to(tl.int64)
    own = load_query_block(plan.table, number, number >= 0)
    pair = number * num_kv_heads + kv_head
    rows = own.samples * group
    program = local.to(tl.int64) * num_kv_heads + kv_head
    before = (own.first_sample - first_sample).to(tl.int64) * group
    lse_row = row_lse + kv_head * row_count + before
    logits = BlockScores(scores + kv_head * width * row_count + before, row_count, own.width)

    # The segments' sums of each row become one, in the place of the first.
    for from_row in range(0, rows, BLOCK_R):
        row = from_row + tl.arange(0, BLOCK_R)
        present = row < rows
        peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_R], dtype=tl.float32)
        for segment in range(segments):
            part = lse_row + tl.cast(segment, tl.int64) * num_kv_heads * row_count + row
            part_lse = tl.load(part, mask=present, other=float("-inf"))
            higher = tl.maximum(peak, part_lse)
            base = finite_or_zero(higher)
            total = total * tl.exp2(peak - base) + tl.exp2(part_lse - base)
            peak = higher
        tl.store(lse_row + row, finite_or_zero(peak) + tl.log2(total), mask=present)
    # Every thread has written what others read.
    tl.debug_barrier()
    for from_block in range(0, tl.where(rows > 0, own.width, 0), BLOCK_C):
        block = from_block + tl.arange(0, BLOCK_C)
        share = tl.full([BLOCK_C], float("-inf"), dtype=tl.float32)
        held = tl.zeros([BLOCK_C], dtype=tl.float32)
        for from_row in range(0, rows, BLOCK_R):
            row = from_row + tl.arange(0, BLOCK_R)
            present = row < rows
            whole = tl.load(lse_row + row, mask=present, other=0.0)
            tile = load_scores(logits, row, present, block) - whole[:, None]
            # NaN ranks first, with infinity, and weighs nothing.
            share = tl.maximum(share, tl.max(tl.where(tile == tile, tile, float("inf")), axis=0))
            if min_mass is not None:
                held += tl.sum(tl.where(tile == tile, tl.exp2(tile), 0.0), axis=0)
        tl.store(all_weights + program * width + block, tl.exp2(share), mask=block < own.width)
        if min_mass is not None:
            tl.store(all_masses + program * width + block, held, mask=block < own.width)
    tl.debug_barrier()

    # Without a sampled row all blocks are attended, and there are no weights to look at.
    recent = tl.where(rows > 0, tl.load(plan.recent + pair), 0)
    weights = Weights(all_weights + program * width, recent, tl.arange(0, BLOCK_P))
    always = tl.minimum(recent, 1) + own.width - recent
    wanted = tl.load(plan.law + pair)
    if min_mass is not None:
        masses = all_masses + program * width
        # Without a sampled row there are no masses either, and none is missing.
        weighed = tl.where(rows > 0, own.width, 0)
        missing = min_mass * tl.cast(rows, tl.float32) - mass_of_always(masses, weighed, recent, BLOCK_P)
        more = always + count_to_mass(weights, masses, missing)
        # Where even all blocks miss the target by rounding, all are asked for.
        wanted = tl.minimum(tl.maximum(wanted, more), tl.load(plan.limit + pair))
    cut, spare = find_cut(weights, wanted - always)
    tl.store(choice.block_counts + pair, wanted)
    taken_before = 0
    ties_before = 0
    for from_block in range(0, own.width, BLOCK_C):
        block = from_block + tl.arange(0, BLOCK_C)
        place, taken, taken_before, ties_before = take(weights, own.width, block, cut, spare, taken_before, ties_before)
        tl.store(choice.block_indices + pair * capacity + place, own.lowest + block, mask=taken & (place < capacity))

    if kept is not None:
        for from_row in range(0, rows, BLOCK_R):
            row = from_row + tl.arange(0, BLOCK_R)
            present = row < rows
            whole = tl.load(lse_row + row, mask=present, other=0.0)
            kept_here = tl.zeros([BLOCK_R], dtype=tl.float32)
            taken_before = 0
            ties_before = 0
            for from_block in range(0, own.width, BLOCK_C):
                block = from_block + tl.arange(0, BLOCK_C)
                _place, taken, taken_before, ties_before = take(
                    weights, own.width, block, cut, spare, taken_before, ties_before
                )
                # No mask after the load: it would hold each load's predicate, of which there are few, and so the loads
                # would wait for each other. Beyond the last block nothing is taken.
                mass = tl.exp2(load_scores(logits, row, present, block) - whole[:, None])
                kept_here += tl.sum(tl.where(taken[None, :], mass, 0.0), axis=1)
            stored = kept + (kv_head * sample_count + own.first_sample) * group + row
            tl.store(stored, kept_here, mask=present)


@triton.jit
def load_scores(scores, row, present, block):
    """Scores ``[BLOCK_R, BLOCK_C]`` of rows and blocks; -inf where there is no such row or block."""
    pointers = scores.data + (block.to(tl.int64)[None, :] * scores.stride + row[:, None])
    return tl.load(pointers, mask=present[:, None] & (block < scores.blocks)[None, :], other=float("-inf"))


@triton.jit
def mass_of_always(masses, blocks, recent, BLOCK_P: tl.constexpr):
    """The mass of the blocks that are always attended."""
    mass = tl.cast(blocks * 0, tl.float32)
    for first in range(0, blocks, BLOCK_P):
        block = first + tl.arange(0, BLOCK_P)
        always = (block < blocks) & ((block == 0) | (block >= recent))
        mass += tl.sum(tl.load(masses + block, mask=always, other=0.0), axis=0)
    return mass


@triton.jit(do_not_specialize=[*PER_CALL, "query_blocks", "capacity", "row_tiles"])
def attend_blocks_kernel(
    query, key, value, visible, table, choice, sinks, output, lse, lse_keys, attended, query_blocks, num_kv_heads,
    group, Lq, Lk, capacity, row_tiles, settings, shape, EDGE_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The output of ``BLOCK_M`` rows of one query block and key/value head over the blocks chosen for them.

    ``attended`` is int32 ``[B, Hq, Lq]``; ``lse`` and, without the sinks, ``lse_keys`` are float32, or None. All rows
    attend the same blocks, so that a tile of keys, gathered from several blocks, is loaded once for the group. Only the
    blocks at the edges of what the rows see are masked: the chosen blocks ascend, so that those that every row sees
    whole are one run of the list. Programs run from the last query blocks, which have most to attend, to the first.
    """
    program = tl.program_id(0)
    kv_head = ((program // row_tiles) % num_kv_heads).to(tl.int64)
    number = (query_blocks - 1 - program // (row_tiles * num_kv_heads)).to(tl.int64)
    own = load_query_block(table, number, number >= 0)
    first_row = program % row_tiles * shape.BLOCK_M
    flat = first_row + tl.arange(0, shape.BLOCK_M)
    valid = flat < (own.last - own.first) * group
    if first_row < (own.last - own.first) * group:
        index = (own.first + flat // group).to(tl.int64)
        head = kv_head * group + flat % group
        start, end = visible_keys(visible + (own.batch * Lq + index) * 2, valid, Lk)
        row = (own.batch * num_kv_heads * group + head) * Lq + index
        rows = Rows(own.batch, kv_head, index, head, row, valid, start, end, end)
        keys = head_of(key, own.batch, kv_head)
        values = head_of(value, own.batch, kv_head)
        queries = load_queries(query, rows, shape)
        block_list = choice.block_indices + (number * num_kv_heads + kv_head) * capacity
        count = tl.load(choice.block_counts + number * num_kv_heads + kv_head)
        before, clear_tiles = clear_run(block_list, count, own.begin, rows, shape.BLOCK_N, BLOCK_SIZE)

        acc = tl.zeros([shape.BLOCK_M, shape.BLOCK_DV], dtype=tl.float32)
        peak = tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
        dv = tl.arange(0, shape.BLOCK_DV)
        # The list is read a tile ahead, so that the compiler may load keys and values ahead too.
        place = before + tl.arange(0, shape.BLOCK_N)
        block = tl.load(block_list + place // BLOCK_SIZE, mask=place < count * BLOCK_SIZE, other=0)
        for _ in range(clear_tiles):
            columns = own.begin + block * BLOCK_SIZE + place % BLOCK_SIZE
            place += shape.BLOCK_N
            block = tl.load(block_list + place // BLOCK_SIZE, mask=place < count * BLOCK_SIZE, other=0)
            offsets = columns.to(tl.int64) * keys.stride
            raw = dot_scores(queries, keys.data, offsets, columns >= 0, shape, shape.CHUNK_D != shape.BLOCK_D)
            value_rows = values.data + (columns.to(tl.int64)[:, None] * values.stride + dv[None, :])
            if shape.DV == shape.BLOCK_DV:
                tile_values = tl.load(value_rows)
            else:
                tile_values = tl.load(value_rows, mask=dv[None, :] < shape.DV, other=0.0)
            if settings.softcap is not None:
                peak, total, weights, shrink = fold(logits_base2(raw, settings), peak, total)
            else:
                # The scale joins the subtraction: one fused multiply-add an element.
                factor = settings.scale * LOG2_E
                higher = tl.maximum(peak, tl.max(raw, axis=1) * factor)
                base = finite_or_zero(higher)
                weights = tl.exp2(raw * factor - base[:, None])
                shrink = tl.exp2(peak - base)
                peak = higher
                total = total * shrink + tl.sum(weights, axis=1)
            acc = dot(weights.to(tile_values.dtype), tile_values, acc * shrink[:, None])

        # What lies at the edges, where rows differ in what they see. No value is read that none of them sees.
        clear_keys = clear_tiles * shape.BLOCK_N
        edge_keys = count * BLOCK_SIZE - clear_keys
        seen_keys = tl.zeros([shape.BLOCK_M], dtype=tl.int32) + clear_keys
        for tile in range(tl.cdiv(edge_keys, EDGE_N)):
            entry = tile * EDGE_N + tl.arange(0, EDGE_N)
            listed = tl.where(entry < before, entry, entry + clear_keys)
            listed_block = tl.load(block_list + listed // BLOCK_SIZE, mask=entry < edge_keys, other=0)
            columns = own.begin + listed_block * BLOCK_SIZE + listed % BLOCK_SIZE
            in_range = (entry < edge_keys) & (columns >= 0) & (columns < Lk)
            raw = dot_scores(queries, keys.data, columns.to(tl.int64) * keys.stride, in_range, shape, True)
            seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None]) & in_range[None, :]
            logits = tl.where(seen, logits_base2(raw, settings), float("-inf"))
            peak, total, weights, shrink = fold(logits, peak, total)
            tile_values = tl.load(
                values.data + (columns.to(tl.int64)[:, None] * values.stride + dv[None, :]),
                mask=(tl.max(seen.to(tl.int32), axis=0) > 0)[:, None] & (dv[None, :] < shape.DV),
                other=0.0,
            )
            acc = dot(weights.to(tile_values.dtype), tile_values, acc * shrink[:, None])
            seen_keys += tl.sum(seen.to(tl.int32), axis=1)

        base, share, denominator = join_sink(peak, total, sinks, head, valid)
        write_rows(output, rows, acc * (share / denominator)[:, None], seen_keys, shape)
        tl.store(attended + row, seen_keys, mask=valid)
        if lse is not None:
            of_keys = (finite_or_zero(peak) + tl.log2(total)) * LN_2
            tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=valid)
            tl.store(lse_keys + row, of_keys, mask=valid)


@triton.jit
def clear_run(block_list, count, begin, rows, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(listed keys before the first block that every row sees whole, number of tiles of such blocks)."""
    clear_from = tl.max(tl.where(rows.valid, rows.start, 0), axis=0)
    clear_to = tl.min(tl.where(rows.valid, rows.end, FAR), axis=0)
    before = count * 0
    until = count * 0
    for first in range(0, count, _LIST):
        entry = first + tl.arange(0, _LIST)
        position = begin + tl.load(block_list + entry, mask=entry < count, other=0) * BLOCK_SIZE
        before += tl.sum(((entry < count) & (position < clear_from)).to(tl.int32), axis=0)
        until += tl.sum(((entry < count) & (position + BLOCK_SIZE <= clear_to)).to(tl.int32), axis=0)
    return before * BLOCK_SIZE, tl.maximum(until - before, 0) * BLOCK_SIZE // BLOCK_N

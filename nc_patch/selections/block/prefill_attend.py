"""The kernel of block-sparse prefill that attends the chosen key blocks."""

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import FAR, head_of, visible_keys
from nc_patch.ops.triton.scores import (
    LN_2,
    LOG2_E,
    dot,
    dot_scores,
    finite_or_zero,
    fold,
    join_sink,
    load_queries,
    logits_base2,
    write_rows,
)
from nc_patch.ops.triton.structs import PER_CALL, Rows
from nc_patch.selections.block.prefill_choice import load_query_block

# Entries of the list of blocks that are looked at in one step.
_LIST = tl.constexpr(128)


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

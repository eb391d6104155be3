"""The kernel that attends the chosen key blocks, and the one that writes the rows that see no key.

A program takes ``BLOCK_M`` rows of one query block and key/value head, a row for each query and query head of the
group, the head running fastest. All of them attend the same blocks, so that a tile of keys, gathered from several
blocks, is loaded once for the group. Only the blocks at the edges of what the rows see are masked: the chosen blocks
ascend, so that those that every row sees whole are one run of the list.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import (
    LN_2,
    LOG2_E,
    finite_or_zero,
    fold,
    join_sink,
    logits_base2,
    write_rows,
)
from nc_patch.ops.triton.tiles import FAR, PER_CALL, dot, dot_scores, load_query
from nc_patch.selections.block.score import load_plan

# Columns of V that are mended at once, which is rare: few, so that it needs fewer registers than the common path.
_MEND_COLUMNS = tl.constexpr(32)
# Entries of the list of blocks that are looked at in one step.
_LIST = tl.constexpr(128)


@triton.jit(do_not_specialize=[*PER_CALL, "query_blocks", "capacity", "row_tiles"])
def attend_blocks_kernel(
    query,
    key,
    value,
    visible,
    plan,
    block_indices,
    block_counts,
    sinks,
    output,
    lse,
    lse_keys,
    attended,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_ib,
    stride_il,
    query_blocks,
    num_kv_heads,
    group,
    Lq,
    Lk,
    capacity,
    row_tiles,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """Output, number of attended keys and, on request, both log-sum-exps (``lse_keys`` without the sink) of its rows.

    Programs run from the last query blocks, which have most to attend, to the first.
    """
    program = tl.program_id(0)
    tile_of_block = program % row_tiles
    kv_head = ((program // row_tiles) % num_kv_heads).to(tl.int64)
    number = (query_blocks - 1 - program // (row_tiles * num_kv_heads)).to(tl.int64)
    batch, first, last, begin, _lowest, _blocks, _diagonal = load_plan(plan, number, number >= 0)
    flat = tile_of_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = flat < (last - first) * group
    if tile_of_block * BLOCK_M < (last - first) * group:
        index = (first + flat // group).to(tl.int64)
        head = kv_head * group + flat % group
        interval = visible + batch * stride_ib + index * stride_il
        start = tl.maximum(tl.load(interval, mask=valid, other=0), 0)
        end = tl.minimum(tl.load(interval + 1, mask=valid, other=0), Lk)
        query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
        keys = key + batch * stride_kb + kv_head * stride_kh
        values = value + batch * stride_vb + kv_head * stride_vh
        block_list = block_indices + (number * num_kv_heads + kv_head) * capacity
        count = tl.load(block_counts + number * num_kv_heads + kv_head)
        row = (batch * num_kv_heads * group + head) * Lq + index
        queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
        before, clear_tiles = clear_run(block_list, count, begin, valid, start, end, BLOCK_N, BLOCK_SIZE)

        acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        n = tl.arange(0, BLOCK_N)
        dv = tl.arange(0, BLOCK_DV)
        # The list is read a tile ahead, so that the compiler may load keys and values ahead too.
        place = before + n
        block = tl.load(block_list + place // BLOCK_SIZE, mask=place < count * BLOCK_SIZE, other=0)
        for _ in range(clear_tiles):
            columns = begin + block * BLOCK_SIZE + place % BLOCK_SIZE
            place += BLOCK_N
            block = tl.load(block_list + place // BLOCK_SIZE, mask=place < count * BLOCK_SIZE, other=0)
            raw = dot_scores(
                queries, query_rows, valid, keys, columns.to(tl.int64) * stride_kl, columns >= 0, D, BLOCK_D,
                CHUNK_D, CHUNK_D != BLOCK_D,
            )  # fmt: skip
            value_rows = values + (columns.to(tl.int64)[:, None] * stride_vl + dv[None, :])
            if DV == BLOCK_DV:
                tile_values = tl.load(value_rows)
            else:
                tile_values = tl.load(value_rows, mask=dv[None, :] < DV, other=0.0)
            if HAS_SOFTCAP:
                logits = logits_base2(raw, scale, softcap, True)
                higher = tl.maximum(peak, tl.max(logits, axis=1))
                base = finite_or_zero(higher)
                weights = tl.exp2(logits - base[:, None])
            else:
                # The scale joins the subtraction: one fused multiply-add an element.
                higher = tl.maximum(peak, tl.max(raw, axis=1) * (scale * LOG2_E))
                base = finite_or_zero(higher)
                weights = tl.exp2(raw * (scale * LOG2_E) - base[:, None])
            shrink = tl.exp2(peak - base)
            peak = higher
            total = total * shrink + tl.sum(weights, axis=1)
            acc = dot(weights.to(values.dtype.element_ty), tile_values, acc * shrink[:, None])

        # What lies at the edges, where rows differ in what they see.
        clear_keys = clear_tiles * BLOCK_N
        edge_keys = count * BLOCK_SIZE - clear_keys
        seen_keys = tl.zeros([BLOCK_M], dtype=tl.int32) + clear_keys
        for tile in range(tl.cdiv(edge_keys, EDGE_N)):
            columns, in_range = edge_columns(
                block_list, tile, edge_keys, before, clear_keys, begin, Lk, EDGE_N, BLOCK_SIZE
            )
            raw = dot_scores(
                queries, query_rows, valid, keys, columns.to(tl.int64) * stride_kl, in_range, D, BLOCK_D, CHUNK_D, True
            )
            seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None]) & in_range[None, :]
            seen_keys += tl.sum(seen.to(tl.int32), axis=1)
            logits = tl.where(seen, logits_base2(raw, scale, softcap, HAS_SOFTCAP), float("-inf"))
            peak, total, weights, shrink = fold(logits, peak, total)
            tile_values = tl.load(
                values + (columns.to(tl.int64)[:, None] * stride_vl + dv[None, :]),
                mask=in_range[:, None] & (dv[None, :] < DV),
                other=0.0,
            )
            acc = dot(weights.to(values.dtype.element_ty), tile_values, acc * shrink[:, None])

        base, share, denominator = join_sink(peak, total, sinks, head, valid, HAS_SINKS)
        write_rows(output + row * DV, acc, share / denominator, valid, seen_keys, DV, BLOCK_DV)
        tl.store(attended + row, seen_keys, mask=valid)
        if WANT_STATS:
            tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=valid)
            tl.store(lse_keys + row, (finite_or_zero(peak) + tl.log2(total)) * LN_2, mask=valid)
        # In a tile, 0 * NaN and 0 * inf reach rows that do not attend the key: such programs compute again, and any
        # broken element shows in the sum of all.
        if ~(tl.abs(tl.sum(acc)) < float("inf")):
            tl.debug_barrier()
            again = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
            for column in range(0, DV, _MEND_COLUMNS):
                mended, touched = attend_sound(
                    again, query_rows, valid, keys, values + column, stride_kl, stride_vl, start, end, block_list,
                    count, begin, Lk, base, scale, softcap, DV - column, D, BLOCK_M, EDGE_N, BLOCK_D, CHUNK_D,
                    BLOCK_SIZE, HAS_SOFTCAP,
                )  # fmt: skip
                mended = tl.where(touched > 0.0, float("nan"), mended)
                write_rows(
                    output + row * DV + column, mended, 1.0 / denominator, valid, seen_keys, DV - column, _MEND_COLUMNS
                )


@triton.jit
def clear_run(block_list, count, begin, valid, start, end, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(listed keys before the first block that every row sees whole, number of tiles of such blocks)."""
    clear_from = tl.max(tl.where(valid, start, 0), axis=0)
    clear_to = tl.min(tl.where(valid, end, FAR), axis=0)
    before = count * 0
    until = count * 0
    for first in range(0, count, _LIST):
        entry = first + tl.arange(0, _LIST)
        position = begin + tl.load(block_list + entry, mask=entry < count, other=0) * BLOCK_SIZE
        before += tl.sum(((entry < count) & (position < clear_from)).to(tl.int32), axis=0)
        until += tl.sum(((entry < count) & (position + BLOCK_SIZE <= clear_to)).to(tl.int32), axis=0)
    return before * BLOCK_SIZE, tl.maximum(until - before, 0) * BLOCK_SIZE // BLOCK_N


@triton.jit
def edge_columns(
    block_list, tile, edge_keys, before, clear_keys, begin, Lk, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """(key positions, which of them there are) of a tile of the blocks before and after the run of clear tiles."""
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    listed = tl.where(place < before, place, place + clear_keys)
    block = tl.load(block_list + listed // BLOCK_SIZE, mask=place < edge_keys, other=0)
    columns = begin + block * BLOCK_SIZE + listed % BLOCK_SIZE
    return columns, (place < edge_keys) & (columns >= 0) & (columns < Lk)


@triton.jit
def attend_sound(
    queries,
    query_rows,
    valid,
    keys,
    values,
    stride_kl,
    stride_vl,
    start,
    end,
    block_list,
    count,
    begin,
    Lk,
    base,
    scale,
    softcap,
    columns_left,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """A few columns of what is attended, relative to 2**base, without the values that are NaN or infinite; and how many
    of these each row attends.
    """
    mended = tl.zeros([BLOCK_M, _MEND_COLUMNS], dtype=tl.float32)
    touched = tl.zeros([BLOCK_M, _MEND_COLUMNS], dtype=tl.float32)
    dv = tl.arange(0, _MEND_COLUMNS)
    element = values.dtype.element_ty
    for tile in range(tl.cdiv(count * BLOCK_SIZE, BLOCK_N)):
        columns, in_range = edge_columns(block_list, tile, count * BLOCK_SIZE, 0, 0, begin, Lk, BLOCK_N, BLOCK_SIZE)
        raw = dot_scores(
            queries, query_rows, valid, keys, columns.to(tl.int64) * stride_kl, in_range, D, BLOCK_D, CHUNK_D, True
        )
        seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None]) & in_range[None, :]
        logits = tl.where(seen, logits_base2(raw, scale, softcap, HAS_SOFTCAP), float("-inf"))
        weights = tl.exp2(logits - base[:, None])
        tile_values = tl.load(
            values + (columns.to(tl.int64)[:, None] * stride_vl + dv[None, :]),
            mask=in_range[:, None] & (dv[None, :] < columns_left),
            other=0.0,
        )
        # Written so that NaN fails the comparison too.
        sound = tl.abs(tile_values.to(tl.float32)) < float("inf")
        mended = dot(weights.to(element), tl.where(sound, tile_values, 0.0).to(element), mended)
        touched = dot(seen.to(tl.float32).to(element), (~sound).to(tl.float32).to(element), touched)
    return mended, touched


@triton.jit(do_not_specialize=[*PER_CALL, "heads", "row_count"])
def blank_rows_kernel(
    visible,
    sinks,
    output,
    lse,
    lse_keys,
    attended,
    stride_ib,
    stride_il,
    heads,
    Lq,
    row_count,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """What the rows are given that see no key: output 0, attended 0, and the sink for a log-sum-exp."""
    flat = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = flat < row_count
    batch = (flat // Lq).to(tl.int64)
    index = (flat % Lq).to(tl.int64)
    interval = visible + batch * stride_ib + index * stride_il
    start = tl.load(interval, mask=exists, other=0)
    end = tl.load(interval + 1, mask=exists, other=1)
    blank = exists & (end <= start)
    dv = tl.arange(0, BLOCK_DV)
    if tl.max(blank.to(tl.int32), axis=0) > 0:
        for head in range(heads):
            row = (batch * heads + head) * Lq + index
            zeros = tl.zeros([BLOCK_R, BLOCK_DV], dtype=output.dtype.element_ty)
            tl.store(output + row[:, None] * DV + dv[None, :], zeros, mask=blank[:, None] & (dv[None, :] < DV))
            tl.store(attended + row, tl.zeros([BLOCK_R], dtype=tl.int32), mask=blank)
            if WANT_STATS:
                nothing = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
                tl.store(lse_keys + row, nothing, mask=blank)
                if HAS_SINKS:
                    nothing = tl.zeros([BLOCK_R], dtype=tl.float32) + tl.load(sinks + head).to(tl.float32)
                tl.store(lse + row, nothing, mask=blank)

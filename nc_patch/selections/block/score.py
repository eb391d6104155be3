"""The kernel that scores key blocks: a log-sum-exp of the sampled rows' logits for each of them, in base 2.

A program takes ``BLOCK_M`` consecutive sampled rows of one key/value head, whatever query blocks they belong to, and
one segment of the key blocks that any of them sees: with 4 sampled rows a query block and 4 query heads a group, 128
rows are those of 8 query blocks, so that keys are read once for 8 of them. The log-sum-exp of a block needs nothing of
the other blocks, so that segments are independent, and what is written is ``1 / block_size`` of the scores.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import factored_logits, finite_or_zero
from nc_patch.ops.triton.tiles import FAR, PER_CALL, dot_scores, load_query

# Columns of the plan, int32 [N, PLAN_COLUMNS]: the sequence, the query block's first row and the row after its last,
# the key position of block 0, the first visible block, how many there are, and how many come before the diagonal.
PLAN_COLUMNS = tl.constexpr(8)


@triton.jit
def load_plan(plan, number, mask):
    """(batch, first, last, begin, lowest, blocks, diagonal) of query blocks; zeros where there is none."""
    row = plan + number.to(tl.int64) * PLAN_COLUMNS
    batch = tl.load(row, mask=mask, other=0).to(tl.int64)
    first = tl.load(row + 1, mask=mask, other=0)
    last = tl.load(row + 2, mask=mask, other=0)
    begin = tl.load(row + 3, mask=mask, other=0)
    lowest = tl.load(row + 4, mask=mask, other=0)
    blocks = tl.load(row + 5, mask=mask, other=0)
    diagonal = tl.load(row + 6, mask=mask, other=0)
    return batch, first, last, begin, lowest, blocks, diagonal


@triton.jit(do_not_specialize=[*PER_CALL, "slots", "first_number", "row_count", "width"])
def score_blocks_kernel(
    query,
    key,
    visible,
    plan,
    samples,
    scores,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_ib,
    stride_il,
    num_kv_heads,
    group,
    Lk,
    slots,
    first_number,
    row_count,
    width,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Writes ``scores [num_kv_heads, width, row_count]``, of key blocks, counted from the first visible one, and rows.

    Rows are (query block, slot, query head of the group), the head running fastest, from query block ``first_number``
    on. ``samples`` is int32 ``[N, slots]``, the rows of Lq, -1 where a query block has fewer. Scores of the rows that
    are missing are not written. The third axis of the grid divides the keys that a program's rows see.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    flat = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    number = first_number + flat // (slots * group)
    exists = flat < row_count
    sample = tl.load(samples + number.to(tl.int64) * slots + (flat // group) % slots, mask=exists, other=-1)
    valid = sample >= 0
    batch, _first, _last, begin, lowest, blocks, _diagonal = load_plan(plan, number, valid)
    index = tl.maximum(sample, 0).to(tl.int64)
    interval = visible + batch * stride_ib + index * stride_il
    start = tl.maximum(tl.load(interval, mask=valid, other=0), 0)
    end = tl.minimum(tl.load(interval + 1, mask=valid, other=0), Lk)
    head = kv_head * group + flat % group
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    columns_of_row = scores + kv_head * width * row_count + flat

    # Blocks are counted from each sequence's beginning: rows of one sequence at a time, and mostly there is but one.
    remaining = valid
    while tl.max(remaining.to(tl.int32), axis=0) > 0:
        leader = tl.min(tl.where(remaining, flat, FAR), axis=0)
        leads = flat == leader
        own_batch = tl.sum(tl.where(leads, batch, 0), axis=0)
        own_begin = tl.sum(tl.where(leads, begin, 0), axis=0)
        here = remaining & (batch == own_batch) & (begin == own_begin)
        base_block = tl.min(tl.where(here, lowest, FAR), axis=0)
        past = tl.max(tl.where(here, lowest + blocks, -FAR), axis=0)
        tiles = tl.cdiv((past - base_block) * BLOCK_SIZE, BLOCK_N)
        share = tl.cdiv(tiles, tl.num_programs(2))
        low = own_begin + base_block * BLOCK_SIZE + segment * share * BLOCK_N
        tiles = tl.minimum(tl.maximum(tiles - segment * share, 0), share)
        # Tiles that every row sees whole need no mask; those before and after them do.
        clear_from = tl.max(tl.where(here, start, 0), axis=0)
        clear_to = tl.min(tl.where(here, end, FAR), axis=0)
        before = tl.minimum(tl.cdiv(tl.maximum(clear_from - low, 0), BLOCK_N), tiles)
        after = tl.minimum(tl.maximum(clear_to - low, 0) // BLOCK_N, tiles)
        after = tl.maximum(after, before)
        keys = key + own_batch * stride_kb + kv_head * stride_kh
        shift = base_block - lowest + segment * share * (BLOCK_N // BLOCK_SIZE)
        score_tiles(
            queries, query_rows, valid, keys, stride_kl, start, end, low, 0, before, after, tiles, columns_of_row,
            shift, blocks, row_count, here, Lk, scale, softcap, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, BLOCK_SIZE,
            HAS_SOFTCAP, True,
        )  # fmt: skip
        score_tiles(
            queries, query_rows, valid, keys, stride_kl, start, end, low, before, after, 0, 0, columns_of_row,
            shift, blocks, row_count, here, Lk, scale, softcap, D, BLOCK_M, BLOCK_N, BLOCK_D, CHUNK_D, BLOCK_SIZE,
            HAS_SOFTCAP, False,
        )  # fmt: skip
        remaining = remaining & ~here


@triton.jit
def score_tiles(
    queries,
    query_rows,
    valid,
    keys,
    stride_kl,
    start,
    end,
    low,
    from_tile,
    to_tile,
    later_from,
    later_to,
    columns_of_row,
    shift,
    blocks,
    row_count,
    here,
    Lk,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores the tiles ``from_tile:to_tile`` and ``later_from:later_to`` of the keys from ``low`` on."""
    n = tl.arange(0, BLOCK_N)
    blocks_of_tile: tl.constexpr = BLOCK_N // BLOCK_SIZE
    for step in range(to_tile - from_tile + later_to - later_from):
        tile = from_tile + step
        if MASKED:
            tile = tl.where(tile < to_tile, tile, tile - to_tile + later_from)
        position = low + tile * BLOCK_N
        columns = position + n
        raw = dot_scores(
            queries, query_rows, valid, keys + position.to(tl.int64) * stride_kl, n * stride_kl,
            (columns >= 0) & (columns < Lk), D, BLOCK_D, CHUNK_D, MASKED,
        )  # fmt: skip
        bent, factor = factored_logits(raw, scale, softcap, HAS_SOFTCAP)
        if MASKED:
            seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
            bent = tl.where(seen, bent, float("-inf"))
        by_block = tl.reshape(bent, (BLOCK_M, blocks_of_tile, BLOCK_SIZE))
        base = finite_or_zero(tl.max(by_block, axis=2) * factor)
        # A fused multiply-add by name: left to the compiler, tiles with and without a mask would round differently, and
        # a block's score would depend on which other rows share its tile.
        factors = tl.full(by_block.shape, factor, dtype=tl.float32)
        total = tl.sum(tl.exp2(tl.fma(by_block, factors, tl.broadcast_to(-base[:, :, None], by_block.shape))), axis=2)
        block = shift[:, None] + tile * blocks_of_tile + tl.arange(0, blocks_of_tile)[None, :]
        tl.store(
            columns_of_row[:, None] + block.to(tl.int64) * row_count,
            base + tl.log2(total),
            mask=here[:, None] & (block >= 0) & (block < blocks[:, None]),
        )

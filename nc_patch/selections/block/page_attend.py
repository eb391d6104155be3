"""The kernel that attends the chosen pages; ``page_tiles`` describes its programs."""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import fold, logits_base2
from nc_patch.ops.triton.tiles import PER_CALL, dot, dot_scores, load_query
from nc_patch.selections.block.page_tiles import group_rows, query_pages


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "capacity"])
def attend_pages_kernel(
    query,
    key,
    value,
    visible,
    origin,
    chosen,
    chosen_count,
    acc,
    peak,
    total,
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
    stride_ob,
    stride_ol,
    num_kv_heads,
    group,
    Lq,
    Lk,
    splits,
    capacity,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(acc, peak, total) of one share of the chosen pages, as ``split`` wants them.

    All rows of a program attend the same keys and no other key is loaded, so that what others hold cannot matter.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    batch, index, kv_head, start, end, begin, _low, _pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    _member, head, valid = group_rows(kv_head, group, BLOCK_G)
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh
    page_list = chosen + number.to(tl.int64) * capacity
    highest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    sum_of_weights = tl.zeros([BLOCK_G], dtype=tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_DV], dtype=tl.float32)
    n = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, BLOCK_DV)
    count = tl.load(chosen_count + number)
    share = (count + splits - 1) // splits
    first = split * share
    stop = tl.minimum(first + share, count)
    keys_left = tl.maximum(stop - first, 0) * BLOCK_SIZE
    tiles = (keys_left + BLOCK_N - 1) // BLOCK_N
    for tile in range(tiles):
        offset = tile * BLOCK_N + n
        page = tl.load(page_list + first + offset // BLOCK_SIZE, mask=offset < keys_left, other=0)
        position = begin + page * BLOCK_SIZE + offset % BLOCK_SIZE
        seen = (offset < keys_left) & (position >= start) & (position < end)
        raw = dot_scores(
            queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, seen, D, BLOCK_D, CHUNK_D, True
        )
        logits = tl.where(seen[None, :], logits_base2(raw, scale, softcap, HAS_SOFTCAP), float("-inf"))
        highest, sum_of_weights, weights, shrink = fold(logits, highest, sum_of_weights)
        tile_values = tl.load(
            values + (position.to(tl.int64)[:, None] * stride_vl + dv[None, :]),
            mask=seen[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        sums = dot(weights.to(values.dtype.element_ty), tile_values, sums * shrink[:, None])
    row = (batch * num_kv_heads * group + head) * Lq + index
    part = row * splits + split
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, sum_of_weights, mask=valid)
    if tiles > 0:
        tl.store(acc + part[:, None] * DV + dv[None, :], sums, mask=valid[:, None] & (dv[None, :] < DV))

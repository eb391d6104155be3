"""What the Triton kernels share: the rows of a program and tiles of raw scores.

A program works on ``BLOCK_M`` rows of one key/value head. Rows are (query, query head of the group) pairs, the head
running fastest, so that every tile of keys is loaded once for the whole group and any group size fills the block. Row
vectors are ``[BLOCK_M]``, tiles ``[BLOCK_M, BLOCK_N]``.
"""

import triton
import triton.language as tl

# Arguments whose values no kernel is compiled for: numbers of heads, queries and keys, settings, and the strides of
# intervals, origins and budgets, which follow from the number of queries. Prompts of any length share one variant.
PER_CALL = (
    *("num_kv_heads", "num_heads", "group", "Lq", "Lk", "sink_keys", "recent_keys"),
    *("stride_ib", "stride_il", "stride_ob", "stride_ol", "stride_nb", "stride_nh", "stride_nl"),
)
# Above every position.
FAR = tl.constexpr(2147483647)
# Triton's interpreter multiplies bfloat16 as integers; there, dots take their (exactly converted) operands in float32.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def program_rows(
    visible,
    budget,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    BLOCK_M: tl.constexpr,
):
    """The rows of this program: (batch, kv head, query index, query head, row, valid, start, end, budget).

    ``row`` is the offset in a contiguous ``[B, Hq, Lq]``. Blocks run from the last queries to the first, so that the
    long ones start first. Rows beyond the end, and rows that see no key, have ``start = end`` and a budget of 0.
    """
    blocks = tl.cdiv(Lq * group, BLOCK_M)
    program = tl.program_id(0)
    kv_row = program // blocks
    batch = (kv_row // num_kv_heads).to(tl.int64)
    kv_head = (kv_row % num_kv_heads).to(tl.int64)
    flat = (blocks - 1 - program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = flat < Lq * group
    index = (flat // group).to(tl.int64)
    head = kv_head * group + flat % group
    interval = visible + batch * stride_ib + index * stride_il
    start = tl.maximum(tl.load(interval, mask=valid, other=0), 0)
    end = tl.minimum(tl.load(interval + 1, mask=valid, other=0), Lk)
    end = tl.maximum(start, end)
    wanted = tl.load(budget + batch * stride_nb + head * stride_nh + index * stride_nl, mask=valid, other=0)
    wanted = tl.minimum(tl.maximum(wanted, 0), end - start)
    row = (batch * num_kv_heads * group + head) * Lq + index
    return batch, kv_head, index, head, row, valid, start, end, wanted


@triton.jit
def span(low, high, among):
    """(smallest ``low``, largest ``high``) of the rows in ``among``; an empty range when there are none."""
    least = tl.min(tl.where(among, low, FAR), axis=0)
    most = tl.max(tl.where(among, high, 0), axis=0)
    return tl.minimum(least, most), most


@triton.jit
def load_query(query_rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr):
    """The queries ``[BLOCK_M, BLOCK_D]``; where scores are summed in chunks, only a stand-in that is not read."""
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        queries = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
    else:
        queries = tl.load(query_rows, mask=valid, other=0.0)
    return queries


@triton.jit
def dot(left, right, acc):
    """``left @ right + acc`` in float32, without TF32."""
    if _INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def dot_scores(
    queries,
    query_rows,
    valid,
    keys,
    offsets,
    in_range,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Raw scores q·k in float32 of the keys at ``keys + offsets``; ``EDGE`` reads only those that are ``in_range``.

    Every pass and both kernels call this with the same shapes, so that a score has the same bits in all of them.
    """
    scores = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        if EDGE:
            tile = tl.load(keys + (offsets[None, :] + d[:, None]), mask=(d[:, None] < D) & in_range[None, :], other=0.0)
        elif D == BLOCK_D:
            tile = tl.load(keys + (offsets[None, :] + d[:, None]))
        else:
            tile = tl.load(keys + (offsets[None, :] + d[:, None]), mask=d[:, None] < D, other=0.0)
        scores = dot(queries, tile, scores)
    else:
        for chunk in range(0, D, CHUNK_D):
            d = chunk + tl.arange(0, CHUNK_D)
            part = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
            tile = tl.load(keys + (offsets[None, :] + d[:, None]), mask=(d[:, None] < D) & in_range[None, :], other=0.0)
            scores = dot(part, tile, scores)
    return scores


@triton.jit
def forced_keys(wanted, sink_keys, recent_keys, BY_SCORE: tl.constexpr):
    """(first keys, last keys) that a row attends whatever they score; ``reference.forced_counts`` defines them."""
    if BY_SCORE:
        recents = tl.minimum(wanted, recent_keys)
        firsts = tl.minimum(wanted - recents, sink_keys)
    else:
        firsts = tl.minimum(tl.maximum(wanted - 1, 0), sink_keys)
        recents = wanted - firsts
    return firsts, recents

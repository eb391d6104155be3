"""Rows whose keys could not be chosen from codes: all their keys are scored, chosen from and attended.

Three launches, of as many programs as the other steps have, most of the time with nothing to do: exact scores of all
keys, the threshold of each row, and the partial softmax of ``gather``, which takes the place of the row's empty
one.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.tiles import PER_CALL, load_query, program_rows, span
from nc_patch.selections.topk.candidates import (
    MATRIX_ULP,
    RANK_NEGATIVE_INFINITY,
    exact_scores,
    find_best,
    row_interval,
)


@triton.jit(do_not_specialize=PER_CALL)
def score_flagged_kernel(
    query,
    key,
    visible,
    budget,
    flags,
    scores,
    errors,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    WANT_BOUNDS: tl.constexpr,
):
    """Exact scores ``[row, Lk]`` of the keys that a flagged row sees and, with ``WANT_BOUNDS``, their ``errors``.

    ``flags`` is int32 ``[B, Hq, Lq]``. The second axis of the grid divides the keys.
    """
    batch, kv_head, index, head, row, valid, start, end, _wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    valid = valid & (tl.load(flags + row, mask=valid, other=0) != 0)
    low, high = span(start, end, valid & (end > start))
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    keys = key + batch * stride_kb + kv_head * stride_kh
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    tiles = tl.cdiv(high - low, BLOCK_E)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        position = low + tile * BLOCK_E + tl.arange(0, BLOCK_E)
        here = position < high
        score, size = exact_scores(
            queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, here, D, BLOCK_D, CHUNK_D, WANT_BOUNDS
        )
        at = row[:, None] * Lk + position[None, :]
        inside = valid[:, None] & here[None, :]
        tl.store(scores + at, score, mask=inside)
        if WANT_BOUNDS:
            tl.store(errors + at, size * ((D + 16) * MATRIX_ULP), mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def choose_flagged_kernel(
    visible,
    budget,
    flags,
    scores,
    listed,
    threshold,
    ties_end,
    stride_ib,
    stride_il,
    stride_nb,
    stride_nh,
    stride_nl,
    num_heads,
    Lq,
    Lk,
    sink_keys,
    recent_keys,
    BLOCK_E: tl.constexpr,
):
    """Threshold and end of its ties of a flagged row from the ``scores [row, Lk]`` of all keys, all ``listed`` then."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(flags + row) != 0:
        _batch, _head, _index, start, end, wanted, first, last = row_interval(
            row, visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_heads, Lq, Lk, sink_keys,
            recent_keys,
        )  # fmt: skip
        needed = wanted - (end - start - (last - first))
        limit, limit_end = find_best(
            scores, scores + row * Lk + first, last - first, first * 0 + RANK_NEGATIVE_INFINITY, wanted >= 0, needed,
            first, last, BLOCK_E, False,
        )  # fmt: skip
        tl.store(listed + row, end)
        tl.store(threshold + row, limit)
        tl.store(ties_end + row, limit_end)

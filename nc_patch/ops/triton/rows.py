"""The rows of a program, and which keys they see.

A program works on ``BLOCK_M`` rows of one key/value head. Rows are (query, query head of the group) pairs, the head
running fastest, so that every tile of keys is loaded once for the whole group and any group size fills the block.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.structs import Matrix, Rows, Selected

# Above every position.
FAR = tl.constexpr(2147483647)


@triton.jit
def program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, BLOCK_M: tl.constexpr):
    """The ``Rows`` of this program, from its number along the first axis of the grid.

    Blocks run from the last queries to the first, so that the long ones start first. Rows beyond the end, and rows that
    see no key, have ``start = end`` and a budget of 0.
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
    start, end = visible_keys(inputs.visible + (batch * Lq + index) * 2, valid, Lk)
    wanted = tl.load(budget_of(inputs.budget, budget_heads, batch, head, index, Lq), mask=valid, other=0)
    wanted = tl.minimum(tl.maximum(wanted, 0), end - start)
    row = (batch * num_kv_heads * group + head) * Lq + index
    return Rows(batch, kv_head, index, head, row, valid, start, end, wanted)


@triton.jit
def visible_keys(interval, valid, Lk):
    """(start, end) of the keys in an interval that is stored; empty where there is no key or the row is not valid."""
    start = tl.maximum(tl.load(interval, mask=valid, other=0), 0)
    end = tl.minimum(tl.load(interval + 1, mask=valid, other=0), Lk)
    return start, tl.maximum(start, end)


@triton.jit
def budget_of(budget, budget_heads, batch, head, index, Lq):
    """Where the budget of a query and its head is stored: ``[B, budget_heads, Lq]``, one head's or one for all."""
    return budget + (batch * budget_heads + tl.minimum(head, budget_heads - 1)) * Lq + index


@triton.jit
def span(low, high, among):
    """(smallest ``low``, largest ``high``) of the rows in ``among``; an empty range when there are none."""
    least = tl.min(tl.where(among, low, FAR), axis=0)
    most = tl.max(tl.where(among, high, 0), axis=0)
    return tl.minimum(least, most), most


@triton.jit
def forced_keys(wanted, sink_keys, recent_keys, BY_SCORE: tl.constexpr):
    """(first keys, last keys) that a row attends whatever they score; without ``BY_SCORE`` they fill its budget."""
    if BY_SCORE:
        recents = tl.minimum(wanted, recent_keys)
        firsts = tl.minimum(wanted - recents, sink_keys)
    else:
        firsts = tl.minimum(tl.maximum(wanted - 1, 0), sink_keys)
        recents = wanted - firsts
    return firsts, recents


@triton.jit
def row_pointers(tensor, rows):
    """Pointers to the row of each of ``rows`` in a tensor of queries (``Heads``)."""
    return tensor.data + rows.batch * tensor.stride_b + rows.head * tensor.stride_h + rows.index * tensor.stride_l


@triton.jit
def head_of(tensor, batch, head):
    """One head of keys, values or their means (``Heads``) as a ``Matrix``."""
    return Matrix(tensor.data + batch * tensor.stride_b + head * tensor.stride_h, tensor.stride_l)


@triton.jit
def select_keys(rows, limits, sink_keys, recent_keys):
    """The ``Selected`` keys of a program's rows: the forced ones, and those that their ``limits`` admit."""
    firsts, recents = forced_keys(rows.wanted, sink_keys, recent_keys, True)
    threshold = tl.load(limits.threshold + rows.row, mask=rows.valid, other=float("inf"))
    ties_end = tl.load(limits.ties_end + rows.row, mask=rows.valid, other=0)
    return Selected(rows.start, rows.end, rows.start + firsts, rows.end - recents, threshold, ties_end)


@triton.jit
def attended_keys(raw, columns, selected):
    """Which keys of a tile each row attends, from their raw scores."""
    seen = (columns[None, :] >= selected.start[:, None]) & (columns[None, :] < selected.end[:, None])
    attended = (columns[None, :] < selected.sinks_end[:, None]) | (columns[None, :] >= selected.recents_start[:, None])
    if selected.threshold is not None:
        # NaN ranks with +inf, above every finite score.
        ranked = tl.where(raw == raw, raw, float("inf"))
        tied = (ranked == selected.threshold[:, None]) & (columns[None, :] < selected.ties_end[:, None])
        attended = attended | (ranked > selected.threshold[:, None]) | tied
    return attended & seen

"""What the kernels of ``block`` while decoding share: what a program's query sees, and its rows.

A program works for one query and one key/value head, for up to ``BLOCK_G`` of its query heads; ``number`` below counts
(batch, query, key/value head) with the head running fastest. Logits are in base 2. Pages are counted from the first
visible one, except in the list of chosen pages and in the statistics, where they are counted from the origin.
"""

import triton
import triton.language as tl


@triton.jit
def query_pages(
    number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE: tl.constexpr
):
    """(batch, query index, kv head, start, end, begin, low, pages): what a query sees, and in which pages.

    ``begin`` is the position of page 0; ``low`` the first visible page, ``pages`` how many there are.
    """
    batch = (number // (num_kv_heads * Lq)).to(tl.int64)
    index = ((number // num_kv_heads) % Lq).to(tl.int64)
    kv_head = (number % num_kv_heads).to(tl.int64)
    begin = tl.load(origin + batch * stride_ob + index * stride_ol)
    start = tl.load(visible + batch * stride_ib + index * stride_il)
    end = tl.load(visible + batch * stride_ib + index * stride_il + 1)
    start = tl.maximum(tl.maximum(start, begin), 0)
    end = tl.maximum(tl.minimum(end, Lk), start)
    # No negative number is divided: start is not before begin.
    low = (start - begin) // BLOCK_SIZE
    pages = tl.where(end > start, (end - start + (start - begin) % BLOCK_SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
    return batch, index, kv_head, start, end, begin, low, pages


@triton.jit
def group_rows(kv_head, group, BLOCK_G: tl.constexpr):
    """(query head within the group, query head, whether there is one) of this program's rows, ``[BLOCK_G]``."""
    member = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    return member, kv_head * group + member, member < group

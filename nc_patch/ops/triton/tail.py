"""``topk`` with a tail, over whole rows: what a row does not attend enters by the means of its pages (``means.py``).

After the keys that a row attends ``attend_kernel`` goes over its pages, sixteen at a time: their keys are scored once
more to count, in registers, how many of each page are attended, and the pages join the softmax by their mean keys and
values. For a pair of a row and a key that costs 2 * D + 32 + (2 * D + 2 * Dv) / 16 operations.

Rows of one program may belong to sequences that begin anywhere: those whose pages begin at the same positions modulo
the page size go together, and the program goes over the pages once for each such set, one where nothing is packed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.ops.triton.rows import attended_keys, span
from nc_patch.ops.triton.scores import accumulate_run, dot, load_rows, logits_base2, score_run

PAGE = tl.constexpr(TAIL_PAGE_SIZE)


class Tail(NamedTuple):
    """The means of pages by slot: ``Heads`` of keys and of values, and the ``Shape`` of a tile of them.

    Its ``BLOCK_N`` pages are taken at once. Queries are read again for them ``CHUNK_D`` channels at a time, rather than
    held in the layouts of two products.
    """

    key: Any
    value: Any
    shape: Any


@triton.jit
def add_tail(softmax, queries, keys, mean_keys, mean_values, selected, origin, settings, shape, pages):
    """The ``Softmax`` of the keys that the rows attend with the pages of those that they do not."""
    p = tl.arange(0, pages.BLOCK_N)
    residue, own = pages_of_rows(origin, selected.end)
    waiting = tl.where(own > selected.start, residue, -1)
    current = tl.max(waiting, axis=0)
    while current >= 0:
        among = waiting == current
        low, high = span(selected.start, own, among)
        first = tl.cdiv(low - current, PAGE)
        last = (high - current) // PAGE
        for slot in range(first, last, pages.BLOCK_N):
            # Read anew, so that they are held for this loop alone; the barrier keeps the compiler from merging loads.
            tl.debug_barrier()
            again = load_rows(queries.rows, queries.valid, shape)
            begin = slot * PAGE + current
            there = tl.minimum(last - slot, pages.BLOCK_N)
            missing = -count_attended(again, keys, begin, there, high, selected, shape, pages) + PAGE
            page_begin = begin + p * PAGE
            within = (page_begin[None, :] >= selected.start[:, None]) & (page_begin[None, :] < own[:, None])
            within = within & among[:, None] & (missing > 0.5)
            raw = score_run(again, mean_keys, slot, slot + p < last, pages, True)
            logits = logits_base2(raw, settings) + tl.log2(tl.maximum(missing, 1.0))
            logits = tl.where(within, logits, float("-inf"))
            # Only pages that enter for some row are read: of others, means may hold anything.
            taken = tl.max(within.to(tl.int32), axis=0) > 0
            softmax = accumulate_run(softmax, logits, mean_values, slot, taken, pages)
        waiting = tl.where(among, -1, waiting)
        current = tl.max(waiting, axis=0)
    return softmax


@triton.jit
def count_attended(queries, keys, begin, there, high, selected, shape, pages):
    """How many keys each row attends of the pages from position ``begin`` on, of which ``there`` are, in float32."""
    counts = tl.zeros([shape.BLOCK_M, pages.BLOCK_N], dtype=tl.float32)
    n = tl.arange(0, shape.BLOCK_N)
    element = keys.data.dtype.element_ty
    for part in range(0, there * PAGE, shape.BLOCK_N):
        columns = begin + part + n
        raw = score_run(queries, keys, begin + part, columns < high, shape, True)
        attended = attended_keys(raw, columns, selected)
        page = (part + n)[:, None] // PAGE == tl.arange(0, pages.BLOCK_N)[None, :]
        # By way of float32, from which alone the interpreter converts to bfloat16.
        counts = dot(attended.to(tl.float32).to(element), page.to(tl.float32).to(element), counts)
    return counts


@triton.jit
def pages_of_rows(origin, end):
    """(residue, own): a row's pages begin at ``residue`` modulo the page size, and the one of its own at ``own``.

    The bits of a negative origin are those of the number modulo any power of two.
    """
    residue = origin & (PAGE - 1)
    last = end - 1 - residue
    return residue, last - (last & (PAGE - 1)) + residue

"""The kernel that chooses the heaviest pages; ``page_tiles`` describes its programs, one for all heads of a group."""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import finite_or_zero
from nc_patch.ops.triton.tiles import PER_CALL
from nc_patch.selections.block.page_tiles import query_pages

_ABOVE_INFINITY = tl.constexpr(2139095041)


@triton.jit(do_not_specialize=[*PER_CALL, "width", "splits", "capacity"])
def choose_pages_kernel(
    visible,
    origin,
    budget,
    page_logits,
    peak,
    total,
    chosen,
    chosen_count,
    attended,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    width,
    splits,
    capacity,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The pages that one query and the group attend: ``chosen [number, capacity]``, ascending, and how many they are.

    Also ``attended [B, Hq, Lq]``, the number of their visible keys. ``peak`` and ``total`` have ``splits`` parts.
    """
    number = tl.program_id(0)
    batch, index, kv_head, start, end, begin, low, pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    pages = tl.minimum(pages, width)
    weights = page_logits + number.to(tl.int64) * group * width
    largest_budget = sum_weights(
        weights, peak + number.to(tl.int64) * group * splits, total + number.to(tl.int64) * group * splits,
        budget + batch * stride_nb + kv_head * group * stride_nh + index * stride_nl, stride_nh, group, width, splits,
        pages, BLOCK_P, BLOCK_S,
    )  # fmt: skip
    tl.debug_barrier()
    always = tl.minimum(pages, 2)
    # A budget of all keys has one page more, as intervals begin and end within pages.
    more = tl.where(largest_budget >= end - start, BLOCK_SIZE, 0)
    wanted = tl.maximum((tl.maximum(largest_budget, 0) + more + BLOCK_SIZE - 1) // BLOCK_SIZE, always)
    wanted = tl.minimum(tl.minimum(wanted, pages), capacity)
    cut, spare = find_cut(weights, pages, wanted - always, BLOCK_P)
    certain = 0
    ties = 0
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        rank = load_ranks(weights, page, pages)
        above = (page < pages) & ((page == 0) | (page == pages - 1) | (rank > cut))
        tied = rank == cut
        ties_here = ties + tl.cumsum(tied.to(tl.int32), axis=0)
        certain_here = certain + tl.cumsum(above.to(tl.int32), axis=0)
        place = certain_here + tl.minimum(ties_here, spare) - 1
        taken = (above | (tied & (ties_here <= spare))) & (place < capacity)
        tl.store(chosen + number.to(tl.int64) * capacity + place, low + page, mask=taken)
        ties += tl.sum(tied.to(tl.int32), axis=0)
        certain += tl.sum(above.to(tl.int32), axis=0)
    tl.store(chosen_count + number, wanted)
    # The first and the last page may be seen in part; both are always chosen.
    missing = (start - begin - low * BLOCK_SIZE) + (begin + (low + pages) * BLOCK_SIZE - end)
    keys = tl.where(pages > 0, wanted * BLOCK_SIZE - missing, 0)
    row = (batch * num_kv_heads + kv_head) * group * Lq + index
    for member in range(group):
        tl.store(attended + row + member * Lq, keys)


@triton.jit
def sum_weights(
    logits_rows,
    peak,
    total,
    budgets,
    stride_nh,
    group,
    width,
    splits,
    pages,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The group's largest budget; over the first head's logits goes each page's weight, summed over the group.

    A logit that is NaN or +inf weighs +inf.
    """
    largest_budget = 0
    split = tl.arange(0, BLOCK_S)
    for member in range(group):
        largest_budget = tl.maximum(largest_budget, tl.load(budgets + member * stride_nh))
    for first in range(0, pages, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        weight = tl.zeros([BLOCK_P], dtype=tl.float32)
        for member in range(group):
            peaks = tl.load(peak + member * splits + split, mask=split < splits, other=float("-inf"))
            totals = tl.load(total + member * splits + split, mask=split < splits, other=0.0)
            row = logits_rows + tl.cast(member, tl.int64) * width
            logits = tl.load(row + page, mask=page < pages, other=float("-inf"))
            base = finite_or_zero(tl.max(peaks, axis=0))
            whole = tl.sum(totals * tl.exp2(peaks - base), axis=0)
            share = tl.where(whole > 0.0, 1.0 / tl.maximum(whole, 1e-30), 0.0)
            # Written so that NaN fails the comparison too.
            weight += tl.where(logits < float("inf"), tl.exp2(logits - base) * share, float("inf"))
        # Every thread has read the logits that the weights replace.
        tl.debug_barrier()
        tl.store(logits_rows + page, weight, mask=page < pages)
    return largest_budget


@triton.jit
def load_ranks(weights, page, pages):
    """The bits of the weights, which order them, since none is negative; below 0 for pages that are no candidates."""
    candidate = (page > 0) & (page < pages - 1)
    return tl.load(weights + page, mask=candidate, other=-1.0).to(tl.int32, bitcast=True)


@triton.jit
def find_cut(weights, pages, needed, BLOCK_P: tl.constexpr):
    """(cut, spare): the ``needed`` highest ranks are those above ``cut`` and the first ``spare`` that equal it.

    ``low`` is a rank that ``needed`` or more candidates reach and ``high`` one that fewer reach; each pass counts at
    three ranks between them and keeps a quarter. The search ends when a count is exact, or the quarter a single rank:
    after at most 17 passes, and about 8 for weights that differ.
    """
    cut = tl.where(needed > 0, -1, _ABOVE_INFINITY)
    spare = needed * 0
    low = needed * 0
    high = low + _ABOVE_INFINITY
    count_high = needed * 0
    searching = (needed > 0) & (needed < pages - 2)
    while searching:
        step = tl.maximum((high - low) // 4, 1)
        at_first = tl.minimum(low + step, high - 1)
        at_second = tl.minimum(at_first + step, high - 1)
        at_third = tl.minimum(at_second + step, high - 1)
        # Three counts of 21 bits each travel in one sum.
        counts = tl.cast(needed * 0, tl.int64)
        for first in range(0, pages, BLOCK_P):
            rank = load_ranks(weights, first + tl.arange(0, BLOCK_P), pages)
            reached = tl.where(rank >= at_first, 1, 0) + tl.where(rank >= at_second, 1 << 21, 0)
            counts += tl.sum(reached.to(tl.int64) + ((rank >= at_third).to(tl.int64) << 42), axis=0)
        first_count = (counts & 0x1FFFFF).to(tl.int32)
        second_count = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        third_count = (counts >> 42).to(tl.int32)
        exact = (first_count == needed) | (second_count == needed) | (third_count == needed)
        hit = tl.where(third_count == needed, at_third, tl.where(second_count == needed, at_second, at_first))
        # Ranks rise and counts fall: the lowest rank that too few reach is the new top.
        high = tl.where(third_count < needed, at_third, high)
        count_high = tl.where(third_count < needed, third_count, count_high)
        high = tl.where(second_count < needed, at_second, high)
        count_high = tl.where(second_count < needed, second_count, count_high)
        high = tl.where(first_count < needed, at_first, high)
        count_high = tl.where(first_count < needed, first_count, count_high)
        low = tl.where(first_count >= needed, at_first, low)
        low = tl.where(second_count >= needed, at_second, low)
        low = tl.where(third_count >= needed, at_third, low)
        cut = tl.where(exact, hit - 1, low)
        spare = tl.where(exact, 0, needed - count_high)
        searching = ~(exact | (high - low <= 1))
    return cut, spare

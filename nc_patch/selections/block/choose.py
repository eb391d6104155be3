"""The kernel that chooses key blocks for each query block and key/value head, from the log-sum-exps of sampled rows.

One program chooses for one query block and one key/value head. It reads the scores three times: for each row's
log-sum-exp over its blocks, for the largest share that any row puts on each block, and for the mass that each row
keeps. The number of blocks varies; they are found by bisection over the bits of the shares, without a sort.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import finite_or_zero, fold
from nc_patch.ops.triton.tiles import PER_CALL
from nc_patch.selections.block.page_choice import find_cut, load_ranks
from nc_patch.selections.block.score import load_plan

_ABOVE_INFINITY = tl.constexpr(2139095041)


@triton.jit(do_not_specialize=[*PER_CALL, "slots", "first_number", "row_count", "width", "capacity", "min_mass"])
def choose_blocks_kernel(
    plan,
    samples,
    scores,
    law,
    limit,
    weights,
    masses,
    row_lse,
    block_indices,
    block_counts,
    kept,
    enlarged,
    num_kv_heads,
    group,
    slots,
    first_number,
    row_count,
    width,
    capacity,
    min_mass,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_MIN_MASS: tl.constexpr,
):
    """The chosen blocks of query block ``first_number + program_id(0)`` and key/value head ``program_id(1)``.

    Args:
        scores: as ``score_blocks_kernel`` writes them. law, limit: int32 ``[N, Hkv]``, the counts of the budget and at
            most. weights, masses: scratch, a row of ``width`` for each program; masses with ``HAS_MIN_MASS`` alone.
            row_lse: scratch, a row of ``slots * group``.
        block_indices: int32 ``[N, Hkv, capacity]``, filled with -1. block_counts: int32 ``[N, Hkv]``.
        kept: ``[N, Hkv, slots, group]``, each sampled row's mass on the chosen blocks; 0 where there is no row.
        enlarged: int32 ``[N, Hkv]``, whether ``min_mass`` asked for more than the law.
    """
    local = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    number = (first_number + local).to(tl.int64)
    _batch, _first, _last, _begin, lowest, blocks, diagonal = load_plan(plan, number, number >= 0)
    pair = number * num_kv_heads + kv_head
    rows = slots * group
    scratch = local.to(tl.int64) * num_kv_heads + kv_head
    weight_row = weights + scratch * width
    mass_row = masses + scratch * width
    lse_row = row_lse + scratch * rows
    own_scores = scores + kv_head * width * row_count + local.to(tl.int64) * rows
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)

    present_rows = 0
    for from_row in range(0, rows, BLOCK_R):
        row = from_row + r
        present = tl.load(samples + number * slots + row // group, mask=row < rows, other=-1) >= 0
        present_rows += tl.sum(present.to(tl.int32), axis=0)
        peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_R], dtype=tl.float32)
        for from_block in range(0, blocks, BLOCK_C):
            logits = load_scores(own_scores, from_block + c, row, present, blocks, row_count)
            peak, total, _weights, _shrink = fold(logits, peak, total)
        # Of a row that is missing 0, as where it is loaded below: its scores are -inf, and so its mass is 0, not NaN.
        whole = tl.where(present, finite_or_zero(peak) + tl.log2(total), 0.0)
        tl.store(lse_row + row, whole, mask=present)
        for from_block in range(0, blocks, BLOCK_C):
            block = from_block + c
            mass = load_mass(own_scores, block, row, present, blocks, row_count, whole)
            # NaN ranks first, with infinity, and weighs nothing.
            weight = tl.max(tl.where(mass == mass, mass, float("inf")), axis=0)
            if from_row > 0:
                weight = tl.maximum(weight, tl.load(weight_row + block, mask=block < blocks, other=0.0))
            tl.store(weight_row + block, weight, mask=block < blocks)
            if HAS_MIN_MASS:
                held = tl.sum(tl.where(mass == mass, mass, 0.0), axis=0)
                if from_row > 0:
                    held += tl.load(mass_row + block, mask=block < blocks, other=0.0)
                tl.store(mass_row + block, held, mask=block < blocks)
        # Every thread has written the weights, and the log-sum-exps, that others read.
        tl.debug_barrier()

    always = tl.minimum(diagonal, 1) + blocks - diagonal
    wanted = tl.minimum(tl.maximum(tl.load(law + pair), always), blocks)
    if HAS_MIN_MASS:
        most = tl.minimum(tl.maximum(tl.load(limit + pair), wanted), blocks)
        target = min_mass * tl.cast(present_rows, tl.float32)
        more = always + count_to_mass(weight_row, mass_row, blocks, diagonal, target, BLOCK_P)
        # Where even all blocks miss the target by rounding, all are asked for.
        grown = tl.minimum(tl.maximum(wanted, more), most)
        tl.store(enlarged + pair, (grown > wanted).to(tl.int32))
        wanted = grown
    wanted = tl.minimum(wanted, capacity)
    # Ranks are of the blocks between the first and the diagonal: as if those on it were one page, the last.
    cut, spare = find_cut(weight_row, diagonal + 1, wanted - always, BLOCK_P)

    for from_row in range(0, rows, BLOCK_R):
        row = from_row + r
        present = tl.load(samples + number * slots + row // group, mask=row < rows, other=-1) >= 0
        whole = tl.load(lse_row + row, mask=present, other=0.0)
        kept_here = tl.zeros([BLOCK_R], dtype=tl.float32)
        certain = 0
        ties = 0
        for from_block in range(0, blocks, BLOCK_C):
            block = from_block + c
            rank = load_ranks(weight_row, block, diagonal + 1)
            above = (block < blocks) & ((block == 0) | (block >= diagonal) | (rank > cut))
            # No weight is negative, and what is no candidate has a negative rank.
            tied = (rank == cut) & (rank >= 0)
            ties_here = ties + tl.cumsum(tied.to(tl.int32), axis=0)
            certain_here = certain + tl.cumsum(above.to(tl.int32), axis=0)
            place = certain_here + tl.minimum(ties_here, spare) - 1
            taken = above | (tied & (ties_here <= spare))
            if from_row == 0:
                tl.store(block_indices + pair * capacity + place, lowest + block, mask=taken & (place < capacity))
            ties += tl.sum(tied.to(tl.int32), axis=0)
            certain += tl.sum(above.to(tl.int32), axis=0)
            mass = load_mass(own_scores, block, row, present, blocks, row_count, whole)
            kept_here += tl.sum(tl.where(taken[None, :], mass, 0.0), axis=1)
        tl.store(kept + pair * rows + row, kept_here, mask=row < rows)
    tl.store(block_counts + pair, wanted)


@triton.jit
def load_scores(own_scores, block, row, present, blocks, row_count):
    """Scores ``[BLOCK_R, BLOCK_C]`` of rows and blocks; -inf where there is no such row or block."""
    pointers = own_scores + (block.to(tl.int64)[None, :] * row_count + row[:, None])
    return tl.load(pointers, mask=present[:, None] & (block < blocks)[None, :], other=float("-inf"))


@triton.jit
def load_mass(own_scores, block, row, present, blocks, row_count, whole):
    """The share of each row's mass on each block, ``[BLOCK_R, BLOCK_C]``; 0 where there is no such row.

    What lies beyond the last block means nothing. No mask is needed after the load: a mask would hold each load's
    predicate, of which there are few, and so the loads would wait for each other.
    """
    logits = load_scores(own_scores, block, row, present, blocks, row_count)
    return tl.exp2(logits - whole[:, None])


@triton.jit
def count_to_mass(weight_row, mass_row, blocks, diagonal, target, BLOCK_P: tl.constexpr):
    """How many of the heaviest candidates, with the blocks that are always taken, hold a mass of ``target`` or more.

    Bisects for the largest weight such that all that weigh as much or more, together with the blocks always taken,
    reach the target; of those that weigh just as much only as many count as are needed, each with their mean mass.
    """
    forced = target * 0.0
    for first in range(0, blocks, BLOCK_P):
        block = first + tl.arange(0, BLOCK_P)
        always = (block < blocks) & ((block == 0) | (block >= diagonal))
        forced += tl.sum(tl.load(mass_row + block, mask=always, other=0.0), axis=0)
    missing = target - forced
    low = diagonal * 0
    high = low + _ABOVE_INFINITY
    while (missing > 0.0) & (high - low > 1):
        middle = low + (high - low) // 2
        mass, _count = weigh(weight_row, mass_row, diagonal, middle, BLOCK_P)
        reaches = mass >= missing
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
    mass_above, count_above = weigh(weight_row, mass_row, diagonal, low + 1, BLOCK_P)
    mass_from, count_from = weigh(weight_row, mass_row, diagonal, low, BLOCK_P)
    tied = (count_from - count_above).to(tl.float32)
    each = (mass_from - mass_above) / tl.maximum(tied, 1.0)
    ties = tl.ceil((missing - mass_above) / tl.maximum(each, 1e-38))
    ties = tl.minimum(tl.maximum(ties, 1.0), tied).to(tl.int32)
    return tl.where(missing > 0.0, count_above + ties, 0)


@triton.jit
def weigh(weight_row, mass_row, diagonal, least_rank, BLOCK_P: tl.constexpr):
    """(mass, count) of the candidates whose rank is ``least_rank`` or more."""
    mass = least_rank.to(tl.float32) * 0.0
    count = least_rank * 0
    for first in range(0, diagonal, BLOCK_P):
        block = first + tl.arange(0, BLOCK_P)
        rank = load_ranks(weight_row, block, diagonal + 1)
        reached = (rank >= least_rank) & (rank >= 0)
        mass += tl.sum(tl.load(mass_row + block, mask=reached, other=0.0), axis=0)
        count += tl.sum(reached.to(tl.int32), axis=0)
    return mass, count

"""The heaviest of many weights: what the kernels that choose blocks, and those that choose pages, share.

Weights are float32 and not negative, so that their bits are their ranks. Some are no candidates: what they stand for is
attended anyway.
"""

from collections import namedtuple

import triton
import triton.language as tl

from nc_patch.ops.triton.ranks import ABOVE_INFINITY, Bracket, count_ranks, search

# A pointer to weights, of which the first and those from ``stop`` on are no candidates. ``lanes`` counts those that are
# looked at at once, from 0 on.
Weights = namedtuple("Weights", "data stop lanes")


@triton.jit
def load_ranks(weights, place):
    """The ranks of the weights at these places; below 0 for those that are no candidates."""
    candidate = (place > 0) & (place < weights.stop)
    return tl.load(weights.data + place, mask=candidate, other=-1.0).to(tl.int32, bitcast=True)


@triton.jit
def find_cut(weights, needed):
    """(cut, spare): the ``needed`` highest ranks are those above ``cut`` and the first ``spare`` that equal it."""
    # Where none is needed the bracket is closed above all of them.
    low = tl.where(needed > 0, needed * 0, ABOVE_INFINITY)
    count_low = tl.where(needed > 0, weights.stop - 1, needed)
    bracket = Bracket(low, needed * 0 + ABOVE_INFINITY, count_low, needed * 0)
    bracket = search(bracket, needed, count_candidates, weights)
    exact = bracket.count_low == needed
    return tl.where(exact, bracket.low - 1, bracket.low), tl.where(exact, 0, needed - bracket.count_high)


@triton.jit
def count_candidates(weights, first, second, third):
    """How many candidates reach each of three ascending ranks."""
    count_first = first * 0
    count_second = first * 0
    count_third = first * 0
    for begin in range(0, weights.stop, weights.lanes.shape[0]):
        ranks = load_ranks(weights, begin + weights.lanes)
        reach_first, reach_second, reach_third = count_ranks(ranks, first, second, third)
        count_first += reach_first
        count_second += reach_second
        count_third += reach_third
    return count_first, count_second, count_third


@triton.jit
def count_to_mass(weights, masses, missing):
    """How many of the heaviest candidates hold a mass of ``missing`` or more; ``masses`` points to the mass of each.

    Bisects for the largest weight such that all that weigh as much or more are enough; of those that weigh just as
    much only as many count as are needed, each with their mean mass.
    """
    low = weights.stop * 0
    high = low + ABOVE_INFINITY
    while (missing > 0.0) & (high - low > 1):
        middle = low + (high - low) // 2
        mass, _count = weigh(weights, masses, middle)
        low = tl.where(mass >= missing, middle, low)
        high = tl.where(mass >= missing, high, middle)
    mass_above, count_above = weigh(weights, masses, low + 1)
    mass_from, count_from = weigh(weights, masses, low)
    tied = (count_from - count_above).to(tl.float32)
    each = (mass_from - mass_above) / tl.maximum(tied, 1.0)
    ties = tl.ceil((missing - mass_above) / tl.maximum(each, 1e-38))
    ties = tl.minimum(tl.maximum(ties, 1.0), tied).to(tl.int32)
    return tl.where(missing > 0.0, count_above + ties, 0)


@triton.jit
def weigh(weights, masses, least_rank):
    """(mass, count) of the candidates whose rank is ``least_rank``, which is not negative, or more."""
    mass = least_rank.to(tl.float32) * 0.0
    count = least_rank * 0
    for begin in range(0, weights.stop, weights.lanes.shape[0]):
        place = begin + weights.lanes
        reached = load_ranks(weights, place) >= least_rank
        mass += tl.sum(tl.load(masses + place, mask=reached, other=0.0), axis=0)
        count += tl.sum(reached.to(tl.int32), axis=0)
    return mass, count


@triton.jit
def take(weights, count, place, cut, spare, taken_before, ties_before):
    """Where a tile of ``count`` places goes in an ascending list: (where, which are taken, taken and ties to its end).

    Taken are the places that are no candidates, those above the cut, and the first ``spare`` at it.
    """
    rank = load_ranks(weights, place)
    above = (place < count) & ((place == 0) | (place >= weights.stop) | (rank > cut))
    tied = rank == cut
    ties = ties_before + tl.cumsum(tied.to(tl.int32), axis=0)
    certain = taken_before + tl.cumsum(above.to(tl.int32), axis=0)
    return (
        certain + tl.minimum(ties, spare) - 1,
        above | (tied & (ties <= spare)),
        taken_before + tl.sum(above.to(tl.int32), axis=0),
        ties_before + tl.sum(tied.to(tl.int32), axis=0),
    )

"""One cut over ranked scores: how the k highest of many are found by counting, without a sort.

A rank is an int32 that orders as the float32 it stands for. A ``Bracket`` of ranks closes on the k-th highest: each
pass counts how many scores reach three ranks that quarter it, so that at most 17 leave one rank, which several scores
may share. All but ``count_ranks`` and ``search`` work on a bracket for each row, too.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

RANK_NEGATIVE_INFINITY = tl.constexpr(-2139095041)
RANK_INFINITY = tl.constexpr(2139095040)
ABOVE_INFINITY = tl.constexpr(2139095041)
# Below the rank of every score.
NO_RANK = tl.constexpr(-2147483648)
# Three counts travel in one int64, so that they are summed at once.
_FIELD_BITS = tl.constexpr(20)
_FIELD = tl.constexpr((1 << 20) - 1)


class Bracket(NamedTuple):
    """Two ranks, and how many scores reach each: ``low`` as many as are needed or more, ``high`` fewer."""

    low: Any
    high: Any
    count_low: Any
    count_high: Any


@triton.jit
def rank_of(score):
    """A float32 as an int32 of the same order; NaN has no place in it."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(rank):
    """The float32 whose ``rank_of`` is ``rank``."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_ranks(ranks, first, second, third):
    """How many ranks are at or above each of three ascending ones."""
    one = tl.full([1], 1, tl.int64)
    packed = tl.where(ranks >= first, one, 0)
    packed += tl.where(ranks >= second, one << _FIELD_BITS, 0)
    packed += tl.where(ranks >= third, one << (2 * _FIELD_BITS), 0)
    total = tl.sum(packed, axis=0)
    return (
        (total & _FIELD).to(tl.int32),
        ((total >> _FIELD_BITS) & _FIELD).to(tl.int32),
        (total >> (2 * _FIELD_BITS)).to(tl.int32),
    )


@triton.jit
def width_of(bracket):
    """The distance between the ranks of a bracket, int64."""
    return bracket.high.to(tl.int64) - bracket.low.to(tl.int64)


@triton.jit
def quarter(bracket):
    """Three ascending ranks that quarter a bracket, inside it where it is wider than one rank."""
    width = width_of(bracket)
    low = bracket.low.to(tl.int64)
    first = tl.maximum((low + width // 4).to(tl.int32), bracket.low + 1)
    second = tl.maximum((low + width // 2).to(tl.int32), first)
    third = tl.maximum((low + width * 3 // 4).to(tl.int32), second)
    return first, second, third


@triton.jit
def narrow(bracket, needed, first, second, third, count_first, count_second, count_third):
    """The ``Bracket`` after counting at three ascending ranks inside it."""
    low = tl.where(count_first >= needed, first, bracket.low)
    low = tl.where(count_second >= needed, second, low)
    low = tl.where(count_third >= needed, third, low)
    count_low = tl.where(count_first >= needed, count_first, bracket.count_low)
    count_low = tl.where(count_second >= needed, count_second, count_low)
    count_low = tl.where(count_third >= needed, count_third, count_low)
    high = tl.where(count_third < needed, third, bracket.high)
    high = tl.where(count_second < needed, second, high)
    high = tl.where(count_first < needed, first, high)
    count_high = tl.where(count_third < needed, count_third, bracket.count_high)
    count_high = tl.where(count_second < needed, count_second, count_high)
    count_high = tl.where(count_first < needed, count_first, count_high)
    return Bracket(low, high, count_low, count_high)


@triton.jit
def search(bracket, needed, COUNT: tl.constexpr, counted):
    """The ``Bracket`` narrowed until just ``needed`` scores reach its low end, or it is one rank wide.

    ``COUNT(counted, first, second, third)`` returns how many scores reach each of three ascending ranks.
    """
    while (bracket.count_low != needed) & (width_of(bracket) > 1):
        first, second, third = quarter(bracket)
        count_first, count_second, count_third = COUNT(counted, first, second, third)
        bracket = narrow(bracket, needed, first, second, third, count_first, count_second, count_third)
    return bracket

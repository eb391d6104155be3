"""What kernels for CPUs share: conversion of rows, keys in panels, the k-th largest score of a row."""

import math

import numba
import numpy as np

from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.products import dot
from nc_patch.ops.cpu.vectors import (
    count_from,
    element_of,
    f32,
    from_floats,
    i8,
    i32,
    largest,
    set_f32,
    set_i8,
    set_i32,
    take_from,
    to_floats,
)

compiled = numba.njit(nogil=True, error_model="numpy")

INF = np.float32(np.inf)
_LARGEST = np.finfo(np.float32).max
LOG2E = math.log2(math.e)
# Scores of a row that a first guess of its threshold is taken from, and rows that are too short for one.
_SAMPLED, _FEW = 512, 1024


@compiled
def padded(count):
    """``count``, rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@compiled
def read_row(target, source, count, kind):
    """Converts ``count`` elements of a kind to floats, zeros up to a whole vector."""
    whole = count // LANES * LANES
    to_floats(target, source, whole, kind)
    for i in range(whole, count):
        set_f32(target, i, element_of(source, i, kind))
    pad_row(target, count, np.float32(0))


@compiled
def write_row(target, source, count, factor, kind, spare):
    """Writes ``count`` floats times a factor as elements of a kind; ``spare`` has room for a whole vector more."""
    whole, size = count // LANES * LANES, 4 if kind == 0 else 2
    from_floats(target, source, whole, factor, kind)
    if whole < count:
        from_floats(spare, source + 4 * whole, LANES, factor, kind)
        for i in range((count - whole) * size):
            set_i8(target + whole * size, i, i8(spare, i))


@compiled
def dot_row(x, row, count, kind):
    """The dot product of floats and ``count`` elements of a kind."""
    whole = count // LANES * LANES
    total = dot(x, row, whole, kind)
    for i in range(whole, count):
        total += f32(x, i) * element_of(row, i, kind)
    return total


@compiled
def fill_outside(row, count, begin, stop, value):
    """Fills a row of ``count`` floats but for those of [begin, stop)."""
    for i in range(begin):
        set_f32(row, i, value)
    for i in range(stop, count):
        set_f32(row, i, value)


@compiled
def pad_row(row, count, value):
    """Fills the last vector of a row of ``count`` floats."""
    fill_outside(row, padded(count), 0, count, value)


@compiled
def kth_largest(row, count, k, least):
    """A threshold that as few floats as possible reach, ``k`` or more of ``count``, a multiple of 16.

    It is one of the floats where more than ``k`` reach it. NaN reaches every threshold. ``least``: a number that ``k``
    reach, or -inf where none is known.
    """
    if count_from(row, count, INF) >= k:
        return INF
    hi = min(largest(row, count), _LARGEST)
    high = count_from(row, count, hi)
    if high >= k:
        return hi
    lo = least
    if not lo > -INF:
        step = np.float32(max(abs(hi) * 0.25, 1e-30))
        lo = hi - step
        while lo > -INF and count_from(row, count, lo) < k:
            hi = lo
            step *= np.float32(2)
            lo = hi - step
        if not lo > -INF:
            lo = -_LARGEST
        high = count_from(row, count, hi)
    low = count_from(row, count, lo)
    if low < k:
        return -INF
    even = True
    while low > k:
        middle = lo * np.float32(0.5) + hi * np.float32(0.5)
        if even:
            guess = lo + (hi - lo) * np.float32((low - k + 0.5) / (low - high))
            if guess > lo and guess < hi:
                middle = guess
        if not (middle > lo and middle < hi):
            break
        even = not even
        found = count_from(row, count, middle)
        if found >= k:
            lo, low = middle, found
        else:
            hi, high = middle, found
    return lo


@compiled
def threshold_of(row, count, k, values, places, sample):
    """``kth_largest`` of ``count`` floats; arguments as of ``best_of``."""
    taken, guess = _narrowed(row, count, k, 0, values, places, sample)
    pad_row(values, taken, -INF)
    return kth_largest(values, padded(taken), k, guess)


@compiled
def _narrowed(row, count, k, first, values, places, sample):
    """Lists floats among which are the ``k`` largest: how many, and a number that they reach; see ``best_of``."""
    pad_row(row, count, -INF)
    guess = -INF
    if count >= _FEW and 2 * k < count:
        step = count // LANES // (_SAMPLED // LANES)
        for i in range(_SAMPLED // LANES):
            to_floats(sample + 64 * i, row + 64 * step * i, LANES, 0)
        share = k / count
        rank = int(share * _SAMPLED + 4.0 * math.sqrt(share * (1 - share) * _SAMPLED) + 1.0)
        if rank < _SAMPLED:
            guess = kth_largest(sample, _SAMPLED, rank, -INF)
    taken = 0
    if guess > -INF:
        taken = take_from(row, padded(count), guess, values, places, first, 0)
    if taken < k:
        guess = -INF
        take_from(row, padded(count), -INF, values, places, first, 0)
        taken = count
    return taken, guess


@compiled
def best_of(row, count, k, first, values, places, sample):
    """Lists the ``k`` largest of ``count`` floats, in order of place; ties go to the lower place, NaN comes first.

    Args:
        row: up to 15 floats behind the last are overwritten. first: the place of the first.
        values, places: receive the floats and their places, with room for ``count`` and 32 more.
        sample: room for 512 floats.
    """
    taken, guess = _narrowed(row, count, k, first, values, places, sample)
    if taken == k:
        return
    pad_row(values, taken, -INF)
    whole = padded(taken)
    threshold = kth_largest(values, whole, k, guess)
    if threshold > -INF and count_from(values, whole, threshold) == k:
        take_from(values, whole, threshold, values, places, places, 1)
        return
    above = 0
    for i in range(taken):
        above += not f32(values, i) <= threshold
    room, found = k - above, 0
    for i in range(taken):
        value = f32(values, i)
        equal = value == threshold
        if not value <= threshold or (equal and room > 0):
            room -= equal
            set_f32(values, found, value)
            set_i32(places, found, i32(places, i))
            found += 1

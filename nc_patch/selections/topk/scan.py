"""Scores from codes: how a program bounds q·k of a tile of keys without reading a key, and reads only what may matter.

All that a row does not collect scores less than its guess; so the best are collected if as many as are needed are.

``codes.py`` defines the codes and the bounds. A weighted query ``w = q * spread`` is rounded to 16 bits,
``w ~= step * (256 * high + low)`` with two int8 vectors, so that its product with codes is an exact integer product of
the tensor cores. Both vectors of all rows are stacked into one operand, of as many rows as a matrix instruction takes.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import budget_of, forced_keys, head_of, program_rows, row_pointers, span, visible_keys
from nc_patch.ops.triton.scores import dot_scores, finite_or_zero, fold, load_queries, logits_base2
from nc_patch.ops.triton.structs import PER_CALL, Rows
from nc_patch.selections.topk.codes import KeyCodes
from nc_patch.selections.topk.encode import HALF_ULP, LARGEST, SMALLEST

# The largest weight: 127 * 256 + 127.
_LARGEST_WEIGHT = tl.constexpr(32639.0)
# The bits of a float32 that are its exponent, what less these are those of the inverse, and of 2**-126 and 2**126.
_EXPONENT, _INVERSE = tl.constexpr(0x7F800000), tl.constexpr(254 << 23)
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = tl.constexpr(1 << 23), tl.constexpr(253 << 23)
# What one step of a sum on matrix units may lose, relative to the sum of the sizes: they cut where float32 rounds.
_MATRIX_ULP = tl.constexpr(2.0**-22)
# Rounding of a logit on its way from a raw score, relative to the logit and to the soft-cap: sixteen half units.
_LOGIT_SLACK = tl.constexpr(2.0**-20)


class CodedRows(NamedTuple):
    """The rows of a program against codes: a score is ``at_center + scale * step * product`` of weights and codes.

    It is off by at most ``per_residual * residual + per_scale * scale + slack``, float32's rounding included. All are
    float32 ``[BLOCK_M]`` but the weights, int8 ``[2 * BLOCK_M, BLOCK_D]``: the high parts of all rows, then the low
    ones.
    """

    weights: Any
    step: Any
    at_center: Any
    per_residual: Any
    per_scale: Any
    slack: Any


# Of each row: the rivals ``[first, last)`` that it collects where they score ``least`` or more.
Sought = namedtuple("Sought", "first last least")


# Sums of exponentials of each row, at least and at most, of keys whose scores are known from both sides: both over
# ``2**peak``, the largest that one may be. Where that is infinite the least is not known.
Masses = namedtuple("Masses", "peak least most")


@triton.jit(do_not_specialize=[*PER_CALL, "length", "splits", "segment", "again"])
def scan_kernel(
    query, key, codes, inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, length,
    splits, segment, again, settings, shape, scored, STAGES: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Lists, of every ``splits``-th tile of keys, those that may reach the ``guess`` of any row or are forced for one.

    The keys of this list, the program's own segment, whose positions rise, are scored exactly, and each row collects
    its rivals that reach its guess. Where fewer do than it needs, the guess was too high: launched ``again``, the rows
    of such a block list every key they see, and those that were short collect all their rivals. With ``BOUNDS`` also
    the masses of the keys that are not listed. ``scored`` is the shape of the tiles of exact scores.
    ``STAGES`` tiles of codes are on their way at once.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    sought = rivals_sought(scratch, rows, again, sink_keys, recent_keys)
    if (again == 0) | (tl.max(sought.last - sought.first, axis=0) > 0):
        positions, count, first = entries_of(scratch, splits, segment)
        of_head = codes_of_head(codes, rows, num_kv_heads, length, shape)
        coded = coded_rows(query, rows, of_head, shape)
        listed, unlisted = list_keys(
            coded, of_head, rows, sought, positions + first, splits, settings, shape, STAGES, BOUNDS
        )
        tl.store(count, listed)
        if BOUNDS:
            store_masses(scratch, rows, splits, 0, unlisted)
        # What other threads have stored is read back.
        tl.debug_barrier()
        tile_rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, scored.BLOCK_M)
        tile_sought = rivals_sought(scratch, tile_rows, again, sink_keys, recent_keys)
        keys = head_of(key, tile_rows.batch, tile_rows.kv_head)
        collect(
            query, keys, tile_rows, tile_sought, positions, first, first + listed, scratch, splits * segment, again,
            scored, BOUNDS,
        )  # fmt: skip


@triton.jit
def rivals_sought(scratch, rows, again, sink_keys, recent_keys):
    """What rows collect (``Sought``): the rivals that reach their guess.

    ``again``, rows that have collected fewer than they need collect all, and the others none.
    """
    first, last, needed = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(scratch.floats + scratch.guess + rows.row, mask=rows.valid, other=float("inf"))
    if again:
        reached = tl.load(scratch.integers + scratch.reached + rows.row * 2, mask=rows.valid, other=0)
        last = tl.where(reached < needed, last, first)
        least = tl.where(reached < needed, float("-inf"), least)
    return Sought(first, last, least)


@triton.jit
def list_keys(
    coded, codes, rows, sought, positions, splits, settings, shape, STAGES: tl.constexpr, BOUNDS: tl.constexpr
):  # fmt: skip
    """Lists the keys of a program that any of its rows may seek, or sees and does not choose by score.

    Returns how many they are and, with ``BOUNDS``, the ``Masses`` of the others.
    """
    lowest, highest = span(rows.start, rows.end, rows.end > rows.start)
    n = tl.arange(0, shape.BLOCK_N)
    listed = 0
    unlisted = no_masses(shape.BLOCK_M)
    for tile in tl.range(
        lowest // shape.BLOCK_N + tl.program_id(1), tl.cdiv(highest, shape.BLOCK_N), splits, num_stages=STAGES
    ):
        begin = tl.cast(tile, tl.int64) * shape.BLOCK_N
        columns = tile * shape.BLOCK_N + n
        within = columns < highest
        product = code_products(coded, codes.codes + begin * shape.D, n, within, shape)
        sizes = tl.load(codes.scale + begin + n, mask=within, other=0.0)
        residual = tl.load(codes.residual + begin + n, mask=within, other=0.0)
        score = coded_scores(coded, product, sizes)
        error = coded.per_residual[:, None] * residual[None, :] + (
            coded.per_scale[:, None] * sizes[None, :] + coded.slack[:, None]
        )
        seen = (columns[None, :] >= rows.start[:, None]) & (columns[None, :] < rows.end[:, None])
        rival = (columns[None, :] >= sought.first[:, None]) & (columns[None, :] < sought.last[:, None])
        # NaN is below nothing, so that a key whose score is not known at all is listed.
        chosen = tl.max((seen & ~(rival & (score + error < sought.least[:, None]))).to(tl.int32), axis=0)
        place = listed + tl.cumsum(chosen, axis=0) - chosen
        tl.store(positions + place, columns, mask=chosen > 0)
        listed += tl.sum(chosen, axis=0)
        if BOUNDS:
            unlisted = add_masses(unlisted, score, error, seen & (chosen == 0)[None, :], settings)
    return listed, unlisted


@triton.jit
def collect(
    query, keys, rows, sought, positions, first, stop, scratch, stride, again, shape, BOUNDS: tl.constexpr
):  # fmt: skip
    """Scores the keys of the entries ``first:stop`` exactly, and adds those that a row seeks to its collection.

    Their order there is no matter: it is a set. With ``BOUNDS`` what scores may be off by is stored, too.
    """
    queries = load_queries(query, rows, shape)
    collected = scratch.integers + scratch.reached + rows.row * 2 + again
    for begin in tl.range(first, stop, shape.BLOCK_N, num_stages=2):
        at, position, here = entries_at(rows, positions, begin, stop, stride, shape)
        inside = rows.valid[:, None] & here[None, :]
        offsets = position.to(tl.int64) * keys.stride
        score = dot_scores(queries, keys.data, offsets, here, shape, True)
        tl.store(scratch.floats + scratch.scores + at, score, mask=inside)
        if BOUNDS:
            size = dot_scores(queries, keys.data, offsets, here, shape, True, True)
            tl.store(scratch.floats + scratch.errors + at, size * ((shape.D + 16) * _MATRIX_ULP), mask=inside)
        rival = (position[None, :] >= sought.first[:, None]) & (position[None, :] < sought.last[:, None])
        # NaN reaches any score.
        ones = (inside & rival & ~(score < sought.least[:, None])).to(tl.int32)
        count = tl.sum(ones, axis=1)
        taken = tl.atomic_add(collected, count, mask=rows.valid & (count > 0), sem="relaxed")
        place = (rows.row * stride + taken)[:, None] + tl.cumsum(ones, axis=1) - ones
        where = scratch.integers + scratch.reached_positions + place
        tl.store(where, tl.broadcast_to(position[None, :], place.shape), mask=ones > 0)
        tl.store(scratch.floats + scratch.reached_scores + place, score, mask=ones > 0)


@triton.jit
def entries_of(scratch, splits, segment):
    """Pointers to the positions of a block's entries and to how many a program has; the first entry that it has."""
    block = tl.program_id(0).to(tl.int64) * splits
    positions = scratch.integers + scratch.positions + block * segment
    return positions, scratch.integers + scratch.counts + block + tl.program_id(1), tl.program_id(1) * segment


@triton.jit
def entries_at(rows, positions, begin, stop, stride, shape):
    """Of ``BLOCK_N`` entries: places by row, which has ``stride``; positions; whether they come before ``stop``."""
    e = begin + tl.arange(0, shape.BLOCK_N)
    return rows.row[:, None] * stride + e[None, :], tl.load(positions + e, mask=e < stop, other=0), e < stop


@triton.jit
def one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk):
    """``program_rows`` of one row, in the order of a contiguous ``[B, Hq, Lq]``; its members are scalars."""
    row = tl.program_id(0).to(tl.int64)
    index = row % Lq
    head = row // Lq % (num_kv_heads * group)
    batch = row // Lq // (num_kv_heads * group)
    start, end = visible_keys(inputs.visible + (batch * Lq + index) * 2, row >= 0, Lk)
    wanted = tl.load(budget_of(inputs.budget, budget_heads, batch, head, index, Lq))
    wanted = tl.minimum(tl.maximum(wanted, 0), end - start)
    return Rows(batch, head // group, index, head, row, row >= 0, start, end, wanted)


@triton.jit
def rivals_of(rows, sink_keys, recent_keys):
    """(first, end) of the keys of each row that are attended by their score, if at all, and how many of them are."""
    firsts, recents = forced_keys(rows.wanted, sink_keys, recent_keys, True)
    return rows.start + firsts, rows.end - recents, rows.wanted - firsts - recents


@triton.jit
def codes_of_head(codes, rows, num_kv_heads, length, shape):
    """The ``KeyCodes`` of one head: pointers to its first key's, of ``length`` keys, and to its first channel's."""
    head = rows.batch * num_kv_heads + rows.kv_head
    keys = head * length
    return KeyCodes(
        codes.codes + keys * shape.D, codes.scale + keys, codes.residual + keys, codes.center + head * shape.D,
        codes.spread + head * shape.D,
    )  # fmt: skip


@triton.jit
def coded_rows(query, rows, codes, shape):
    """The ``CodedRows`` of a program's rows against the codes of their head.

    Channels come first in the tiles that are summed: sums over them then stay within few threads.
    """
    D: tl.constexpr = shape.D
    d = tl.arange(0, shape.BLOCK_D)
    exists = (d < D)[:, None]
    places = row_pointers(query, rows)[None, :] + d[:, None]
    q = tl.load(places, mask=exists & rows.valid[None, :], other=0.0).to(tl.float32)
    center = tl.load(codes.center + d[:, None], mask=exists, other=0.0)
    w = q * tl.load(codes.spread + d[:, None], mask=exists, other=0.0)
    at_center = tl.sum(q * center, axis=0)
    # Of the sum above, and of the center's part in an exact score.
    slack = tl.sum(tl.abs(q * center), axis=0) * (2 * (D + 16) * HALF_ULP) + SMALLEST

    largest = tl.max(tl.abs(w), axis=0)
    step = largest / _LARGEST_WEIGHT
    step = tl.where((step > 1e-37) & (largest < float("inf")), step, 0.0)
    level = w * tl.where(step > 0, 1.0 / tl.where(step > 0, step, 1.0), 0.0)[None, :]
    level = tl.floor(tl.where(level == level, level, 0.0) + 0.5)
    level = tl.minimum(tl.maximum(level, -_LARGEST_WEIGHT), _LARGEST_WEIGHT)
    # NaN and infinity stay in what is left over, so that such a row bounds nothing.
    left_over = column_norms(w - step[None, :] * level, largest)
    size = column_norms(w, largest)
    widest = LARGEST * (D**0.5) * (1.0 + 8 * HALF_ULP)
    per_scale = widest * (size * ((D + 16) * HALF_ULP) + left_over)

    high = tl.floor((level + 128.0) * (1.0 / 256.0))
    both = tl.join(high, level - 256.0 * high).to(tl.int8)
    weights = tl.reshape(tl.permute(both, (2, 1, 0)), [2 * shape.BLOCK_M, shape.BLOCK_D])
    return CodedRows(weights, step, at_center, size, per_scale, slack)


@triton.jit
def column_norms(tile, largest):
    """At least the norm of each column, whose elements are at most ``largest``; not finite of NaN or inf.

    Without overflow or underflow on the way: by powers of two, which round nothing, made of exponents alone.
    """
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & _EXPONENT, _SMALLEST_EXPONENT)
    exponent = tl.minimum(exponent, _LARGEST_EXPONENT)
    inverse = -exponent + _INVERSE  # in this order also where constants are objects
    scaled = tile * inverse.to(tl.float32, bitcast=True)[None, :]
    size = exponent.to(tl.float32, bitcast=True)
    return size * tl.sqrt(tl.sum(scaled * scaled, axis=0)) * (1.0 + (tile.shape[0] + 16) * HALF_ULP)


@triton.jit
def code_products(coded, codes, keys, within, shape):
    """int32 ``[BLOCK_M, BLOCK_N]``, exact: the 16-bit weights times the codes of ``keys``."""
    d = tl.arange(0, shape.BLOCK_D)
    mask = within[None, :]
    if shape.D < shape.BLOCK_D:
        mask = mask & (d < shape.D)[:, None]
    tile = tl.load(codes + (keys[None, :] * shape.D + d[:, None]), mask=mask, other=0)
    parts = tl.reshape(tl.dot(coded.weights, tile, out_dtype=tl.int32), [2, shape.BLOCK_M, shape.BLOCK_N])
    worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    return tl.sum(parts * worth[:, None, None], axis=0)


@triton.jit
def coded_scores(coded, product, sizes):
    """Raw scores of ``CodedRows`` from their products with codes, whose scales are ``sizes``."""
    return product.to(tl.float32) * sizes[None, :] * coded.step[:, None] + coded.at_center[:, None]


@triton.jit
def no_masses(BLOCK_M: tl.constexpr):
    """The ``Masses`` of no key."""
    none = tl.zeros([BLOCK_M], dtype=tl.float32)
    return Masses(none - float("inf"), none, none)


@triton.jit
def add_masses(masses, score, error, among, settings):
    """The ``Masses`` with the keys of a tile that are ``among`` a row's, whose raw scores may be off by ``error``.

    A logit that is not known is infinite.
    """
    lower = logits_base2(score - error, settings)
    upper = logits_base2(score + error, settings)
    limit = 0.0
    if settings.softcap is not None:
        limit = settings.softcap
    lower -= (tl.abs(lower) + limit) * _LOGIT_SLACK
    upper += (tl.abs(upper) + limit) * _LOGIT_SLACK
    lower = tl.where(among & (lower == lower), lower, float("-inf"))
    upper = tl.where(among, tl.where(upper == upper, upper, float("inf")), float("-inf"))
    peak, most, _weights, shrink = fold(upper, masses.peak, masses.most)
    least = masses.least * shrink + tl.sum(tl.exp2(lower - finite_or_zero(peak)[:, None]), axis=1)
    return Masses(peak, least, most)


@triton.jit
def store_masses(scratch, rows, splits, kind, masses):
    """Stores a split's ``Masses`` of one of three kinds: of keys not listed, of keys attended, of the other entries."""
    at = scratch.floats + scratch.masses + ((rows.row * splits + tl.program_id(1)) * 3 + kind) * 3
    tl.store(at, masses.peak, mask=rows.valid)
    tl.store(at + 1, masses.least, mask=rows.valid)
    tl.store(at + 2, masses.most, mask=rows.valid)

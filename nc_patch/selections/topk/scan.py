"""Scores from codes: how a program bounds q·k of a tile of keys without reading a key, and lists what may matter.

``codes.py`` defines the codes and the bounds. A weighted query ``w = q * spread`` is itself rounded to 16 bits,
``w ~= step * (256 * high + low)`` with two int8 vectors, so that its product with a key's codes is an exact integer
product of the tensor cores; what the rounding leaves out is part of the error. Both vectors of a program's rows are
stacked into one operand of twice the rows, which is the least number of rows that a matrix instruction takes.

A tile of keys is looked at twice: by the high halves of all its codes, and by the low halves of those alone that the
high ones do not rule out for every row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import budget_of, forced_keys, program_rows, span, visible_keys
from nc_patch.ops.triton.scores import fold, logits_base2
from nc_patch.ops.triton.structs import PER_CALL, Rows
from nc_patch.selections.topk.codes import HIGH_UNIT, LARGEST_CODE, KeyCodes

# The largest weight: 127 * 256 + 127.
_LARGEST_WEIGHT = tl.constexpr(32639.0)
# As in codes.py: half a unit in the last place of a float32 near 1, what float32 loses near its smallest number, and
# the largest code.
_HALF_ULP = tl.constexpr(2.0**-24)
_SMALLEST = tl.constexpr(1e-25)
_LARGEST = tl.constexpr(float(LARGEST_CODE))
_HIGH_UNIT = tl.constexpr(HIGH_UNIT)
# The golden ratio's fraction in units of 2**-16, and odd.
_GOLDEN = tl.constexpr(40503)
# Rounding of a logit on its way from a raw score, relative to the logit and to the soft-cap: sixteen half units.
_LOGIT_SLACK = tl.constexpr(2.0**-20)


class CodeShape(NamedTuple):
    """The constants of a program over codes: ``head_dim``, rows, keys in a tile, and padded half of ``head_dim``."""

    D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_H: Any


class CodedRows(NamedTuple):
    """The rows of a program against codes: a score is ``at_center + scale * step * product`` of weights and codes.

    It is off by at most ``per_residual * residual + per_scale * scale + slack``, float32's rounding included.

    Attributes:
        firsts, seconds: weights int8 ``[2 * BLOCK_M, BLOCK_H]`` of the first half of the channels and of the second:
            the high parts of all rows, then the low ones.
        step, at_center, per_residual, per_scale, slack: float32 ``[BLOCK_M]``.
    """

    firsts: Any
    seconds: Any
    step: Any
    at_center: Any
    per_residual: Any
    per_scale: Any
    slack: Any


class Mass(NamedTuple):
    """A sum of exponentials of each row: the largest logit in base 2, and the sum relative to its power of two.

    Powers are of ``finite_or_zero(peak)``.
    """

    peak: Any
    total: Any


@triton.jit(do_not_specialize=[*PER_CALL, "length"])
def sample_kernel(
    query, codes, inputs, samples, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, length, shape,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Approximate scores, ``samples[row, SAMPLES]``, of keys drawn from even shares of the rivals of a block of rows.

    Which key of its share is drawn follows from the share's number alone, by multiples of the golden ratio: evenly
    spaced keys would be in step with a text that repeats itself.
    A key outside a row's rivals is stored as -inf, and NaN as +inf. A program scores ``BLOCK_N`` keys.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    codes = codes_of_head(codes, rows, num_kv_heads, length, shape)
    coded = coded_rows(query, rows, codes, group, Lq, shape)
    first, last = rivals_of(rows, sink_keys, recent_keys)
    begin, end = span(first, last, last > first)
    place = tl.program_id(1) * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
    at = (place.to(tl.int64) << 16) + (place * _GOLDEN & 0xFFFF)
    columns = (begin + (end - begin).to(tl.int64) * at // (SAMPLES << 16)).to(tl.int32)
    within = columns < end
    product = _HIGH_UNIT * half_products(coded, codes.high, columns.to(tl.int64), within, shape)
    product += half_products(coded, codes.low, columns.to(tl.int64), within, shape)
    score = coded_scores(coded, product, tl.load(codes.scale + columns, mask=within, other=0.0))
    score = tl.where(score == score, score, float("inf"))
    rival = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
    score = tl.where(rival, score, float("-inf"))
    tl.store(samples + (rows.row * SAMPLES)[:, None] + place[None, :], score, mask=rows.valid[:, None])


@triton.jit(do_not_specialize=[*PER_CALL, "length", "splits", "segment"])
def scan_kernel(
    query, codes, inputs, guess, segments, outside, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys,
    length, splits, segment, settings, shape,
):  # fmt: skip
    """Lists, of every ``splits``-th tile of keys, those that may reach the ``guess`` of any row or are forced for one.

    The rows of a program share its list, a segment of its own, whose positions rise; its count goes on where the
    segment is full. Unless ``outside`` is None, ``outside[row, split]`` is (peak, total) of the softmax of the lower
    and then of the upper logits, in base 2, of the keys not listed, for which every low half is read.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    codes = codes_of_head(codes, rows, num_kv_heads, length, shape)
    coded = coded_rows(query, rows, codes, group, Lq, shape)
    first, last = rivals_of(rows, sink_keys, recent_keys)
    least = tl.load(guess + rows.row, mask=rows.valid, other=float("inf"))
    lowest, highest = span(rows.start, rows.end, rows.end > rows.start)
    split = tl.program_id(1)
    own = tl.program_id(0).to(tl.int64) * splits + split
    positions = segments.positions + own * segment
    n = tl.arange(0, shape.BLOCK_N)
    listed = 0
    least_mass = empty_mass(shape.BLOCK_M)
    most_mass = least_mass
    for tile in range(lowest // shape.BLOCK_N + split, tl.cdiv(highest, shape.BLOCK_N), splits):
        begin = tl.cast(tile, tl.int64) * shape.BLOCK_N
        columns = tile * shape.BLOCK_N + n
        within = columns < highest
        half: tl.constexpr = (shape.D + 1) // 2
        product = _HIGH_UNIT * half_products(coded, codes.high + begin * half, n, within, shape)
        sizes = tl.load(codes.scale + begin + n, mask=within, other=0.0)
        far = tl.load(codes.coarse + begin + n, mask=within, other=0.0).to(tl.float32)
        near = tl.load(codes.residual + begin + n, mask=within, other=0.0).to(tl.float32)
        rounding = coded.per_scale[:, None] * sizes[None, :] + coded.slack[:, None]
        seen = (columns[None, :] >= rows.start[:, None]) & (columns[None, :] < rows.end[:, None])
        forced = (columns[None, :] < first[:, None]) | (columns[None, :] >= last[:, None])
        # NaN is below nothing, so that a key whose score is not known at all is listed.
        rough = coded_scores(coded, product, sizes)
        reach = coded.per_residual[:, None] * far[None, :] + rounding
        maybe = seen & (forced | ~(rough + reach < least[:, None]))
        read = tl.max(maybe.to(tl.int32), axis=0) > 0 if outside is None else within
        product += half_products(coded, codes.low + begin * half, n, read, shape)
        score = coded_scores(coded, product, sizes)
        error = coded.per_residual[:, None] * near[None, :] + rounding
        chosen = tl.max((maybe & (forced | ~(score + error < least[:, None]))).to(tl.int32), axis=0)
        place = listed + tl.cumsum(chosen, axis=0) - chosen
        tl.store(positions + place, columns, mask=(chosen > 0) & (place < segment))
        if outside is not None:
            rest = seen & (chosen == 0)[None, :]
            lower, upper = logit_bounds(score, error, settings)
            least_mass = add_logits(least_mass, lower, rest)
            most_mass = add_logits(most_mass, upper, rest)
        listed += tl.sum(chosen, axis=0)
    tl.store(segments.counts + own, listed)
    if outside is not None:
        sums = outside + (rows.row * splits + split) * 4
        store_mass(sums, least_mass, rows.valid)
        store_mass(sums + 2, most_mass, rows.valid)


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
    """(first, end) of the keys of each row that are attended by their score, if at all."""
    firsts, recents = forced_keys(rows.wanted, sink_keys, recent_keys, True)
    return rows.start + firsts, rows.end - recents


@triton.jit
def codes_of_head(codes, rows, num_kv_heads, length, shape):
    """The ``KeyCodes`` of one head: pointers to its first key's, of ``length`` keys, and to its first channel's."""
    head = rows.batch * num_kv_heads + rows.kv_head
    keys = head * length
    halves = keys * ((shape.D + 1) // 2)
    return KeyCodes(
        codes.high + halves, codes.low + halves, codes.scale + keys, codes.coarse + keys, codes.residual + keys,
        codes.center + head * shape.D, codes.spread + head * shape.D,
    )  # fmt: skip


@triton.jit
def coded_rows(query, rows, codes, group, Lq, shape):
    """The ``CodedRows`` of the rows of ``program_rows``, against the codes of their head."""
    blocks = tl.cdiv(Lq * group, shape.BLOCK_M)
    stacked = tl.arange(0, 2 * shape.BLOCK_M)
    flat = (blocks - 1 - tl.program_id(0) % blocks) * shape.BLOCK_M + stacked % shape.BLOCK_M
    valid = flat < Lq * group
    head = rows.kv_head * group + flat % group
    pointers = query.data + rows.batch * query.stride_b + head * query.stride_h
    pointers += (flat // group).to(tl.int64) * query.stride_l
    D: tl.constexpr = shape.D
    half: tl.constexpr = (D + 1) // 2
    h = tl.arange(0, shape.BLOCK_H)
    q, middle, w = weighted(pointers, codes.center, codes.spread, valid, h, half)
    q_2, middle_2, w_2 = weighted(pointers + half, codes.center + half, codes.spread + half, valid, h, D - half)
    at_center = tl.sum(q * middle, axis=1) + tl.sum(q_2 * middle_2, axis=1)
    slack = row_norms(q, q_2) * tl.max(row_norms(middle, middle_2), axis=0) * (2 * (D + 16) * _HALF_ULP) + _SMALLEST

    largest = tl.maximum(tl.max(tl.abs(w), axis=1), tl.max(tl.abs(w_2), axis=1))
    step = largest / _LARGEST_WEIGHT
    step = tl.where((step > 1e-37) & (largest < float("inf")), step, 0.0)
    level = levels(w, step)
    level_2 = levels(w_2, step)
    # NaN and infinity stay in what is left over, so that such a row bounds nothing.
    left_over = row_norms(w - step[:, None] * level, w_2 - step[:, None] * level_2)
    size = row_norms(w, w_2)
    widest = _LARGEST * (D**0.5) * (1.0 + 8 * _HALF_ULP)
    per_scale = widest * (size * ((D + 16) * _HALF_ULP) + left_over)
    is_high = (stacked < shape.BLOCK_M)[:, None]
    return CodedRows(
        byte_of(level, is_high),
        byte_of(level_2, is_high),
        one_half(step, shape.BLOCK_M),
        one_half(at_center, shape.BLOCK_M),
        one_half(size, shape.BLOCK_M),
        one_half(per_scale, shape.BLOCK_M),
        one_half(slack, shape.BLOCK_M),
    )


@triton.jit
def weighted(pointers, center, spread, valid, h, count):
    """``count`` channels of queries, of the center ``[1, BLOCK_H]``, and of the queries times the spread; float32."""
    mask = (h < count)[None, :]
    q = tl.load(pointers[:, None] + h[None, :], mask=valid[:, None] & mask, other=0.0).to(tl.float32)
    middle = tl.load(center + h[None, :], mask=mask, other=0.0)
    return q, middle, q * tl.load(spread + h[None, :], mask=mask, other=0.0)


@triton.jit
def levels(w, step):
    """Whole numbers of at most 16 bits that times ``step`` are nearest to w; 0 where there are none."""
    level = w / tl.where(step > 0, step, 1.0)[:, None]
    level = tl.where((step > 0)[:, None] & (level == level), level, 0.0)
    return tl.minimum(tl.maximum(tl.floor(level + 0.5), -_LARGEST_WEIGHT), _LARGEST_WEIGHT)


@triton.jit
def byte_of(level, is_high):
    """The upper or the lower byte of 16-bit whole numbers, both signed."""
    upper = tl.floor((level + 128.0) * (1.0 / 256.0))
    return tl.where(is_high, upper, level - 256.0 * upper).to(tl.int8)


@triton.jit
def one_half(stacked, BLOCK_M: tl.constexpr):
    """The first ``BLOCK_M`` of twice as many numbers whose halves are equal; NaN stays."""
    return 0.5 * tl.sum(tl.reshape(stacked, [2, BLOCK_M]), axis=0)


@triton.jit
def row_norms(rows, more):
    """At least the norm of each row of two tiles side by side, without overflow or underflow on the way.

    NaN where a row holds NaN or inf.
    """
    largest = tl.maximum(tl.max(tl.abs(rows), axis=1), tl.max(tl.abs(more), axis=1))
    size = tl.where(largest > 0, largest, 1.0)[:, None]
    squares = tl.sum((rows / size) * (rows / size), axis=1) + tl.sum((more / size) * (more / size), axis=1)
    return largest * tl.sqrt(squares) * (1.0 + (2 * rows.shape[1] + 16) * _HALF_ULP)


@triton.jit
def half_products(coded, packed, keys, within, shape):
    """int32 ``[BLOCK_M, BLOCK_N]``, exact: the 16-bit weights times the packed halves of the codes of ``keys``."""
    half: tl.constexpr = (shape.D + 1) // 2
    h = tl.arange(0, shape.BLOCK_H)
    places = packed + (keys[None, :] * half + h[:, None])
    if half == shape.BLOCK_H:
        tile = tl.load(places, mask=within[None, :], other=0)
    else:
        tile = tl.load(places, mask=within[None, :] & (h < half)[:, None], other=0)
    # Shifts of signed numbers, eight bits wide, so that the sign of the lower half comes out too.
    product = tl.dot(coded.firsts, (tile << 4).to(tl.int8) >> 4, out_dtype=tl.int32)
    product = tl.dot(coded.seconds, tile >> 4, product, out_dtype=tl.int32)
    parts = tl.reshape(product, [2, shape.BLOCK_M, shape.BLOCK_N])
    worth = tl.where(tl.arange(0, 2) == 0, 256, 1)
    return tl.sum(parts * worth[:, None, None], axis=0)


@triton.jit
def coded_scores(coded, product, sizes):
    """Raw scores of ``CodedRows`` from their products with codes, whose scales are ``sizes``."""
    return product.to(tl.float32) * sizes[None, :] * coded.step[:, None] + coded.at_center[:, None]


@triton.jit
def empty_mass(BLOCK_M: tl.constexpr):
    """The ``Mass`` of no key."""
    return Mass(tl.full([BLOCK_M], float("-inf"), dtype=tl.float32), tl.zeros([BLOCK_M], dtype=tl.float32))


@triton.jit
def add_logits(mass, logits, among):
    """The ``Mass`` with those of a tile of logits that are ``among`` a row's."""
    peak, total, _weights, _shrink = fold(tl.where(among, logits, float("-inf")), mass.peak, mass.total)
    return Mass(peak, total)


@triton.jit
def store_mass(places, mass, valid):
    """Stores a ``Mass`` as two numbers side by side."""
    tl.store(places, mass.peak, mask=valid)
    tl.store(places + 1, mass.total, mask=valid)


@triton.jit
def logit_bounds(score, error, settings):
    """(lower, upper) logits in base 2 of raw scores that may be off by ``error``; what is not known is infinite."""
    lower = logits_base2(score - error, settings)
    upper = logits_base2(score + error, settings)
    lower -= logit_slack(lower, settings)
    upper += logit_slack(upper, settings)
    return tl.where(lower == lower, lower, float("-inf")), tl.where(upper == upper, upper, float("inf"))


@triton.jit
def logit_slack(logits, settings):
    """What logits in base 2 may be off by beyond the error of the scores they are made of."""
    slack = tl.abs(logits) * _LOGIT_SLACK
    if settings.softcap is not None:
        slack += settings.softcap * _LOGIT_SLACK
    return slack

"""Tiles of raw scores, logits, and the running softmax.

Every pass over scores calls ``dot_scores`` with the same shape, so that a score has the same bits in all of them.
"""

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import row_pointers
from nc_patch.ops.triton.structs import Queries, Softmax

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Triton's interpreter multiplies bfloat16 as integers; there, dots take their (exactly converted) operands in float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_queries(query, rows, shape):
    """The ``Queries`` of a program's ``Rows``, from a tensor of queries (``Heads``)."""
    return load_rows(row_pointers(query, rows), rows.valid, shape)


@triton.jit
def load_rows(pointers, valid, shape):
    """The ``Queries`` at ``pointers``; where scores are summed in chunks, the tile is a stand-in that is not read."""
    if shape.CHUNK_D == shape.BLOCK_D:
        d = tl.arange(0, shape.BLOCK_D)
        tile = tl.load(pointers[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < shape.D), other=0.0)
    else:
        tile = tl.load(pointers, mask=valid, other=0.0)
    return Queries(tile, pointers, valid)


@triton.jit
def dot(left, right, acc):
    """``left @ right + acc`` in float32, without TF32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def dot_scores(queries, keys, offsets, in_range, shape, EDGE: tl.constexpr, SIZES: tl.constexpr = False):
    """Raw scores q·k in float32 of the keys at ``keys + offsets``; ``EDGE`` reads only those that are ``in_range``.

    With ``SIZES`` the sums of the sizes of what a score is a sum of.
    """
    scores = tl.zeros([queries.rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    if shape.CHUNK_D == shape.BLOCK_D:
        d = tl.arange(0, shape.BLOCK_D)
        places = keys + (offsets[None, :] + d[:, None])
        if EDGE:
            tile = tl.load(places, mask=(d[:, None] < shape.D) & in_range[None, :], other=0.0)
        elif shape.D == shape.BLOCK_D:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=d[:, None] < shape.D, other=0.0)
        part = queries.tile
        if SIZES:
            part, tile = tl.abs(part), tl.abs(tile)
        scores = dot(part, tile, scores)
    else:
        for chunk in range(0, shape.D, shape.CHUNK_D):
            d = chunk + tl.arange(0, shape.CHUNK_D)
            inside = d < shape.D
            part = tl.load(queries.rows[:, None] + d[None, :], mask=queries.valid[:, None] & inside[None, :], other=0.0)
            places = keys + (offsets[None, :] + d[:, None])
            tile = tl.load(places, mask=inside[:, None] & in_range[None, :], other=0.0)
            if SIZES:
                part, tile = tl.abs(part), tl.abs(tile)
            scores = dot(part, tile, scores)
    return scores


@triton.jit
def score_run(queries, keys, begin, in_range, shape, EDGE: tl.constexpr):
    """``dot_scores`` of the ``BLOCK_N`` keys from ``begin`` on, of one head (``Matrix``)."""
    offsets = tl.arange(0, shape.BLOCK_N) * keys.stride
    return dot_scores(queries, keys.data + tl.cast(begin, tl.int64) * keys.stride, offsets, in_range, shape, EDGE)


@triton.jit
def logits_base2(scores, settings):
    """Raw scores scaled, soft-capped, and times log2(e), so that the softmax can use exp2."""
    bent, factor = factored_logits(scores, settings)
    return bent * factor


@triton.jit
def factored_logits(scores, settings):
    """Two factors of ``logits_base2``: a tensor, and a positive number."""
    if settings.softcap is not None:
        ratio = scores * (settings.scale / settings.softcap)
        shrink = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2_E))
        bent = (1.0 - shrink) / (1.0 + shrink)
        bent = tl.where(ratio < 0, -bent, bent)
        factor = settings.softcap * LOG2_E
    else:
        bent = scores
        factor = settings.scale * LOG2_E
    return bent, factor


@triton.jit
def finite_or_zero(peak):
    """What a softmax with this largest logit subtracts: never inf - inf, which would turn zero weights into NaN."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def empty_softmax(shape):
    """A ``Softmax`` of no key."""
    return Softmax(
        tl.zeros([shape.BLOCK_M, shape.BLOCK_DV], dtype=tl.float32),
        tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32),
        tl.zeros([shape.BLOCK_M], dtype=tl.float32),
    )


@triton.jit
def fold(logits, peak, total):
    """Takes a tile of logits into a running softmax: (peak, total, the tile's weights, factor of what came before)."""
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    base = finite_or_zero(higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    return higher, total * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def accumulate_run(softmax, logits, values, begin, in_range, shape):
    """The ``Softmax`` with a tile of logits ``[BLOCK_M, BLOCK_N]``, -inf where a row does not attend.

    The values of one head (``Matrix``) from ``begin`` on that are ``in_range`` are loaded after the logits are folded:
    fewer registers.
    """
    offsets = tl.arange(0, shape.BLOCK_N) * values.stride
    return accumulate(softmax, logits, values.data + tl.cast(begin, tl.int64) * values.stride, offsets, in_range, shape)


@triton.jit
def accumulate(softmax, logits, values, offsets, in_range, shape):
    """``accumulate_run`` of the values at ``values + offsets``."""
    peak, total, weights, shrink = fold(logits, softmax.peak, softmax.total)
    dv = tl.arange(0, shape.BLOCK_DV)
    places = values + (offsets[:, None] + dv[None, :])
    tile = tl.load(places, mask=in_range[:, None] & (dv[None, :] < shape.DV), other=0.0)
    return Softmax(dot(weights.to(tile.dtype), tile, softmax.acc * shrink[:, None]), peak, total)


@triton.jit
def join_sink(peak, total, sinks, head, valid):
    """(base, share, denominator): the softmax's denominator relative to 2**base, and the factor of acc to match it.

    ``sinks`` points to a logit for each query head, or is None.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        base = finite_or_zero(tl.maximum(peak, sink))
        share = tl.exp2(peak - base)
        denominator = total * share + tl.exp2(sink - base)
    else:
        base = finite_or_zero(peak)
        share = tl.exp2(peak - base)
        denominator = total
    return base, share, denominator


@triton.jit
def write_rows(output, rows, values, attended, shape):
    """Stores values in the contiguous ``[B, Hq, Lq, DV]``, and zero where a row has no ``attended`` key.

    A row whose keys all score -inf stays 0 / 0.
    """
    dv = tl.arange(0, shape.BLOCK_DV)
    values = tl.where((attended > 0)[:, None], values, 0.0)
    mask = rows.valid[:, None] & (dv[None, :] < shape.DV)
    tl.store((output + rows.row * shape.DV)[:, None] + dv[None, :], values.to(output.dtype.element_ty), mask=mask)

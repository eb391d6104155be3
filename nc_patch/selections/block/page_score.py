"""The kernel that scores pages by their statistics; ``page_tiles`` describes its programs."""

import triton
import triton.language as tl

from nc_patch.ops.triton.attend import finite_or_zero, fold, logits_base2
from nc_patch.ops.triton.tiles import PER_CALL, dot, dot_scores, load_query
from nc_patch.selections.block.page_tiles import group_rows, query_pages

_EXPONENT = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(1.1754943508222875e-38)
# What is lost of a square, kept apart, is this much smaller: so that float16 can hold it.
_LOW_PART = tl.constexpr(2048.0)


@triton.jit
def squares(part, norm):
    """``(part / norm) ** 2`` as a sum ``high + low / _LOW_PART`` of numbers of part's dtype, exact for 16-bit ones.

    ``norm`` is a power of two, and so is what it divides 1 to: exactly, unlike the plain division of a GPU.
    """
    scaled = part.to(tl.float32) * tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)[:, None]
    square = scaled * scaled
    high = square.to(part.dtype)
    low = ((square - high.to(tl.float32)) * _LOW_PART).to(part.dtype)
    return high, low


@triton.jit
def load_codes(codes, offsets, d, in_range, D: tl.constexpr, dtype: tl.constexpr):
    """Channels ``d`` of one vector of the pages whose vectors begin at ``offsets``: ``[d, BLOCK_P]``."""
    mask = (d[:, None] < D) & in_range[None, :]
    return tl.load(codes + (offsets[None, :] + d[:, None]), mask=mask, other=0).to(tl.float32).to(dtype)


@triton.jit
def page_scores(
    queries,
    query_rows,
    valid,
    codes,
    offsets,
    scales,
    in_range,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """Raw scores ``[BLOCK_G, BLOCK_P]`` of the pages whose codes begin at ``offsets``, their scales at ``scales``.

    Two: that of the key apart, and ``q.mean + scale / 2 * q^2.variance`` of the others.
    """
    far = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    along = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    spread = tl.zeros([query_rows.shape[0], offsets.shape[0]], dtype=tl.float32)
    far_scale = tl.load(scales, mask=in_range, other=0.0)[None, :]
    mean_scale = tl.load(scales + 1, mask=in_range, other=0.0)[None, :]
    deviation = tl.load(scales + 2, mask=in_range, other=0.0)[None, :]
    if CHUNK_D == BLOCK_D:
        d = tl.arange(0, BLOCK_D)
        far = dot(queries, load_codes(codes, offsets, d, in_range, D, queries.dtype), far)
        along = dot(queries, load_codes(codes + D, offsets, d, in_range, D, queries.dtype), along)
        # Divided by a power of two, so that squares stay in the range of the dtype.
        largest = tl.max(tl.abs(queries.to(tl.float32)), axis=1)
        norm = (largest.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
        norm = tl.maximum(norm, _SMALLEST)
        high, low = squares(queries, norm)
        variance = load_codes(codes + 2 * D, offsets, d, in_range, D, queries.dtype)
        spread = dot(low, variance, spread) * (1.0 / _LOW_PART)
        spread = dot(high, variance, spread)
        deviation = deviation * norm[:, None]
    else:
        for chunk in range(0, D, CHUNK_D):
            d = chunk + tl.arange(0, CHUNK_D)
            part = tl.load(query_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
            far = dot(part, load_codes(codes, offsets, d, in_range, D, part.dtype), far)
            along = dot(part, load_codes(codes + D, offsets, d, in_range, D, part.dtype), along)
            spread = dot(part * part, load_codes(codes + 2 * D, offsets, d, in_range, D, part.dtype), spread)
    return far * far_scale, along * mean_scale + (0.5 * scale) * spread * deviation * deviation


@triton.jit(do_not_specialize=[*PER_CALL, "stride_sb", "stride_sh", "stride_sp", "width", "splits"])
def score_pages_kernel(
    query,
    key,
    codes,
    scales,
    visible,
    origin,
    page_logits,
    peak,
    total,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_cb,
    stride_ch,
    stride_cp,
    stride_sb,
    stride_sh,
    stride_sp,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    num_kv_heads,
    group,
    Lq,
    Lk,
    width,
    splits,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits ``[number, group, width]`` of visible pages, and (peak, total) of their softmax for each split.

    Split s scores the s-th share of the pages from their statistics; the one after the last scores the query's own
    page from its keys. What is NaN or +inf stays out of the softmax.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    batch, index, kv_head, start, end, begin, low, pages = query_pages(
        number, visible, origin, stride_ib, stride_il, stride_ob, stride_ol, num_kv_heads, Lq, Lk, BLOCK_SIZE
    )
    member, head, valid = group_rows(kv_head, group, BLOCK_G)
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    logits_rows = page_logits + (number.to(tl.int64) * group + member) * width
    highest = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    sum_of_weights = tl.zeros([BLOCK_G], dtype=tl.float32)
    own = tl.minimum(pages, width) - 1
    if split < splits:
        head_codes = codes + batch * stride_cb + kv_head * stride_ch
        head_scales = scales + batch * stride_sb + kv_head * stride_sh
        share = (own + splits * BLOCK_P - 1) // (splits * BLOCK_P)
        stop = tl.minimum((split + 1) * share * BLOCK_P, own)
        for tile in range(share):
            page = (split * share + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
            in_range = page < stop
            first = begin + (low + page) * BLOCK_SIZE
            size = tl.minimum(first + BLOCK_SIZE, end) - tl.maximum(first, start)
            number_of_page = (low + page).to(tl.int64)
            far, rest = page_scores(
                queries, query_rows, valid, head_codes, number_of_page * stride_cp,
                head_scales + number_of_page * stride_sp, in_range, scale, D, BLOCK_D, CHUNK_D,
            )  # fmt: skip
            far = logits_base2(far, scale, softcap, HAS_SOFTCAP)
            others = tl.log2(tl.maximum(size - 1, 1).to(tl.float32))
            others = tl.where(size > 1, others, float("-inf"))
            rest = logits_base2(rest, scale, softcap, HAS_SOFTCAP) + others[None, :]
            base = finite_or_zero(tl.maximum(far, rest))
            logits = base + tl.log2(tl.exp2(far - base) + tl.exp2(rest - base))
            tl.store(logits_rows[:, None] + page[None, :], logits, mask=valid[:, None] & in_range[None, :])
            # Written so that NaN fails the comparison too.
            ordinary = (logits < float("inf")) & in_range[None, :]
            highest, sum_of_weights, _weights, _shrink = fold(
                tl.where(ordinary, logits, float("-inf")), highest, sum_of_weights
            )
    elif own >= 0:
        keys = key + batch * stride_kb + kv_head * stride_kh
        position = begin + (low + pages - 1) * BLOCK_SIZE + tl.arange(0, BLOCK_K)
        seen = (position >= start) & (position < end)
        raw = dot_scores(
            queries, query_rows, valid, keys, position.to(tl.int64) * stride_kl, seen, D, BLOCK_D, CHUNK_D, True
        )
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        highest, sum_of_weights, _weights, _shrink = fold(
            tl.where(seen[None, :], logits, float("-inf")), highest, sum_of_weights
        )
        exact = finite_or_zero(highest) + tl.log2(sum_of_weights)
        tl.store(logits_rows + own, exact, mask=valid)
        ordinary_page = exact < float("inf")
        highest = tl.where(ordinary_page, highest, float("-inf"))
        sum_of_weights = tl.where(ordinary_page, sum_of_weights, 0.0)
    part = (number.to(tl.int64) * group + member) * (splits + 1) + split
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, sum_of_weights, mask=valid)

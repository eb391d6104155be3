"""The kernels of ``block`` while decoding: they score pages by their statistics, choose some, and attend these.

A program works for up to ``BLOCK_M`` query heads of one query and key/value head; ``number`` counts (batch, query,
key/value head), the head running fastest. Logits are in base 2. Pages are counted from the first visible one, in the
list of chosen pages and in the statistics from the origin. Parts of a softmax are as in ``ops.triton.split``.
"""

from collections import namedtuple

import triton
import triton.language as tl

from nc_patch.ops.triton.rows import budget_of, head_of
from nc_patch.ops.triton.scores import dot, dot_scores, finite_or_zero, fold, load_queries, logits_base2
from nc_patch.ops.triton.split import arrives_last, join_parts, store_part, write_joined
from nc_patch.ops.triton.structs import PER_CALL, Rows, Softmax
from nc_patch.selections.block.heaviest import Weights, find_cut, take
from nc_patch.selections.block.summarize import heads_of_pages, power_of_two, summarize_page

# What is lost of a square, kept apart, is this much smaller: so that float16 can hold it.
_LOW_PART = tl.constexpr(2048.0)


# What a query sees: the query and the key/value head of the program, the positions ``start:end`` of the keys, that of
# page 0, the first visible page, and how many there are.
Seen = namedtuple("Seen", "batch index kv_head start end begin low pages")


@triton.jit
def load_seen(inputs, number, num_kv_heads, Lq, Lk, BLOCK_SIZE: tl.constexpr):
    """What the query with this number sees."""
    batch = (number // (num_kv_heads * Lq)).to(tl.int64)
    index = ((number // num_kv_heads) % Lq).to(tl.int64)
    kv_head = (number % num_kv_heads).to(tl.int64)
    query = batch * Lq + index
    if inputs.origin is not None:
        begin = tl.load(inputs.origin + query)
        start = tl.maximum(tl.maximum(tl.load(inputs.visible + query * 2), begin), 0)
        end = tl.maximum(tl.minimum(tl.load(inputs.visible + query * 2 + 1), Lk), start)
    else:
        end = tl.maximum(tl.minimum(tl.load(inputs.visible + query), Lk), 0)
        begin = end * 0
        start = begin
    # No negative number is divided: start is not before begin.
    low = (start - begin) // BLOCK_SIZE
    pages = tl.where(end > start, (end - start + (start - begin) % BLOCK_SIZE + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
    return Seen(batch, index, kv_head, start, end, begin, low, pages)


@triton.jit
def place_of_page(table, batch, number, there, PAGES: tl.constexpr):
    """A page of a sequence, counted in the sequence or, with a ``Table``, in the memory, in blocks of ``PAGES``."""
    if table is not None:
        block = tl.load(table.data + batch * table.stride + number // PAGES, mask=there, other=0)
        number = block * PAGES + number % PAGES
    return number


@triton.jit
def located(tensor, seen, place, CELLS: tl.constexpr):
    """Where a head's keys, or pages, of a sequence or in blocks of ``CELLS`` begin, and the offsets of some of them."""
    begin = tensor.data + seen.kv_head * tensor.stride_h
    if CELLS == 0:
        begin += seen.batch * tensor.stride_b
        offsets = place.to(tl.int64) * tensor.stride_l
    else:
        offsets = (place // CELLS).to(tl.int64) * tensor.stride_b + (place % CELLS).to(tl.int64) * tensor.stride_l
    return begin, offsets


@triton.jit
def group_rows(seen, group, shape):
    """The ``Rows`` of this program, query heads of the group, but for their offsets in results and their budgets."""
    member = tl.program_id(2) * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
    head = seen.kv_head * group + member
    return Rows(seen.batch, seen.kv_head, seen.index, head, head, member < group, seen.start, seen.end, head)


@triton.jit
def squares(part, norm):
    """``(part / norm) ** 2`` as ``high + low / _LOW_PART`` in part's dtype, exact for 16 bits; ``norm`` a power of two.

    The plain division of a GPU is not exact.
    """
    scaled = part.to(tl.float32) * tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm)[:, None]
    square = scaled * scaled
    high = square.to(part.dtype)
    low = ((square - high.to(tl.float32)) * _LOW_PART).to(part.dtype)
    return high, low


@triton.jit
def load_codes(codes, d, in_range, D: tl.constexpr, dtype: tl.constexpr):
    """Channels ``d`` of one vector of the pages whose vectors begin at the pointers ``codes``: ``[d, BLOCK_N]``."""
    mask = (d[:, None] < D) & in_range[None, :]
    return tl.load(codes[None, :] + d[:, None], mask=mask, other=0).to(tl.float32).to(dtype)


@triton.jit
def page_scores(queries, codes, scales, in_range, scale, shape):
    """Raw scores ``[BLOCK_M, BLOCK_N]`` of the pages whose codes and scales begin at these pointers.

    Two: that of the key apart, and ``q.mean + scale / 2 * q^2.variance`` of the others.
    """
    far = tl.zeros([shape.BLOCK_M, shape.BLOCK_N], dtype=tl.float32)
    along, spread = far, far
    far_scale = tl.load(scales, mask=in_range, other=0.0)[None, :]
    mean_scale = tl.load(scales + 1, mask=in_range, other=0.0)[None, :]
    deviation = tl.load(scales + 2, mask=in_range, other=0.0)[None, :]
    if shape.CHUNK_D == shape.BLOCK_D:
        d = tl.arange(0, shape.BLOCK_D)
        far = dot(queries.tile, load_codes(codes, d, in_range, shape.D, queries.tile.dtype), far)
        along = dot(queries.tile, load_codes(codes + shape.D, d, in_range, shape.D, queries.tile.dtype), along)
        # Divided by a power of two, so that squares stay in the range of the dtype.
        norm = power_of_two(tl.max(tl.abs(queries.tile.to(tl.float32)), axis=1))
        high, low = squares(queries.tile, norm)
        variance = load_codes(codes + 2 * shape.D, d, in_range, shape.D, queries.tile.dtype)
        spread = dot(low, variance, spread) * (1.0 / _LOW_PART)
        spread = dot(high, variance, spread)
        deviation = deviation * norm[:, None]
    else:
        for chunk in range(0, shape.D, shape.CHUNK_D):
            d = chunk + tl.arange(0, shape.CHUNK_D)
            mask = queries.valid[:, None] & (d[None, :] < shape.D)
            part = tl.load(queries.rows[:, None] + d[None, :], mask=mask, other=0.0)
            far = dot(part, load_codes(codes, d, in_range, shape.D, part.dtype), far)
            along = dot(part, load_codes(codes + shape.D, d, in_range, shape.D, part.dtype), along)
            spread = dot(part * part, load_codes(codes + 2 * shape.D, d, in_range, shape.D, part.dtype), spread)
    return far * far_scale, along * mean_scale + (0.5 * scale) * spread * deviation * deviation


@triton.jit(do_not_specialize=[*PER_CALL, "stored_pages", "width", "splits"])
def score_pages_kernel(
    query, key, statistics, table, inputs, scratch, stored_pages, num_kv_heads, group, Lq, Lk, width, splits, settings,
    shape, page,
):  # fmt: skip
    """Logits ``[number, group, width]`` of visible pages, and ``splits + 1`` parts of their softmax for each row.

    Program s along the second axis scores the s-th share of the pages from their statistics, with a ``Table``
    ``Heads``; the one after the last scores the query's own page from its keys. What is NaN or +inf stays out of the
    softmax. One program more, where there is one, takes the last key of the only query's sequence into the statistics:
    the page that it completes is the query's own, so that nobody reads in this launch what is written.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    pages: tl.constexpr = page.KEYS // page.BLOCK_SIZE
    if table is None:
        statistics = heads_of_pages(statistics, num_kv_heads, stored_pages, page)
    if split <= splits:
        seen = load_seen(inputs, number, num_kv_heads, Lq, Lk, page.BLOCK_SIZE)
        rows = group_rows(seen, group, shape)
        queries = load_queries(query, rows, shape)
        member = number.to(tl.int64) * group + tl.program_id(2) * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
        logits_rows = scratch.floats + scratch.page_logits + member * width
        peak = tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
        own = tl.minimum(seen.pages, width) - 1
        if split < splits:
            share = (own + splits * shape.BLOCK_N - 1) // (splits * shape.BLOCK_N)
            stop = tl.minimum((split + 1) * share * shape.BLOCK_N, own)
            for tile in range(share):
                n = (split * share + tile) * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
                in_range = n < stop
                first = seen.begin + (seen.low + n) * page.BLOCK_SIZE
                size = tl.minimum(first + page.BLOCK_SIZE, seen.end) - tl.maximum(first, seen.start)
                place = place_of_page(table, seen.batch, seen.low + n, in_range, pages)
                codes, code_offsets = located(statistics.codes, seen, place, pages)
                scales, scale_offsets = located(statistics.scales, seen, place, pages)
                far, rest = page_scores(
                    queries, codes + code_offsets, scales + scale_offsets, in_range, settings.scale, shape
                )  # fmt: skip
                far = logits_base2(far, settings)
                others = tl.log2(tl.maximum(size - 1, 1).to(tl.float32))
                others = tl.where(size > 1, others, float("-inf"))
                rest = logits_base2(rest, settings) + others[None, :]
                base = finite_or_zero(tl.maximum(far, rest))
                logits = base + tl.log2(tl.exp2(far - base) + tl.exp2(rest - base))
                tl.store(logits_rows[:, None] + n[None, :], logits, mask=rows.valid[:, None] & in_range[None, :])
                # Written so that NaN fails the comparison too.
                ordinary = (logits < float("inf")) & in_range[None, :]
                peak, total, _weights, _shrink = fold(tl.where(ordinary, logits, float("-inf")), peak, total)
        elif own >= 0:
            last = seen.low + seen.pages - 1
            position = seen.begin + last * page.BLOCK_SIZE + tl.arange(0, page.BLOCK_K)
            last = place_of_page(table, seen.batch, last, own >= 0, pages)
            place = seen.begin + last * page.BLOCK_SIZE + tl.arange(0, page.BLOCK_K)
            keys, offsets = located(key, seen, place, page.KEYS)
            in_page = (position >= seen.start) & (position < seen.end)
            raw = dot_scores(queries, keys, offsets, in_page, shape, True)
            logits = logits_base2(raw, settings)
            peak, total, _weights, _shrink = fold(tl.where(in_page[None, :], logits, float("-inf")), peak, total)
            exact = finite_or_zero(peak) + tl.log2(total)
            tl.store(logits_rows + own, exact, mask=rows.valid)
            ordinary_page = exact < float("inf")
            peak = tl.where(ordinary_page, peak, float("-inf"))
            total = tl.where(ordinary_page, total, 0.0)
        at = scratch.floats + member * (splits + 1) + split
        tl.store(at + scratch.page_peak, peak, mask=rows.valid)
        tl.store(at + scratch.page_total, total, mask=rows.valid)
    elif table is None:  # noqa: SIM102 - with a table nothing of this is compiled
        if tl.program_id(2) == 0:
            batch = (number // num_kv_heads).to(tl.int64)
            begin = tl.load(inputs.origin + batch).to(tl.int64)
            end = tl.load(inputs.visible + batch * 2 + 1).to(tl.int64)
            completed = tl.maximum(end - 1 - begin, 0) // page.BLOCK_SIZE
            first = begin + completed * page.BLOCK_SIZE
            if (completed < stored_pages) & (first + page.BLOCK_SIZE <= tl.minimum(end, Lk)):
                kv_head = (number % num_kv_heads).to(tl.int64)
                summarize_page(head_of(key, batch, kv_head), statistics, batch, kv_head, completed, first, page)


@triton.jit(do_not_specialize=[*PER_CALL, "width", "splits", "capacity", "blocks"])
def choose_pages_kernel(
    table, inputs, scratch, attended, budget_heads, num_kv_heads, group, Lq, Lk, width, splits, capacity, blocks,
    BLOCK_SIZE: tl.constexpr, PAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The pages that one query and the group attend, and how many keys these are, ``attended [B, Hq, Lq]``.

    Each query head has ``splits`` parts of a softmax, padded ``BLOCK_S``. ``BLOCK_P`` pages are looked at together. A
    block of memory has ``PAGES``, or 0.
    """
    number = tl.program_id(0)
    seen = load_seen(inputs, number, num_kv_heads, Lq, Lk, BLOCK_SIZE)
    count = tl.minimum(seen.pages, width)
    data = scratch.floats + scratch.page_logits + number.to(tl.int64) * group * width
    weights = Weights(data, count - 1, tl.arange(0, BLOCK_P))
    parts = scratch.floats + number.to(tl.int64) * group * splits
    parts = Softmax(None, parts + scratch.page_peak, parts + scratch.page_total)
    sum_weights(weights, parts, group, width, splits, count, BLOCK_S)
    largest_budget = 0
    for member in range(group):
        head = seen.kv_head * group + member
        budget = tl.load(budget_of(inputs.budget, budget_heads, seen.batch, head, seen.index, Lq))
        largest_budget = tl.maximum(largest_budget, budget)
    tl.debug_barrier()
    always = tl.minimum(count, 2)
    # A budget of all keys has one page more, as intervals begin and end within pages.
    more = tl.where(largest_budget >= seen.end - seen.start, BLOCK_SIZE, 0)
    wanted = tl.maximum((tl.maximum(largest_budget, 0) + more + BLOCK_SIZE - 1) // BLOCK_SIZE, always)
    wanted = tl.minimum(tl.minimum(wanted, count), capacity)
    cut, spare = find_cut(weights, wanted - always)
    pages = scratch.integers + scratch.pages + number.to(tl.int64) * capacity
    taken_before = 0
    ties_before = 0
    for first in range(0, count, BLOCK_P):
        at = first + weights.lanes
        place, taken, taken_before, ties_before = take(weights, count, at, cut, spare, taken_before, ties_before)
        stays = taken & (place < capacity)
        found = place_of_page(table, seen.batch, seen.low + at, stays, PAGES)
        tl.store(pages + place, found, mask=stays)
    for block in range(blocks):
        tl.store(scratch.integers + scratch.arrivals + number * blocks + block, 0)
    # The first and the last page may be seen in part; both are always chosen.
    first_key = seen.begin + seen.low * BLOCK_SIZE
    missing = (seen.start - first_key) + (first_key + count * BLOCK_SIZE - seen.end)
    keys = tl.where(count > 0, wanted * BLOCK_SIZE - missing, 0)
    row = (seen.batch * num_kv_heads + seen.kv_head) * group * Lq + seen.index
    tl.store(scratch.integers + scratch.count + number * 2, wanted)
    tl.store(scratch.integers + scratch.count + number * 2 + 1, row.to(tl.int32))
    for member in range(group):
        tl.store(attended + row + member * Lq, keys)


@triton.jit
def sum_weights(weights, parts, group, width, splits, pages, BLOCK_S: tl.constexpr):
    """Writes, over the first head's logits, each page's weight, summed over the group; NaN and +inf weigh +inf."""
    split = tl.arange(0, BLOCK_S)
    for first in range(0, pages, weights.lanes.shape[0]):
        page = first + weights.lanes
        weight = tl.zeros([weights.lanes.shape[0]], dtype=tl.float32)
        for member in range(group):
            peaks = tl.load(parts.peak + member * splits + split, mask=split < splits, other=float("-inf"))
            totals = tl.load(parts.total + member * splits + split, mask=split < splits, other=0.0)
            row = weights.data + tl.cast(member, tl.int64) * width
            logits = tl.load(row + page, mask=page < pages, other=float("-inf"))
            base = finite_or_zero(tl.max(peaks, axis=0))
            whole = tl.sum(totals * tl.exp2(peaks - base), axis=0)
            share = tl.where(whole > 0.0, 1.0 / tl.maximum(whole, 1e-30), 0.0)
            # Written so that NaN fails the comparison too.
            weight += tl.where(logits < float("inf"), tl.exp2(logits - base) * share, float("inf"))
        # Every thread has read the logits that the weights replace.
        tl.debug_barrier()
        tl.store(weights.data + page, weight, mask=page < pages)


@triton.jit(do_not_specialize=[*PER_CALL, "capacity"])
def attend_pages_kernel(
    query, key, value, inputs, scratch, attended, sinks, output, lse, lse_keys, num_kv_heads, group, Lq, Lk, capacity,
    settings, shape, join_shape, page,
):  # fmt: skip
    """Part s of each row is of the s-th share of the chosen pages; the last program of a row joins its parts.

    ``join_shape`` is ``shape`` with no more rows than a group has. No key is loaded that a row does not attend.
    """
    number = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    seen = load_seen(inputs, number, num_kv_heads, Lq, Lk, page.BLOCK_SIZE)
    rows = group_rows(seen, group, shape)
    queries = load_queries(query, rows, shape)
    dv = tl.arange(0, shape.BLOCK_DV)
    count = tl.load(scratch.integers + scratch.count + number * 2)
    share = (count + splits - 1) // splits
    first = split * share
    page_list = scratch.integers + scratch.pages + number.to(tl.int64) * capacity + first
    keys_left = tl.maximum(tl.minimum(first + share, count) - first, 0) * page.BLOCK_SIZE
    if page.KEYS > 0:
        # Of the pages only a sequence's last, which is listed last, may lack keys.
        keys_left = tl.minimum(keys_left, seen.end - (seen.pages - count + first) * page.BLOCK_SIZE)
    tiles = (keys_left + shape.BLOCK_N - 1) // shape.BLOCK_N
    # Apart, not as a ``Softmax``: in float32 that takes more registers.
    peak = tl.full([shape.BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([shape.BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([shape.BLOCK_M, shape.BLOCK_DV], dtype=tl.float32)
    for tile in range(tiles):
        offset = tile * shape.BLOCK_N + tl.arange(0, shape.BLOCK_N)
        of_page = tl.load(page_list + offset // page.BLOCK_SIZE, mask=offset < keys_left, other=0)
        place = seen.begin + of_page * page.BLOCK_SIZE + offset % page.BLOCK_SIZE
        there = offset < keys_left
        if page.KEYS == 0:
            there = there & (place >= seen.start) & (place < seen.end)
        keys, key_offsets = located(key, seen, place, page.KEYS)
        values, value_offsets = located(value, seen, place, page.KEYS)
        raw = dot_scores(queries, keys, key_offsets, there, shape, True)
        logits = tl.where(there[None, :], logits_base2(raw, settings), float("-inf"))
        tile_values = tl.load(
            values + (value_offsets[:, None] + dv[None, :]),
            mask=there[:, None] & (dv[None, :] < shape.DV),
            other=0.0,
        )
        peak, total, weights, shrink = fold(logits, peak, total)
        acc = dot(weights.to(tile_values.dtype), tile_values, acc * shrink[:, None])
    member = tl.program_id(2) * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
    at = (number.to(tl.int64) * group + member) * splits + split
    parts = Softmax(scratch.floats + scratch.acc, scratch.floats + scratch.peak, scratch.floats + scratch.total)
    store_part(parts, member < group, Softmax(acc, peak, total), at, shape)
    arrivals = scratch.integers + scratch.arrivals + number * tl.num_programs(2) + tl.program_id(2)
    if arrives_last(arrivals, splits):
        member_of = tl.program_id(2) * join_shape.BLOCK_M + tl.arange(0, join_shape.BLOCK_M)
        place = number.to(tl.int64) * group + member_of
        row = tl.load(scratch.integers + scratch.count + number * 2 + 1) + member_of.to(tl.int64) * Lq
        head = (row // Lq) % (num_kv_heads * group)
        results = Rows(None, None, None, head, row, member_of < group, None, None, None)
        joined = join_parts(parts, results.valid, place * splits, 1, splits, join_shape)
        counted = tl.load(attended + row, mask=results.valid, other=0)
        write_joined(joined, results, sinks, counted, output, lse, lse_keys, join_shape)

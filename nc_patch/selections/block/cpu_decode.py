"""``block`` while decoding on a CPU: each query chooses pages by their statistics and attends them.

Two launches. In the first an item is a run of pages of one key/value head: it summarises those that new keys have
completed, and estimates the scores of all queries of the group. In the second an item is one query and head: it weighs
the pages for the whole group, as each head of the group does, and attends the chosen ones.
"""

import math

import numpy as np
import torch
from numba import carray

from nc_patch.ops.cpu.launch import KINDS, kernel
from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.parts import LogSums, decode_arguments, last_dense, padded_length
from nc_patch.ops.cpu.products import code_products
from nc_patch.ops.cpu.recent import dense_log_sums
from nc_patch.ops.cpu.rows import (
    INF,
    LOG2E,
    best_of,
    compiled,
    dot_row,
    element_of,
    pad_row,
    padded,
    read_row,
    write_row,
)
from nc_patch.ops.cpu.softmax import add_listed, cap, score_listed, softmax_row
from nc_patch.ops.cpu.vectors import exponentials, f32, fill, i32, largest, set_f32, set_i8, set_i32
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.block.pages import LARGEST_CODE, VECTORS, PageStatistics

_FIELDS = (
    "query:4 key:4 value:4 output:4 visible origin budget budget_b budget_h sinks codes scales room estimates width "
    "most group heads Lq N D Dv kind new size factor:f softcap:f scale:f attended lse lse_kept"
)
# Pages of an item of the first launch.
_PAGES = 64
# The smallest normal float, below which keys count as zero.
_SMALLEST = float(torch.finfo(torch.float32).tiny)


def cpu_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says; ``new`` keys come in first.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read.
    """
    query, key, value = problem.query, problem.key, problem.value
    B, Hq, Lq, D = query.shape
    N, Dv, size = key.shape[2], value.shape[3], problem.page_size
    output, sums = query.new_empty(B, Lq, Hq, Dv).transpose(1, 2), LogSums.of(problem)
    attended = problem.visible.new_zeros(B, Hq, Lq)
    codes, scales = problem.key_index
    span = max(N, int((problem.visible[..., 1] - problem.origin).max())) if B * Lq else 0
    width = padded_length(span // size + 2) + LANES
    estimates = torch.empty(B * Hq * Lq, 2 * width, dtype=torch.float32, device="cpu")
    most = min(N, -(-problem.most // size) * size + 2 * size if problem.most else N) + 2 * LANES
    arguments = decode_arguments(problem, output, sums) | {
        "codes": codes.data_ptr(), "scales": scales, "room": codes.shape[2], "estimates": estimates, "width": width,
        "most": most, "size": size, "attended": attended,
    }  # fmt: skip
    floats = max(8 * padded_length(D) + 12 * LANES, size * D + 4 * padded_length(D))
    _estimate_kernel(B * key.shape[1] * -(-(N // size + 2) // _PAGES), floats, **arguments)
    floats = 2 * most + 4 * width + padded_length(D) + padded_length(Dv) + size + 512 + 2 * LANES
    _attend_kernel(B * Hq * Lq, floats, **arguments)
    return sums.result(problem, output, dense_log_sums(problem))._replace(attended=attended)


def cpu_summarize_pages_(
    key: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int, end: torch.Tensor,
    statistics: PageStatistics, block_size: int,
) -> None:  # fmt: skip
    """``pages.update_pages_`` in a compiled kernel."""
    B, Hkv, N, D = key.shape
    pages = min(statistics.codes.shape[2], N // block_size + 2)
    origin, first, end = (t.to(torch.int32).contiguous() for t in (origin, first, end))
    _summarize_kernel(
        B * Hkv * -(-pages // _PAGES), block_size * D + 4 * D, key=last_dense(key), origin=origin, firsts=first,
        ends=end, codes=statistics.codes.data_ptr(), scales=statistics.scales, room=statistics.codes.shape[2],
        pages=pages, heads=Hkv, N=N, D=D, kind=KINDS[key.dtype], new=count, size=block_size,
    )  # fmt: skip


@kernel("key:4 origin firsts ends codes scales room pages heads N D kind new size")
def _summarize_kernel(pointer, item, scratch):
    """A run of pages of one head."""
    p = carray(pointer, 1)[0]
    runs = (p.pages + _PAGES - 1) // _PAGES
    head, page = item // runs, item % runs * _PAGES
    batch = head // p.heads
    begin, changed = i32(p.origin, batch), i32(p.firsts, batch)
    stop = min(i32(p.ends, batch), p.N, changed + p.new + p.size - 1)
    keys = p.key + batch * p.key_b + head % p.heads * p.key_h
    for j in range(max(page, max(changed - begin, 0) // p.size), min(page + _PAGES, p.room, (stop - begin) // p.size)):
        summarize_page(p, keys, begin + j * p.size, head * p.room + j, scratch)


@compiled
def _interval(p, batch, i):
    """Start and end of what a query sees, and where its sequence begins."""
    at = batch * p.Lq + i
    begin = i32(p.origin, at)
    return max(i32(p.visible, 2 * at), begin, 0), min(i32(p.visible, 2 * at + 1), p.N), begin


@kernel(_FIELDS)
def _estimate_kernel(pointer, item, scratch):
    """A run of pages of one head: those that have become whole are summarised, and all are estimated."""
    p = carray(pointer, 1)[0]
    runs = (p.N // p.size + 2 + _PAGES - 1) // _PAGES
    head, first = item // runs, item % runs * _PAGES
    batch, kv_head = head // p.heads, head % p.heads
    end = 0
    for i in range(p.Lq):
        end = max(end, _interval(p, batch, i)[1])
    begin = i32(p.origin, batch * p.Lq + p.Lq - 1)
    keys = p.key + batch * p.key_b + kv_head * p.key_h
    if p.new > 0:
        for page in range(max(first, (end - p.new - begin) // p.size), min(first + _PAGES, (end - begin) // p.size)):
            if page < p.room:
                summarize_page(p, keys, begin + page * p.size, head * p.room + page, scratch)
    step = 4 * padded(p.D)
    x, squares, found = scratch, scratch + 4 * step, scratch + 8 * step
    rows = p.group * p.Lq
    for r0 in range(0, rows, 4):
        many, low, high = min(4, rows - r0), first + _PAGES, first
        fill(x, 8 * padded(p.D), np.float32(0))
        for r in range(many):
            of_head, i = kv_head * p.group + (r0 + r) // p.Lq, (r0 + r) % p.Lq
            start, stop, its_begin = _interval(p, batch, i)
            if stop > start:
                low, high = min(low, (start - its_begin) // p.size), max(high, (stop - 1 - its_begin) // p.size)
            read_row(x + r * step, p.query + batch * p.query_b + of_head * p.query_h + i * p.query_n, p.D, p.kind)
            for d in range(p.D):
                scaled = f32(x + r * step, d) * np.float32(p.scale)
                set_f32(x + r * step, d, scaled)
                set_f32(squares + r * step, d, np.float32(0.5) * scaled * scaled)
        for page in range(max(first, low), min(first + _PAGES, high, p.room)):
            place = head * p.room + page
            for vector in range(VECTORS):
                codes = p.codes + (place * VECTORS + vector) * p.D
                weighted = squares if vector == 2 else x
                if p.D % LANES == 0:
                    code_products(weighted, step, codes, p.D, p.D, found + 64 * vector, 16, 4)
                else:
                    for r in range(4):
                        set_f32(found + 64 * vector, 4 * r, dot_row(weighted + r * step, codes, p.D, 3))
            apart, mean, spread = (f32(p.scales, place * VECTORS), f32(p.scales, place * VECTORS + 1),
                                   f32(p.scales, place * VECTORS + 2))  # fmt: skip
            for r in range(many):
                of_head, i = kv_head * p.group + (r0 + r) // p.Lq, (r0 + r) % p.Lq
                at = p.estimates + 8 * p.width * ((batch * p.heads * p.group + of_head) * p.Lq + i)
                set_f32(at, page, f32(found, 4 * r) * apart)
                others = f32(found + 64, 4 * r) * mean + f32(found + 128, 4 * r) * spread * spread
                set_f32(at, p.width + page, others)


@compiled
def summarize_page(p, keys, first, place, room):
    """Writes the statistics of the page of ``size`` keys from ``first`` on; ``pages.summarize`` defines them."""
    step = 4 * p.D
    mean = room + p.size * step
    apart, others, variance = mean + 4 * p.D, mean + 8 * p.D, mean + 12 * p.D
    count, most, sound = 0, np.float32(0), True
    for j in range(max(-first, 0), p.size):
        row = room + count * step
        for d in range(p.D):
            value = element_of(keys + (first + j) * p.key_n, d, p.kind)
            set_f32(row, d, value)
            sound = sound and abs(value) < INF
            most = max(most, abs(value))
        count += 1
    if not sound:
        for d in range(VECTORS * p.D):
            set_i8(p.codes + place * VECTORS * p.D, d, 0)
        for vector in range(VECTORS):
            set_f32(p.scales, place * VECTORS + vector, np.float32(np.nan))
        return
    # Numbers near one, whose squares neither overflow nor vanish; a power of two rounds nothing.
    unit = np.float32(2.0 ** (math.frexp(max(most, np.float32(_SMALLEST)))[1] - 1))
    for d in range(p.D):
        total = np.float32(0)
        for j in range(count):
            value = f32(room + j * step, d) / unit
            set_f32(room + j * step, d, value)
            total += value
        set_f32(mean, d, total / np.float32(max(count, 1)))
    far, farthest = 0, np.float32(-1)
    for j in range(count):
        distance = np.float32(0)
        for d in range(p.D):
            off = f32(room + j * step, d) - f32(mean, d)
            distance += off * off
        if distance > farthest:
            far, farthest = j, distance
    divisor = np.float32(max(count - 1, 1))
    for d in range(p.D):
        total = np.float32(0)
        for j in range(count):
            total += f32(room + j * step, d) if j != far else np.float32(0)
        middle, squares = total / divisor, np.float32(0)
        for j in range(count):
            off = f32(room + j * step, d) - middle
            squares += off * off if j != far else np.float32(0)
        set_f32(others, d, middle)
        set_f32(variance, d, squares / divisor)
        set_f32(apart, d, f32(room + far * step, d) if count > 0 else np.float32(0))
    for vector in range(VECTORS):
        row = apart + vector * step
        most = np.float32(0)
        for d in range(p.D):
            most = max(most, abs(f32(row, d)))
        scale = most / np.float32(LARGEST_CODE)
        for d in range(p.D):
            code = math.floor(f32(row, d) / scale + np.float32(0.5)) if scale > 0 else 0.0
            set_i8(p.codes + (place * VECTORS + vector) * p.D, d, int(min(max(code, -LARGEST_CODE), LARGEST_CODE)))
        set_f32(p.scales, place * VECTORS + vector, (np.float32(math.sqrt(scale)) if vector == 2 else scale) * unit)


@kernel(_FIELDS)
def _attend_kernel(pointer, item, scratch):
    """One query of one head: the pages of its group, and softmax times value over their keys."""
    p = carray(pointer, 1)[0]
    i, of_head = item % p.Lq, item // p.Lq % (p.heads * p.group)
    batch = item // p.Lq // (p.heads * p.group)
    kv_head, at = of_head // p.group, (batch * p.heads * p.group + of_head) * p.Lq + i
    scores, places = scratch, scratch + 4 * p.most
    weights = places + 4 * p.most
    x = weights + 16 * p.width
    out = x + 4 * padded(p.D)
    own_scores = out + 4 * padded(p.Dv)
    sample = own_scores + 4 * padded(p.size)
    start, end, begin = _interval(p, batch, i)
    fill(out, padded(p.Dv), np.float32(0))
    inverse = np.float32(1)
    if end > start:
        low, own = (start - begin) // p.size, (end - 1 - begin) // p.size
        budget = 0
        for g in range(p.group):
            budget = max(budget, i32(p.budget, batch * p.budget_b + (kv_head * p.group + g) * p.budget_h + i))
        pages = own + 1 - low
        count = min((budget + p.size - 1) // p.size, pages) if budget < end - start else pages
        keys = p.key + batch * p.key_b + kv_head * p.key_h
        chosen = weights + 8 * p.width
        others = max(count - 2, 0)
        if others < pages - 2:
            _weigh_pages(p, batch, kv_head, i, keys, (start, end, begin), x, own_scores, weights)
            if others > 0:
                best_of(weights + 4, pages - 2, others, 1, weights + 4 * p.width, chosen, sample)
        else:
            for j in range(others):
                set_i32(chosen, j, j + 1)
        taken = 0
        for j in range(-1, others + 1):
            page = low if j < 0 else own if j == others else low + i32(chosen, j)
            if j == others and own == low:
                continue
            first, last = max(begin + page * p.size, start), min(begin + (page + 1) * p.size, end)
            for position in range(first, last):
                set_i32(places, taken, position)
                taken += 1
        read_row(x, p.query + batch * p.query_b + of_head * p.query_h + i * p.query_n, p.D, p.kind)
        score_listed(p, x, keys, places, taken, scores)
        if p.softcap != 0:
            cap(scores, taken, p.scale, p.softcap)
        pad_row(scores, taken, -INF)
        for j in range(taken, padded(taken)):
            set_i32(places, j, start)
        inverse = softmax_row(p, scores, padded(taken), of_head, at)
        values = p.value + batch * p.value_b + kv_head * p.value_h
        add_listed(out, p.Dv, scores, places, padded(taken), values, p.value_n, p.kind)
        set_i32(p.attended, at, taken)
    write_row(p.output + batch * p.output_b + of_head * p.output_h + i * p.output_n, out, p.Dv, inverse, p.kind, sample)


@compiled
def _weigh_pages(p, batch, kv_head, i, keys, seen, x, own_scores, weights):
    """Writes the weight of each page from the first visible one up to the query's own: its share, over all heads.

    Three times as much room follows the weights.
    """
    start, end, begin = seen
    low, own = (start - begin) // p.size, (end - 1 - begin) // p.size
    pages, first_own = own - low, max(begin + own * p.size, start)
    far, rest = weights + 4 * p.width, weights + 8 * p.width
    in_first = begin + (low + 1) * p.size - start
    fill(weights, padded(pages), np.float32(0))
    for g in range(p.group):
        of_head = kv_head * p.group + g
        read_row(x, p.query + batch * p.query_b + of_head * p.query_h + i * p.query_n, p.D, p.kind)
        for j in range(end - first_own):
            set_f32(own_scores, j, dot_row(x, keys + (first_own + j) * p.key_n, p.D, p.kind) * np.float32(p.scale))
        at = p.estimates + 8 * p.width * ((batch * p.heads * p.group + of_head) * p.Lq + i)
        for j in range(pages):
            set_f32(far, j, f32(at, low + j))
            set_f32(rest, j, f32(at, p.width + low + j))
        if p.softcap != 0:
            cap(own_scores, end - first_own, 1.0, p.softcap)
            cap(far, pages, 1.0, p.softcap)
            cap(rest, pages, 1.0, p.softcap)
        for j in range(pages):
            # What is no number, or infinite, outweighs all others, and has no part in the softmax.
            if not (f32(far, j) < INF and f32(rest, j) < INF):
                set_f32(weights, j, INF)
                set_f32(far, j, -INF)
                set_f32(rest, j, -INF)
        if in_first == 1:  # the key apart is the only one
            set_f32(rest, 0, -INF)
        own_is_sound = True
        for j in range(end - first_own):
            own_is_sound = own_is_sound and f32(own_scores, j) < INF
        count_own = padded(end - first_own) if own_is_sound else 0
        pad_row(own_scores, end - first_own, -INF)
        pad_row(far, pages, -INF)
        pad_row(rest, pages, -INF)
        most = max(largest(far, padded(pages)), largest(rest, padded(pages)), largest(own_scores, count_own))
        if not most > -INF:
            continue
        factor = np.float32(LOG2E)
        total = exponentials(own_scores, count_own, most, factor)
        exponentials(far, padded(pages), most, factor)
        exponentials(rest, padded(pages), most, factor)
        for j in range(pages):
            others = np.float32((in_first if j == 0 else p.size) - 1)
            value = f32(far, j) + f32(rest, j) * others
            set_f32(far, j, value)
            total += value
        share = np.float32(1) / total
        for j in range(pages):
            set_f32(weights, j, f32(weights, j) + f32(far, j) * share)

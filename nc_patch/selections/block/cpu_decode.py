"""``block`` while decoding on a CPU: each query chooses pages by their statistics and attends them.

Two launches. In the first an item is a run of pages of one key/value head: it summarises those that new keys have
completed, and estimates the scores of all queries of the group. In the second an item is one query and head: it weighs
the pages for the whole group, as each head of the group does, and attends the chosen ones.

A key's place is how many steps of ``key_n`` bytes it lies behind the first of its head: its position or, where a table
names the blocks of memory of a sequence, ``key_block`` for each block before and ``key_row`` for each key before.
"""

import math

import numpy as np
import torch

from nc_patch.common import LARGEST_INTEGER
from nc_patch.ops.cpu import rows as of_rows
from nc_patch.ops.cpu import vectors
from nc_patch.ops.cpu.launch import KINDS, Kernel, compiled, memory_of
from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.parts import Outputs, arguments_of, last_dense
from nc_patch.ops.cpu.recent import result_of
from nc_patch.ops.cpu.rows import INF, LOG2E, Row, cap, pad_row, padded, read_query, score_listed
from nc_patch.ops.cpu.vectors import code_products, exponentials, f32, fill, i32, largest, set_f32, set_i8, set_i32
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections.block.pages import LARGEST_CODE, VECTORS, PageStatistics

# Pages of an item of the first launch.
_PAGES = 64
# How many pages ahead of their use those of a table are asked for.
_AHEAD = 4
# The smallest normal float, below which keys count as zero.
_SMALLEST = float(torch.finfo(torch.float32).tiny)


def cpu_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says; ``new`` keys come in first.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read.
    """
    key, size, table, outputs = problem.key, problem.page_size, problem.table, Outputs.of(problem, attended=True)
    B, Hq, Lq, D = problem.query.shape
    codes, scales = problem.key_index
    arguments = arguments_of(problem, outputs) | {"key_row": 1, "value_row": 1, "room": codes.shape[2]}
    if table is not None:
        N = span = min(problem.key_length, max(0, int(problem.visible.max()))) if B else 0
        arguments |= {"table": table, "table_b": table.stride(0), "pages": codes.shape[2], "room": span // size}
        arguments |= {**_steps("key", key), **_steps("value", problem.value)}
    else:
        N = key.shape[2]
        span = max(N, int((problem.visible[..., 1] - problem.origin).max())) if B * Lq else 0
    columns = padded(span // size + 2) + 2 * LANES
    estimates = torch.empty(B * Hq * Lq, 2 * columns, dtype=torch.float32, device="cpu")
    most = min(N, -(-problem.most // size) * size + 2 * size if problem.most else N) + 2 * LANES
    arguments |= {"codes": codes, "scales": scales, "estimates": estimates, "columns": columns, "size": size, "N": N,
                  "queries": Lq}  # fmt: skip
    # Four queries, the squares of their elements, their products with a page's vectors, and room to summarise a page.
    arrays = [4 * padded(D), 4 * padded(D), LANES, size * D + 4 * D]
    _estimate_kernel(B * key.shape[1] * -(-(N // size + 2) // _PAGES), arrays, **arguments)
    # Scores, places, the query, its output; of pages weights, those chosen and scores, with the own keys'; a sample.
    of_pages = [columns, columns, 2 * columns + padded(size)]
    _attend_kernel(B * Hq * Lq, [most, most, *map(padded, problem.head_dims), *of_pages, of_rows.SAMPLED], **arguments)
    return result_of(problem, outputs)


def _steps(name: str, tensor: torch.Tensor) -> dict[str, int]:
    """The fields of places in blocks of memory ``[blocks, Hkv, N, D]``."""
    block, _, row, _ = (step * tensor.element_size() for step in tensor.stride())
    unit = math.gcd(block, row)
    if (len(tensor) * block + tensor.shape[2] * row) // unit > LARGEST_INTEGER:
        raise ValueError(
            f"{name} has blocks of {block} bytes and rows of {row}, of which there are too many to count in steps of "
            f"{unit} bytes: take fewer blocks, or round the bytes of a block up to a multiple of a row's"
        )
    return {f"{name}_n": unit, f"{name}_block": block // unit, f"{name}_row": row // unit}


def cpu_summarize_pages_(
    key: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int, end: torch.Tensor,
    statistics: PageStatistics, block_size: int,
) -> None:  # fmt: skip
    """``pages.update_pages_`` in a compiled kernel."""
    count_pages = min(statistics.codes.shape[2], key.shape[2] // block_size + 2)
    pages = torch.arange(count_pages, dtype=torch.int32, device="cpu")
    begin = origin.to(torch.int32)[:, None] + pages * block_size
    stop = torch.minimum(end, first + (count + block_size - 1)).clamp(max=key.shape[2])
    whole = (begin + block_size > first[:, None]) & (begin + block_size <= stop[:, None])
    batch, page = whole.nonzero().to(torch.int32).unbind(1)
    _summarize(key, statistics, torch.stack((batch, begin[whole], page), 1), block_size)


def cpu_summarize_slots_(key: torch.Tensor, statistics: PageStatistics, slots: torch.Tensor, block_size: int) -> None:
    """The pages in blocks of memory whose last keys are in these slots; see ``paged``."""
    N = key.shape[2]
    first = slots[(slots >= 0) & (slots % block_size == block_size - 1)] - (block_size - 1)
    row = first % N
    _summarize(key, statistics, torch.stack((first // N, row, row // block_size), 1).to(torch.int32), block_size)


def _summarize(key: torch.Tensor, statistics: PageStatistics, pages: torch.Tensor, size: int) -> None:
    """Writes statistics of pages, int32 ``[P, 3]``: a sequence or block of memory, the first key, and the number."""
    _, Hkv, _, D = key.shape
    _summarize_kernel(
        Hkv * -(-len(pages) // _PAGES), [size * D + 4 * D], key=last_dense(key), pages=pages, codes=statistics.codes,
        scales=statistics.scales, count=len(pages), heads=Hkv, D=D, kind=KINDS[key.dtype], size=size,
    )  # fmt: skip


@Kernel
def _summarize_kernel(p, item, scratch):
    """Some pages, for one head."""
    head, first = item % p.heads, item // p.heads * _PAGES
    for j in range(first, min(first + _PAGES, p.count)):
        block, begin, page = i32(p.pages, 3 * j), i32(p.pages, 3 * j + 1), i32(p.pages, 3 * j + 2)
        keys = p.key + block * p.key_b + head * p.key_h
        summarize_page(p, keys, begin, *_statistics_at(p, block, head, page), scratch)


@compiled
def _page_at(p, batch, page):
    """The block of memory that holds a page, and its number there; the sequence and its number, without blocks."""
    if p.table == 0:
        return batch, page
    number = page // p.pages
    return np.int64(i32(p.table, batch * p.table_b + number)), page - number * p.pages


@compiled
def _statistics_at(p, batch, head, page):
    """The addresses of a page's codes and scales."""
    block, number = _page_at(p, batch, page)
    at = p.codes + block * p.codes_b + head * p.codes_h + number * p.codes_n
    return at, p.scales + block * p.scales_b + head * p.scales_h + number * p.scales_n


@compiled
def _row_of(p, batch, head, i):
    """The row of a head and a position, which sees only what there is of its sequence."""
    if p.table != 0:
        zero = np.int64(0)
        length = max(min(i32(p.visible, batch), p.N), 0)
        return Row(batch, head, zero, batch * p.heads * p.group + head, zero, length, zero)
    row = of_rows.row_of(p, batch, head, i)
    return Row(batch, head, i, row.number, max(row.start, row.origin, 0), min(row.end, p.N), row.origin)


@Kernel
def _estimate_kernel(p, item, scratch):
    """A run of pages of one head: those that have become whole are summarised, and all are estimated."""
    runs = (p.N // p.size + 2 + _PAGES - 1) // _PAGES
    head, first = item // runs, item % runs * _PAGES
    batch, kv_head = head // p.heads, head % p.heads
    x, squares, found, room = memory_of(p, scratch)[:4]
    end = 0
    for i in range(p.Lq):
        end = max(end, _row_of(p, batch, 0, i).end)
    begin = i32(p.origin, batch * p.Lq + p.Lq - 1)
    keys = p.key + batch * p.key_b + kv_head * p.key_h
    if p.new > 0:
        for page in range(max(first, (end - p.new - begin) // p.size), min(first + _PAGES, (end - begin) // p.size)):
            if page < p.room:
                summarize_page(p, keys, begin + page * p.size, *_statistics_at(p, batch, kv_head, page), room)
    step = 4 * padded(p.D)
    rows = p.group * p.Lq
    for r0 in range(0, rows, 4):
        many, low, high = min(4, rows - r0), first + _PAGES, first
        fill(x, step, np.float32(0))
        fill(squares, step, np.float32(0))
        for r in range(many):
            row = _row_of(p, batch, kv_head * p.group + (r0 + r) // p.Lq, (r0 + r) % p.Lq)
            if row.end > row.start:
                low = min(low, (row.start - row.origin) // p.size)
                high = max(high, (row.end - 1 - row.origin) // p.size)
            read_query(p, x + r * step, row)
            for d in range(p.D):
                scaled = f32(x + r * step, d) * np.float32(p.scale)
                set_f32(x + r * step, d, scaled)
                set_f32(squares + r * step, d, np.float32(0.5) * scaled * scaled)
        for page in range(max(first, low), min(first + _PAGES, high, p.room)):
            if p.table != 0 and page + _AHEAD < min(first + _PAGES, high):
                vectors.ask_for(_statistics_at(p, batch, kv_head, page + _AHEAD)[0])
            codes, scales = _statistics_at(p, batch, kv_head, page)
            # Products of row r with the key apart, the mean and the variance are at found[4 * r:].
            if p.D % LANES == 0:
                code_products((x, step), codes, 2, p.D, (found, 16), 4)
                code_products((squares, step), codes + 2 * p.D, 1, p.D, (found + 8, 16), 4)
            else:
                for r in range(4):
                    for vector in range(VECTORS):
                        weighted = (squares if vector == 2 else x) + r * step
                        product = vectors.dot(weighted, codes + vector * p.D, p.D, 3)
                        set_f32(found, 4 * r + vector, product)
            apart, mean, spread = f32(scales, 0), f32(scales, 1), f32(scales, 2)
            for r in range(many):
                at, of_row = p.estimates + 8 * p.columns * (head * rows + r0 + r), found + 16 * r
                set_f32(at, page, f32(of_row, 0) * apart)
                set_f32(at, p.columns + page, f32(of_row, 1) * mean + f32(of_row, 2) * spread * spread)


@compiled
def summarize_page(p, keys, first, codes, scales, room):
    """Writes the statistics of the page of ``size`` keys from ``first`` on; ``pages.summarize`` defines them."""
    step = 4 * p.D
    mean = room + p.size * step
    apart, others, variance = mean + 4 * p.D, mean + 8 * p.D, mean + 12 * p.D
    count, most, sound = max(p.size - max(-first, 0), 0), np.float32(0), True
    for j in range(count):
        for d in range(p.D):
            value = vectors.element_of(keys + (max(first, 0) + j) * p.key_n, d, p.kind)
            set_f32(room + j * step, d, value)
            sound = sound and abs(value) < INF
            most = max(most, abs(value))
    # Numbers near one, whose squares neither overflow nor vanish; a power of two rounds nothing.
    unit = np.float32(2.0 ** (math.frexp(max(most, np.float32(_SMALLEST)))[1] - 1))
    if not sound:  # codes of a page without keys, and scales that are no numbers
        count, unit = 0, np.float32(np.nan)
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
            set_i8(codes + vector * p.D, d, int(min(max(code, -LARGEST_CODE), LARGEST_CODE)))
        set_f32(scales, vector, (np.float32(math.sqrt(scale)) if vector == 2 else scale) * unit)


@Kernel
def _attend_kernel(p, item, scratch):
    """One query of one head: the pages of its group, and softmax times value over their keys."""
    row = _row_of(p, *of_rows.decoded(p, item))
    kv_head = row.head // p.group
    scores, places, x, out, weights, chosen, estimates, sample = memory_of(p, scratch)[:8]
    fill(out, padded(p.Dv), np.float32(0))
    inverse = np.float32(1)
    if row.end > row.start:
        budget = 0
        for g in range(p.group):
            budget = max(budget, of_rows.budget_of(p, _row_of(p, row.batch, kv_head * p.group + g, row.i)))
        pages = (row.end - 1 - row.origin) // p.size + 1 - (row.start - row.origin) // p.size
        count = pages
        if budget < row.end - row.start:
            count = min(max((budget + p.size - 1) // p.size, 2), pages)
        keys, values = p.key + kv_head * p.key_h, p.value + kv_head * p.value_h
        if p.table == 0:
            keys, values = keys + row.batch * p.key_b, values + row.batch * p.value_b
        if count < pages:
            set_i32(chosen, 0, pages - 1)
            own = _list_places(p, row, chosen, 1, p.key_block, p.key_row, places)
            _weigh_pages(p, row, keys, places, own, x, estimates, weights)
        for j in range(count):
            set_i32(chosen, j, j)
        if count < pages:
            if count > 2:
                of_rows.best_of(weights + 4, pages - 2, count - 2, 1, estimates, chosen + 4, sample)
            set_i32(chosen, count - 1, pages - 1)
        taken = _list_places(p, row, chosen, count, p.key_block, p.key_row, places)
        read_query(p, x, row)
        score_listed(p, x, keys, places, taken, scores)
        if p.value_block != p.key_block or p.value_row != p.key_row:
            _list_places(p, row, chosen, count, p.value_block, p.value_row, places)
        of_rows.fill_up(p, scores, places, taken)
        inverse = of_rows.softmax_row(p, row, scores, taken, 0, 0, 0)
        of_rows.add_listed(out, p.Dv, scores, places, padded(taken), (values, p.value_n), p.kind)
        set_i32(p.attended, row.number, taken)
    of_rows.write_output(p, row, out, inverse)


@compiled
def _list_places(p, row, chosen, count, of_block, of_row, places):
    """Lists the places of the visible keys of chosen pages, which count from the first visible one; how many."""
    low, taken = (row.start - row.origin) // p.size, 0
    for j in range(count):
        page = low + i32(chosen, j)
        block, number = _page_at(p, row.batch, page)
        first, place = row.origin + page * p.size, block * of_block + (row.origin + number * p.size) * of_row
        for position in range(max(first, row.start), min(first + p.size, row.end)):
            set_i32(places, taken, place + (position - first) * of_row)
            taken += 1
    return taken


@compiled
def _weigh_pages(p, row, keys, places, own, x, room, weights):
    """Writes the weight of each page from the first visible one up to the query's own: its share, over all heads.

    ``places`` are those of the ``own`` keys of the query's page. ``room`` is for scores: two of each page, which are
    estimated, and those of the own keys.
    """
    low = (row.start - row.origin) // p.size
    pages = (row.end - 1 - row.origin) // p.size - low
    whole, factor = padded(pages), np.float32(LOG2E)
    far, rest, own_scores = room, room + 4 * whole, room + 8 * whole
    in_first = row.origin + (low + 1) * p.size - row.start
    fill(weights, whole, np.float32(0))
    for g in range(p.group):
        of_head = _row_of(p, row.batch, row.head // p.group * p.group + g, row.i)
        read_query(p, x, of_head)
        score_listed(p, x, keys, places, own, own_scores)
        for j in range(own):
            set_f32(own_scores, j, f32(own_scores, j) * np.float32(p.scale))
        at = p.estimates + 8 * p.columns * of_head.number
        for j in range(pages):
            set_f32(far, j, f32(at, low + j))
            set_f32(rest, j, f32(at, p.columns + low + j))
        cap(far, 2 * whole + own, 1.0, p.softcap)
        for j in range(pages):
            # What is no number, or infinite, outweighs all others, and has no part in the softmax.
            if not (f32(far, j) < INF and f32(rest, j) < INF):
                set_f32(weights, j, INF)
                set_f32(far, j, -INF)
                set_f32(rest, j, -INF)
        if in_first == 1:  # the key apart is the only one
            set_f32(rest, 0, -INF)
        is_sound = True
        for j in range(own):
            is_sound = is_sound and f32(own_scores, j) < INF
        count_own = padded(own) if is_sound else 0
        pad_row(far, pages, -INF)
        pad_row(rest, pages, -INF)
        pad_row(own_scores, own, -INF)
        most = largest(far, 2 * whole + count_own)
        if not most > -INF:
            continue
        total = exponentials(own_scores, count_own, most, factor, 0, 0)
        exponentials(far, 2 * whole, most, factor, 0, 0)
        for j in range(pages):
            others = np.float32((in_first if j == 0 else p.size) - 1)
            value = f32(far, j) + f32(rest, j) * others
            set_f32(far, j, value)
            total += value
        share = np.float32(1) / total
        for j in range(pages):
            set_f32(weights, j, f32(weights, j) + f32(far, j) * share)

"""What kernels for CPUs do with rows: read and write them, find their largest scores, weigh keys, add up values."""

import math
from typing import NamedTuple

import numpy as np

from nc_patch.ops.cpu import vectors
from nc_patch.ops.cpu.launch import compiled
from nc_patch.ops.cpu.llvm import COLUMNS, LANES, TILE_ROWS
from nc_patch.ops.cpu.vectors import dot, f32, from_floats, i32, largest, product, set_f32, set_i32, to_floats

INF = np.float32(np.inf)
LARGEST = np.finfo(np.float32).max
LOG2E = math.log2(math.e)
# Scores of a row that a first guess of its threshold is taken from, and rows that are too short for one.
SAMPLED, _FEW = 512, 1024


@compiled
def padded(count: int) -> int:
    """``count``, rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@compiled
def tiles_in(count: int) -> int:
    """How many tiles ``count`` columns take."""
    return (count + COLUMNS - 1) // COLUMNS


class Row(NamedTuple):
    """A row of a problem: its sequence of the batch, its head and position among the queries, its number among all rows
    of the launch, the interval of keys that it sees, and where its sequence begins.
    """

    batch: int
    head: int
    i: int
    number: int
    start: int
    end: int
    origin: int


@compiled
def row_of(p, batch, head, i):
    """The row of a head and a position."""
    at = batch * p.Lq + i
    number = (batch * p.heads * p.group + head) * p.Lq + i
    return Row(batch, head, i, number, i32(p.visible, 2 * at), i32(p.visible, 2 * at + 1), i32(p.origin, at))


@compiled
def decoded(p, item):
    """Of an item of decoding, which is one of ``queries`` of a head from ``first`` on: sequence, head and position."""
    head = item // p.queries
    return head // (p.heads * p.group), head % (p.heads * p.group), p.first + item % p.queries


@compiled
def tile_of(p, item):
    """Of an item: its head, and its rows [first, last); the last rows, which see most keys, come first."""
    tiles = (p.Lq + p.rows - 1) // p.rows
    first = (tiles - 1 - item // p.heads) * p.rows
    return item % p.heads, first, min(first + p.rows, p.Lq)


@compiled
def row_in(p, head, first, rows, r):
    """Row ``r`` of all heads of a group over ``rows`` positions from ``first`` on."""
    return row_of(p, 0, head * p.group + r // rows, first + r % rows)


@compiled
def budget_of(p, row):
    """How many keys a row attends."""
    return i32(p.budget, row.batch * p.budget_b + row.head * p.budget_h + row.i)


@compiled
def leave_gap(low, high, row):
    """Whether keys lie between [low, high) and a row's interval, if neither is empty, that are in none of the two."""
    return low < high and row.start < row.end and (row.start > high or row.end < low)


@compiled
def read_query(p, target, row):
    """A row's query as floats, or in pairs, see ``parts.in_pairs``."""
    source = p.query + row.batch * p.query_b + row.head * p.query_h + row.i * p.query_n
    read_row(target, source, p.D, 0 if p.pairs else p.kind)


@compiled
def write_output(p, row, source, factor):
    """Writes a row of the output, ``source`` times a factor."""
    target = p.output + row.batch * p.output_b + row.head * p.output_h + row.i * p.output_n
    from_floats(target, source, p.Dv, factor, p.kind)


@compiled
def read_row(target, source, count, kind):
    """Converts ``count`` elements of a kind to floats, zeros up to a whole vector."""
    to_floats(target, source, count, kind)
    pad_row(target, count, np.float32(0))


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
    if vectors.count_from(row, count, INF) >= k:
        return INF
    hi = min(largest(row, count), LARGEST)
    high = vectors.count_from(row, count, hi)
    if high >= k:
        return hi
    lo = least
    if not lo > -INF:
        step = np.float32(max(abs(hi) * 0.25, 1e-30))
        lo = hi - step
        while lo > -INF and vectors.count_from(row, count, lo) < k:
            hi = lo
            step *= np.float32(2)
            lo = hi - step
        if not lo > -INF:
            lo = -LARGEST
        high = vectors.count_from(row, count, hi)
    low = vectors.count_from(row, count, lo)
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
        found = vectors.count_from(row, count, middle)
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
        step = count // LANES // (SAMPLED // LANES)
        for i in range(SAMPLED // LANES):
            to_floats(sample + 64 * i, row + 64 * step * i, LANES, 0)
        share = k / count
        rank = int(share * SAMPLED + 4.0 * math.sqrt(share * (1 - share) * SAMPLED) + 1.0)
        if rank < SAMPLED:
            guess = kth_largest(sample, SAMPLED, rank, -INF)
    taken = 0
    if guess > -INF:
        taken = vectors.take_from(row, padded(count), guess, values, places, first, 0)
    if taken < k:
        guess = -INF
        vectors.take_from(row, padded(count), -INF, values, places, first, 0)
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
    if threshold > -INF and vectors.count_from(values, whole, threshold) == k:
        vectors.take_from(values, whole, threshold, values, places, places, 1)
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


@compiled
def cap(row, count, scale, softcap):
    """Soft-caps raw scores: ``softcap * tanh(scale * score / softcap)``; none where that is 0."""
    if softcap != 0:
        for i in range(count):
            set_f32(row, i, np.float32(softcap * math.tanh(f32(row, i) * scale / softcap)))


@compiled
def sink_share(p, row, shift):
    """What a row's sink adds to the sum of the exponentials; infinite where it leaves nothing to the keys."""
    if p.sinks == 0:
        return 0.0
    return 2.0 ** (f32(p.sinks, row.head) * LOG2E - shift * p.factor)


@compiled
def write_log_sums(p, row, shift, kept, total):
    """Writes, where that is asked, logarithms of sums of exponentials: over attended keys, and over all and the sink.

    ``total`` is of the attended keys and of page means.
    """
    if p.lse_kept == 0:
        return
    base = shift * p.factor / LOG2E
    set_f32(p.lse_kept, row.number, np.float32(base + math.log(kept)))
    every = base + math.log(total)
    if p.sinks != 0:
        sink = np.float64(f32(p.sinks, row.head))
        every = max(every, sink) + math.log1p(math.exp(-abs(every - sink)))
    set_f32(p.lse, row.number, np.float32(every))


@compiled
def softmax_row(p, row, scores, count, means, counts, counted):
    """Makes exponentials of a row's scores, -inf where not attended, up to a whole vector; one over the sum of all.

    Those of ``counted`` page means count as often as ``counts`` says.
    """
    most = max(largest(scores, padded(count)), largest(means, padded(counted)))
    shift = np.float32(0) if most == -INF and p.sinks != 0 else most
    kept = vectors.exponentials(scores, padded(count), shift, np.float32(p.factor), 0, 0)
    total = kept + vectors.exponentials(means, padded(counted), shift, np.float32(p.factor), counts, 1)
    write_log_sums(p, row, shift, kept, total)
    return np.float32(1.0 / (total + sink_share(p, row, shift)))


@compiled
def fill_up(p, scores, places, taken):
    """Soft-caps the scores of ``taken`` listed keys, and fills up both lists to whole vectors."""
    cap(scores, taken, p.scale, p.softcap)
    pad_row(scores, taken, -INF)
    for j in range(taken, padded(taken)):
        set_i32(places, j, i32(places, 0))


@compiled
def add_listed(out, width, weights, places, count, rows, kind):
    """Adds up the first ``width`` elements of rows of a kind at ``places`` times their weights; ``count`` of four.

    ``rows``: the address of the first, and the bytes from one to the next.
    """
    (at, step), size, most, whole = rows, 4 if kind == 0 else 2, width // 64 * 64, width // LANES * LANES
    for column in range(0, most, 64):
        vectors.add_rows(out + 4 * column, weights, places, count, (at + size * column, step), 4, kind)
    for column in range(most, whole, LANES):
        vectors.add_rows(out + 4 * column, weights, places, count, (at + size * column, step), 1, kind)
    for d in range(whole, width):
        total = f32(out, d)
        for j in range(count):
            total += f32(weights, j) * vectors.element_of(at + i32(places, j) * step, d, kind)
        set_f32(out, d, total)


@compiled
def score_listed(p, x, keys, places, count, scores):
    """Scores of a query of floats and the keys at ``places``."""
    done = 0
    if p.D % LANES == 0:
        done = count // 4 * 4
        vectors.listed_products(x, (keys, p.key_n), places, done, p.D, scores, p.kind)
    for j in range(done, count):
        set_f32(scores, j, dot(x, keys + i32(places, j) * p.key_n, p.D, p.kind))


@compiled
def score_rows(p, x, rows, step, count, out):
    """Writes the raw scores of a query of floats and rows, ``step`` bytes apart."""
    for j in range(count):
        set_f32(out, j, dot(x, rows + j * step, p.D, p.kind))


@compiled
def add_product(x, x_next, y, out, depth, rows, width):
    """Adds the product of x ``[rows, depth]`` and y ``[depth, width]``, ``width`` of 16, to out; see ``product``."""
    whole = width // COLUMNS * COLUMNS
    for row in range(0, rows, TILE_ROWS):
        x_row, z = (x[0] + row * x[1], x[1]), out[0] + row * out[1]
        for column in range(0, whole, COLUMNS):
            product(x_row, x_next, (y[0] + 4 * column, y[1]), (z + 4 * column, out[1]), depth, TILE_ROWS, COLUMNS, 1, 0)
        if whole < width:
            product(x_row, x_next, (y[0] + 4 * whole, y[1]), (z + 4 * whole, out[1]), depth, TILE_ROWS, LANES, 1, 0)

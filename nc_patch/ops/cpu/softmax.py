"""Softmax of rows of scores, and the sum of the values at listed places."""

import math

import numpy as np

from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.products import add_rows, listed_products
from nc_patch.ops.cpu.rows import INF, LOG2E, compiled, dot_row, padded
from nc_patch.ops.cpu.vectors import element_of, exponentials, f32, i32, largest, set_f32, times_counts


@compiled
def cap(row, count, scale, softcap):
    """Soft-caps raw scores: ``softcap * tanh(scale * score / softcap)``; none where that is 0."""
    if softcap != 0:
        for i in range(count):
            set_f32(row, i, np.float32(softcap * math.tanh(f32(row, i) * scale / softcap)))


@compiled
def sink_share(p, head, shift):
    """What a head's sink adds to the sum of the exponentials; infinite where it leaves nothing to the keys."""
    if p.sinks == 0:
        return 0.0
    return 2.0 ** (f32(p.sinks, head) * LOG2E - shift * p.factor)


@compiled
def write_log_sums(p, head, at, shift, kept, total):
    """Writes, where that is asked, logarithms of sums of exponentials: over attended keys, and over all and the sink.

    ``total`` is of the attended keys and of page means.
    """
    if p.lse_kept == 0:
        return
    base = shift * p.factor / LOG2E
    set_f32(p.lse_kept, at, np.float32(base + math.log(kept)))
    every = base + math.log(total)
    if p.sinks != 0:
        sink = np.float64(f32(p.sinks, head))
        every = max(every, sink) + math.log1p(math.exp(-abs(every - sink)))
    set_f32(p.lse, at, np.float32(every))


@compiled
def softmax_row(p, row, count, means, counts, counted, head, at):
    """Makes exponentials of raw scores, -inf where not attended, up to a whole vector; one over the sum of all.

    Those of ``counted`` page means count as often as ``counts`` says. ``at``: the row's number in what is
    written on request.
    """
    most = max(largest(row, padded(count)), largest(means, padded(counted)))
    shift = np.float32(0) if most == -INF and p.sinks != 0 else most
    kept = exponentials(row, padded(count), shift, np.float32(p.factor))
    exponentials(means, padded(counted), shift, np.float32(p.factor))
    total = kept + times_counts(means, counts, padded(counted))
    write_log_sums(p, head, at, shift, kept, total)
    return np.float32(1.0 / (total + sink_share(p, head, shift)))


@compiled
def add_listed(out, width, weights, places, count, rows, step, kind):
    """Adds up the first ``width`` elements of rows of a kind at ``places``, ``step`` bytes apart, times their weights.

    ``count`` is a multiple of 4.
    """
    size, most, whole = 4 if kind == 0 else 2, width // 64 * 64, width // LANES * LANES
    for column in range(0, most, 64):
        add_rows(out + 4 * column, weights, places, count, rows + size * column, step, 4, kind)
    for column in range(most, whole, LANES):
        add_rows(out + 4 * column, weights, places, count, rows + size * column, step, 1, kind)
    for d in range(whole, width):
        total = f32(out, d)
        for j in range(count):
            total += f32(weights, j) * element_of(rows + i32(places, j) * step, d, kind)
        set_f32(out, d, total)


@compiled
def score_listed(p, x, keys, places, count, scores):
    """Scores of a query of floats and the keys at ``places``."""
    done = 0
    if p.D % LANES == 0:
        done = count // 4 * 4
        listed_products(x, keys, p.key_n, places, done, p.D, scores, p.kind)
    for j in range(done, count):
        set_f32(scores, j, dot_row(x, keys + i32(places, j) * p.key_n, p.D, p.kind))

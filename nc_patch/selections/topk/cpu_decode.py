"""Exact ``topk`` of few queries on a CPU: codes bound every score, and only keys that may be among the best are read.

Two launches. In the first an item is a run of keys of one key/value head: it takes in the new keys among them, bounds
the scores of all queries of the group from below, and scores the run's page means. In the second an item is one query
and head: it finds the threshold of its bounds, scores the keys that may reach it, and attends the best. Without codes
the first scores the keys themselves. Without queries it builds an index.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nc_patch.ops.cpu import rows as of_rows
from nc_patch.ops.cpu import vectors
from nc_patch.ops.cpu.launch import KINDS, Kernel, compiled, memory_of
from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.parts import Outputs, arguments_of, last_dense
from nc_patch.ops.cpu.recent import result_of
from nc_patch.ops.cpu.rows import INF, add_listed, best_of, padded, read_query, row_of, score_listed
from nc_patch.ops.cpu.vectors import code_products, f32, fill, i32, set_f32, set_i8, set_i32
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rounding import HALF_ULP, SMALLEST
from nc_patch.selections.topk.codes import LARGEST_CODE, code_slack
from nc_patch.selections.topk.cpu import PAGE, list_best, list_forced, weigh_list

# Keys of an item of the first launch, and floats of bounds that are kept at once.
_KEYS = 1024
_MOST_BOUNDS = 1 << 24
# Floats of what a query's bounds follow from, see ``_weigh_query``.
_STATE = 4


def cpu_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention of few queries a sequence over their best keys; ``new`` keys are taken in first.

    By ``problem.key_index``, where there is one and codes of a head fill whole vectors; page means join as in prefill.
    """
    key, means, index, outputs = problem.key, problem.means, problem.key_index, Outputs.of(problem)
    B, Hq, Lq, D = problem.query.shape
    N = key.shape[2]
    columns = padded(N) + 2 * LANES
    slots = 0 if means is None else padded(min(means.key.shape[2], N // PAGE + 1)) + 2 * LANES
    width = columns + slots + _STATE
    at_once = max(1, min(Lq, _MOST_BOUNDS // max(1, B * Hq * width)))
    bounds = torch.empty(B * Hq * at_once, width, dtype=torch.float32, device="cpu")
    arguments = arguments_of(problem, outputs) | {
        "bounds": bounds, "bounds_n": 4 * width, "columns": columns, "slots": slots, "per_scale": code_slack(D),
        "sink_keys": sink_keys, "recent_keys": recent_keys, "coded": bool(index) and D % LANES == 0,
    }  # fmt: skip
    arguments |= _index_of(index, means)
    if problem.new:
        arguments["first_new"] = problem.visible[..., 1].amax(1) - problem.new
    for first in range(0, Lq, at_once):
        queries = min(at_once, Lq - first)
        arguments |= {"first": first, "queries": queries}
        # Four queries, their products with codes, and room to take in keys.
        arrays = [4 * padded(D), 4 * _KEYS, 2 * padded(max(problem.head_dims))]
        _scan_kernel(B * key.shape[1] * -(-N // _KEYS), arrays, **arguments)
        # Scores, places, two more lists, counts of pages, the query, its output, and a sample.
        arrays = [*[columns] * 4, slots, *map(padded, problem.head_dims), of_rows.SAMPLED]
        _attend_kernel(B * Hq * queries, arrays, **arguments)
        arguments["new"] = 0
    return result_of(problem, outputs)


def _index_of(codes: Sequence[torch.Tensor], means: PageMeans | None) -> dict[str, Any]:
    """What a kernel takes of the tensors of an index, where there is one, and of page means."""
    found: dict[str, Any] = dict(zip(("codes", "scales", "residuals", "center", "spread"), codes, strict=False))
    if codes:
        found["room"] = codes[0].shape[2]
    if means is not None:
        found |= {"mean_key": means.key, "mean_value": means.value, "mean_count": means.key.shape[2]}
    return found


def cpu_take_in_(
    key: torch.Tensor, value: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int,
    codes: Sequence[torch.Tensor] = (), means: PageMeans | None = None,
) -> None:  # fmt: skip
    """Writes the codes of the keys ``[first, first + count)`` of each sequence, as far as there are any, and the mean
    of each whole page that holds any of them.

    Args:
        key: ``[B, Hkv, N, D]``. value: ``[B, Hkv, N, Dv]``. origin, first: int ``[B]``.
        codes: those of ``KeyCodes``, contiguous, as an index has them. means: page means.
    """
    (B, Hkv, N, D), Dv = key.shape, value.shape[3]
    _scan_kernel(
        B * Hkv * -(-N // _KEYS), [0, 0, 2 * padded(max(D, Dv))], key=last_dense(key), value=last_dense(value),
        origin=origin.to(torch.int32).contiguous(), first_new=first.to(torch.int32).contiguous(), new=count, heads=Hkv,
        Lq=1, N=N, D=D, Dv=Dv, kind=KINDS[key.dtype], **_index_of(codes, means),
    )  # fmt: skip


@compiled
def _take_in(p, head, begin, first, end, scratch):
    """Of a run of keys from ``begin`` on: the codes of those of [first, end), and the means of pages that have any."""
    batch, kv_head = head // p.heads, head % p.heads
    keys, values = p.key + batch * p.key_b + kv_head * p.key_h, p.value + batch * p.value_b + kv_head * p.value_h
    if p.codes != 0:
        for position in range(max(begin, first), min(begin + _KEYS, end, p.room)):
            _encode(p, head, keys + position * p.key_n, head * p.room + position, scratch)
    if p.mean_count == 0:
        return
    mean_keys = p.mean_key + batch * p.mean_key_b + kv_head * p.mean_key_h
    mean_values = p.mean_value + batch * p.mean_value_b + kv_head * p.mean_value_h
    shift = i32(p.origin, batch * p.Lq + p.Lq - 1) % PAGE
    for slot in range(begin // PAGE, min((begin + _KEYS) // PAGE, p.mean_count)):
        page = slot * PAGE + shift
        if first - PAGE < page <= end - PAGE:
            _average(p, keys + page * p.key_n, p.key_n, mean_keys + slot * p.mean_key_n, p.D, scratch)
            _average(p, values + page * p.value_n, p.value_n, mean_values + slot * p.mean_value_n, p.Dv, scratch)


@compiled
def _norm(x, count):
    """The norm of floats, not below the true one but for its rounding of ordinary numbers."""
    total = 0.0
    for i in range(count):
        total += np.float64(f32(x, i)) * np.float64(f32(x, i))
    return np.float32(math.sqrt(total) + 2.0**-149)


@compiled
def _weigh_query(p, x, head, state):
    """Multiplies a query by the channels' spreads, in place, and writes what its bounds follow from."""
    center, spread = p.center + 4 * head * p.D, p.spread + 4 * head * p.D
    middle, size = np.float32(0), _norm(x, p.D)
    for d in range(p.D):
        middle += f32(x, d) * f32(center, d)
        set_f32(x, d, f32(x, d) * f32(spread, d))
    set_f32(state, 0, middle)
    set_f32(state, 1, _norm(x, p.D))
    set_f32(state, 2, np.float32(p.per_scale))
    set_f32(state, 3, size * _norm(center, p.D) * np.float32(2 * (p.D + 16) * HALF_ULP) + np.float32(SMALLEST))


@Kernel
def _scan_kernel(p, item, scratch):
    """A run of keys of one head: new ones are taken in, scores are bounded from below, page means are scored."""
    runs = (p.N + _KEYS - 1) // _KEYS
    head, begin = item // runs, item % runs * _KEYS
    batch, kv_head = head // p.heads, head % p.heads
    x, raw, room = memory_of(p, scratch)[:3]
    high = 0
    for i in range(p.first, p.first + p.queries):
        high = max(high, row_of(p, batch, 0, i).end)
    if p.new > 0:
        first = i32(p.first_new, batch)
        _take_in(p, head, begin, first, min(first + p.new, p.N), room)
    keys = p.key + batch * p.key_b + kv_head * p.key_h + begin * p.key_n
    slot, place = begin // PAGE, head * p.room + begin
    mean_keys = p.mean_key + batch * p.mean_key_b + kv_head * p.mean_key_h + slot * p.mean_key_n
    slots = min(_KEYS // PAGE, min(p.mean_count, p.N // PAGE + 1) - slot)
    count, step = min(begin + _KEYS, high) - begin, 4 * padded(p.D)
    rows = p.group * p.queries
    for first in range(0, rows, 4):
        many, bounds = min(4, rows - first), p.bounds + (head * rows + first) * p.bounds_n
        fill(x, step, np.float32(0))
        for r in range(many):
            row = row_of(p, batch, kv_head * p.group + (first + r) // p.queries, p.first + (first + r) % p.queries)
            query, of_row = x + r * step, bounds + r * p.bounds_n
            read_query(p, query, row)
            of_rows.score_rows(p, query, mean_keys, p.mean_key_n, slots, of_row + 4 * (p.columns + slot))
            if p.coded != 0:
                _weigh_query(p, query, head, of_row + 4 * (p.columns + p.slots))
            else:
                of_rows.score_rows(p, query, keys, p.key_n, count, of_row + 4 * begin)
        if p.coded == 0 or count <= 0:
            continue
        code_products((x, step), p.codes + place * p.D, count, p.D, (raw, 4 * _KEYS), many)
        for r in range(many):
            of_row = bounds + r * p.bounds_n
            vectors.to_lower_bounds(
                raw + 4 * r * _KEYS, of_row + 4 * begin, padded(count), p.scales + 4 * place, p.residuals + 4 * place,
                of_row + 4 * (p.columns + p.slots),
            )  # fmt: skip


@compiled
def _encode(p, head, key, place, x):
    """Writes the codes of a key; ``codes.encode_keys`` defines them."""
    center, spread = p.center + 4 * head * p.D, p.spread + 4 * head * p.D
    of_rows.read_row(x, key, p.D, p.kind)
    most, sound = np.float32(0), True
    for d in range(p.D):
        value = (f32(x, d) - f32(center, d)) / f32(spread, d)
        set_f32(x, d, value)
        sound = sound and abs(value) < INF
        most = max(most, abs(value))
    if not sound:
        fill(x, padded(p.D), np.float32(0))
        most = np.float32(0)
    scale = most / np.float32(LARGEST_CODE) if most >= np.float32(SMALLEST) else np.float32(0)
    left = 0.0
    for d in range(p.D):
        code = np.float32(0)
        if scale > 0:
            code = np.rint(f32(x, d) / scale)
            code = min(max(code, np.float32(-LARGEST_CODE)), np.float32(LARGEST_CODE))
        set_i8(p.codes + place * p.D, d, int(code))
        rest = f32(x, d) - scale * code
        left += np.float64(rest) * np.float64(rest)
    residual = math.sqrt(left) * (1 + p.D * HALF_ULP) + most * (8 * math.sqrt(p.D) * HALF_ULP) + SMALLEST
    set_f32(p.scales, place, scale)
    set_f32(p.residuals, place, np.float32(residual * (1 + HALF_ULP)) if sound else INF)


@compiled
def _average(p, rows, step, target, width, x):
    """Writes the mean of a page's rows."""
    total = x + 4 * padded(width)
    fill(total, padded(width), np.float32(0))
    for row in range(PAGE):
        of_rows.read_row(x, rows + row * step, width, p.kind)
        for d in range(width):
            set_f32(total, d, f32(total, d) + f32(x, d) * np.float32(1 / PAGE))
    vectors.from_floats(target, total, width, np.float32(1), p.kind)


@Kernel
def _attend_kernel(p, item, scratch):
    """One query of one head: its threshold, its best keys, and softmax times value over those."""
    row = row_of(p, *of_rows.decoded(p, item))
    batch, kv_head = row.batch, row.head // p.group
    scores, places, listed, exact, counts, x, out, sample = memory_of(p, scratch)[:8]
    fill(out, padded(p.Dv), np.float32(0))
    inverse = np.float32(1)
    if row.end > row.start:
        bounds = p.bounds + item * p.bounds_n
        k = min(of_rows.budget_of(p, row), row.end - row.start)
        if p.coded == 0:
            list_best(p, row, bounds + 4 * row.start, k, scores, places, sample)
        else:
            read_query(p, x, row)
            keys = p.key + batch * p.key_b + kv_head * p.key_h
            sinks, recents = list_forced(p, row, k, places)
            forced = sinks + recents
            score_listed(p, x, keys, places, forced, scores)
            if k > forced:
                best, at = scores + 4 * forced, places + 4 * forced
                first, stop = row.start + sinks, row.end - recents
                threshold = of_rows.threshold_of(bounds + 4 * first, stop - first, k - forced, best, at, sample)
                found, count = _candidates(p, batch * p.heads + kv_head, bounds, first, stop, threshold, listed)
                score_listed(p, x, keys, found, count, exact)
                best_of(exact, count, k - forced, 0, best, at, sample)
                for j in range(forced, k):
                    set_i32(places, j, i32(found, i32(places, j)))
        slots, means = min(row.end // PAGE + 1, p.mean_count), bounds + 4 * p.columns
        inverse, slot, counted = weigh_list(p, row, scores, places, k, means, slots, counts)
        values = p.value + batch * p.value_b + kv_head * p.value_h
        add_listed(out, p.Dv, scores, places, padded(k), (values, p.value_n), p.kind)
        if counted > 0:
            for j in range(padded(counted)):
                set_i32(listed, j, slot + min(j, counted - 1))
            values = p.mean_value + batch * p.mean_value_b + kv_head * p.mean_value_h
            add_listed(out, p.Dv, means + 4 * slot, listed, padded(counted), (values, p.mean_value_n), p.kind)
    of_rows.write_output(p, row, out, inverse)


@compiled
def _candidates(p, head, bounds, first, stop, threshold, listed):
    """Lists the keys [first, stop) whose scores may reach a threshold: where the list is, and how long."""
    # Whole vectors, which lie within what there is room for; what is not asked for is cut off again.
    begin = first // LANES * LANES
    place, row, width = 4 * (head * p.room + begin), bounds + 4 * begin, padded(stop - begin)
    vectors.to_upper_bounds(row, width, p.scales + place, p.residuals + place, bounds + 4 * (p.columns + p.slots))
    count = vectors.take_from(row, width, threshold, row, listed, begin, 0)
    skipped = 0
    while skipped < count and i32(listed, skipped) < first:
        skipped += 1
    while count > skipped and i32(listed, count - 1) >= stop:
        count -= 1
    return listed + 4 * skipped, count - skipped

"""The keys that a row lists as its best, and the weights of those and of page means."""

import numpy as np

from nc_patch.ops.cpu.rows import INF, best_of, compiled, pad_row, padded
from nc_patch.ops.cpu.softmax import cap, softmax_row
from nc_patch.ops.cpu.vectors import f32, fill, i32, set_f32, set_i32
from nc_patch.ops.means import TAIL_PAGE_SIZE

PAGE = TAIL_PAGE_SIZE


@compiled
def forced_of(p, k, seen):
    """How many first and last of ``seen`` keys a row attends whatever they score; all it does, if it attends all."""
    recents = min(k, p.recent_keys)
    return (k, 0) if k >= seen else (min(k - recents, p.sink_keys), recents)


@compiled
def list_best(p, row, start, end, k, scores, places, sample):
    """Lists the scores and the positions of the ``k`` keys that a row attends, of raw scores from ``start`` on."""
    seen = end - start
    sinks, recents = forced_of(p, k, seen)
    forced = sinks + recents
    for j in range(forced):
        place = j if j < sinks else seen - forced + j
        set_f32(scores, j, f32(row, place))
        set_i32(places, j, start + place)
    if k > forced:
        best_of(row + 4 * sinks, seen - forced, k - forced, start + sinks, scores + 4 * forced, places + 4 * forced,
                sample)  # fmt: skip


@compiled
def weigh_list(p, scores, places, taken, seen, head, at, means, slots, counts):
    """Makes weights of the scores of ``taken`` listed keys and of ``slots`` page means; fills up both lists.

    Args:
        seen: start and end of the row's interval, and the origin of its sequence.
        at: the row's number in what is written on request.
        counts: room for as many floats as there are slots.

    Returns:
        (one over the sum of all weights, slot of the first page that counts, how many do).
    """
    start, end, origin = seen
    slot = counted = 0
    cap(scores, taken, p.scale, p.softcap)
    pad_row(scores, taken, -INF)
    for j in range(taken, padded(taken)):
        set_i32(places, j, i32(places, 0))
    if slots > 0 and taken < end - start:
        slot, counted = missing_of_pages(places, taken, start, end, origin, counts)
        cap(means + 4 * slot, counted, p.scale, p.softcap)
        pad_row(means + 4 * slot, counted, -INF)
    return softmax_row(p, scores, taken, means + 4 * slot, counts, counted, head, at), slot, counted


@compiled
def missing_of_pages(places, taken, start, end, origin, counts):
    """How many keys of each page that counts for a row are not among those at ``places``, and where the pages are.

    Returns:
        (slot of the first page, number of pages); ``counts`` receives a float for each, zeros up to a whole vector.
    """
    first = (start - origin + PAGE - 1) // PAGE
    counted = max((end - 1 - origin) // PAGE - first, 0)
    fill(counts, padded(counted), np.float32(PAGE))
    begin = origin + first * PAGE
    for j in range(taken):
        place = i32(places, j) - begin
        if 0 <= place < counted * PAGE:
            set_f32(counts, place // PAGE, f32(counts, place // PAGE) - np.float32(1))
    pad_row(counts, counted, np.float32(0))
    return origin // PAGE + first, counted

"""What a row does with the keys that it has listed: their weights, those of page means, and the sum of their values."""

import numpy as np

from nc_patch.ops.cpu.rows import INF, compiled, pad_row, padded
from nc_patch.ops.cpu.softmax import cap, shift_of, sink_share, write_log_sums
from nc_patch.ops.cpu.vectors import exponentials, fill_i32, i32, largest, set_f32, set_i32, times_counts
from nc_patch.ops.means import TAIL_PAGE_SIZE

PAGE = TAIL_PAGE_SIZE


@compiled
def forced_of(p, k, seen):
    """How many first and last of ``seen`` keys a row attends whatever they score; all it does, if it attends all."""
    recents = min(k, p.recent_keys)
    return (k, 0) if k >= seen else (min(k - recents, p.sink_keys), recents)


@compiled
def pad_list(scores, places, count):
    """Fills the last vectors of a list: with -inf, and with its first place."""
    pad_row(scores, count, -INF)
    for j in range(count, padded(count)):
        set_i32(places, j, i32(places, 0))


@compiled
def weigh_list(p, scores, places, taken, seen, head, at, means, slots, counts):
    """Makes weights of the scores of listed keys and of page means.

    Args:
        scores, places: of ``taken`` keys, up to whole vectors -inf and the first place.
        seen: start and end of the row's interval, and the origin of its sequence.
        at: the row's number in what is written on request.
        means: raw scores of ``slots`` page means, which become weights, zero where a page does not count.
        counts: room for as many int32.

    Returns:
        (one over the sum of all weights, slot of the first page that counts, how many do).
    """
    start, end, origin = seen
    if p.softcap != 0:
        cap(scores, taken, p.scale, p.softcap)
    most = largest(scores, padded(taken))
    slot = counted = 0
    if slots > 0 and taken < end - start:
        slot, counted = missing_of_pages(places, taken, start, end, origin, counts)
        if p.softcap != 0:
            cap(means + 4 * slot, counted, p.scale, p.softcap)
        pad_row(means + 4 * slot, counted, -INF)
        most = max(most, largest(means + 4 * slot, padded(counted)))
    shift = shift_of(p, most)
    kept = exponentials(scores, padded(taken), shift, np.float32(p.factor))
    total = kept
    if counted > 0:
        exponentials(means + 4 * slot, padded(counted), shift, np.float32(p.factor))
        total += times_counts(means + 4 * slot, counts, padded(counted))
    write_log_sums(p, head, at, shift, kept, total)
    for j in range(slot):
        set_f32(means, j, np.float32(0))
    for j in range(slot + counted, slots):
        set_f32(means, j, np.float32(0))
    return np.float32(1.0 / (total + sink_share(p, head, shift))), slot, counted


@compiled
def missing_of_pages(places, taken, start, end, origin, counts):
    """How many keys of each page that counts for a row are not among those at ``places``, and where the pages are.

    Returns:
        (slot of the first page, number of pages); ``counts`` receives an int32 for each, zeros up to a whole vector.
    """
    first = (start - origin + PAGE - 1) // PAGE
    counted = max((end - 1 - origin) // PAGE - first, 0)
    fill_i32(counts, padded(counted), PAGE)
    begin = origin + first * PAGE
    for j in range(taken):
        place = i32(places, j) - begin
        if 0 <= place < counted * PAGE:
            set_i32(counts, place // PAGE, i32(counts, place // PAGE) - 1)
    for j in range(counted, padded(counted)):
        set_i32(counts, j, 0)
    return origin // PAGE + first, counted

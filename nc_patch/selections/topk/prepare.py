"""What comes before the scan: new keys are taken into the indexes, and a guess of each row's k-th score is made."""

import triton
import triton.language as tl

from nc_patch.ops.triton.means import average_rows
from nc_patch.ops.triton.ranks import NO_RANK, RANK_INFINITY, Bracket, count_ranks, rank_of, score_of, search
from nc_patch.ops.triton.rows import head_of, program_rows, span
from nc_patch.ops.triton.split import MOST_ARRIVALS
from nc_patch.ops.triton.structs import PER_CALL
from nc_patch.ops.triton.tail import PAGE
from nc_patch.selections.topk.encode import encode_run
from nc_patch.selections.topk.scan import code_products, coded_rows, coded_scores, codes_of_head, one_row, rivals_of

# The golden ratio's fraction in units of 2**-16, and odd.
_GOLDEN = tl.constexpr(40503)
# The most queries of a call, a power of two.
_QUERIES = tl.constexpr(32)
# Entries that are set to zero at once.
_ZEROS = tl.constexpr(1024)
# Deviations of the sample's count by which the guess lies on the safe side.
_DEVIATIONS = tl.constexpr(5.0)


@triton.jit(do_not_specialize=[*PER_CALL, "length", "slots", "new", "touched"])
def prepare_kernel(
    query, key, value, codes, means, inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys,
    length, slots, new, touched, shape, new_keys, SAMPLES: tl.constexpr, SAMPLERS: tl.constexpr,
):  # fmt: skip
    """Approximate scores, ``samples``, of keys drawn from even shares of the rivals of a block of rows.

    Which key of its share is drawn follows from the share's number alone, by multiples of the golden ratio: evenly
    spaced keys would be in step with a text that repeats itself. A key outside a row's rivals is stored as -inf, and
    NaN as +inf. ``SAMPLERS`` programs share the samples of a block.

    The programs after these take the last ``new`` keys of each sequence into its codes and, unless None, its means, of
    which they have ``touched``. The samples are of keys before them.
    """
    rows = program_rows(inputs, budget_heads, num_kv_heads, group, Lq, Lk, shape.BLOCK_M)
    q = tl.arange(0, _QUERIES)
    end_of_sequence = tl.load(inputs.visible + (rows.batch * Lq + q) * 2 + 1, mask=q < Lq, other=0)
    first_new = tl.max(end_of_sequence, axis=0) - new
    number = tl.program_id(1)
    if number < SAMPLERS:
        codes = codes_of_head(codes, rows, num_kv_heads, length, shape)
        coded = coded_rows(query, rows, codes, shape)
        first, last, _needed = rivals_of(rows, sink_keys, recent_keys)
        begin, end = span(first, last, last > first)
        end = tl.maximum(tl.minimum(end, first_new), begin)
        samples = scratch.floats + scratch.samples + (rows.row * SAMPLES)[:, None]
        for start in tl.range(number * (SAMPLES // SAMPLERS), (number + 1) * (SAMPLES // SAMPLERS), shape.BLOCK_N):
            place = start + tl.arange(0, shape.BLOCK_N)
            at = (place.to(tl.int64) << 16) + (place * _GOLDEN & 0xFFFF)
            columns = (begin + (end - begin).to(tl.int64) * at // (SAMPLES << 16)).to(tl.int32)
            within = columns < end
            product = code_products(coded, codes.codes, columns.to(tl.int64), within, shape)
            score = coded_scores(coded, product, tl.load(codes.scale + columns, mask=within, other=0.0))
            score = tl.where(score == score, score, float("inf"))
            rival = (columns[None, :] >= first[:, None]) & (columns[None, :] < tl.minimum(last, end)[:, None])
            score = tl.where(rival, score, float("-inf"))
            tl.store(samples + place[None, :], score, mask=rows.valid[:, None])
    elif tl.program_id(0) % tl.cdiv(Lq * group, shape.BLOCK_M) == 0:
        number -= SAMPLERS
        tiles = tl.cdiv(new, new_keys.BLOCK_N)
        if number < tiles:
            keys = head_of(key, rows.batch, rows.kv_head)
            begin = first_new.to(tl.int64) + number * new_keys.BLOCK_N
            stop = tl.minimum(first_new + new, tl.minimum(Lk, length)).to(tl.int64)
            encode_run(keys, codes, rows.batch * num_kv_heads + rows.kv_head, begin, stop, length, new_keys)
        elif means is not None:
            origin = tl.load(inputs.origin + rows.batch * Lq + Lq - 1)
            # Division that rounds down, for origins before the first key too.
            residue = origin.to(tl.int64) & (PAGE - 1)
            changed = first_new.to(tl.int64) - residue
            changed = (changed - (changed & (PAGE - 1))) // PAGE
            # Where the first slot is clamped some are written twice, with the same means.
            changed = tl.minimum(tl.maximum(changed, 0), slots - touched)
            slot = changed + (number - tiles) + tl.arange(0, 1)
            start = slot * PAGE + residue
            average_rows(
                head_of(key, rows.batch, rows.kv_head), head_of(means.key, rows.batch, rows.kv_head), start, slot,
                slot >= 0, 0, Lk, shape.D, PAGE, new_keys.BLOCK_D,
            )  # fmt: skip
            average_rows(
                head_of(value, rows.batch, rows.kv_head), head_of(means.value, rows.batch, rows.kv_head), start, slot,
                slot >= 0, 0, Lk, shape.DV, PAGE, new_keys.BLOCK_DV,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*PER_CALL, "slots"])
def guess_kernel(
    inputs, scratch, budget_heads, num_kv_heads, group, Lq, Lk, sink_keys, recent_keys, slots, SAMPLES: tl.constexpr
):  # fmt: skip
    """A score that at least the needed rivals of a row should reach, and few more; -inf where the sample is no help.

    Sets to zero what later kernels count in: ``reached``, ``page_counts`` and ``arrivals``.
    """
    row = one_row(inputs, budget_heads, num_kv_heads, group, Lq, Lk)
    set_zero(scratch.integers + scratch.arrivals + row.row * MOST_ARRIVALS, MOST_ARRIVALS)
    set_zero(scratch.integers + scratch.reached + row.row * 2, 2)
    set_zero(scratch.integers + scratch.page_counts + row.row * slots, slots)
    first, last, needed = rivals_of(row, sink_keys, recent_keys)
    sampled = tl.load(scratch.floats + scratch.samples + row.row * SAMPLES + tl.arange(0, SAMPLES))
    ranks = tl.where(sampled > float("-inf"), rank_of(sampled), NO_RANK)
    size = tl.sum((ranks > NO_RANK).to(tl.int32), axis=0)
    share = needed.to(tl.float32) * size.to(tl.float32) / tl.maximum(last - first, 1).to(tl.float32)
    place = tl.ceil(share + _DEVIATIONS * tl.sqrt(share) + 4.0).to(tl.int32)
    guess = tl.where(needed > 0, float("-inf"), float("inf"))
    if (needed > 0) & (needed < last - first) & (place <= size):
        low = tl.min(tl.where(ranks > NO_RANK, ranks, RANK_INFINITY), axis=0)
        bracket = Bracket(low, tl.max(ranks, axis=0) + 1, size, size * 0)
        guess = score_of(search(bracket, place, count_ranks, ranks).low)
    tl.store(scratch.floats + scratch.guess + row.row, guess)


@triton.jit
def set_zero(pointer, count):
    """Sets ``count`` int32 to zero."""
    for begin in range(0, count, _ZEROS):
        place = begin + tl.arange(0, _ZEROS)
        tl.store(pointer + place, tl.zeros([_ZEROS], tl.int32), mask=place < count)

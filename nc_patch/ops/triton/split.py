"""Split-K: one row's keys are divided among programs, and the last of them joins what each has accumulated.

Decoding has few rows and many keys, so that a row has to be spread over the GPU. The program of split s leaves a
``Softmax`` of the keys it attended, in float32 and with logits in base 2: ``peak[row, s]``, ``total[row, s]`` and
``acc[row, s]``. One that attended nothing has ``peak = -inf`` and ``total = 0``, and its ``acc`` counts for nothing.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.scores import LN_2, empty_softmax, finite_or_zero, join_sink, write_rows
from nc_patch.ops.triton.structs import Softmax

MAX_SPLITS = 256
# Of an H200; other GPUs come close.
_MULTIPROCESSORS = 132
# Beyond this, writing and joining the partial sums costs more than the parallelism gains.
MOST_USEFUL_SPLITS = 64
# Parts that are joined one after another.
GROUP = tl.constexpr(16)
# Room for ``arrivals`` of a block: one for each group of parts and one for all groups, a power of two.
MOST_ARRIVALS = tl.constexpr(32)
# On AMD's GPUs a barrier does not wait for stores: each thread waits for its own, by an atomic that adds nothing.
_EACH_WAITS = tl.constexpr(torch.version.hip is not None)
_THREADS = tl.constexpr(512)


def share(resident: int, blocks: int, units: int, most: int = MOST_USEFUL_SPLITS) -> int:
    """Among how many programs, at most ``most``, to divide each of ``blocks`` blocks of ``units`` tiles of work.

    A multiprocessor holds ``resident`` of them at once: one wave, and no second one that is nearly empty.
    """
    return max(1, min(resident * _MULTIPROCESSORS // max(blocks, 1), units, most))


def padded_splits(splits: int) -> int:
    """The power of two that a kernel takes for a number of splits; the same for most plans."""
    return max(MOST_USEFUL_SPLITS, triton.next_power_of_2(splits))


@triton.jit
def arrives_last(arrivals, programs):
    """Whether this program is the last of ``programs`` that come here: it may read what the others have stored before.

    ``arrivals`` points to an int32 that was zero before the launch.
    """
    if _EACH_WAITS:
        tl.atomic_add(arrivals + tl.zeros([_THREADS], tl.int32), 0, sem="release")
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1


@triton.jit
def store_part(parts, valid, softmax, at, shape):
    """Stores the ``Softmax`` of ``valid`` rows at the places ``at`` of their parts, which ``parts`` (pointers) hold."""
    dv = tl.arange(0, shape.BLOCK_DV)
    inside = valid[:, None] & (dv[None, :] < shape.DV)
    tl.store(parts.acc + at[:, None] * shape.DV + dv[None, :], softmax.acc, mask=inside)
    tl.store(parts.peak + at, softmax.peak, mask=valid)
    tl.store(parts.total + at, softmax.total, mask=valid)


@triton.jit
def join_parts(parts, valid, first, step, count, shape):
    """The ``Softmax`` of ``count`` parts of each ``valid`` row, ``step`` apart from the places ``first`` on."""
    dv = tl.arange(0, shape.BLOCK_DV)
    softmax = empty_softmax(shape)
    # With few rows there are registers for more parts at once, and not to wait for whether one is used.
    FEW: tl.constexpr = shape.BLOCK_M <= 8
    UNROLLED: tl.constexpr = 8 if FEW else 2
    for part in tl.range(0, count, loop_unroll_factor=UNROLLED):
        at = first + part * step
        peak = tl.load(parts.peak + at, mask=valid, other=float("-inf"))
        total = tl.load(parts.total + at, mask=valid, other=0.0)
        used = (peak != float("-inf")) | (total != 0.0)
        inside = (valid if FEW else used)[:, None] & (dv < shape.DV)[None, :]
        acc = tl.load(parts.acc + at[:, None] * shape.DV + dv[None, :], mask=inside, other=0.0)
        higher = tl.maximum(softmax.peak, peak)
        base = finite_or_zero(higher)
        # Nothing is added to nothing, whatever the factor.
        before = tl.where(softmax.total != 0.0, tl.exp2(finite_or_zero(softmax.peak) - base), 0.0)
        factor = tl.where(used, tl.exp2(finite_or_zero(peak) - base), 0.0)
        if FEW:
            acc = tl.where(used[:, None], acc, 0.0)
        softmax = Softmax(
            softmax.acc * before[:, None] + acc * factor[:, None], higher, softmax.total * before + total * factor
        )
    return softmax


@triton.jit
def finish_part(scratch, block, rows, softmax, part, count, shape, join_rows, join_shape):
    """(whether this program is the last of ``count``, the ``Softmax`` of all parts of its rows).

    Each program of a block of rows comes here with its ``part``. The last one of every ``GROUP`` parts joins these, and
    the last of those the groups, so that neither has many to read one after another. ``join_rows`` are the same rows in
    a tile of ``join_shape``, which may have room for fewer. In the scratch memory there is room for the parts of all
    rows, and there are ``MOST_ARRIVALS`` ``arrivals`` for each block, zero before the launch.
    """
    parts = Softmax(scratch.floats + scratch.acc, scratch.floats + scratch.peak, scratch.floats + scratch.total)
    arrivals = scratch.integers + scratch.arrivals + block * MOST_ARRIVALS
    store_part(parts, rows.valid, softmax, rows.row * count + part, shape)
    group = part // GROUP
    first = join_rows.row * count + group * GROUP
    members = tl.minimum(count - group * GROUP, GROUP)
    last = False
    joined = empty_softmax(join_shape)
    if arrives_last(arrivals + 1 + group, members):
        joined = join_parts(parts, join_rows.valid, first, 1, members, join_shape)
        groups = tl.cdiv(count, GROUP)
        # Every thread has read the part that is stored over.
        tl.debug_barrier()
        store_part(parts, join_rows.valid, joined, first, join_shape)
        last = arrives_last(arrivals, groups)
        if last:
            joined = join_parts(parts, join_rows.valid, join_rows.row * count, GROUP, groups, join_shape)
    return last, joined


@triton.jit
def write_joined(softmax, rows, sinks, attended, output, lse, lse_keys, shape):
    """Writes the output of rows, and the logs of their softmax's denominators, with and without ``sinks``.

    ``attended`` is how many keys each row attends: one without any is zero. What is not finite is stored as NaN: an
    infinite or NaN value has been attended. ``lse`` and ``lse_keys`` are None where they are not wanted.
    """
    base, share, denominator = join_sink(softmax.peak, softmax.total, sinks, rows.head, rows.valid)
    result = softmax.acc * (share / denominator)[:, None]
    result = tl.where(tl.abs(result) < float("inf"), result, float("nan"))
    write_rows(output, rows, result, attended, shape)
    if lse is not None:
        tl.store(lse + rows.row, (base + tl.log2(denominator)) * LN_2, mask=rows.valid)
    if lse_keys is not None:
        own = finite_or_zero(softmax.peak) + tl.log2(softmax.total)
        tl.store(lse_keys + rows.row, own * LN_2, mask=rows.valid)

"""Split-K: one row's keys are divided among programs, and a second kernel joins what each of them accumulated.

Decoding has few rows and many keys, so that a row has to be spread over the GPU. The program of split s leaves three
things about the keys it attended, in float32 and with logits in base 2 (``scores.logits_base2``):

- ``peak[row, s]``: the largest logit,
- ``total[row, s]``: the sum of ``2 ** (logit - base)``, where ``base = scores.finite_or_zero(peak)``,
- ``acc[row, s]``: the sum of ``2 ** (logit - base)`` times the value.

That is what a ``Softmax`` holds. A split that attended nothing has ``peak = -inf`` and ``total = 0``, and its
``acc`` is never read. Rows are those of a contiguous ``[B, Hq, Lq]``.
"""

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.launch import on_device
from nc_patch.ops.triton.scores import LN_2, empty_softmax, finite_or_zero, join_sink
from nc_patch.ops.triton.structs import PER_CALL, Softmax

MAX_SPLITS = 256
# Of an H200; other GPUs come close.
_MULTIPROCESSORS = 132
# Beyond this, writing and joining the partial sums costs more than the parallelism gains.
MOST_USEFUL_SPLITS = 64
# Fewer keys than this are divided like this many.
_SHORTEST = 4096
_COLUMNS = 32
# Parts that are joined one after another.
PARTS_AT_ONCE = 16
GROUP = tl.constexpr(PARTS_AT_ONCE)
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def planned_length(keys: int) -> int:
    """For how many keys work is divided: a power of two that is no less, so that few steps take other variants."""
    return max(_SHORTEST, triton.next_power_of_2(keys))


def share(resident: int, blocks: int, units: int, most: int = MOST_USEFUL_SPLITS) -> int:
    """Among how many programs, at most ``most``, to divide each of ``blocks`` blocks of ``units`` tiles of work.

    A multiprocessor holds ``resident`` of them at once: one wave, and no second one that is nearly empty.
    """
    return max(1, min(resident * _MULTIPROCESSORS // max(blocks, 1), units, most))


def padded_splits(splits: int) -> int:
    """The power of two that a kernel takes for a number of splits; the same for most plans."""
    return max(MOST_USEFUL_SPLITS, triton.next_power_of_2(splits))


def combine_splits(
    acc: torch.Tensor,
    peak: torch.Tensor,
    total: torch.Tensor,
    sinks: torch.Tensor | None,
    attended: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    lse_keys: torch.Tensor | None,
) -> None:
    """Joins the splits of every row and writes ``output``, ``lse`` and ``lse_keys``; one launch, no synchronisation.

    Reads ``S * (Dv + 2) * 4`` bytes a row.

    Args:
        acc: float32 ``[R, S, Dv]``, peak, total: float32 ``[R, S]``, as the module describes; contiguous, S at most
            ``MAX_SPLITS``, ``R = B * Hq * Lq``. Where a split has ``peak = -inf`` and ``total = 0``, acc may hold
            anything.
        sinks: ``[Hq]`` learned logits that join the softmax's denominator, natural base, or None.
        attended: int32 ``[B, Hq, Lq]``, contiguous: how many keys each row attends. A row with none is zero; one whose
            keys all score -inf is NaN, unless there is a sink.
        output: ``[B, Hq, Lq, Dv]``, contiguous, in any float dtype. What is not finite is stored as NaN: an infinite or
            NaN value has been attended.
        lse: float32 ``[B, Hq, Lq]``, contiguous: the natural log of the softmax's denominator, sink included; -inf
            where there is no key and no sink. lse_keys: the same over the keys alone. Both None where not wanted.

    Raises:
        ValueError: more than ``MAX_SPLITS`` splits.
    """
    rows, splits, value_dim = acc.shape
    if splits > MAX_SPLITS:
        raise ValueError(f"at most {MAX_SPLITS} splits can be combined, got {splits}")
    if rows == 0:
        return
    with on_device(acc.device):
        combine_kernel[(rows, triton.cdiv(value_dim, _COLUMNS))](
            parts=Softmax(acc, peak, total),
            sinks=None if sinks is None else sinks.contiguous(),
            attended=attended,
            output=output,
            lse=lse,
            lse_keys=lse_keys,
            num_heads=output.shape[1],
            Lq=output.shape[2],
            splits=splits,
            DV=value_dim,
            BLOCK_S=padded_splits(splits),
            COLUMNS=_COLUMNS,
            **_OPTIONS,
        )


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "DV"])
def combine_kernel(
    parts, sinks, attended, output, lse, lse_keys, num_heads, Lq, splits, DV, BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """``COLUMNS`` columns of one row's output; the program of the first columns also writes the row's sums."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.arange(0, BLOCK_S)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    peaks = tl.load(parts.peak + row * splits + split, mask=split < splits, other=float("-inf"))
    totals = tl.load(parts.total + row * splits + split, mask=split < splits, other=0.0)
    used = (peaks != float("-inf")) | (totals != 0.0)
    sums = tl.load(
        parts.acc + (row * splits + split)[:, None] * DV + column[None, :],
        mask=used[:, None] & (column[None, :] < DV),
        other=0.0,
    )
    count = tl.load(attended + row)

    highest = tl.max(peaks, axis=0)
    factors = tl.exp2(finite_or_zero(peaks) - finite_or_zero(highest))
    factors = tl.where(used, factors, 0.0)
    whole = tl.sum(totals * factors, axis=0)
    head = (row // Lq) % num_heads
    base, share, denominator = join_sink(highest, whole, sinks, head, row >= 0)
    result = tl.sum(sums * factors[:, None], axis=0) * (share / denominator)
    result = tl.where(tl.abs(result) < float("inf"), result, float("nan"))
    result = tl.where(count > 0, result, 0.0)
    tl.store(output + row * DV + column, result.to(output.dtype.element_ty), mask=column < DV)
    if lse is not None:
        first = block == 0
        tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=first)
        tl.store(lse_keys + row, (finite_or_zero(highest) + tl.log2(whole)) * LN_2, mask=first)


@triton.jit
def arrives_last(arrivals, programs):
    """Whether this program is the last of ``programs`` that come here: it may read what the others have stored before.

    ``arrivals`` points to an int32 that was zero before the launch.
    """
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == programs - 1


@triton.jit
def store_part(parts, rows, softmax, at, shape):
    """Stores a ``Softmax`` at the places ``at`` of each row's parts, which ``parts`` (pointers) hold."""
    dv = tl.arange(0, shape.BLOCK_DV)
    inside = rows.valid[:, None] & (dv[None, :] < shape.DV)
    tl.store(parts.acc + at[:, None] * shape.DV + dv[None, :], softmax.acc, mask=inside)
    tl.store(parts.peak + at, softmax.peak, mask=rows.valid)
    tl.store(parts.total + at, softmax.total, mask=rows.valid)


@triton.jit
def join_parts(parts, rows, first, step, count, shape):
    """The ``Softmax`` of ``count`` parts of each row, ``step`` apart from the places ``first`` on."""
    dv = tl.arange(0, shape.BLOCK_DV)
    inside = rows.valid[:, None] & (dv < shape.DV)[None, :]
    softmax = empty_softmax(shape)
    # So many parts are on their way at once.
    UNROLLED: tl.constexpr = 4 if shape.BLOCK_M > 8 else 8
    for part in tl.range(0, count, loop_unroll_factor=UNROLLED):
        at = first + part * step
        peak = tl.load(parts.peak + at, mask=rows.valid, other=float("-inf"))
        total = tl.load(parts.total + at, mask=rows.valid, other=0.0)
        used = (peak != float("-inf")) | (total != 0.0)
        # Whether or not it is used, not to wait for the other two.
        acc = tl.load(parts.acc + at[:, None] * shape.DV + dv[None, :], mask=inside, other=0.0)
        higher = tl.maximum(softmax.peak, peak)
        base = finite_or_zero(higher)
        # Nothing is added to nothing, whatever the factor.
        before = tl.where(softmax.total != 0.0, tl.exp2(finite_or_zero(softmax.peak) - base), 0.0)
        factor = tl.where(used, tl.exp2(finite_or_zero(peak) - base), 0.0)
        added = tl.where(used[:, None], acc * factor[:, None], 0.0)
        softmax = Softmax(softmax.acc * before[:, None] + added, higher, softmax.total * before + total * factor)
    return softmax


@triton.jit
def finish_part(parts, rows, softmax, part, count, arrivals, shape):
    """(whether this program is the last of ``count``, the ``Softmax`` of all parts of its rows).

    Each program comes here with its ``part``. The last one of every ``GROUP`` parts joins these, and the last of those
    the groups, so that neither has many to read one after another. ``arrivals`` has an int32 for the groups together
    and for each, ``cdiv(count, GROUP) + 1``, all zero before the launch.
    """
    store_part(parts, rows, softmax, rows.row * count + part, shape)
    group = part // GROUP
    first = rows.row * count + group * GROUP
    members = tl.minimum(count - group * GROUP, GROUP)
    last = False
    if arrives_last(arrivals + 1 + group, members):
        softmax = join_parts(parts, rows, first, 1, members, shape)
        groups = tl.cdiv(count, GROUP)
        # Every thread has read the part that is stored over.
        tl.debug_barrier()
        store_part(parts, rows, softmax, first, shape)
        last = arrives_last(arrivals, groups)
        if last:
            softmax = join_parts(parts, rows, rows.row * count, GROUP, groups, shape)
    return last, softmax


@triton.jit
def write_joined(softmax, rows, sinks, attended, output, lse, lse_keys, shape):
    """Writes the output of rows, and the logs of their softmax's denominators, with and without ``sinks``.

    ``attended`` is how many keys each row attends: one without any is zero. What is not finite is stored as NaN: an
    infinite or NaN value has been attended. ``lse`` and ``lse_keys`` are None where they are not wanted.
    """
    base, share, denominator = join_sink(softmax.peak, softmax.total, sinks, rows.head, rows.valid)
    result = softmax.acc * (share / denominator)[:, None]
    result = tl.where(tl.abs(result) < float("inf"), result, float("nan"))
    dv = tl.arange(0, shape.BLOCK_DV)
    result = tl.where((attended > 0)[:, None], result, 0.0).to(output.dtype.element_ty)
    inside = rows.valid[:, None] & (dv < shape.DV)[None, :]
    tl.store((output + rows.row * shape.DV)[:, None] + dv[None, :], result, mask=inside)
    if lse is not None:
        tl.store(lse + rows.row, (base + tl.log2(denominator)) * LN_2, mask=rows.valid)
    if lse_keys is not None:
        own = finite_or_zero(softmax.peak) + tl.log2(softmax.total)
        tl.store(lse_keys + rows.row, own * LN_2, mask=rows.valid)

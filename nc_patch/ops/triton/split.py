"""Split-K: one row's keys are divided among programs, and a second kernel joins what each of them accumulated.

Decoding has few rows and many keys, so that a row has to be spread over the GPU. The program of split s leaves three
things about the keys it attended, in float32 and with logits in base 2 (``attend.logits_base2``):

- ``peak[row, s]``: the largest logit,
- ``total[row, s]``: the sum of ``2 ** (logit - base)``, where ``base = triton_attend.finite_or_zero(peak)``,
- ``acc[row, s]``: the sum of ``2 ** (logit - base)`` times the value.

That is what ``attend.fold`` keeps. A split that attended nothing has ``peak = -inf`` and ``total = 0``, and its
``acc`` is never read. Rows are those of a contiguous ``[B, Hq, Lq]``.
"""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from nc_patch.ops.triton.attend import LN_2, finite_or_zero, join_sink
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, pointer_to
from nc_patch.ops.triton.tiles import PER_CALL

MAX_SPLITS = 256
# Of an H200; other GPUs come close.
_MULTIPROCESSORS = 132
# Beyond this, writing and joining the partial sums costs more than the parallelism gains.
MOST_USEFUL_SPLITS = 64
# Fewer keys than this are divided like this many.
_SHORTEST = 4096
_COLUMNS = 32
_WARPS = 4


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
    lse: torch.Tensor,
    lse_keys: torch.Tensor,
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
            where there is no key and no sink. lse_keys: the same over the keys alone. Both empty where not wanted.

    Raises:
        ValueError: more than ``MAX_SPLITS`` splits.
    """
    rows, splits, value_dim = acc.shape
    if splits > MAX_SPLITS:
        raise ValueError(f"at most {MAX_SPLITS} splits can be combined, got {splits}")
    if rows == 0:
        return
    device = acc.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        combine_kernel[(rows, triton.cdiv(value_dim, _COLUMNS))](
            *(acc, peak, total, peak if sinks is None else sinks.contiguous(), attended, output, lse, lse_keys),
            *(output.shape[1], output.shape[2], splits, value_dim),
            **combine_constants(splits, sinks is not None, lse.numel() > 0),
            **combine_options(),
        )


def combine_constants(splits: int, has_sinks: bool, want_stats: bool) -> dict[str, int | bool]:
    """The compile-time arguments of ``combine_kernel``."""
    return {
        "BLOCK_S": padded_splits(splits),
        "COLUMNS": _COLUMNS,
        "HAS_SINKS": has_sinks,
        "WANT_STATS": want_stats,
    }


def combine_options() -> dict[str, int | bool]:
    """Options of the compiler for ``combine_kernel``."""
    return {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=[*PER_CALL, "splits", "DV"])
def combine_kernel(
    acc,
    peak,
    total,
    sinks,
    attended,
    output,
    lse,
    lse_keys,
    num_heads,
    Lq,
    splits,
    DV,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WANT_STATS: tl.constexpr,
):
    """``COLUMNS`` columns of one row's output; the program of the first columns also writes the row's sums."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.arange(0, BLOCK_S)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    peaks = tl.load(peak + row * splits + split, mask=split < splits, other=float("-inf"))
    totals = tl.load(total + row * splits + split, mask=split < splits, other=0.0)
    used = (peaks != float("-inf")) | (totals != 0.0)
    parts = tl.load(
        acc + (row * splits + split)[:, None] * DV + column[None, :],
        mask=used[:, None] & (column[None, :] < DV),
        other=0.0,
    )
    count = tl.load(attended + row)

    highest = tl.max(peaks, axis=0)
    factors = tl.exp2(finite_or_zero(peaks) - finite_or_zero(highest))
    factors = tl.where(used, factors, 0.0)
    whole = tl.sum(totals * factors, axis=0)
    head = (row // Lq) % num_heads
    base, share, denominator = join_sink(highest, whole, sinks, head, row >= 0, HAS_SINKS)
    result = tl.sum(parts * factors[:, None], axis=0) * (share / denominator)
    result = tl.where(tl.abs(result) < float("inf"), result, float("nan"))
    result = tl.where(count > 0, result, 0.0)
    tl.store(output + row * DV + column, result.to(output.dtype.element_ty), mask=column < DV)
    if WANT_STATS:
        first = block == 0
        tl.store(lse + row, (base + tl.log2(denominator)) * LN_2, mask=first)
        tl.store(lse_keys + row, (finite_or_zero(highest) + tl.log2(whole)) * LN_2, mask=first)


def specialisations(target: str) -> Iterator[Specialisation]:
    """The kernel for most numbers of splits and for the most of them, with and without its options."""
    pointers = {**dict.fromkeys(("acc", "peak", "total", "sinks", "lse", "lse_keys"), "*fp32"), "attended": "*i32"}
    for dtype, splits, options in (
        (torch.bfloat16, MOST_USEFUL_SPLITS, False),
        (torch.float16, MOST_USEFUL_SPLITS, True),
        (torch.float32, MAX_SPLITS, True),
    ):
        name = f"combine-{DTYPE_NAMES[dtype]}-s{splits}" + ("-sinks-stats" if options else "")
        constants = combine_constants(splits, options, options)
        types = {**pointers, "output": pointer_to(dtype)}
        yield Specialisation(name, combine_kernel, constants, types, combine_options())

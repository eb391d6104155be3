"""What a launch takes of a problem: all of it, or a few heads of one sequence with keys and values in float32.

Keys come as rows, as they are, or in panels: 32 keys side by side, one float of each after the other.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from nc_patch.ops.cpu.launch import KINDS
from nc_patch.ops.cpu.llvm import COLUMNS, LANES
from nc_patch.ops.cpu.rows import LOG2E, padded, tiles_in
from nc_patch.ops.problem import Problem

# Bytes of keys, and as many of values, that are copied at once.
_MOST_BYTES = 1 << 26


class Outputs(NamedTuple):
    """What kernels write: the output ``[B, Hq, Lq, Dv]``, and on request what a row is known by, ``[B, Hq, Lq]`` each.

    Attributes:
        lse_kept, lse: float32, logarithms of the sums of exponentials: over attended keys, and of all that joins them.
        attended: int32, how many keys are attended.
    """

    output: torch.Tensor
    lse_kept: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    attended: torch.Tensor | None = None

    @classmethod
    def of(cls, problem: Problem, attended: bool = False) -> "Outputs":
        """Memory for those of a problem."""
        query, sinks, kept, every = problem.query, problem.sinks, None, None
        B, Hq, Lq, _ = query.shape
        output = query.new_empty(B, Lq, Hq, problem.value.shape[3]).transpose(1, 2)
        if problem.stats:
            kept, every = (query.new_full((B, Hq, Lq), -torch.inf, dtype=torch.float32) for _ in range(2))
            if sinks is not None:
                every.copy_(sinks.float()[:, None].expand_as(every))
        return cls(output, kept, every, problem.visible.new_zeros(B, Hq, Lq) if attended else None)


def arguments_of(problem: Problem, outputs: Outputs) -> dict[str, Any]:
    """What a kernel takes of a problem; keys and values as they are."""
    query, key, value, budget, sinks = problem.query, problem.key, problem.value, problem.budget, problem.sinks
    return {
        "query": last_dense(query), "key": last_dense(key), "value": last_dense(value), "visible": problem.visible,
        "origin": problem.origin, "budget": budget, "budget_b": budget.stride(0),
        "budget_h": budget.stride(1) * (budget.shape[1] > 1),
        "sinks": None if sinks is None else sinks.float().contiguous(),
        "factor": LOG2E if problem.softcap else problem.scale * LOG2E, "softcap": problem.softcap,
        "scale": problem.scale, "kind": KINDS[outputs.output.dtype], "new": problem.new, "group": problem.group,
        "pairs": query.dtype != outputs.output.dtype,
        "heads": key.shape[1], "Lq": query.shape[2], "N": key.shape[2], "D": query.shape[3],
        "Dv": outputs.output.shape[3], "width": padded(value.shape[3]), **outputs._asdict(),
    }  # fmt: skip


def parts_of(
    problem: Problem, outputs: Outputs, *, panels: bool = False, converts: bool = False
) -> Iterator[tuple[int, slice, dict[str, Any]]]:
    """A few key/value heads of one sequence at a time, so that copies take bounded memory.

    Yields their sequence, which they are, and what a kernel takes of them: values ``[1, heads, N, width]`` are float32
    with zeros behind Dv up to a multiple of 16, unless the kernel ``converts`` them; keys too, or see ``in_panels``.
    Queries and keys of bfloat16 are taken in ``pairs``, each of which counts as one element.
    """
    query, key, value, group = in_pairs(problem.query), in_pairs(problem.key), problem.value, problem.group
    B, Hkv, N, D = key.shape
    at_once = max(1, min(Hkv, _MOST_BYTES // max(4 * N * D, 1)))
    ready = _is_ready(value, LANES)
    converts = converts and not ready
    if not panels and _is_ready(key, 1) and (converts or ready):
        at_once = Hkv
    for b, first in itertools.product(range(B), range(0, Hkv, at_once)):
        row, heads = slice(b, b + 1), slice(first, min(first + at_once, Hkv))
        of = slice(heads.start * group, heads.stop * group)
        keys, values = key[row, heads], value[row, heads]
        part = problem._replace(
            query=query[row, of], key=in_panels(keys) if panels else as_rows(keys, 1),
            value=values if converts else as_rows(values, LANES),
            visible=problem.visible[row], origin=problem.origin[row],
            budget=problem.budget[row, of] if problem.budget.shape[1] > 1 else problem.budget[row],
            sinks=None if problem.sinks is None else problem.sinks[of],
        )  # fmt: skip
        further = (None if each is None else each[row, of] for each in outputs[1:])
        written = Outputs(outputs.output[row, of], *further)
        yield b, heads, arguments_of(part, written) | {"N": N, "converts": converts}


def in_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """Queries or keys ``[B, H, N, D]`` in bfloat16 as ``[B, H, N, D / 2]`` whose floats are the bits of pairs of them.

    Others, and those of an odd D, as they are.
    """
    if tensor.dtype != torch.bfloat16 or tensor.shape[3] % 2:
        return tensor
    fits = tensor.stride(3) == 1 and not any(size % 2 for size in (*tensor.stride()[:3], tensor.storage_offset()))
    return (tensor if fits else tensor.clone(memory_format=torch.contiguous_format)).view(torch.float32)


def as_rows(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[1, H, N, D]`` in float32, D rounded up with zeros to a multiple; the tensor itself where it is like that."""
    if _is_ready(tensor, multiple):
        return tensor
    D = tensor.shape[3]
    rows = tensor.new_empty(*tensor.shape[:3], padded(D), dtype=torch.float32)
    rows[..., :D] = tensor
    rows[..., D:] = 0
    return rows


def in_panels(tensor: torch.Tensor) -> torch.Tensor:
    """Keys ``[1, H, N, D]`` in panels ``[1, H, S, D * 32]``; keys beyond N are zero."""
    _, H, N, D = tensor.shape
    whole, rest = divmod(N, COLUMNS)
    panels = tensor.new_empty(1, H, tiles_in(N), D, COLUMNS, dtype=torch.float32)
    panels[:, :, :whole] = tensor[:, :, : N - rest].unflatten(2, (whole, COLUMNS)).transpose(3, 4)
    panels[:, :, whole:] = 0
    panels[:, :, whole:, :, :rest] = tensor[:, :, None, N - rest :].transpose(3, 4)
    return panels.flatten(3)


def last_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless elements of its last dimension lie side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _is_ready(tensor: torch.Tensor, multiple: int) -> bool:
    """Whether rows are floats without gaps, a multiple of so many of them."""
    return tensor.dtype == torch.float32 and tensor.stride(3) == 1 and tensor.shape[3] % multiple == 0

"""The parts of a problem that a launch takes: a few heads of one sequence, with keys and values in float32.

Keys come as rows, as they are, or in panels: 16 keys side by side, one float of each after the other.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numba import carray

from nc_patch.ops.cpu.launch import KINDS, kernel
from nc_patch.ops.cpu.llvm import LANES
from nc_patch.ops.cpu.rows import LOG2E, padded, read_row
from nc_patch.ops.cpu.vectors import f32, fill, set_f32
from nc_patch.ops.problem import AttentionResult, Problem

# Panels and rows that an item of work makes.
_PANELS, _ROWS = 16, 256
# Bytes of keys, and as many of values, that are copied at once.
_MOST_BYTES = 1 << 26

# What a kernel takes of a problem; tensors of four dimensions bring their steps in bytes.
FIELDS = (
    "query:4 keys:4 values:4 output:4 visible budget budget_h origin sinks factor:f softcap:f scale:f kind "
    "group heads Lq Lk D Dv width lse lse_kept"
)


class Part(NamedTuple):
    """A few key/value heads of a sequence, ``heads`` of ``batch``; float32 ``[1, heads, ...]``, contiguous at the end.

    Attributes:
        keys: ``[.., N, D]``, or with panels ``[.., S + 1, D, 16]``, of which the last has room alone.
        values: ``[.., N, Dv']``, Dv' a multiple of 16: zeros follow Dv.
    """

    batch: int
    heads: slice
    keys: torch.Tensor
    values: torch.Tensor


class LogSums(NamedTuple):
    """Logarithms of the sums of exponentials, float32 ``[B, Hq, Lq]``: over attended keys, and of all that joins them.

    Both are None where a problem does not ask for statistics.
    """

    kept: torch.Tensor | None
    every: torch.Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> "LogSums":
        """Memory for those of a problem."""
        if not problem.stats:
            return cls(None, None)
        kept, every = (problem.query.new_full(problem.query.shape[:3], -torch.inf, dtype=torch.float32) for _ in "ke")
        if problem.sinks is not None:
            every.copy_(problem.sinks.float()[:, None].expand_as(every))
        return cls(kept, every)

    def addresses(self, batch: int, heads: slice) -> dict[str, Any]:
        """The fields of a kernel that writes those of some heads of a sequence."""
        if self.kept is None or self.every is None:
            return {}
        return {"lse_kept": self.kept[batch, heads], "lse": self.every[batch, heads]}

    def result(self, problem: Problem, output: torch.Tensor, dense: torch.Tensor | None) -> AttentionResult:
        """The result with statistics, from the log-sum-exp ``dense [B, Hq, Lq]`` over all visible keys."""
        if self.kept is None or dense is None:
            return AttentionResult(output)
        empty = (problem.visible[..., 1] <= problem.visible[..., 0])[:, None]
        return AttentionResult(
            output, self.every, torch.exp(self.kept - dense).clamp_(max=1.0).masked_fill_(empty, 1.0)
        )


def padded_length(length: int) -> int:
    """A length, rounded up to whole vectors."""
    return -(-length // LANES) * LANES


def parts_of(
    key: torch.Tensor, value: torch.Tensor, *, panels: bool = False, like: torch.Tensor | None = None
) -> Iterator[Part]:
    """Keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` part by part, so that copies take bounded memory.

    Args:
        panels: whether keys come in panels.
        like: other keys whose parts have the same heads.
    """
    of = key if like is None else like
    heads = max(1, min(of.shape[1], _MOST_BYTES // max(4 * of.shape[2] * of.shape[3], 1)))
    if not panels and _is_ready(key, LANES) and _is_ready(value, LANES):
        heads = of.shape[1]
    for b in range(key.shape[0]):
        for first in range(0, key.shape[1], heads):
            chosen = slice(first, min(key.shape[1], first + heads))
            keys, values = key[b : b + 1, chosen], value[b : b + 1, chosen]
            yield Part(b, chosen, _in_panels(keys) if panels else _as_rows(keys, 1), _as_rows(values, LANES))


def arguments_of(problem: Problem, output: torch.Tensor, part: Part, sums: LogSums) -> dict[str, Any]:
    """The fields of a kernel that are of a problem, for a part of it, and its output ``[B, Hq, Lq, Dv]``."""
    b, group = part.batch, problem.group
    heads = slice(part.heads.start * group, part.heads.stop * group)
    budget, query, sinks = problem.budget[b], problem.query[b : b + 1, heads], problem.sinks
    if query.stride(3) != 1:
        query = query.contiguous()
    by_head = len(budget) > 1
    return {
        "query": query, "keys": part.keys, "values": part.values, "output": output[b : b + 1, heads],
        "visible": problem.visible[b], "origin": problem.origin[b], "budget": budget[heads] if by_head else budget,
        "budget_h": budget.stride(0) * by_head, **_score_arguments(problem, sinks if sinks is None else sinks[heads]),
        "group": group, "heads": part.heads.stop - part.heads.start,
        "Lq": query.shape[2], "Lk": problem.key.shape[2], "D": query.shape[3], "Dv": output.shape[3],
        "width": part.values.shape[3], **sums.addresses(b, heads),
    }  # fmt: skip


def decode_arguments(problem: Problem, output: torch.Tensor, sums: LogSums) -> dict[str, Any]:
    """The fields of a kernel for few queries: all heads of all sequences, keys and values as they are."""
    query, key, value, budget = problem.query, problem.key, problem.value, problem.budget
    found = {
        "query": last_dense(query), "key": last_dense(key), "value": last_dense(value), "output": output,
        "visible": problem.visible, "origin": problem.origin, "budget": budget, "budget_b": budget.stride(0),
        "budget_h": budget.stride(1) * (budget.shape[1] > 1), **_score_arguments(problem, problem.sinks),
        "group": problem.group, "heads": key.shape[1], "Lq": query.shape[2], "N": key.shape[2], "D": query.shape[3],
        "Dv": value.shape[3], "new": problem.new,
    }  # fmt: skip
    return found if sums.kept is None else found | {"lse_kept": sums.kept, "lse": sums.every}


def _score_arguments(problem: Problem, sinks: torch.Tensor | None) -> dict[str, Any]:
    """The fields that are of the scores, and the dtype."""
    return {
        "factor": LOG2E if problem.softcap else problem.scale * LOG2E, "softcap": problem.softcap,
        "scale": problem.scale, "kind": KINDS[problem.query.dtype],
        "sinks": 0 if sinks is None else sinks.float().contiguous(),
    }  # fmt: skip


def _is_ready(tensor: torch.Tensor, multiple: int) -> bool:
    """Whether rows are floats without gaps, a multiple of so many of them."""
    return tensor.dtype == torch.float32 and tensor.stride(3) == 1 and tensor.shape[3] % multiple == 0


def _as_rows(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[1, H, N, D]`` in float32, D rounded up with zeros to a multiple; the tensor itself where it is like that."""
    if _is_ready(tensor, multiple):
        return tensor
    _, H, N, D = tensor.shape
    copied = torch.empty(1, H, N, padded_length(D), dtype=torch.float32, device="cpu")
    _copy_kernel(H * -(-N // _ROWS), source=last_dense(tensor), target=copied, N=N, D=D, kind=KINDS[tensor.dtype])
    return copied


def _in_panels(tensor: torch.Tensor) -> torch.Tensor:
    """Keys ``[1, H, N, D]`` in panels ``[1, H, S + 1, D, 16]``; keys beyond N are zero."""
    _, H, N, D = tensor.shape
    S = -(-N // LANES)
    panels = torch.empty(1, H, S + 1, D, LANES, dtype=torch.float32, device="cpu")
    _pack_kernel(
        H * -(-S // _PANELS), LANES * padded_length(D), source=last_dense(tensor), target=panels.flatten(3), S=S,
        N=N, D=D, kind=KINDS[tensor.dtype],
    )  # fmt: skip
    return panels.flatten(3)


def last_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied unless elements of its last dimension lie side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@kernel("source:4 target:4 S N D kind")
def _pack_kernel(pointer, item, scratch):
    """Makes up to ``_PANELS`` panels of one head."""
    p = carray(pointer, 1)[0]
    chunks = (p.S + _PANELS - 1) // _PANELS
    head, first = item // chunks, item % chunks * _PANELS
    step = 4 * padded(p.D)
    for panel in range(first, min(first + _PANELS, p.S)):
        for lane in range(LANES):
            position = panel * LANES + lane
            if position < p.N:
                read_row(scratch + lane * step, p.source + head * p.source_h + position * p.source_n, p.D, p.kind)
            else:
                fill(scratch + lane * step, padded(p.D), 0.0)
        target = p.target + head * p.target_h + panel * p.target_n
        for d in range(p.D):
            for lane in range(LANES):
                set_f32(target + 64 * d, lane, f32(scratch + lane * step, d))


@kernel("source:4 target:4 N D kind")
def _copy_kernel(pointer, item, scratch):
    """Converts up to ``_ROWS`` rows of one head."""
    p = carray(pointer, 1)[0]
    chunks = (p.N + _ROWS - 1) // _ROWS
    head, first = item // chunks, item % chunks * _ROWS
    for row in range(first, min(first + _ROWS, p.N)):
        read_row(p.target + head * p.target_h + row * p.target_n, p.source + head * p.source_h + row * p.source_n,
                 p.D, p.kind)  # fmt: skip

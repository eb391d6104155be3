"""From tensors to a kernel launch: what the kernels take, the tile sizes they use, and their outputs."""

import contextlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton

from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.triton.attend import attend_kernel
from nc_patch.ops.triton.structs import Heads, Limits, RowInputs, ScoreSettings, Shape, constants, heads
from nc_patch.ops.triton.tail import Tail


@dataclass(frozen=True)
class Tiles:
    """Shape of a program: rows, keys per tile, warps, pipeline stages, and head_dim elements per dot (None: all)."""

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int | None = None


# The one place where tile sizes are chosen: by architecture, bytes per element and padded head_dim, once for many rows
# and once for few (decoding). The ahead-of-time tests hold each to its architecture's registers and shared memory.
# float32 multiplies on the plain floating point units of NVIDIA GPUs and is summed in chunks of head_dim.
_FLOAT32 = {64: Tiles(32, 32, 4, 1, 32), 128: Tiles(32, 32, 8, 1, 32), 256: Tiles(16, 32, 8, 1, 32)}
_FLOAT32_FEW = {64: Tiles(16, 32, 4, 1, 32), 128: Tiles(16, 32, 4, 1, 32), 256: Tiles(16, 32, 8, 1, 32)}
# With two stages NVIDIA's pipeline waits for every copy that it starts: three, where registers and memory suffice.
_HALF_FEW = {64: Tiles(16, 64, 4, 3), 128: Tiles(16, 32, 4, 3), 256: Tiles(16, 32, 8, 3)}
_HALF = {
    "sm_80": {64: Tiles(128, 32, 8, 3), 128: Tiles(64, 32, 8, 3), 256: Tiles(32, 32, 8, 3)},
    "sm_90": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(32, 32, 8, 3)},
    "sm_100": {64: Tiles(64, 64, 8, 3), 128: Tiles(64, 64, 8, 3), 256: Tiles(64, 32, 8, 1)},
    "gfx942": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}
# What head dimensions take instead that are no power of two: masks of what lies beyond them need registers.
_HALF_MASKED = {"sm_90": {128: Tiles(128, 32, 8, 3)}}
_HALF_FEW_BY_ARCHITECTURE = {"gfx942": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)}}
# What a tail takes instead, where its second pass over the keys would leave too few registers.
_HALF_WITH_TAIL = {
    "sm_80": {128: Tiles(64, 32, 8, 2, 64), 256: Tiles(32, 32, 8, 2, 64)},
    "sm_90": {64: Tiles(128, 32, 8, 3), 128: Tiles(128, 32, 8, 2, 64), 256: Tiles(32, 32, 8, 2, 64)},
    "sm_100": {128: Tiles(64, 64, 8, 2, 64), 256: Tiles(64, 32, 8, 1, 64)},
    "gfx942": {128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 4, 2, 64)},
}
_FEW_WITH_TAIL = {"sm_80": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 32, 4, 2, 64), 256: Tiles(16, 32, 8, 2, 64)}}
_FLOAT32_WITH_TAIL = {"sm_80": {256: Tiles(16, 16, 8, 1, 32)}}
_FEW_ROWS = 16


def tiles_for(
    architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int, rows: int, has_tail: bool = False
) -> Tiles:
    """Tiles for inputs of this dtype and these head dimensions, to be filled by ``rows``, Lq times the group.

    ``has_tail`` is of the kernels that go over whole rows and add a tail, and of the search before.
    """
    padded = max(64, padded_dim(head_dim), padded_dim(value_dim))
    # In float32 the larger shape leaves too few registers for a tail.
    few = rows <= _FEW_ROWS or (has_tail and dtype == torch.float32)
    if has_tail:
        changed = _FLOAT32_WITH_TAIL if dtype == torch.float32 else _FEW_WITH_TAIL if few else _HALF_WITH_TAIL
        if padded in changed.get(architecture, {}):
            return changed[architecture][padded]
    if dtype == torch.float32:
        return (_FLOAT32_FEW if few else _FLOAT32)[padded]
    if few:
        return _HALF_FEW_BY_ARCHITECTURE.get(architecture, _HALF_FEW)[padded]
    if {head_dim, value_dim} != {padded} and padded in _HALF_MASKED.get(architecture, {}):
        return _HALF_MASKED[architecture][padded]
    return _HALF[architecture][padded]


@lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> str:
    """The row of the tile table for a device; NVIDIA GPUs without one use that of sm_80, which asks for least."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; 132, as an H200, where it is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile holds for this head_dim."""
    return max(16, triton.next_power_of_2(head_dim))


@lru_cache(maxsize=256)
def shape_of(head_dim: int, value_dim: int, tiles: Tiles) -> Shape:
    """The constants of a program with these tiles."""
    padded = padded_dim(head_dim)
    chunk = min(padded, tiles.chunk or padded)
    shape: Shape = constants(Shape(head_dim, value_dim, tiles.rows, tiles.keys, padded, padded_dim(value_dim), chunk))
    return shape


def launch_attention(
    problem: Problem, sink_keys: int = 0, recent_keys: int = 0, search_kernel: Any = None
) -> AttentionResult:
    """Attention over each row's first and last keys, as many as its budget has, or over the keys that limits leave.

    Args:
        problem: its ``means``, where there are any, stand for the keys that are not attended.
        sink_keys, recent_keys: the first and the last keys that are attended whatever they score.
        search_kernel: writes the limits of each row, where keys are attended by their scores.
    """
    problem = prepared(problem)
    query, means = problem.query, problem.means
    (B, Hq, Lq, D), (Lk, DV), device = query.shape, problem.value.shape[2:], query.device
    Hkv, group, architecture = problem.key.shape[1], problem.group, architecture_of(device)
    tiles = tiles_for(architecture, query.dtype, D, DV, Lq * group, means is not None)
    programs = triton.cdiv(Lq * group, tiles.rows) * B * Hkv
    arguments = {
        "query": heads_of(query, tiles), "key": heads_of(problem.key, tiles), "num_kv_heads": Hkv, "group": group,
        "inputs": RowInputs(problem.visible, problem.budget, None if means is None else problem.origin), "Lq": Lq,
        "Lk": Lk, "budget_heads": problem.budget.shape[1], "sink_keys": sink_keys, "recent_keys": recent_keys,
        "shape": shape_of(D, DV, tiles), **compile_options(tiles, architecture),
    }  # fmt: skip
    limits = tail = lse = kept_mass = None
    if means is not None:
        # The fewest pages that matrix instructions take.
        pages = shape_of(D, DV, replace(tiles, keys=16, chunk=min(tiles.chunk or 64, 64)))
        tail = Tail(heads_of(means.key, tiles), heads_of(means.value, tiles), pages)
    output = query.new_empty(B, Hq, Lq, DV)
    if problem.stats:
        lse, kept_mass = (output.new_empty((B, Hq, Lq), dtype=torch.float32) for _ in range(2))
    if search_kernel is not None:
        row = problem.visible.new_empty(B, Hq, Lq)
        limits = Limits(torch.empty_like(row, dtype=torch.float32), row)
    if programs:
        with on_device(device):
            if search_kernel is not None:
                search_kernel[(programs,)](limits=limits, **arguments)
            attend_kernel[(programs,)](
                value=heads_of(problem.value, tiles), limits=limits, tail=tail, sinks=problem.sinks,
                settings=settings_of(problem), output=output, lse=lse, kept_mass=kept_mass, **arguments,
            )  # fmt: skip
    return AttentionResult(output, lse, kept_mass)


def kept_mass_of(problem: Problem, lse: torch.Tensor) -> torch.Tensor:
    """The kept mass of rows whose attended keys have this log-sum-exp; costs as much as dense attention."""
    whole = problem.over_all_keys()
    _, dense, *_ = launch_attention(whole._replace(sinks=None, stats=True))
    assert dense is not None
    return torch.where(whole.budget > 0, torch.exp(lse - dense), 1.0)


def settings_of(problem: Problem) -> ScoreSettings:
    """How the kernels make scores of products."""
    return ScoreSettings(problem.scale, problem.softcap or None)


_HERE = contextlib.nullcontext()


def on_device(device: torch.device) -> Any:
    """A context in which Triton launches on this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def heads_of(tensor: torch.Tensor, tiles: Tiles) -> Heads:
    """The structure for ``[B, H, L, D]``; of a copy where offsets within a tile do not fit 32 bits."""
    return heads(tensor if tensor.stride(2) * tiles.keys < 2**31 else tensor.contiguous())


def dense_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis dense, a copy where it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def compile_options(tiles: Tiles, architecture: str) -> dict[str, Any]:
    """Options of the compiler.

    Fused multiply-adds are asked for by name, since the default differs between releases. Naming all registers keeps
    NVIDIA's assembler from spilling some to fit one more program on a multiprocessor.
    """
    options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    return options if architecture.startswith("gfx") else {**options, "maxnreg": 255}


def prepared(problem: Problem) -> Problem:
    """The problem, with last axes that are dense and integers that are contiguous: copies where they are not."""
    means = problem.means
    return problem._replace(
        query=dense_last(problem.query), key=dense_last(problem.key), value=dense_last(problem.value),
        visible=problem.visible.contiguous(), origin=problem.origin.contiguous(), budget=problem.budget.contiguous(),
        sinks=None if problem.sinks is None else problem.sinks.contiguous(),
        means=None if means is None else PageMeans(*map(dense_last, means)),
        key_index=tuple(x.contiguous() for x in problem.key_index),
    )  # fmt: skip

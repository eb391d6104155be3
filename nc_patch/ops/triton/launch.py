"""From tensors to a kernel launch: what the kernels take, the tile sizes they use, and their outputs."""

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from nc_patch.ops.limits import DTYPES, MAX_HEAD_DIM
from nc_patch.ops.means import PageMeans, slot_count
from nc_patch.ops.triton.attend import attend_kernel
from nc_patch.ops.triton.tail import attend_tail_kernel
from nc_patch.selections.topk.threshold import threshold_kernel


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
_FEW_WITH_TAIL = {
    "sm_80": {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 32, 4, 2, 64), 256: Tiles(16, 32, 8, 2, 64)},
}
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


def launch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    by_score: bool,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks the inputs, allocates the results and launches the kernels; see ``triton_topk_attention`` for the shapes.

    ``by_score`` is ``topk``: a first kernel finds each row's threshold. Without it the selection is ``window``.
    """
    check_inputs(query, key, value, visible, budget, sinks)
    check_tail(tail, origin, key, value, visible)
    B, Hq, Lq, _ = query.shape
    device = query.device
    output = torch.empty(B, Hq, Lq, value.shape[-1], dtype=query.dtype, device=device)
    stats_shape = (B, Hq, Lq) if want_stats else (0,)
    lse = torch.empty(stats_shape, dtype=torch.float32, device=device)
    kept_mass = torch.empty(stats_shape, dtype=torch.float32, device=device)
    launch_rows(
        *(query, key, value, visible, budget, sinks, output, lse, kept_mass),
        by_score=by_score,
        scale=scale,
        softcap=softcap,
        sink_keys=sink_keys,
        recent_keys=recent_keys,
        tail=tail,
        origin=origin,
    )
    return output, lse, kept_mass


def launch_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    kept_mass: torch.Tensor,
    *,
    by_score: bool,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> None:
    """Launches the kernels on inputs that fit. Results are contiguous; ``lse`` and ``kept_mass`` empty if not wanted.

    A ``tail``, with each row's ``origin``, goes with ``by_score`` alone.
    """
    B, _Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group = query.shape[1] // Hkv
    device = query.device
    architecture = architecture_of(device)
    tiles = tiles_for(architecture, query.dtype, D, DV, Lq * group, tail is not None)
    query, key, value = (addressable(x, tiles.keys) for x in (query, key, value))
    visible = dense_last(visible)
    programs = triton.cdiv(Lq * group, tiles.rows) * B * Hkv
    if programs == 0:
        return
    # Where no threshold is searched for, the kernel reads neither of these.
    threshold = torch.empty(output.shape[:3] if by_score else (0,), dtype=torch.float32, device=device)
    ties_end = torch.empty(threshold.shape, dtype=torch.int32, device=device)
    query_key = (*query.stride()[:3], *key.stride()[:3])
    rows = (*visible.stride()[:2], budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2))
    sizes = (Hkv, group, Lq, Lk, sink_keys, recent_keys)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if by_score:
            threshold_kernel[(programs,)](
                *(query, key, visible, budget, threshold, ties_end, *query_key, *rows, *sizes),
                **threshold_constants(D, tiles),
                **compile_options(tiles, architecture),
            )
        if tail is not None and origin is not None:
            means = PageMeans(*(addressable(x, tiles.keys) for x in tail))
            attend_tail_kernel[(programs,)](
                *(query, key, value, *means, visible, origin, budget, lse if sinks is None else sinks.contiguous()),
                *(threshold, ties_end, output, lse, kept_mass, *query_key, *value.stride()[:3]),
                *(*means.key.stride()[:3], *means.value.stride()[:3], *visible.stride()[:2], *origin.stride()),
                *(*rows[2:], *sizes, scale, softcap),
                **tail_constants(D, DV, tiles, sinks is not None, softcap > 0, lse.numel() > 0),
                **compile_options(tiles, architecture),
            )
            return
        attend_kernel[(programs,)](
            *(query, key, value, visible, budget, lse if sinks is None else sinks.contiguous(), threshold, ties_end),
            *(output, lse, kept_mass, *query_key, *value.stride()[:3], *rows, *sizes, scale, softcap),
            **attend_constants(D, DV, tiles, by_score, sinks is not None, softcap > 0, lse.numel() > 0),
            **compile_options(tiles, architecture),
        )


def addressable(tensor: torch.Tensor, keys: int) -> torch.Tensor:
    """The tensor with its last axis dense and, within a tile of ``keys``, offsets that fit 32 bits; else a copy."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(2) * keys < 2**31 else tensor.contiguous()


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


def threshold_constants(head_dim: int, tiles: Tiles) -> dict[str, Any]:
    """The compile-time arguments of ``threshold_kernel``."""
    padded = padded_dim(head_dim)
    return {
        "D": head_dim,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": padded,
        "CHUNK_D": min(padded, tiles.chunk or padded),
    }


def attend_constants(
    head_dim: int,
    value_dim: int,
    tiles: Tiles,
    by_score: bool,
    has_sinks: bool = False,
    has_softcap: bool = False,
    want_stats: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of ``attend_kernel``."""
    return {
        **threshold_constants(head_dim, tiles),
        "DV": value_dim,
        "BLOCK_DV": padded_dim(value_dim),
        "BY_SCORE": by_score,
        "HAS_SINKS": has_sinks,
        "HAS_SOFTCAP": has_softcap,
        "WANT_STATS": want_stats,
    }


def tail_constants(
    head_dim: int,
    value_dim: int,
    tiles: Tiles,
    has_sinks: bool = False,
    has_softcap: bool = False,
    want_stats: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of ``attend_tail_kernel``."""
    constants = attend_constants(head_dim, value_dim, tiles, True, has_sinks, has_softcap, want_stats)
    del constants["BY_SCORE"]
    return constants


def check_tail(
    tail: PageMeans | None,
    origin: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
) -> None:
    """Raises TypeError or ValueError unless a tail fits the keys, and comes with the origins of the rows."""
    if tail is None:
        return
    if origin is None or origin.dtype != torch.int32 or origin.shape != visible.shape[:2]:
        got = "none" if origin is None else f"{origin.dtype} {list(origin.shape)}"
        raise ValueError(f"a tail needs origin int32 {list(visible.shape[:2])}, got {got}")
    if tail.key.dtype != key.dtype or tail.value.dtype != value.dtype:
        raise TypeError(f"means must have the dtype of the keys, {key.dtype}, got {tail.key.dtype}, {tail.value.dtype}")
    slots = slot_count(key.shape[2])
    for name, means, rows in (("keys", tail.key, key), ("values", tail.value, value)):
        if means.dim() != 4 or (*means.shape[:2], means.shape[3]) != (*rows.shape[:2], rows.shape[3]):
            raise ValueError(
                f"means of {name} must be {[*rows.shape[:2], 'S', rows.shape[3]]}, got {list(means.shape)}"
            )
        if means.shape[2] < slots:
            raise ValueError(f"{key.shape[2]} keys have {slots} slots, got means of {name} for {means.shape[2]}")
    devices = {t.device for t in (key, origin, *tail)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless the tensors fit each other and the kernels."""
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise TypeError(
            "query, key and value must share one dtype of bfloat16, float16 and float32, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(f"query, key and value must have 4 axes, got {query.dim()}, {key.dim()}, {value.dim()}")
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1:3]
    if tuple(key.shape) != (B, Hkv, Lk, D) or tuple(value.shape[:3]) != (B, Hkv, Lk) or Hkv == 0 or Hq % Hkv:
        raise ValueError(
            "query [B, Hq, Lq, D], key [B, Hkv, Lk, D] and value [B, Hkv, Lk, Dv] must agree, Hq a multiple of Hkv; "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if max(D, value.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM}, got {D} and {value.shape[-1]}: use the torch backend"
        )
    for name, tensor, shapes in (
        ("visible", visible, ((B, Lq, 2),)),
        ("budget", budget, ((B, 1, Lq), (B, Hq, Lq))),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) not in shapes:
            allowed = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name} must be int32 {allowed}, got {tensor.dtype} {list(tensor.shape)}")
    if sinks is not None and tuple(sinks.shape) != (Hq,):
        raise ValueError(f"sinks must hold one logit per query head, [{Hq}], got {list(sinks.shape)}")
    devices = {x.device for x in (query, key, value, visible, budget, *(() if sinks is None else (sinks,)))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")

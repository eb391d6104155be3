"""From tensors to a kernel launch: what the kernels take, the tile sizes they use, and their outputs."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """Shape of a program: rows, keys per tile, warps, software pipeline stages, and head_dim elements per dot (None: all)."""

    rows: int
    keys: int
    warps: int
    stages: int
    chunk: int | None = None


# The one place where tile sizes are chosen, by (bytes per element, padded head_dim). The ahead-of-time tests hold every
# entry to the registers and shared memory of sm_80, sm_90, sm_100 and gfx942.
TILES = {
    (2, 64): Tiles(64, 64, 4, 3),
    (2, 128): Tiles(64, 64, 4, 2),
    (2, 256): Tiles(64, 32, 8, 2),
    (4, 64): Tiles(32, 32, 4, 1, 32),
    (4, 128): Tiles(32, 32, 4, 1, 32),
    (4, 256): Tiles(32, 32, 8, 1, 32),
}


def tiles_for(dtype: torch.dtype, head_dim: int, value_dim: int, rows: int) -> Tiles:
    """Tiles for inputs of this dtype and these head dimensions, ``rows`` (Lq times the group) being there to fill them."""
    padded = max(64, padded_dim(head_dim), padded_dim(value_dim))
    tiles = TILES[dtype.itemsize, padded]
    return Tiles(16, tiles.keys, 4, tiles.stages, tiles.chunk) if rows <= 16 else tiles


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile holds for this head_dim."""
    return max(16, triton.next_power_of_2(head_dim))


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one launch, in the order in which ``topk_kernel`` and ``window_kernel`` take them, and its results."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: Tiles
    programs: int
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def launch(self, kernel: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the kernel on the device of its tensors and returns (output, lse, kept_mass)."""
        if self.programs == 0:
            return self.results
        device = self.results[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(self.programs,)](
                *self.arguments, **self.constants, num_warps=self.tiles.warps, num_stages=self.tiles.stages
            )
        return self.results


def attention_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
) -> AttentionCall:
    """Checks the inputs, allocates the results, and lays out the launch; see ``triton_topk_attention`` for the shapes."""
    check_inputs(query, key, value, visible, budget, sinks)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    B, Hq, Lq, D = query.shape
    Hkv, Lk, DV = value.shape[1:]
    group = Hq // Hkv
    output = torch.empty(B, Hq, Lq, DV, dtype=query.dtype, device=query.device)
    stats_shape = (B, Hq, Lq) if want_stats else (0,)
    lse = torch.empty(stats_shape, dtype=torch.float32, device=query.device)
    kept_mass = torch.empty(stats_shape, dtype=torch.float32, device=query.device)
    tiles = tiles_for(query.dtype, D, DV, Lq * group)
    arguments = (
        *(query, key, value, visible, budget, lse if sinks is None else sinks.contiguous(), output, lse, kept_mass),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *visible.stride()[:2]),
        *(budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2)),
        *(Hkv, group, Lq, Lk, sink_keys, recent_keys, scale, softcap),
    )
    constants = kernel_constants(D, DV, tiles, sinks is not None, softcap > 0, want_stats)
    programs = triton.cdiv(Lq * group, tiles.rows) * B * Hkv
    return AttentionCall(arguments, constants, tiles, programs, (output, lse, kept_mass))


def kernel_constants(
    head_dim: int, value_dim: int, tiles: Tiles, has_sinks: bool, has_softcap: bool, want_stats: bool
) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    padded = padded_dim(head_dim)
    return {
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": padded,
        "BLOCK_DV": padded_dim(value_dim),
        "CHUNK_D": min(padded, tiles.chunk or padded),
        "HAS_SINKS": has_sinks,
        "HAS_SOFTCAP": has_softcap,
        "WANT_STATS": want_stats,
    }


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
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {D} and {value.shape[-1]}: use the torch backend")
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

"""Fuzz cases for the Triton kernels in the interpreter, as on a GPU: ``fuzz_checks``, smaller, with tiles to match."""

import random
from dataclasses import replace
from typing import Any

import fuzz_checks
import torch
from fuzz_inputs import Inputs, laid_out, random_inputs

# The kernels, by what is asked of ``sparse_attention``.
KERNELS = ("topk", "window", "dense", "block", "tail", "codes", "pages", "means")
_DECODING = ("codes", "pages", "means")


def random_kernel_call(kernel: str, seed: int) -> fuzz_checks.Call:
    """The call of a kernel that a seed stands for."""
    rng = random.Random(f"triton {kernel} {seed}")
    values = rng.choice(("moderate", "moderate", "moderate", "broken"))
    selection = {"block": "block", "window": "window", "dense": "dense", "pages": "block"}.get(kernel, "topk")
    while True:
        queries = rng.choice((1, 1, 3)) if kernel in _DECODING else 24
        inputs = random_inputs(rng, values=values, queries=queries, longest=70)
        B, Hq, _, Lq, Lk = inputs.shape
        one_origin = inputs.origin is None or bool((inputs.origin == inputs.origin[:, :1]).all())
        indexed = one_origin and Lq > 0 and (inputs.origin is None or bool((inputs.origin >= 0).all()))
        if Hq * max(B, 1) <= 12 and B and Lk and (indexed or kernel not in _DECODING):
            break
    inputs = _dense_last_axis(inputs)
    if values == "broken" and kernel != "pages":
        # Rows share tiles of values: one that is NaN or infinite may reach rows that do not attend it.
        inputs = replace(inputs, value=torch.where(inputs.value.isfinite(), inputs.value, 1.0))
    options = fuzz_checks.random_options(rng, inputs, selection) | {"backend": "triton"}
    if selection == "topk":
        options["tail"] = "mean" if kernel in ("tail", "means") else "drop"
    call = fuzz_checks.Call(inputs, options, means=kernel == "means")
    call.index = {"codes": "codes", "pages": "pages", "means": rng.choice((None, "codes"))}.get(kernel)
    return call


def _dense_last_axis(inputs: Inputs) -> Inputs:
    """The inputs with columns side by side: the kernels refuse others by name."""
    changed: dict[str, Any] = {
        name: tensor if tensor.shape[3] == 1 or tensor.stride(3) == 1 else laid_out(tensor.contiguous(), "transposed")
        for name, tensor in (("query", inputs.query), ("key", inputs.key), ("value", inputs.value))
    }
    return replace(inputs, **changed)


def check_kernel(kernel: str, seed: int) -> str | None:
    """Runs one case; what is wrong with it, or None. The interpreter must be on before triton is imported."""
    from gpu_semantics import GpuSemantics

    with _small_tiles(seed), GpuSemantics(seed).active() as gpu:
        said = fuzz_checks.check_call(random_kernel_call(kernel, seed), f"triton {kernel} {seed}")
    return said or "; ".join(gpu.take_findings()) or None


class _small_tiles:
    """Tiles with which short inputs cross many, in two of three cases; the kernels' own in the others."""

    def __init__(self, seed: int) -> None:
        self._small = seed % 3 != 0
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        if not self._small:
            return
        from nc_patch.ops.triton import launch as triton_launch
        from nc_patch.selections.block import decode as triton_decode_block
        from nc_patch.selections.block import prefill as triton_block

        tiles = triton_launch.Tiles(32, 16, 4, 1)
        self._set(triton_launch, "tiles_for", lambda _, dtype, *sizes: replace(tiles, chunk=_chunk(dtype)))
        self._set(triton_block, "_BLOCKS_AT_ONCE", 8)
        self._set(triton_block, "_RANKS_AT_ONCE", 16)
        self._set(triton_block, "_SEGMENT", 64)
        self._set(triton_decode_block, "_CHOOSE_AT_ONCE", 4)

    def _set(self, module: Any, name: str, value: Any) -> None:
        self._saved.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def __exit__(self, *_: object) -> None:
        for module, name, value in self._saved:
            setattr(module, name, value)


def _chunk(dtype: torch.dtype) -> int | None:
    return 32 if dtype == torch.float32 else None

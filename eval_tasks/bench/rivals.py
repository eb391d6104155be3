"""Dense attention in every implementation that may be there: the rivals of sparse attention.

``scaled_dot_product_attention`` runs with each of its backends in two forms: ``gqa``, as it is called in a model, and
one that spares a backend the repeating of keys. With one query per sequence that is ``rows``, where the query heads of
a group stand as rows of one head; for a prompt it is ``expanded``, over keys and values that are repeated beforehand.
Copies that a rival wants in a layout of its own are not timed either.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench.inputs import Inputs
from eval_tasks.bench.timing import Step

Make = Callable[[Sequence[Inputs]], Step]
# What the names of the implementations begin with.
KINDS = ("sdpa", "flex", "flash_attn", "flashinfer")
# "math" is the last, since it takes so much memory that little may be left for others.
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_WORKSPACE, _PAGE, _FLEX_BLOCK = 256 << 20, 64, 128
# Above this many keys PyTorch's plain implementation, which stores all scores of a prompt, is not tried.
_MATH_KEYS = 4096


class Absent(Exception):
    """The implementation is not installed, or not made for this device or these inputs."""


def rivals(device: torch.device, phase: str, kinds: Sequence[str] = KINDS) -> dict[str, Make]:
    """By name, which begins with one of ``kinds``, what makes a step of each implementation from the sets of inputs.

    The phase is ``"decode"``, one query a sequence, or ``"prefill"``, whole prompts. Making, or the first step, raises
    ``Absent`` or whatever the implementation raises.
    """
    found: dict[str, Make] = {}
    for backend in _BACKENDS:
        if backend == "math" and device.type == "cuda":
            found["flex attention"] = _flex
            found["flash_attn"] = partial(_flash, module="flash_attn")
            found["flash_attn 3"] = partial(_flash, module="flash_attn_interface")
            found["flashinfer"] = _flashinfer_decode if phase == "decode" else _flashinfer_prefill
        for form in ("gqa", "rows" if phase == "decode" else "expanded"):
            found[f"sdpa {backend}, {form}"] = partial(_sdpa, backend=backend, form=form)
    return {name: make for name, make in found.items() if name.startswith(tuple(kinds))}


def rival_versions() -> dict[str, str | None]:
    """Versions of packages that the times of dense attention depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("triton", "flash-attn", "flash-attn-3", "flashinfer-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The causal mask of FlexAttention for a prompt, made from its blocks: nothing of size n^2 comes up."""
    blocks = -(-length // _FLEX_BLOCK)
    number = torch.arange(blocks, dtype=torch.int32, device=device)
    whole = number.expand(1, 1, blocks, blocks).contiguous()
    diagonal = torch.zeros_like(whole)
    diagonal[..., 0] = number
    return BlockMask.from_kv_blocks(
        *(torch.ones_like(number).view(1, 1, blocks), diagonal, number.view(1, 1, blocks), whole),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(length, length),
    )


def _sdpa(sets: Sequence[Inputs], backend: str, form: str) -> Step:
    query, key = sets[0].query, sets[0].key
    causal, grouped = query.shape[2] > 1, form == "gqa" and query.shape[1] != key.shape[1]
    if query.device.type == "cpu" and backend in ("cudnn", "efficient"):
        raise Absent(f"the {backend} backend needs a GPU")
    if causal and backend == "math" and key.shape[2] > _MATH_KEYS:
        raise Absent(f"it stores all scores, which is tried up to {_MATH_KEYS:,} keys")
    if form == "expanded" and query.shape[1] == key.shape[1]:
        raise Absent("every head has keys of its own: the same as gqa")

    def step(i: int) -> torch.Tensor:
        one = sets[i]
        rows = one.query.view(*one.key.shape[:2], -1, one.key.shape[-1]) if form == "rows" else one.query
        keys, values = one.expanded if form == "expanded" else (one.key, one.value)
        with sdpa_kernel(_BACKENDS[backend]):
            output = scaled_dot_product_attention(rows, keys, values, is_causal=causal, enable_gqa=grouped)
        return output.view(one.query.shape) if form == "rows" else output

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            step(0)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "No available kernel" not in str(error):
                raise
            reasons = [str(warning.message).split(" (Triggered")[0].strip() for warning in said]
            raise Absent("; ".join(["no kernel for this input", *reasons])[:600]) from error
    return step


def _flex(sets: Sequence[Inputs]) -> Step:
    torch._dynamo.reset()  # each length is compiled anew, and PyTorch limits how often one function is
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    length, device = sets[0].key.shape[2], sets[0].key.device
    mask = None if sets[0].query.shape[2] == 1 else causal_blocks(length, device)
    return lambda i: compiled(sets[i].query, sets[i].key, sets[i].value, block_mask=mask, enable_gqa=True)


def _flash(sets: Sequence[Inputs], module: str) -> Step:
    package, causal = _import(module), sets[0].query.shape[2] > 1
    attend = partial(package.flash_attn_func, causal=True) if causal else package.flash_attn_with_kvcache

    def step(i: int) -> torch.Tensor:
        result = attend(*(tensor.transpose(1, 2) for tensor in (sets[i].query, sets[i].key, sets[i].value)))
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return step


def _flashinfer_decode(sets: Sequence[Inputs]) -> Step:
    """FlashInfer's paged decoding, over a copy of keys and values in pages of its layout, planned beforehand."""
    flashinfer = _import("flashinfer")
    query, key = sets[0].query, sets[0].key
    B, Hkv, n, D = key.shape
    if n % _PAGE:
        raise Absent(f"{n} keys are not whole pages of {_PAGE}")
    pages = n // _PAGE

    def paged(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(B, Hkv, pages, _PAGE, D).transpose(1, 2).reshape(B * pages, Hkv, _PAGE, D)

    copies = [(paged(one.key), paged(one.value)) for one in sets]
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=key.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": key.device}
    ends, numbers = torch.arange(B + 1, **integers) * pages, torch.arange(B * pages, **integers)
    filled, sizes = torch.full((B,), _PAGE, **integers), (query.shape[1], Hkv, D, _PAGE)
    wrapper.plan(ends, numbers, filled, *sizes, q_data_type=query.dtype, kv_data_type=key.dtype)
    return lambda i: wrapper.run(sets[i].query[:, :, 0], copies[i])[:, :, None]


def _flashinfer_prefill(sets: Sequence[Inputs]) -> Step:
    """FlashInfer's prefill over sequences of equal length, planned beforehand."""
    flashinfer = _import("flashinfer")
    B, Hq, n, D = sets[0].query.shape
    tensors = [[t.transpose(1, 2).flatten(0, 1).contiguous() for t in (one.query, one.key, one.value)] for one in sets]
    query, key, _ = tensors[0]
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    ends = torch.arange(B + 1, dtype=torch.int32, device=query.device) * n
    wrapper.plan(*(ends, ends, Hq, key.shape[1], D), causal=True, q_data_type=query.dtype, kv_data_type=key.dtype)
    return lambda i: wrapper.run(*tensors[i]).view(B, n, Hq, -1).transpose(1, 2)


def _import(module: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed")
    return importlib.import_module(module)

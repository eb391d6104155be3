"""Dense attention of one decoding step, in every implementation that may be there: the rivals of sparse attention.

``scaled_dot_product_attention`` runs with each of its backends in two forms: ``gqa``, as it is called in a model, and
``rows``, where the query heads of a group stand as rows of one head. With one query per sequence both are the same
attention, and ``rows`` reads each key once on backends that would expand them.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nc_patch.bench.inputs import DecodeInputs

Step = Callable[[int], torch.Tensor]
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What the names of the implementations begin with.
KINDS = ("sdpa", "flex", "flash_attn", "flashinfer")
_FORMS = ("gqa", "rows")
_WORKSPACE = 128 << 20
_PAGE = 64


class Absent(Exception):
    """The implementation is not installed, or not made for this device."""


def rivals(device: torch.device, kinds: Sequence[str] = KINDS) -> dict[str, Callable[[Sequence[DecodeInputs]], Step]]:
    """By name, which begins with one of ``kinds``, what makes a step of each implementation from the sets of inputs.

    Making, or the first step, raises ``Absent`` or whatever the implementation raises.
    """
    found: dict[str, Callable[[Sequence[DecodeInputs]], Step]] = {}
    for backend, form in ((backend, form) for backend in SDPA_BACKENDS for form in _FORMS):
        found[f"sdpa {backend}, {form}"] = partial(_sdpa, backend=backend, form=form)
    if device.type == "cuda":
        found["flex attention"] = _flex
        found["flash_attn"] = partial(_flash, module="flash_attn")
        found["flash_attn 3"] = partial(_flash, module="flash_attn_interface")
        found["flashinfer"] = _flashinfer
    # Last, since it takes so much memory that little may be left for others.
    for form in _FORMS:
        found[f"sdpa math, {form}"] = found.pop(f"sdpa math, {form}")
    return {name: make for name, make in found.items() if name.startswith(tuple(kinds))}


def _sdpa(sets: Sequence[DecodeInputs], backend: str, form: str) -> Step:
    def attend(i: int) -> torch.Tensor:
        query, key, value = sets[i].query, sets[i].key, sets[i].value
        rows = query if form == "gqa" else query.view(*key.shape[:2], -1, query.shape[-1])
        grouped = form == "gqa" and query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(rows, key, value, enable_gqa=grouped).view(query.shape)

    return sdpa_step(attend, backend, sets[0].key.device)


def sdpa_step(attend: Step, backend: str, device: torch.device) -> Step:
    """A step that calls ``scaled_dot_product_attention`` in a way, held to one of ``SDPA_BACKENDS``; tried once.

    Raises:
        Absent: the backend has no kernel for these inputs; the message has its reasons.
    """
    if device.type == "cpu" and backend in ("cudnn", "efficient"):
        raise Absent(f"the {backend} backend needs a GPU")

    def step(i: int) -> torch.Tensor:
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            return attend(i)

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


def _flex(sets: Sequence[DecodeInputs]) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # each length is compiled anew, and PyTorch limits how often one function is
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda i: compiled(sets[i].query, sets[i].key, sets[i].value, enable_gqa=True)


def _flash(sets: Sequence[DecodeInputs], module: str) -> Step:
    attend = import_rival(module).flash_attn_with_kvcache

    def step(i: int) -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (sets[i].query, sets[i].key, sets[i].value))
        result = attend(query, key, value)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return step


def _flashinfer(sets: Sequence[DecodeInputs]) -> Step:
    """FlashInfer's paged decoding, over a copy of keys and values in pages of its layout, planned beforehand."""
    flashinfer = import_rival("flashinfer")
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
    wrapper.plan(
        torch.arange(B + 1, **integers) * pages,
        torch.arange(B * pages, **integers),
        torch.full((B,), _PAGE, **integers),
        *(query.shape[1], Hkv, D, _PAGE),
        q_data_type=query.dtype,
        kv_data_type=key.dtype,
    )
    return lambda i: wrapper.run(sets[i].query[:, :, 0], copies[i])[:, :, None]


def import_rival(module: str) -> Any:
    """A module that may not be installed, which raises ``Absent``."""
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed")
    return importlib.import_module(module)

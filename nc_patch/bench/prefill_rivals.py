"""Dense causal attention of a whole prompt, in every implementation that may be there: the rivals of sparse prefill.

``scaled_dot_product_attention`` runs with each of its backends in two forms: ``gqa``, as it is called in a model, and
``expanded``, over keys and values that are repeated for the heads of a group beforehand, which is not timed. Copies
that other packages want in a layout of their own are not timed either.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nc_patch.bench.dense_rivals import KINDS, Absent, Step, import_rival, sdpa_step
from nc_patch.bench.prompts import PromptInputs

_FORMS = ("gqa", "expanded")
_WORKSPACE = 256 << 20
_FLEX_BLOCK = 128
# Above this many keys PyTorch's plain implementation, which stores all scores, is not tried.
_MATH_KEYS = 4096


def rivals(device: torch.device, kinds: Sequence[str] = KINDS) -> dict[str, Callable[[PromptInputs], Step]]:
    """By name, which begins with one of ``kinds``, what makes a step of each implementation from the inputs.

    Making, or the first step, raises ``Absent`` or whatever the implementation raises.
    """
    found: dict[str, Callable[[PromptInputs], Step]] = {}
    for backend in ("flash", "cudnn", "efficient", "math"):
        for form in _FORMS:
            found[f"sdpa {backend}, {form}"] = partial(_sdpa, backend=backend, form=form)
    if device.type == "cuda":
        found["flex attention"] = _flex
        found["flash_attn"] = partial(_flash, module="flash_attn")
        found["flash_attn 3"] = partial(_flash, module="flash_attn_interface")
        found["flashinfer"] = _flashinfer
    return {name: make for name, make in found.items() if name.startswith(tuple(kinds))}


def causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The causal mask of FlexAttention for a prompt, made from its blocks: nothing of size n^2 comes up."""
    blocks = -(-length // _FLEX_BLOCK)
    number = torch.arange(blocks, dtype=torch.int32, device=device)
    whole = number.expand(1, 1, blocks, blocks).contiguous()
    diagonal = torch.zeros_like(whole)
    diagonal[..., 0] = number
    return BlockMask.from_kv_blocks(
        torch.ones_like(number).view(1, 1, blocks),
        diagonal,
        number.view(1, 1, blocks),
        whole,
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(length, length),
    )


def _sdpa(inputs: PromptInputs, backend: str, form: str) -> Step:
    query, key, value = inputs.query, inputs.key, inputs.value
    group = query.shape[1] // key.shape[1]
    if backend == "math" and key.shape[2] > _MATH_KEYS:
        raise Absent(f"it stores all scores, which is tried up to {_MATH_KEYS:,} keys")
    if form == "expanded":
        if group == 1:
            raise Absent("every head has keys of its own: the same as gqa")
        key, value = inputs.expanded
    grouped = form == "gqa" and group > 1

    def attend(_: int) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return sdpa_step(attend, backend, query.device)


def _flex(inputs: PromptInputs) -> Step:
    torch._dynamo.reset()  # each length is compiled anew, and PyTorch limits how often one function is
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = causal_blocks(inputs.key.shape[2], inputs.key.device)
    return lambda _: compiled(inputs.query, inputs.key, inputs.value, block_mask=mask, enable_gqa=True)


def _flash(inputs: PromptInputs, module: str) -> Step:
    attend = import_rival(module).flash_attn_func
    query, key, value = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))

    def step(_: int) -> torch.Tensor:
        result = attend(query, key, value, causal=True)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return step


def _flashinfer(inputs: PromptInputs) -> Step:
    """FlashInfer's prefill over sequences of equal length, planned beforehand."""
    flashinfer = import_rival("flashinfer")
    B, Hq, n, D = inputs.query.shape
    query, key, value = (t.transpose(1, 2).flatten(0, 1).contiguous() for t in (inputs.query, inputs.key, inputs.value))
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    ends = torch.arange(B + 1, dtype=torch.int32, device=query.device) * n
    wrapper.plan(*(ends, ends, Hq, key.shape[1], D), causal=True, q_data_type=query.dtype, kv_data_type=key.dtype)
    return lambda _: wrapper.run(query, key, value).view(B, n, Hq, -1).transpose(1, 2)

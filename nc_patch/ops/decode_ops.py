"""The operations of decoding as ``torch.library`` custom ops: upkeep of the key index, and attention over it.

They have no gradients, but for ``page_means``: where one is required the operations of ``custom_ops`` run, which need
no index.
"""

from typing import Any

import torch

from nc_patch.ops.by_backend import op_by_backend
from nc_patch.ops.custom_ops import Four, Three, tail_of
from nc_patch.ops.derivatives import in_transform, register_gradient
from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans, page_starts, slot_count, spread_over_pages
from nc_patch.ops.means import page_means as _page_means
from nc_patch.selections.block.pages import PageStatistics, update_pages_
from nc_patch.selections.block.torch_decode import torch_block_decode
from nc_patch.selections.topk.codes import KeyCodes, encode_keys
from nc_patch.selections.topk.torch_decode import torch_topk_decode

# Keys that the PyTorch backend encodes at once, to bound its memory.
_KEYS_AT_ONCE = 8192


def runs_directly(*tensors: torch.Tensor | None) -> bool:
    """Whether an operation of the PyTorch backend may be called without its custom op.

    So it may where nothing traces it and nothing records a gradient; going through the dispatcher takes longer than a
    step over the pages of a small model.
    """
    return (
        not torch.compiler.is_compiling()
        and not in_transform()
        and all(tensor is None or type(tensor) is torch.Tensor for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
    )


@torch.library.custom_op("nc_patch::encode_keys_", mutates_args=("high", "low", "code_scale", "coarse", "residual"))
def encode_keys_(
    key: torch.Tensor,
    first: torch.Tensor,
    count: int,
    high: torch.Tensor,
    low: torch.Tensor,
    code_scale: torch.Tensor,
    coarse: torch.Tensor,
    residual: torch.Tensor,
    center: torch.Tensor,
    spread: torch.Tensor,
    backend: str,
) -> None:
    """Writes the codes of the keys ``first[b]`` to ``first[b] + count`` of each sequence b; see ``KeyCodes``.

    ``key`` is ``[B, Hkv, N, D]``, ``first`` int ``[B]``; positions that do not exist are left out.
    """
    if backend == "triton":
        from nc_patch.selections.topk.encode import triton_encode_keys_

        written = KeyCodes(high, low, code_scale, coarse, residual, center, spread)
        return triton_encode_keys_(key, first, count, written)
    Hkv, N, D = key.shape[1:]
    for begin in range(0, count, _KEYS_AT_ONCE):
        offset = torch.arange(begin, min(begin + _KEYS_AT_ONCE, count), device=key.device)
        # A key's codes depend on it alone, so that writing one twice, where a position is clamped, does no harm.
        index = (first.long()[:, None] + offset).clamp(0, N - 1)[:, None].expand(-1, Hkv, -1)
        keys = key.gather(2, index[..., None].expand(-1, -1, -1, D))
        kept = (high, low, code_scale, coarse, residual)
        for target, new in zip(kept, encode_keys(keys, center, spread), strict=True):
            target.scatter_(2, index if new.dim() == 3 else index[..., None].expand_as(new), new)
    return None


@encode_keys_.register_fake
def _(key, first, count, high, low, code_scale, coarse, residual, center, spread, backend):  # type: ignore[no-untyped-def]
    return None


@op_by_backend(mutates_args=("page_codes", "page_scales"))
def summarize_pages_(
    key: torch.Tensor,
    origin: torch.Tensor,
    first: torch.Tensor,
    count: int,
    end: torch.Tensor,
    page_codes: torch.Tensor,
    page_scales: torch.Tensor,
    block_size: int,
    backend: str,
) -> None:
    """Writes the statistics of each whole page that holds any of the keys ``first[b]`` to ``first[b] + count``.

    ``key`` is ``[B, Hkv, N, D]``; ``origin``, ``first`` and ``end`` are int ``[B]``; see ``pages.update_pages_``.
    """
    statistics = PageStatistics(page_codes, page_scales)
    if backend == "triton":
        from nc_patch.selections.block.summarize import triton_summarize_pages_

        return triton_summarize_pages_(key, origin, first, count, end, statistics, block_size)
    return update_pages_(key, origin, first, count, end, statistics, block_size)


@summarize_pages_.register_fake
def _(key, origin, first, count, end, page_codes, page_scales, block_size, backend):  # type: ignore[no-untyped-def]
    return None


@torch.library.custom_op("nc_patch::page_means", mutates_args=())
def page_means(
    key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, origin: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of all pages that the tail of queries with these intervals may need, by slot; see ``ops/means.py``.

    ``key`` is ``[B, Hkv, N, D]``, ``value`` ``[B, Hkv, N, Dv]``, ``visible`` int32 ``[B, Lq, 2]``, ``origin`` int32
    ``[B, Lq]``.
    """
    starts = page_starts(visible, origin, key.shape[2])
    if backend == "triton":
        from nc_patch.ops.triton.means import triton_page_means

        means = triton_page_means(key, value, starts)
    else:
        means = _page_means(key, value, starts)
    return means.key, means.value


@page_means.register_fake
def _(key, value, visible, origin, backend):  # type: ignore[no-untyped-def]
    slots = slot_count(key.shape[2]) + 1  # see page_starts
    return key.new_empty(*key.shape[:2], slots, key.shape[3]), value.new_empty(*value.shape[:2], slots, value.shape[3])


def _setup_means(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    key, _, visible, origin, _ = inputs
    ctx.save_for_backward(visible, origin)
    ctx.key_length = key.shape[2]


def _means_backward(ctx: Any, grad_key: torch.Tensor, grad_value: torch.Tensor) -> tuple[Any, ...]:
    visible, origin = ctx.saved_tensors
    starts = page_starts(visible, origin, ctx.key_length)
    return (
        spread_over_pages(grad_key, starts, ctx.key_length),
        spread_over_pages(grad_value, starts, ctx.key_length),
        None,
        None,
        None,
    )


register_gradient(page_means, _means_backward, _setup_means)


@torch.library.custom_op("nc_patch::page_means_", mutates_args=("mean_key", "mean_value"))
def page_means_(
    key: torch.Tensor,
    value: torch.Tensor,
    origin: torch.Tensor,
    first: torch.Tensor,
    count: int,
    mean_key: torch.Tensor,
    mean_value: torch.Tensor,
    backend: str,
) -> None:
    """Writes the means of each page that holds any of the keys ``first[b]`` to ``first[b] + count``.

    ``origin`` and ``first`` are int ``[B]``. The mean of a page that is not full yet is overwritten when it is.
    """
    if backend == "triton":
        from nc_patch.ops.triton.means import triton_page_means_

        return triton_page_means_(key, value, origin, first, count, PageMeans(mean_key, mean_value))
    slots = mean_key.shape[2]
    touched = min((count + TAIL_PAGE_SIZE - 2) // TAIL_PAGE_SIZE + 1, slots)
    begin = origin.long() % TAIL_PAGE_SIZE
    # Means depend on the page alone, so that writing one twice, where a slot is clamped, does no harm.
    slot = torch.div(first.long() - begin, TAIL_PAGE_SIZE, rounding_mode="floor").clamp(0, slots - touched)
    index = slot[:, None] + torch.arange(touched, device=key.device)
    means = _page_means(key, value, index * TAIL_PAGE_SIZE + begin[:, None])
    for kept, new in ((mean_key, means.key), (mean_value, means.value)):
        kept.scatter_(2, index[:, None, :, None].expand_as(new), new)
    return None


@page_means_.register_fake
def _(key, value, origin, first, count, mean_key, mean_value, backend):  # type: ignore[no-untyped-def]
    return None


@op_by_backend(mutates_args=())
def topk_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    high: torch.Tensor,
    low: torch.Tensor,
    code_scale: torch.Tensor,
    coarse: torch.Tensor,
    residual: torch.Tensor,
    center: torch.Tensor,
    spread: torch.Tensor,
    scale: float,
    softcap: float,
    sink_keys: int,
    recent_keys: int,
    refine: bool,
    max_budget: int,
    want_bounds: bool,
    backend: str,
    tail_key: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
) -> Three:
    """Top-k attention over keys chosen by their codes; see ``torch_topk_decode``.

    ``max_budget`` is the largest budget that any query may have, from which buffers are sized.
    """
    key_codes = KeyCodes(high, low, code_scale, coarse, residual, center, spread)
    tail = tail_of(tail_key, tail_value)
    if backend == "triton":
        from nc_patch.selections.topk.decode import triton_topk_decode

        return triton_topk_decode(
            *(query, key, value, visible, budget, sinks, key_codes),
            scale=scale,
            softcap=softcap,
            sink_keys=sink_keys,
            recent_keys=recent_keys,
            refine=refine,
            max_budget=max_budget,
            want_bounds=want_bounds,
            tail=tail,
            origin=origin,
        )
    return torch_topk_decode(
        *(query, key, value, visible, budget, sinks, key_codes),
        scale=scale,
        softcap=softcap,
        sink_keys=sink_keys,
        recent_keys=recent_keys,
        refine=refine,
        want_bounds=want_bounds,
        tail=tail,
        origin=origin,
    )


@topk_decode.register_fake
def _(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    visible,
    budget,
    sinks,
    high,
    low,
    code_scale,
    coarse,
    residual,
    center,
    spread,
    scale,
    softcap,
    sink_keys,
    recent_keys,
    refine,
    max_budget,
    want_bounds,
    backend,
    tail_key=None,
    tail_value=None,
    origin=None,
):
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[-1]),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty((*rows, 2) if want_bounds else (0,), dtype=torch.float32),
    )


@op_by_backend(mutates_args=())
def block_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    page_codes: torch.Tensor,
    page_scales: torch.Tensor,
    scale: float,
    softcap: float,
    block_size: int,
    max_budget: int,
    want_stats: bool,
    backend: str,
) -> Four:
    """Attention over pages chosen by their statistics; see ``torch_block_decode``. ``max_budget`` as above."""
    if backend == "triton":
        from nc_patch.selections.block.decode import triton_block_decode

        return triton_block_decode(
            *(query, key, value, visible, origin, budget, sinks, page_codes, page_scales),
            scale=scale,
            softcap=softcap,
            block_size=block_size,
            max_budget=max_budget,
            want_stats=want_stats,
        )
    return torch_block_decode(
        *(query, key, value, visible, origin, budget, sinks, page_codes, page_scales),
        scale=scale,
        softcap=softcap,
        block_size=block_size,
        want_stats=want_stats,
    )


@block_decode.register_fake
def _(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    visible,
    origin,
    budget,
    sinks,
    page_codes,
    page_scales,
    scale,
    softcap,
    block_size,
    max_budget,
    want_stats,
    backend,
):
    rows = query.shape[:3]
    stats = rows if want_stats else (0,)
    return (
        query.new_empty(*rows, value.shape[-1]),
        query.new_empty(stats, dtype=torch.float32),
        query.new_empty(stats, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.int32),
    )


def _refuse_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "decoding by an index, topk_decode or block_decode, has no gradient. Train on whole sequences, with "
        'use_cache=False, or let the layers decode without an index: decode="topk" or "window"'
    )


register_gradient(topk_decode, _refuse_gradient, lambda ctx, inputs, output: None)
register_gradient(block_decode, _refuse_gradient, lambda ctx, inputs, output: None)

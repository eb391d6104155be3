"""The operations as ``torch.library`` custom ops: opaque to ``torch.compile``, with fakes and gradients.

One operation a selection. Each returns the output, the log-sum-exp and the kept mass; the last two are empty unless
``want_stats``. ``block_attention`` also returns how many keys each query attended, which only it does not know
beforehand, what its choice is expected to keep, and on request an audit of that.
"""

from collections.abc import Iterable
from typing import Any

import torch

from nc_patch.budget import row_budgets as _row_budgets
from nc_patch.common import autocast_off
from nc_patch.ops.by_backend import READS_HOST, op_by_backend
from nc_patch.ops.derivatives import call, no_second_derivative, register_gradient
from nc_patch.ops.gradients import attention_gradients
from nc_patch.ops.means import PageMeans
from nc_patch.ops.reference import forced_counts
from nc_patch.ops.rows import Buffers, RowBlock, row_blocks, rows_per_block
from nc_patch.ops.torch_tail import of_one_origin
from nc_patch.selections.block.audit import AUDIT_COLUMNS, BlockAudit
from nc_patch.selections.block.blocks import BlockSettings, query_block_table
from nc_patch.selections.block.torch import ChosenBlocks, torch_block_attention
from nc_patch.selections.block.torch_choose import choose_blocks
from nc_patch.selections.topk.torch import keep_topk_, torch_topk_attention
from nc_patch.selections.window import keep_window_, torch_window_attention

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Six = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("nc_patch::row_budgets", mutates_args=())
def row_budgets(
    visible: torch.Tensor, max_n: int, alphas: list[float], exponents: list[float], min_keys: int, law: str
) -> torch.Tensor:
    """Budgets int32 ``[B, len(alphas), Lq]`` of the queries with intervals ``visible``; see ``nc_patch.budget``."""
    return _row_budgets(visible, max_n, tuple(zip(alphas, exponents, strict=True)), min_keys, law)  # type: ignore[arg-type]


@row_budgets.register_fake
def _(visible, max_n, alphas, exponents, min_keys, law):  # type: ignore[no-untyped-def]
    return visible.new_empty(visible.shape[0], len(alphas), visible.shape[1])


def _row_settings(scale: float, softcap: float, sink_keys: int, recent_keys: int, want_stats: bool) -> dict[str, Any]:
    """The keyword arguments that the row operations of every backend share."""
    return {
        "scale": scale,
        "softcap": softcap,
        "sink_keys": sink_keys,
        "recent_keys": recent_keys,
        "want_stats": want_stats,
    }


@op_by_backend(mutates_args=())
def topk_attention(
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
    backend: str,
    tail_key: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
) -> Three:
    """Exact token-level top-k attention; see ``torch_topk_attention`` for shapes. ``backend``: "torch" or "triton"."""
    settings = _row_settings(scale, softcap, sink_keys, recent_keys, want_stats)
    tail = tail_of(tail_key, tail_value)
    if backend == "triton":
        from nc_patch.selections.topk.prefill import triton_topk_attention

        return triton_topk_attention(query, key, value, visible, budget, sinks, **settings, tail=tail, origin=origin)
    return torch_topk_attention(query, key, value, visible, budget, sinks, **settings, tail=tail, origin=origin)


def tail_of(key: torch.Tensor | None, value: torch.Tensor | None) -> PageMeans | None:
    """The two tensors of a tail as one, or None where there is none."""
    return None if key is None or value is None else PageMeans(key, value)


@op_by_backend(mutates_args=())
def window_attention(
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
    backend: str,
) -> Three:
    """Attention over sink keys and the most recent ones; arguments as in ``topk_attention``."""
    settings = _row_settings(scale, softcap, sink_keys, recent_keys, want_stats)
    if backend == "triton":
        from nc_patch.selections.window import triton_window_attention

        return triton_window_attention(query, key, value, visible, budget, sinks, **settings)
    return torch_window_attention(query, key, value, visible, budget, sinks, **settings)


@torch.library.custom_op("nc_patch::block_attention", mutates_args=(), tags=READS_HOST)
def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    block_size: int,
    query_block_size: int,
    sample_stride: int,
    min_mass: float,
    max_factor: float,
    estimator: str,
    want_stats: bool,
    backend: str,
    audit_seed: int = -1,
) -> Six:
    """Attention over key blocks chosen by sampled query rows; see ``torch_block_attention`` for shapes.

    Every backend counts query blocks on the host. That of "triton" has ``estimator="sampled"`` alone.

    Returns what that does and, with a seed that is not negative, the audit ``[Hq + 1, 5]``, else an empty tensor.
    """
    audit = BlockAudit(audit_seed) if audit_seed >= 0 else None
    settings: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "block_size": block_size,
        "query_block_size": query_block_size,
        "sample_stride": sample_stride,
        "min_mass": min_mass,
        "max_factor": max_factor,
        "want_stats": want_stats,
        "audit": audit,
    }
    inputs = (query, key, value, visible, origin, budget, sinks)
    if backend == "triton":
        from nc_patch.selections.block.prefill import triton_block_attention

        assert estimator == "sampled", "choose_backend sends the other estimators to the PyTorch backend"
        results = triton_block_attention(*inputs, **settings)
    else:
        results = torch_block_attention(*inputs, **settings, estimator=estimator)
    return *results, query.new_empty(0, dtype=torch.float32) if audit is None or audit.result is None else audit.result


def _fake_outputs(query: torch.Tensor, value: torch.Tensor, want_stats: bool) -> Three:
    B, Hq, Lq, _ = query.shape
    stats = (B, Hq, Lq) if want_stats else (0,)
    return (
        query.new_empty(B, Hq, Lq, value.shape[-1]),
        query.new_empty(stats, dtype=torch.float32),
        query.new_empty(stats, dtype=torch.float32),
    )


@topk_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    visible,
    budget,
    sinks,
    scale,
    softcap,
    sink_keys,
    recent_keys,
    want_stats,
    backend,
    tail_key=None,
    tail_value=None,
    origin=None,
):
    return _fake_outputs(query, value, want_stats)


@window_attention.register_fake
def _(query, key, value, visible, budget, sinks, scale, softcap, sink_keys, recent_keys, want_stats, backend):  # type: ignore[no-untyped-def]
    return _fake_outputs(query, value, want_stats)


@block_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    visible,
    origin,
    budget,
    sinks,
    scale,
    softcap,
    block_size,
    query_block_size,
    sample_stride,
    min_mass,
    max_factor,
    estimator,
    want_stats,
    backend,
    audit_seed=-1,
):
    attended = query.new_empty(query.shape[:3], dtype=torch.int32)
    estimate = query.new_empty(query.shape[1], 5, dtype=torch.float32)
    audit = query.new_empty((query.shape[1] + 1, len(AUDIT_COLUMNS)) if audit_seed >= 0 else (0,), dtype=torch.float32)
    return *_fake_outputs(query, value, want_stats), attended, estimate, audit


@torch.library.custom_op("nc_patch::attention_backward", mutates_args=(), tags=READS_HOST)
def attention_backward(
    grad_output: torch.Tensor,
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
    selection: str,
    tail_key: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
) -> Six:
    """Gradients of query, key, value, sinks, tail_key and tail_value (empty where there is none), in PyTorch.

    For ``topk`` and ``window``.
    """
    rows: Iterable[RowBlock] = row_blocks(visible, rows_per_block(query.shape[1], key.shape[2]))
    tail = tail_of(tail_key, tail_value)
    if tail is not None and origin is not None:
        rows = of_one_origin(rows, visible, origin)

    def keep(raw: torch.Tensor, seen: torch.Tensor, block: RowBlock, buffers: Buffers) -> torch.Tensor:
        allowed = budget[block.batch, :, block.rows]
        if selection == "topk":
            return keep_topk_(raw, seen, allowed, block, sink_keys, recent_keys, buffers)
        return keep_window_(raw, seen, *forced_counts(allowed, sink_keys, recent_keys, "window"), block)

    with autocast_off(query):
        gradients = attention_gradients(
            *(grad_output, query, key, value, visible, sinks, keep, rows),
            scale=scale,
            softcap=softcap,
            tail=tail,
            origin=origin,
        )
    return tuple(query.new_empty(0) if grad is None else grad for grad in gradients)  # type: ignore[return-value]


@torch.library.custom_op("nc_patch::block_attention_backward", mutates_args=(), tags=READS_HOST)
def block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    block_size: int,
    query_block_size: int,
    sample_stride: int,
    min_mass: float,
    max_factor: float,
    estimator: str,
) -> Four:
    """Gradients as from ``attention_backward`` for ``block``.

    The blocks are chosen once more, by the computation of the forward pass on the same tensors: they are the same.
    Keeping them instead would make an output's shape depend on what is in ``visible``.
    """
    settings = BlockSettings(block_size, query_block_size, sample_stride, min_mass, max_factor, estimator)
    table = query_block_table(visible, origin, query_block_size)

    def keep(raw: torch.Tensor, seen: torch.Tensor, block: RowBlock, buffers: Buffers) -> torch.Tensor:
        return chosen.keep_(raw, seen, block)

    with autocast_off(query):
        choice, _ = choose_blocks(query, key, visible, origin, budget, table, settings, scale=scale, softcap=softcap)
        chosen = ChosenBlocks(table, choice, block_size)
        gradients = attention_gradients(
            grad_output, query, key, value, visible, sinks, keep, chosen.blocks, scale=scale, softcap=softcap
        )
    return *gradients[:3], query.new_empty(0) if gradients.sinks is None else gradients.sinks


def _like(query: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    # Contiguous, as the gradients are, whatever the strides of the tensors.
    return tuple(query.new_empty(0 if tensor is None else tensor.shape) for tensor in tensors)


@attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output,
    query,
    key,
    value,
    visible,
    budget,
    sinks,
    scale,
    softcap,
    sink_keys,
    recent_keys,
    selection,
    tail_key=None,
    tail_value=None,
    origin=None,
):
    return _like(query, query, key, value, sinks, tail_key, tail_value)


@block_attention_backward.register_fake
def _(grad_output, query, key, value, visible, origin, budget, sinks, *settings):  # type: ignore[no-untyped-def]
    return _like(query, query, key, value, sinks)


def _refuse_backend(backend: str) -> None:
    if backend != "torch":
        raise RuntimeError('gradients need backend="torch": forward and backward must choose the same keys')


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, visible, budget, sinks, scale, softcap, sink_keys, recent_keys, _, backend, *tail = inputs
    _refuse_backend(backend)
    ctx.save_for_backward(query, key, value, visible, budget, sinks, *(tail or (None, None, None)))
    ctx.settings = (scale, softcap, sink_keys, recent_keys)
    ctx.inputs = len(inputs)


def _rows_backward(selection: str) -> Any:
    def backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        query, key, value, visible, budget, sinks, tail_key, tail_value, origin = ctx.saved_tensors
        grads = call(
            attention_backward,
            *(grad_output, query, key, value, visible, budget, sinks, *ctx.settings, selection),
            *(tail_key, tail_value, origin),
        )
        of_tail = (None, None) if tail_key is None else grads[4:]
        of_settings = ((None,) * 6 + of_tail + (None,))[: ctx.inputs - 6]
        return *grads[:3], None, None, None if sinks is None else grads[3], *of_settings

    return backward


def _setup_block(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, softcap, block_size, query_block_size, sample_stride, min_mass, max_factor = inputs[:14]
    estimator, _, backend = inputs[14:17]
    ctx.inputs = len(inputs)
    _refuse_backend(backend)
    ctx.save_for_backward(*tensors)
    ctx.settings = (
        *(scale, softcap, block_size, query_block_size),
        *(sample_stride, min_mass, max_factor, estimator),
    )


def _block_backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # to be asked for once: gradient checkpointing computes them when it is
    grads = call(block_attention_backward, grad_output, *tensors, *ctx.settings)
    return *grads[:3], None, None, None, None if tensors[-1] is None else grads[3], *(None,) * (ctx.inputs - 7)


register_gradient(topk_attention, _rows_backward("topk"), _setup_rows)
register_gradient(window_attention, _rows_backward("window"), _setup_rows)
register_gradient(block_attention, _block_backward, _setup_block)
no_second_derivative(attention_backward)
no_second_derivative(block_attention_backward)

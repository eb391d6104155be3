"""Gradients of sparse attention in PyTorch, in blocks of query rows; the choice of keys is a constant.

Which keys are attended is piecewise constant in the inputs, so that almost everywhere the gradient through the attended
keys is the gradient.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from nc_patch.ops.means import PageMeans
from nc_patch.ops.rows import Buffers, RowBlock, final_scores_, rows_per_block, scores_of, softmax_
from nc_patch.ops.torch_tail import join_tail, pages_of

# (raw scores, seen, block, buffers) -> shift; keeps what is attended and makes the rest -inf, as keep_topk_ does.
Keep = Callable[[torch.Tensor, torch.Tensor, RowBlock, Buffers], torch.Tensor]


class Gradients(NamedTuple):
    """Gradients in the dtypes of what they are gradients of; None where there is no such input."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    tail_key: torch.Tensor | None
    tail_value: torch.Tensor | None


def attention_gradients(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    keep: Keep,
    blocks: Iterable[RowBlock],
    *,
    scale: float,
    softcap: float,
    tail: PageMeans | None = None,
    origin: torch.Tensor | None = None,
) -> Gradients:
    """Gradients with respect to query, key, value, sinks, and the means of the tail.

    Args:
        grad_output: ``[B, Hq, Lq, Dv]``. The other tensors as in the forward operation.
        keep: chooses the attended keys of a row block, the same as in the forward operation.
        blocks: the row blocks, which together hold every row that sees a key.
        scale, softcap, tail, origin: as in the forward operation. With a tail every block is of one origin.
    """
    _, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    zeros = lambda shape: torch.zeros(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    grad_query, grad_key, grad_value = zeros(query.shape), zeros(key.shape), zeros(value.shape)
    grad_sinks = None if sinks is None else zeros(Hq)
    grad_tail = None if tail is None else [zeros(mean.shape) for mean in tail]
    buffers = Buffers(Hq * min(rows_per_block(Hq, Lk), Lq) * Lk, query.device)
    for block in blocks:
        b, span = block.batch, slice(block.low, block.high)
        seen = visible[b, block.rows]
        empty = (seen[:, 1] <= seen[:, 0])[:, None]
        q, k, v = query[b, :, block.rows].float(), key[b, :, span].float(), value[b, :, span].float()
        scores = scores_of(q, k, buffers)
        if softcap:
            scores.clamp_(min=torch.finfo(torch.float32).min)
        shift = keep(scores, seen, block, buffers)
        slope = None
        if softcap:
            dropped = scores == -torch.inf
            tanh = scores.add_(shift[..., None]).mul_(scale / softcap).tanh_()
            slope = 1 - tanh.square()
            scores, shift = tanh.mul_(softcap).masked_fill_(dropped, -torch.inf), torch.zeros_like(shift)
        else:
            scores, shift = scores.mul_(scale), shift * scale
        logits = None if sinks is None else sinks.float()[:, None] - shift
        if tail is not None and grad_tail is not None and origin is not None:
            begin = int(origin[b, block.first])
            scores, more = join_tail(scores, shift, q, tail, b, begin, seen, block, scale, softcap, buffers)
            slots = pages_of(block, begin)[1]
            if more:
                mean_keys = tail.key[b, :, slots].float()
                if slope is not None:
                    capped = final_scores_(scores_of(q, mean_keys, buffers, "tail"), scale, softcap)
                    slope = torch.cat((slope, 1 - (capped / softcap).square()), -1)
                k, v = torch.cat((k, mean_keys), 1), torch.cat((v, *more), 1)
        to_sink = None if logits is None else torch.sigmoid(logits - torch.logsumexp(scores, -1))
        # With blocks a row may see keys and attend none of them.
        nothing = empty | (scores.amax(-1, keepdim=True) == -torch.inf)
        weights = softmax_(scores, logits).masked_fill_(nothing, 0.0)
        grad = grad_output[b, :, block.rows].float().masked_fill(empty, 0.0)

        grad_values = _grouped(weights, Hkv).transpose(1, 2) @ _grouped(grad, Hkv)
        grad_weights = (_grouped(grad, Hkv) @ v.transpose(1, 2)).view_as(weights)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if grad_sinks is not None and to_sink is not None:
            grad_sinks -= (to_sink.masked_fill(empty[:, 0], 0.0) * mean[..., 0]).sum(-1)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query[b, :, block.rows] = (_grouped(grad_scores, Hkv) @ k).view(Hq, -1, D)
        grad_keys = _grouped(grad_scores, Hkv).transpose(1, 2) @ _grouped(q, Hkv)
        length = block.high - block.low
        grad_key[b, :, span] += grad_keys[:, :length]
        grad_value[b, :, span] += grad_values[:, :length]
        if grad_tail is not None and k.shape[1] > length:
            grad_tail[0][b, :, slots] += grad_keys[:, length:]
            grad_tail[1][b, :, slots] += grad_values[:, length:]
    return Gradients(
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype),
        *(
            (None, None)
            if tail is None or grad_tail is None
            else (g.to(t.dtype) for g, t in zip(grad_tail, tail, strict=True))
        ),
    )


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[Hq, R, N]`` as ``[Hkv, G * R, N]``."""
    return tensor.reshape(num_kv_heads, -1, tensor.shape[-1])

"""Attention in PyTorch over whatever keys a selection keeps, and its gradient; in blocks of query rows.

Which keys are attended is piecewise constant in the inputs, so that almost everywhere the gradient through the attended
keys is the gradient.
"""

from collections.abc import Iterable
from typing import Protocol

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE, page_starts, spread_over_pages
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import (
    Buffers,
    RowBlock,
    RowStats,
    final_scores_,
    hide_unseen_,
    rows_per_block,
    scores_of,
    softmax_,
    weighted_values,
)


class Choice(Protocol):
    """Which keys rows attend; see ``nc_patch.selections.base.Choice``."""

    blocks: Iterable[RowBlock]

    def hide_(self, scores: torch.Tensor, block: RowBlock, buffers: Buffers) -> torch.Tensor:
        """Makes the scores of keys that are not attended -inf; returns by how much the others were lowered."""


def attend_rows(problem: Problem, choice: Choice) -> AttentionResult:
    """The output, and with ``problem.stats`` the log-sum-exp and the kept mass; page means join where there are any.

    Scores and softmax are float32.
    """
    query, key, value, means = problem.query, problem.key, problem.value, problem.means
    B, Hq, Lq, _ = query.shape
    Lk = key.shape[2]
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    logits = None if problem.sinks is None else problem.sinks.float()
    stats = RowStats(query, logits, problem.stats)
    buffers = Buffers(Hq * min(rows_per_block(Hq, Lk), Lq) * Lk, query.device)
    loaded = -1
    for block in choice.blocks:
        b = block.batch
        if b != loaded:
            keys, values, loaded = key[b].float(), value[b].float(), b
        seen = problem.visible[b, block.rows]
        empty = seen[:, 1] <= seen[:, 0]
        rows_query = query[b, :, block.rows].float()
        scores = scores_of(rows_query, keys[:, block.low : block.high], buffers)
        if problem.stats:
            position = torch.arange(block.low, block.high, device=query.device, dtype=torch.int32)
            dense = final_scores_(scores.clone(), problem.scale, problem.softcap)
            dense = torch.logsumexp(hide_unseen_(dense, seen, position), -1)
        shift = _hide_(problem, choice, block, scores, buffers)
        joined, slots = _join_means(problem, block, scores, shift, rows_query, buffers)
        if problem.stats:
            kept = torch.logsumexp(scores, -1) + shift
            every = kept if joined is scores else torch.logsumexp(joined, -1) + shift
            stats.record(block, kept, dense, empty, every)
        weights = softmax_(joined, None if logits is None else logits[:, None] - shift)
        parts = [values[:, block.low : block.high]]
        if slots is not None and means is not None:
            parts.append(means.value[b, :, slots].float())
        output[b, :, block.rows] = weighted_values(weights, *parts).masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return AttentionResult(output, *stats.results())


def _hide_(problem: Problem, choice: Choice, block: RowBlock, scores: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """Makes raw scores in place final ones less a shift ``[H or 1, R]``, which it returns; -inf where not attended."""
    scale, softcap = problem.scale, problem.softcap
    if not softcap:
        shift = choice.hide_(scores, block, buffers)
        scores.mul_(scale)
        return shift * scale
    # A score of -inf is a number once it is soft-capped, and must not look like one that is left out.
    shift = choice.hide_(scores.clamp_(min=torch.finfo(torch.float32).min), block, buffers)
    dropped = scores == -torch.inf
    final_scores_(scores.add_(shift[..., None]), scale, softcap).masked_fill_(dropped, -torch.inf)
    return torch.zeros_like(shift)


def _join_means(
    problem: Problem,
    block: RowBlock,
    scores: torch.Tensor,
    shift: torch.Tensor,
    query: torch.Tensor,
    buffers: Buffers,
) -> tuple[torch.Tensor, slice | None]:
    """Scores of the attended keys and behind them those of the P page means that count, and the slots of those.

    Args:
        scores: final scores float32 ``[H, R, N]`` less ``shift`` ``[H or 1, R]``, -inf where a key is not attended.
        query: float32 ``[H, R, D]``.

    Returns:
        (float32 ``[H, R, N + P]``, slots); the scores and None where no page counts.
    """
    if problem.means is None:
        return scores, None
    H, R, N = scores.shape
    size, begin = TAIL_PAGE_SIZE, int(problem.origin[block.batch, block.first])
    first_page = -((begin - block.low) // size)
    count = (block.high - 1 - begin) // size - first_page
    if count <= 0:
        return scores, None
    slots = slice(first_page + begin // size, first_page + begin // size + count)
    seen = problem.visible[block.batch, block.rows]
    column = begin + first_page * size - block.low
    missing = size - _sums_of_pages(scores[..., column : column + count * size] > -torch.inf)
    keys = problem.means.key[block.batch, :, slots].float()
    logits = final_scores_(scores_of(query, keys, buffers, "means"), problem.scale, problem.softcap)
    # A page that is attended whole is left out whatever its mean holds: NaN less infinity would be NaN.
    logits.masked_fill_(missing == 0, -torch.inf)
    logits += missing.log_()
    logits -= shift[..., None]
    page = torch.arange(first_page, first_page + count, device=seen.device)
    own = torch.div(seen[:, 1:] - 1 - begin, size, rounding_mode="floor")
    logits.masked_fill_((begin + page * size < seen[:, :1]) | (page >= own), -torch.inf)
    joined = buffers.get("joined", (H, R, N + count))
    joined[..., :N] = scores
    joined[..., N:] = logits
    return joined, slots


def _sums_of_pages(attended: torch.Tensor) -> torch.Tensor:
    """How many are true in each page, float32 ``[H, R, P]`` of bool ``[H, R, P * TAIL_PAGE_SIZE]``."""
    # Eight bytes at once: the product's highest byte is the sum of all eight, several times faster than a sum of bools.
    eights = (attended.view(torch.int64) * 0x0101010101010101) >> 56
    return eights.unflatten(-1, (-1, TAIL_PAGE_SIZE // 8)).sum(-1).float()


def attention_gradients(
    problem: Problem, choice: Choice, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks in their dtypes, from that of the output ``[B, Hq, Lq, Dv]``.

    ``choice`` is the same as in the forward pass. Through page means keys and values get a gradient too.
    """
    query, key, value, sinks, means = problem.query, problem.key, problem.value, problem.sinks, problem.means
    scale, softcap = problem.scale, problem.softcap
    _, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    zeros = lambda shape: torch.zeros(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    grad_query, grad_key, grad_value, grad_sinks = map(zeros, (query.shape, key.shape, value.shape, Hq))
    grad_means = [] if means is None else [zeros(mean.shape) for mean in means]
    buffers = Buffers(Hq * min(rows_per_block(Hq, Lk), Lq) * Lk, query.device)
    for block in choice.blocks:
        b, span = block.batch, slice(block.low, block.high)
        length = block.high - block.low
        seen = problem.visible[b, block.rows]
        empty = (seen[:, 1] <= seen[:, 0])[:, None]
        q, k, v = query[b, :, block.rows].float(), key[b, :, span].float(), value[b, :, span].float()
        scores = scores_of(q, k, buffers)
        shift = _hide_(problem, choice, block, scores, buffers)
        slope = 1 - (scores / softcap).square() if softcap else None
        joined, slots = _join_means(problem, block, scores, shift, q, buffers)
        if slots is not None and means is not None:
            mean_keys, mean_values = (mean[b, :, slots].float() for mean in means)
            if slope is not None:
                capped = final_scores_(scores_of(q, mean_keys, buffers, "means"), scale, softcap)
                slope = torch.cat((slope, 1 - (capped / softcap).square()), -1)
            k, v = torch.cat((k, mean_keys), 1), torch.cat((v, mean_values), 1)
        # With blocks a row may see keys and attend none of them.
        nothing = empty | (joined.amax(-1, keepdim=True) == -torch.inf)
        if slope is not None:
            slope.masked_fill_(joined == -torch.inf, 0.0)
        logits = None if sinks is None else sinks.float()[:, None] - shift
        to_sink = None if logits is None else torch.sigmoid(logits - torch.logsumexp(joined, -1))
        weights = softmax_(joined, logits).masked_fill_(nothing, 0.0)
        grad = grad_output[b, :, block.rows].float().masked_fill(empty, 0.0)

        grad_values = _grouped(weights, Hkv).transpose(1, 2) @ _grouped(grad, Hkv)
        grad_weights = (_grouped(grad, Hkv) @ v.transpose(1, 2)).view_as(weights)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if to_sink is not None:
            grad_sinks -= (to_sink.masked_fill(empty[:, 0], 0.0) * mean[..., 0]).sum(-1)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query[b, :, block.rows] = (_grouped(grad_scores, Hkv) @ k).view(Hq, -1, D)
        grad_keys = _grouped(grad_scores, Hkv).transpose(1, 2) @ _grouped(q, Hkv)
        grad_key[b, :, span] += grad_keys[:, :length]
        grad_value[b, :, span] += grad_values[:, :length]
        if slots is not None:
            grad_means[0][b, :, slots] += grad_keys[:, length:]
            grad_means[1][b, :, slots] += grad_values[:, length:]
    if means is not None:
        starts = page_starts(problem.visible, problem.origin, Lk)
        for whole, of_means in zip((grad_key, grad_value), grad_means, strict=True):
            whole += spread_over_pages(of_means, starts, Lk)
    of_sinks = None if sinks is None else grad_sinks.to(sinks.dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), of_sinks


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[Hq, R, N]`` as ``[Hkv, G * R, N]``."""
    return tensor.reshape(num_kv_heads, -1, tensor.shape[-1])

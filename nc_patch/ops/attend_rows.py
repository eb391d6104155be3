"""Attention in PyTorch over whatever keys a selection keeps, and its gradient; in blocks of query rows.

Which keys are attended is piecewise constant in the inputs, so that almost everywhere the gradient through the attended
keys is the gradient.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE
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
    query, key, value = problem.query, problem.key, problem.value
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
        if problem.softcap:
            # A score of -inf is a number once it is soft-capped, and must not look like one that is left out.
            scores.clamp_(min=torch.finfo(torch.float32).min)
        shift = finish_hidden_(scores, choice.hide_(scores, block, buffers), problem.scale, problem.softcap)
        joined, more = join_means(problem, block, scores, shift, rows_query, buffers)
        if problem.stats:
            kept = torch.logsumexp(scores, -1) + shift
            every = kept if joined is scores else torch.logsumexp(joined, -1) + shift
            stats.record(block, kept, dense, empty, every)
        weights = softmax_(joined, None if logits is None else logits[:, None] - shift)
        attended = weighted_values(weights, values[:, block.low : block.high], *more)
        output[b, :, block.rows] = attended.masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return AttentionResult(output, *stats.results())


def finish_hidden_(scores: torch.Tensor, shift: torch.Tensor, factor: float, softcap: float) -> torch.Tensor:
    """Scales and soft-caps in place what ``hide_`` left; returns the shift of the final scores."""
    if not softcap:
        scores.mul_(factor)
        return shift * factor
    dropped = scores == -torch.inf
    final_scores_(scores.add_(shift[..., None]), factor, softcap).masked_fill_(dropped, -torch.inf)
    return torch.zeros_like(shift)


def join_means(
    problem: Problem,
    block: RowBlock,
    scores: torch.Tensor,
    shift: torch.Tensor,
    query: torch.Tensor,
    buffers: Buffers,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Scores of the attended keys and behind them those of the page means, and the means' values.

    Args:
        scores: final scores float32 ``[H, R, N]`` less ``shift`` ``[H or 1, R]``, -inf where a key is not attended.
        query: float32 ``[H, R, D]``.

    Returns:
        (float32 ``[H, R, N + P]``, values ``[Hkv, P, Dv]`` in a list); the scores and an empty list where no page
        counts.
    """
    if problem.means is None:
        return scores, []
    H, R, N = scores.shape
    size, begin = TAIL_PAGE_SIZE, int(problem.origin[block.batch, block.first])
    first_page, slots = pages_of(block, begin)
    count = slots.stop - slots.start
    if not count:
        return scores, []
    seen = problem.visible[block.batch, block.rows]
    column = begin + first_page * size - block.low
    missing = size - _sums_of_pages(scores[..., column : column + count * size] > -torch.inf)
    keys, values = (t[block.batch, :, slots].float() for t in problem.means)
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
    return joined, [values]


def pages_of(block: RowBlock, begin: int) -> tuple[int, slice]:
    """Number of the first page that any row of a block may approximate, and the slots of all of them."""
    first = -((begin - block.low) // TAIL_PAGE_SIZE)
    count = max((block.high - 1 - begin) // TAIL_PAGE_SIZE - first, 0)
    slot = first + begin // TAIL_PAGE_SIZE
    return first, slice(slot, slot + count)


def _sums_of_pages(attended: torch.Tensor) -> torch.Tensor:
    """How many are true in each page, float32 ``[H, R, P]`` of bool ``[H, R, P * TAIL_PAGE_SIZE]``."""
    # Eight bytes at once: the product's highest byte is the sum of all eight, several times faster than a sum of bools.
    eights = (attended.view(torch.int64) * 0x0101010101010101) >> 56
    return eights.unflatten(-1, (-1, TAIL_PAGE_SIZE // 8)).sum(-1).float()


class Gradients(NamedTuple):
    """Gradients in the dtypes of what they are gradients of; None where there is no such input."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    mean_key: torch.Tensor | None = None
    mean_value: torch.Tensor | None = None


def attention_gradients(problem: Problem, choice: Choice, grad_output: torch.Tensor) -> Gradients:
    """Gradients with respect to query, key, value, sinks, and page means, from that of the output ``[B, Hq, Lq, Dv]``.

    ``choice`` is the same as in the forward pass.
    """
    query, key, value, sinks, means = problem.query, problem.key, problem.value, problem.sinks, problem.means
    _, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    zeros = lambda shape: torch.zeros(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    grad_query, grad_key, grad_value = zeros(query.shape), zeros(key.shape), zeros(value.shape)
    grad_sinks = None if sinks is None else zeros(Hq)
    grad_means = [] if means is None else [zeros(mean.shape) for mean in means]
    buffers = Buffers(Hq * min(rows_per_block(Hq, Lk), Lq) * Lk, query.device)
    for block in choice.blocks:
        b, span = block.batch, slice(block.low, block.high)
        length = block.high - block.low
        seen = problem.visible[b, block.rows]
        empty = (seen[:, 1] <= seen[:, 0])[:, None]
        q, k, v = query[b, :, block.rows].float(), key[b, :, span].float(), value[b, :, span].float()
        scores = scores_of(q, k, buffers)
        if problem.softcap:
            scores.clamp_(min=torch.finfo(torch.float32).min)
        shift = finish_hidden_(scores, choice.hide_(scores, block, buffers), problem.scale, problem.softcap)
        logits = None if sinks is None else sinks.float()[:, None] - shift
        slope = 1 - (scores / problem.softcap).square() if problem.softcap else None
        joined, more = join_means(problem, block, scores, shift, q, buffers)
        if more and means is not None:
            slots = pages_of(block, int(problem.origin[b, block.first]))[1]
            mean_keys = means.key[b, :, slots].float()
            if slope is not None:
                capped = final_scores_(scores_of(q, mean_keys, buffers, "means"), problem.scale, problem.softcap)
                slope = torch.cat((slope, 1 - (capped / problem.softcap).square()), -1)
            k, v = torch.cat((k, mean_keys), 1), torch.cat((v, *more), 1)
        to_sink = None if logits is None else torch.sigmoid(logits - torch.logsumexp(joined, -1))
        # With blocks a row may see keys and attend none of them.
        nothing = empty | (joined.amax(-1, keepdim=True) == -torch.inf)
        if slope is not None:
            slope.masked_fill_(joined == -torch.inf, 0.0)
        weights = softmax_(joined, logits).masked_fill_(nothing, 0.0)
        grad = grad_output[b, :, block.rows].float().masked_fill(empty, 0.0)

        grad_values = _grouped(weights, Hkv).transpose(1, 2) @ _grouped(grad, Hkv)
        grad_weights = (_grouped(grad, Hkv) @ v.transpose(1, 2)).view_as(weights)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if grad_sinks is not None and to_sink is not None:
            grad_sinks -= (to_sink.masked_fill(empty[:, 0], 0.0) * mean[..., 0]).sum(-1)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(problem.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query[b, :, block.rows] = (_grouped(grad_scores, Hkv) @ k).view(Hq, -1, D)
        grad_keys = _grouped(grad_scores, Hkv).transpose(1, 2) @ _grouped(q, Hkv)
        grad_key[b, :, span] += grad_keys[:, :length]
        grad_value[b, :, span] += grad_values[:, :length]
        if more:
            grad_means[0][b, :, slots] += grad_keys[:, length:]
            grad_means[1][b, :, slots] += grad_values[:, length:]
    of_means = () if means is None else (grad.to(mean.dtype) for grad, mean in zip(grad_means, means, strict=True))
    return Gradients(
        grad_query.to(query.dtype),
        grad_key.to(key.dtype),
        grad_value.to(value.dtype),
        None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype),
        *of_means,
    )


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[Hq, R, N]`` as ``[Hkv, G * R, N]``."""
    return tensor.reshape(num_kv_heads, -1, tensor.shape[-1])

"""Attention in PyTorch over whatever keys a selection keeps, and its gradient; in blocks of query rows.

Which keys are attended is piecewise constant in the inputs, so that almost everywhere the gradient through the attended
keys is the gradient.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE, page_starts, spread_over_pages
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import (
    RowBlock,
    RowStats,
    final_scores_,
    hide_unseen_,
    scores_of,
    softmax_,
    weighted_values,
)


class Choice(Protocol):
    """Which keys rows attend; see ``nc_patch.selections.base.Choice``."""

    blocks: Iterable[RowBlock]

    def keep(self, scores: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """Which keys are attended, bool ``[Hq or 1, R, N]``, by their scores q·k, float32 ``[Hq, R, N]``."""


def attend_rows(problem: Problem, choice: Choice) -> AttentionResult:
    """The output, and with ``problem.stats`` the log-sum-exp and the kept mass; page means join where there are any.

    Scores and softmax are float32.
    """
    query, sinks = problem.query, None if problem.sinks is None else problem.sinks.float()
    output = query.new_zeros(*query.shape[:3], problem.value.shape[-1])
    stats = RowStats(query, sinks, problem.stats)
    for block in choice.blocks:
        seen = problem.visible[block.batch, block.rows]
        empty = seen[:, 1] <= seen[:, 0]
        rows_query, keys, values = _parts(problem, block)
        scores = scores_of(rows_query, keys)
        keep = choice.keep(scores, block)
        final_scores_(scores, problem.scale, problem.softcap)
        if problem.stats:
            position = torch.arange(block.low, block.high, device=query.device, dtype=torch.int32)
            dense = torch.logsumexp(hide_unseen_(scores.clone(), seen, position), -1)
        scores.masked_fill_(~keep, -torch.inf)
        pages = _pages_of(problem, block, rows_query, scores)
        joined = scores if pages is None else torch.cat((scores, pages.logits), -1)
        if problem.stats:
            kept = torch.logsumexp(scores, -1)
            stats.record(block, kept, dense, empty, kept if pages is None else torch.logsumexp(joined, -1))
        weights = softmax_(joined, None if sinks is None else sinks[:, None])
        found = weighted_values(weights, values, *(() if pages is None else (pages.value,)))
        output[block.batch, :, block.rows] = found.masked_fill_(empty[:, None], 0.0).to(output.dtype)
    return AttentionResult(output, *stats.results())


def _parts(problem: Problem, block: RowBlock) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries ``[Hq, R, D]``, keys ``[Hkv, N, D]`` and values ``[Hkv, N, Dv]`` of a block in float32."""
    b, span = block.batch, slice(block.low, block.high)
    return problem.query[b, :, block.rows].float(), problem.key[b, :, span].float(), problem.value[b, :, span].float()


class _Pages(NamedTuple):
    """P page means that join the softmax of R rows.

    Attributes:
        slots: where they are among ``problem.means``. key, value: float32 ``[Hkv, P, D or Dv]``.
        logits: float32 ``[H, R, P]``, final scores plus the logarithm of ``missing``; -inf where a page does not count.
        missing: float32 ``[H, R, P]``, how many keys of each page the row does not attend.
    """

    slots: slice
    key: torch.Tensor
    value: torch.Tensor
    logits: torch.Tensor
    missing: torch.Tensor


def _pages_of(problem: Problem, block: RowBlock, query: torch.Tensor, scores: torch.Tensor) -> _Pages | None:
    """The page means of a block of rows ``query [H, R, D]``; None where there are none.

    ``scores``: final ones, float32 ``[H, R, N]``, -inf where a key is not attended.
    """
    if problem.means is None:
        return None
    size, begin = TAIL_PAGE_SIZE, int(problem.origin[block.batch, block.first])
    first = -((begin - block.low) // size)
    count = (block.high - 1 - begin) // size - first
    if count <= 0:
        return None
    slots = slice(first + begin // size, first + begin // size + count)
    key, value = (mean[block.batch, :, slots].float() for mean in problem.means)
    column = begin + first * size - block.low
    attended = (scores[..., column : column + count * size] > -torch.inf).unflatten(-1, (count, size))
    missing = size - attended.sum(-1, dtype=torch.uint8).float()
    logits = final_scores_(scores_of(query, key), problem.scale, problem.softcap)
    seen, page = problem.visible[block.batch, block.rows], torch.arange(first, first + count, device=query.device)
    own = torch.div(seen[:, 1:] - 1 - begin, size, rounding_mode="floor")
    left_out = (begin + page * size < seen[:, :1]) | (page >= own)
    # A page that is attended whole is left out whatever its mean holds: NaN less infinity would be NaN.
    logits.add_(missing.log()).masked_fill_(left_out | (missing == 0), -torch.inf)
    return _Pages(slots, key, value, logits, missing)


def attention_gradients(
    problem: Problem, choice: Choice, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks in their dtypes, from that of the output ``[B, Hq, Lq, Dv]``.

    ``choice`` is the same as in the forward pass. Through page means keys and values get a gradient too.
    """
    query, key, value, sinks, means = problem.query, problem.key, problem.value, problem.sinks, problem.means
    Hq, Hkv = query.shape[1], key.shape[1]
    zeros = lambda shape: torch.zeros(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    grad_query, grad_key, grad_value, grad_sinks = map(zeros, (query.shape, key.shape, value.shape, Hq))
    grad_means = [] if means is None else [zeros(mean.shape) for mean in means]
    for block in choice.blocks:
        b, span, length = block.batch, slice(block.low, block.high), block.high - block.low
        seen = problem.visible[b, block.rows]
        empty = (seen[:, 1] <= seen[:, 0])[:, None]
        q, k, v = _parts(problem, block)
        scores = scores_of(q, k)
        keep = choice.keep(scores, block)
        joined = final_scores_(scores, problem.scale, problem.softcap).masked_fill_(~keep, -torch.inf)
        pages = _pages_of(problem, block, q, joined)
        if pages is not None:
            joined = torch.cat((joined, pages.logits), -1)
            k, v = torch.cat((k, pages.key), 1), torch.cat((v, pages.value), 1)
        # With blocks a row may see keys and attend none of them.
        nothing = empty | (joined.amax(-1, keepdim=True) == -torch.inf)
        slope = None
        if problem.softcap:
            capped = joined.clone()
            if pages is not None:
                capped[..., length:] -= pages.missing.log()
            slope = (1 - (capped / problem.softcap).square()).masked_fill_(joined == -torch.inf, 0.0)
        logits = None if sinks is None else sinks.float()[:, None]
        to_sink = None if logits is None else torch.sigmoid(logits - torch.logsumexp(joined, -1))
        weights = softmax_(joined, logits).masked_fill_(nothing, 0.0)
        grad = grad_output[b, :, block.rows].float().masked_fill(empty, 0.0)

        grad_values = _grouped(weights, Hkv).transpose(1, 2) @ _grouped(grad, Hkv)
        grad_weights = (_grouped(grad, Hkv) @ v.transpose(1, 2)).view_as(weights)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if to_sink is not None:
            grad_sinks -= (to_sink.masked_fill(empty[:, 0], 0.0) * mean[..., 0]).sum(-1)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(problem.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query[b, :, block.rows] = (_grouped(grad_scores, Hkv) @ k).view_as(q)
        grad_keys = _grouped(grad_scores, Hkv).transpose(1, 2) @ _grouped(q, Hkv)
        grad_key[b, :, span] += grad_keys[:, :length]
        grad_value[b, :, span] += grad_values[:, :length]
        if pages is not None:
            grad_means[0][b, :, pages.slots] += grad_keys[:, length:]
            grad_means[1][b, :, pages.slots] += grad_values[:, length:]
    if means is not None:
        starts = page_starts(problem.visible, problem.origin, key.shape[2])
        for whole, of_means in zip((grad_key, grad_value), grad_means, strict=True):
            whole += spread_over_pages(of_means, starts, key.shape[2])
    of_sinks = None if sinks is None else grad_sinks.to(sinks.dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), of_sinks


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[Hq, R, N]`` as ``[Hkv, G * R, N]``."""
    return tensor.reshape(num_kv_heads, -1, tensor.shape[-1])

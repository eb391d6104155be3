"""Attention in PyTorch over whatever keys a selection keeps, and its gradient; in blocks of query rows.

Which keys are attended is piecewise constant in the inputs, so that almost everywhere the gradient through the attended
keys is the gradient.
"""

from typing import NamedTuple

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE, page_starts, spread_over_pages
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import Choice, RowBlock, Rows, final_scores_, scores_of, softmax_, weighted_values


def attend_rows(problem: Problem, choice: Choice) -> AttentionResult:
    """The output, and with ``problem.stats`` the log-sum-exp and the kept mass; page means join where there are any.

    Scores and softmax are float32.
    """
    query, sinks = problem.query, None if problem.sinks is None else problem.sinks.float()[:, None]
    output = query.new_zeros(*query.shape[:3], problem.value.shape[-1])
    shape = query.shape[:3] if problem.stats else (*query.shape[:2], 0)
    lse, kept_mass = (query.new_full(shape, x, dtype=torch.float32) for x in (-torch.inf, 1.0))
    if sinks is not None:
        lse[:] = sinks
    for block in choice.blocks:
        rows, at = _scored(problem, choice, block), (block.batch, slice(None), block.rows)
        if rows.dense is not None:
            kept = torch.logsumexp(rows.logits[..., : block.high - block.low], -1)
            kept_mass[at] = torch.where(rows.empty, 1.0, torch.exp(kept - rows.dense))
            total = kept if rows.missing is None else torch.logsumexp(rows.logits, -1)
            lse[at] = total if sinks is None else torch.logaddexp(total, sinks)
        found = weighted_values(softmax_(rows.logits, sinks), *rows.values)
        output[at] = found.masked_fill_(rows.nothing[..., None], 0.0).to(output.dtype)
    return AttentionResult(output, lse, kept_mass) if problem.stats else AttentionResult(output)


class _Scored(NamedTuple):
    """R rows of a block, and what joins their softmax: N keys and P page means, where there are any.

    Attributes:
        empty: bool ``[R]``, which rows see no key; nothing: bool ``[Hq or 1, R]``, which attend none, as with blocks a
            row may that sees some. query: float32 ``[Hq, R, D]``.
        keys, values: float32 ``[Hkv, N, D or Dv]``, and ``[Hkv, P, D or Dv]`` of the page means.
        logits: float32 ``[Hq, R, N + P]``, final scores, of a page plus the logarithm of ``missing``; -inf where a key
            is not attended or a page does not count.
        dense: float32 ``[Hq, R]``, the log-sum-exp over the visible keys, with ``problem.stats``.
        slots: where the pages are among ``problem.means``.
        missing: float32 ``[Hq, R, P]``, how many keys of each page a row does not attend.
    """

    empty: torch.Tensor
    nothing: torch.Tensor
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    logits: torch.Tensor
    dense: torch.Tensor | None = None
    slots: slice = slice(0)
    missing: torch.Tensor | None = None


def _scored(problem: Problem, choice: Choice, block: RowBlock) -> _Scored:
    """The rows of a block with their scores."""
    b, span, seen = block.batch, slice(block.low, block.high), problem.visible[block.batch, block.rows]
    query, key, value = (
        t[b, :, of].float() for t, of in ((problem.query, block.rows), (problem.key, span), (problem.value, span))
    )
    scores = scores_of(query, key)
    keep = choice.keep(scores, block)
    final_scores_(scores, problem.scale, problem.softcap)
    dense = None
    if problem.stats:
        unseen = ~Rows.of(problem, block).seen(block.high - block.low)
        dense = torch.logsumexp(scores.masked_fill(unseen, -torch.inf), -1)
    scores.masked_fill_(~keep, -torch.inf)
    alone = _Scored(seen[:, 1] <= seen[:, 0], ~keep.any(-1), query, [key], [value], scores, dense)
    if problem.means is None:
        return alone
    size, begin = TAIL_PAGE_SIZE, int(problem.origin[b, block.first])
    first = -((begin - block.low) // size)
    count = (block.high - 1 - begin) // size - first
    if count <= 0:
        return alone
    slots = slice(first + begin // size, first + begin // size + count)
    mean_key, mean_value = (mean[b, :, slots].float() for mean in problem.means)
    column = begin + first * size - block.low
    attended = (scores[..., column : column + count * size] > -torch.inf).unflatten(-1, (count, size))
    missing = size - attended.sum(-1, dtype=torch.uint8).float()
    logits = final_scores_(scores_of(query, mean_key), problem.scale, problem.softcap)
    page = torch.arange(first, first + count, device=query.device)
    own = torch.div(seen[:, 1:] - 1 - begin, size, rounding_mode="floor")
    left_out = (begin + page * size < seen[:, :1]) | (page >= own)
    # A page that is attended whole is left out whatever its mean holds: NaN less infinity would be NaN.
    logits.add_(missing.log()).masked_fill_(left_out | (missing == 0), -torch.inf)
    joined = torch.cat((scores, logits), -1)
    keys, values = [key, mean_key], [value, mean_value]
    return alone._replace(keys=keys, values=values, logits=joined, slots=slots, missing=missing)


def attention_gradients(
    problem: Problem, choice: Choice, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks in their dtypes, from that of the output ``[B, Hq, Lq, Dv]``.

    ``choice`` is the same as in the forward pass. Through page means keys and values get a gradient too.
    """
    query, key, value, sinks, means = problem.query, problem.key, problem.value, problem.sinks, problem.means
    problem, Hkv = problem._replace(stats=False), key.shape[1]
    zeros = lambda shape: torch.zeros(shape, dtype=torch.float32, device=query.device)  # noqa: E731
    grad_query, grad_key, grad_value, grad_sinks = map(zeros, (query.shape, key.shape, value.shape, query.shape[1]))
    grad_means = [] if means is None else [zeros(mean.shape) for mean in means]
    for block in choice.blocks:
        b, span, length = block.batch, slice(block.low, block.high), block.high - block.low
        rows = _scored(problem, choice, block)
        joined, nothing, q = rows.logits, rows.nothing[..., None], rows.query
        slope = None
        if problem.softcap:
            capped = joined.clone()
            if rows.missing is not None:
                capped[..., length:] -= rows.missing.log()
            slope = (1 - (capped / problem.softcap).square()).masked_fill_(joined == -torch.inf, 0.0)
        logits = None if sinks is None else sinks.float()[:, None]
        to_sink = None if logits is None else torch.sigmoid(logits - torch.logsumexp(joined, -1))
        weights = softmax_(joined, logits).masked_fill_(nothing, 0.0)
        grad = _grouped(grad_output[b, :, block.rows].float().masked_fill(nothing, 0.0), Hkv)

        grad_values = _grouped(weights, Hkv).transpose(1, 2) @ grad
        grad_weights = (grad @ torch.cat(rows.values, 1).transpose(1, 2)).view_as(weights)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        if to_sink is not None:
            grad_sinks -= (to_sink.masked_fill(rows.nothing, 0.0) * mean[..., 0]).sum(-1)
        grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(problem.scale)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_query[b, :, block.rows] = (_grouped(grad_scores, Hkv) @ torch.cat(rows.keys, 1)).view_as(q)
        grad_keys = _grouped(grad_scores, Hkv).transpose(1, 2) @ _grouped(q, Hkv)
        grad_key[b, :, span] += grad_keys[:, :length]
        grad_value[b, :, span] += grad_values[:, :length]
        for of_means, part in zip(grad_means, (grad_keys, grad_values), strict=False):
            of_means[b, :, rows.slots] += part[:, length:]
    if means is not None:
        starts = page_starts(problem.visible, problem.origin, key.shape[2])
        for whole, of_means in zip((grad_key, grad_value), grad_means, strict=True):
            whole += spread_over_pages(of_means, starts, key.shape[2])
    of_sinks = None if sinks is None else grad_sinks.to(sinks.dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), of_sinks


def _grouped(tensor: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[Hq, R, N]`` as ``[Hkv, G * R, N]``."""
    return tensor.reshape(num_kv_heads, -1, tensor.shape[-1])

"""Attention in float64 over given keys. Slow, O(Lq * Lk) memory; all else is tested against it."""

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.ops.problem import AttentionResult, Problem, visible_mask


def raw_scores(problem: Problem) -> torch.Tensor:
    """q·k, float64 ``[B, Hq, Lq, Lk]``."""
    key = problem.key.double().repeat_interleave(problem.group, 1)
    return problem.query.double() @ key.transpose(-1, -2)


def final_scores(problem: Problem, raw: torch.Tensor) -> torch.Tensor:
    """Raw scores, scaled and soft-capped."""
    scores = raw * problem.scale
    return problem.softcap * torch.tanh(scores / problem.softcap) if problem.softcap else scores


def reference_attention(problem: Problem, attended: torch.Tensor, tail: bool = False) -> AttentionResult:
    """Attention over the keys that are attended, bool ``[B, Hq, Lq, Lk]``.

    With ``tail`` the keys that are not attended enter by the means of their pages, see ``ops/means.py``.

    Returns:
        Output, log-sum-exp, kept mass and number of attended keys, in float64 (``attended`` in int32).
    """
    visible, group = problem.visible, problem.group
    value = problem.value.double().repeat_interleave(group, 1)
    scores = final_scores(problem, raw_scores(problem))
    seen = visible_mask(visible, scores.shape[-1])
    kept = scores.masked_fill(~attended, -torch.inf)
    lse_keys = torch.logsumexp(kept, dim=-1)
    lse_dense = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), dim=-1)
    own_keys = attended.sum(-1, dtype=torch.int32)
    if tail:
        logits, means = mean_columns(problem, kept)
        kept, value = torch.cat((kept, logits), -1), torch.cat((value, means.repeat_interleave(group, 1)), -2)
        attended = torch.cat((attended, logits != -torch.inf), -1)
    lse = torch.logsumexp(kept, -1)
    peak = kept.amax(-1) if kept.shape[-1] else lse
    if problem.sinks is not None:
        sink = problem.sinks.double()[None, :, None].expand_as(lse_keys)
        lse, peak = torch.logaddexp(lse, sink), torch.maximum(peak, sink)
    empty = ~seen.any(-1)
    # Relative to the largest logit, not to lse: next to huge scores the logarithm of the sum is lost.
    base = torch.where(peak.isfinite(), peak, 0.0)
    weights = torch.exp(kept - base[..., None])
    denominator = weights.sum(-1) if problem.sinks is None else weights.sum(-1) + torch.exp(sink - base)
    weights = torch.where(attended, weights / denominator[..., None], 0.0)
    # A key without weight contributes nothing, whatever its value holds.
    finite = value.isfinite()
    output = weights @ torch.where(finite, value, 0.0)
    touched = (weights != 0).double() @ (~finite).double() > 0
    output = torch.where(touched, torch.nan, output).masked_fill(empty[..., None], 0.0)
    kept_mass = torch.where(empty, 1.0, torch.exp(lse_keys - lse_dense))
    return AttentionResult(output, lse, kept_mass, own_keys)


def mean_columns(problem: Problem, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The page means of each query as more columns of scores, ``[B, Hq, Lq, P]``, and their values ``[B, Hkv, P, Dv]``.

    Means are rounded to the dtype of what they are means of, since that is how they are kept.

    ``kept`` are the final scores of the attended keys, -inf elsewhere, ``[B, Hq, Lq, Lk]``.
    """
    B, Hq, Lq, Lk = kept.shape
    key, value, visible, origin = problem.key, problem.value, problem.visible, problem.origin
    query, group, size = problem.query.double(), problem.group, TAIL_PAGE_SIZE
    logits, values = [kept.new_empty(B, Hq, Lq, 0)], [value.double()[:, :, :0]]
    for b, begin in [(row, begin) for row in range(B) for begin in sorted(set(origin[row].tolist()))]:
        for j in range(-(min(begin, 0) // size), (Lk - begin) // size):
            first, last = begin + j * size, begin + (j + 1) * size
            own = torch.div(visible[b, :, 1] - 1 - begin, size, rounding_mode="floor")
            counts = (origin[b] == begin) & (visible[b, :, 0] <= first) & (j < own)
            mean_key, mean_value = (
                t[:, :, first:last].double().mean(2, keepdim=True).to(t.dtype) for t in (key, value)
            )
            score = (query[b] @ mean_key[b].double().repeat_interleave(group, 0).transpose(-1, -2))[..., 0]
            score = final_scores(problem, score)
            missing = (kept[b, :, :, first:last] == -torch.inf).sum(-1)
            logit = torch.full((B, Hq, Lq), -torch.inf, dtype=torch.float64, device=kept.device)
            logit[b] = torch.where(counts & (missing > 0), score + missing.double().log(), -torch.inf)
            logits.append(logit[..., None])
            values.append(mean_value.double())
    return torch.cat(logits, -1), torch.cat(values, 2)

"""Exact ``topk`` while decoding, in PyTorch: codes bound the scores, and only keys that may be best are read."""

from typing import NamedTuple

import torch

from nc_patch.ops.kth_largest import kth_largest
from nc_patch.ops.means import TAIL_PAGE_SIZE
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import final_scores_, softmax_, weighted_values
from nc_patch.selections.topk.codes import KeyCodes, code_slack, norm_of, score_slack
from nc_patch.selections.topk.torch import forced_counts

# Relative width given to bounds of sums of exponentials, for their rounding in float32.
_SUM_SLACK = 1e-4
_SMALLEST_MASS = 1e-30


class ScoreBounds(NamedTuple):
    """Raw scores from codes.

    Attributes:
        score: float32 ``[H, R, N]``, approximations.
        error: float32 ``[H, R, N]``, what they may be off by.
        rounding: float32 ``[H, R]``, what an exact score that is computed in float32 may be off by.
    """

    score: torch.Tensor
    error: torch.Tensor
    rounding: torch.Tensor


def torch_topk_decode(problem: Problem, sink_keys: int, recent_keys: int) -> AttentionResult:
    """Attention over the best keys of each query, chosen by the ``KeyCodes`` of ``problem.key_index``.

    What they hold beyond the intervals is not looked at. ``problem.means``, where there are any, stand for the others.
    """
    query, key, value, visible, origin, budget = problem.tensors()[:6]
    sinks, tail, scale, softcap = problem.sinks, problem.means, problem.scale, problem.softcap
    want_bounds, codes = problem.bounds, KeyCodes(*problem.key_index)
    B, Hq, Lq, _ = query.shape
    Hkv, group = key.shape[1], problem.group
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    lse = torch.full((B, Hq, Lq), -torch.inf, dtype=torch.float32, device=query.device)
    bounds = torch.ones((B, Hq, Lq, 2) if want_bounds else (0,), dtype=torch.float32, device=query.device)
    logits = None if sinks is None else sinks.float()
    if logits is not None:
        lse.copy_(logits[None, :, None].expand_as(lse))
    for b in range(B):
        seen = visible[b]
        rows = seen[:, 1] > seen[:, 0]
        if not bool(rows.any()):
            continue
        low, high = int(seen[rows, 0].min()), int(seen[rows, 1].max())
        position = torch.arange(low, high, device=query.device)
        is_seen = (position >= seen[:, :1]) & (position < seen[:, 1:])
        k = budget[b].expand(Hq, Lq)
        forced_first, forced_last = forced_counts(k, sink_keys, recent_keys)
        for h in range(Hkv):
            heads = slice(h * group, (h + 1) * group)
            first, last = (t[heads, :, None] for t in (forced_first, forced_last))
            forced = is_seen & ((position < seen[:, :1] + first) | (position >= seen[:, 1:] - last))
            rival = is_seen & ~forced
            wanted = k[heads] - (first + last)[..., 0]
            rough = bound_scores(query[b, heads].float(), codes, b, h, low, high)
            needed = forced | _may_be_best(rough, rival, wanted)
            columns = needed.any(1).any(0).nonzero()[:, 0]
            # In float64 equal keys have equal scores after rounding, wherever they stand.
            exact = (query[b, heads].double() @ key[b, h, low + columns].double().T).float()
            attends = _best(exact, forced[..., columns], rival[..., columns], wanted)
            scores = final_scores_(exact.clone(), scale, softcap).masked_fill_(~attends, -torch.inf)
            kept = torch.logsumexp(scores, -1)
            if want_bounds:
                bounds[b, heads] = _kept_mass(kept, rough, exact, columns, attends, is_seen, scale, softcap)
            values = [value[b, h, low + columns].float()[None]]
            if tail is not None:
                more = _tail_logits(
                    query[b, heads].float(), tail.key[b, h], attends, low + columns, origin[b], seen, scale, softcap
                )
                scores, values = torch.cat((scores, more), -1), [*values, tail.value[b, h].float()[None]]
                kept = torch.logsumexp(scores, -1)
            sink = None if logits is None else logits[heads, None].expand_as(kept)
            lse[b, heads] = kept if sink is None else torch.logaddexp(kept, sink)
            weights = softmax_(scores, sink)
            result = weighted_values(weights.view(1, -1, weights.shape[-1]), *values)
            output[b, heads] = result.view(group, Lq, -1).masked_fill_(~rows[:, None], 0.0).to(output.dtype)
            lse[b, heads] = torch.where(rows, lse[b, heads], -torch.inf if sink is None else sink)
    if want_bounds:
        bounds[(visible[..., 1] <= visible[..., 0])[:, None].expand(B, Hq, Lq)] = 1.0
    return AttentionResult(output, lse, kept_mass_bounds=bounds if want_bounds else None)


def bound_scores(query: torch.Tensor, codes: KeyCodes, batch: int, head: int, low: int, high: int) -> ScoreBounds:
    """Raw scores of ``query`` float32 ``[H, R, D]`` against the keys ``low:high`` of one key/value head."""
    D = query.shape[-1]
    center, spread = codes.center[batch, head], codes.spread[batch, head]
    whole, scale, residual = (t[batch, head, low:high] for t in (codes.codes, codes.scale, codes.residual))
    weighted = query * spread
    # By a power of two near the largest weight, so that products with codes are finite where scores are.
    unit = torch.exp2(torch.frexp(weighted.abs().amax(-1, keepdim=True)).exponent.float() - 1)
    score = ((weighted / unit) @ whole.float().T) * (scale * unit) + (query @ center)[..., None]
    score = torch.where(score.isfinite(), score, torch.nan)  # what overflows bounds nothing
    off = residual.float() + scale * code_slack(D)
    slack = score_slack(query, center.expand(query.shape[0], D))
    size = norm_of(weighted)
    # |q||k| at most, but for the centre, whose share is in the slack.
    rounding = slack + size * (scale.amax() * code_slack(D) * spread.amax() / spread.amin())
    return ScoreBounds(score, size[..., None] * off + slack[..., None], rounding)


def _may_be_best(rough: ScoreBounds, rival: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """bool ``[H, R, N]``: rivals that are not certainly below ``wanted [H, R]`` others."""
    lower = torch.where(rival, rough.score - rough.error, -torch.inf).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    threshold = kth_largest(lower, wanted.clamp(min=0))[0]
    upper = rough.score + rough.error
    return rival & ~(upper < threshold[..., None])


def _best(scores: torch.Tensor, forced: torch.Tensor, rival: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """bool ``[H, R, C]``: the forced keys and the ``wanted [H, R]`` best rivals; ties to the lower place, NaN first."""
    ranked = torch.where(rival, torch.where(scores.isnan(), torch.inf, scores), -torch.inf)
    # A rival of -inf ties with what is no rival, so that the count at the threshold goes by rivals alone.
    threshold = kth_largest(ranked.clone(), torch.minimum(wanted.clamp(min=0), rival.sum(-1)))[0][..., None]
    above = rival & (ranked > threshold)
    equal = rival & (ranked == threshold)
    room = wanted[..., None] - above.sum(-1, keepdim=True)
    return forced | above | (equal & (equal.cumsum(-1) <= room))


def _tail_logits(
    query: torch.Tensor,
    mean: torch.Tensor,
    attends: torch.Tensor,
    position: torch.Tensor,
    origin: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Logits of the tail, float32 ``[H, R, S]``, -inf for slots without a page that counts.

    Args:
        query: float32 ``[H, R, D]``. mean: ``[S, D]``. attends: bool ``[H, R, C]``, the attended ones of the keys at
            ``position`` int64 ``[C]``. origin: int32 ``[R]``. seen: int32 ``[R, 2]``.
    """
    H, R, _ = query.shape
    S, size = mean.shape[0], TAIL_PAGE_SIZE
    begin = origin.long()[:, None]
    # Where the page in each slot starts: at the slot's only position that is a multiple of the page size from origin.
    start = torch.arange(S, device=query.device) * size + begin % size
    own = begin + torch.div(seen[:, 1:] - 1 - begin, size, rounding_mode="floor") * size
    counts = (start >= seen[:, :1]) & (start < own)
    slot = torch.div(position - begin % size, size, rounding_mode="floor").clamp_(min=-1) + 1
    attended = torch.zeros(H, R, S + 1, dtype=torch.float32, device=query.device)
    attended.scatter_add_(-1, slot.expand(H, -1, -1), attends.float())
    missing = size - attended[..., 1:]
    logits = final_scores_(query @ mean.float().T, scale, softcap) + missing.log()
    return logits.masked_fill_(~counts | (missing == 0), -torch.inf)


def _kept_mass(
    kept: torch.Tensor,
    rough: ScoreBounds,
    exact: torch.Tensor,
    columns: torch.Tensor,
    attends: torch.Tensor,
    is_seen: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Bounds ``[H, R, 2]`` of the kept mass."""
    rest = is_seen.expand(rough.score.shape).clone()
    rest[..., columns] &= ~attends
    result = []
    for sign in (1.0, -1.0):
        # The kept mass is least where the rest scores highest and what is attended lowest.
        score = rough.score + sign * rough.error
        score[..., columns] = exact
        score = final_scores_(score, scale, softcap)
        score = score.nan_to_num_(nan=sign * torch.inf, posinf=torch.inf, neginf=-torch.inf)
        dropped = torch.logsumexp(score.masked_fill_(~rest, -torch.inf), -1)
        result.append(torch.sigmoid((kept - dropped).double() - sign * scale * rough.rounding))
    lower, upper = result
    lower = (lower * (1 - _SUM_SLACK) - _SMALLEST_MASS).nan_to_num(nan=0.0)
    upper = (upper * (1 + _SUM_SLACK) + _SMALLEST_MASS).nan_to_num(nan=1.0)
    return torch.stack((lower.clamp(0, 1), upper.clamp(0, 1)), -1).float()

"""``block`` while decoding, in PyTorch: each query chooses pages by their statistics and attends them.

A step of a small model takes as long as its number of operations, so that there are few: integers are worked out on
the host, heads are taken together, and pages that are seen whole are copied as rows of ``block_size * D`` elements.
"""

import contextlib
import math
from collections.abc import Iterator

import torch

from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import RowBlock, RowStats, final_scores_, plain_softmax_, softmax_, weighted_values
from nc_patch.selections.block.pages import PageStatistics, page_logits

# Elements of keys, or of statistics, up to which a query is quicker done by one thread than others are woken.
_ONE_THREAD = 1 << 19


def torch_block_decode(problem: Problem) -> AttentionResult:
    """Attention over the pages that each query chooses, as ``definition.page_mask`` says.

    ``problem.key_index`` are ``PageStatistics``; what lies beyond a query's own page is not read. The kept mass costs
    as much as dense attention.
    """
    query, key, value, visible, origin, budget = problem.tensors()[:6]
    (page_codes, page_scales), block_size = problem.key_index, problem.page_size
    sinks, scale, softcap, want_stats = problem.sinks, problem.scale, problem.softcap, problem.stats
    B, Hq, Lq, D = query.shape
    Hkv, group = key.shape[1], problem.group
    output = query.new_zeros(B, Hq, Lq, value.shape[-1])
    attended = torch.zeros(B, Hq, Lq, dtype=torch.int32, device=query.device)
    logits = None if sinks is None else sinks.float()
    stats = RowStats(query, logits, want_stats)
    heads_of_budget = (B, Hkv, group, Lq) if budget.shape[1] > 1 else (B, 1, 1, Lq)
    budgets = budget.view(heads_of_budget).amax(2).expand(B, Hkv, Lq).tolist()
    intervals, origins = visible.tolist(), origin.tolist()
    most = max((count for heads in budgets for rows in heads for count in rows), default=0)
    elements = Hkv * D * max(most, 3 * key.shape[2] // block_size)
    with _one_thread() if elements <= _ONE_THREAD and query.device.type == "cpu" else contextlib.nullcontext():
        for b in range(B):
            for i in range(Lq):
                (start, end), begin = intervals[b][i], origins[b][i]
                start, end = max(start, begin, 0), min(end, key.shape[2])
                if end <= start:
                    continue
                low, own = (start - begin) // block_size, (end - 1 - begin) // block_size
                # A budget of all keys has one page more, as intervals begin and end within pages.
                counts = [-(-k // block_size) + (k >= end - start) for k in (budgets[b][h][i] for h in range(Hkv))]
                # The query's own page, whose scores also weigh it against the others.
                last = slice(max(begin + own * block_size, start), end)
                rows = query[b, :, i].view(Hkv, group, D).float()
                keys, values = [key[b, :, last].float()], [value[b, :, last].float()]
                scores = [final_scores_(rows @ keys[0].transpose(1, 2), scale, softcap)]
                kept_keys = [end - last.start] * Hkv
                if own > low:
                    first_page = begin + low * block_size
                    seen_in_first = first_page + block_size - start
                    pages = PageStatistics(page_codes[b, :, low:own], page_scales[b, :, low:own])
                    weight = page_weights(rows, pages, scores[0], seen_in_first, block_size, scale, softcap)
                    # A first page that is seen in part is attended apart; of the others as many as the budgets ask for.
                    apart = seen_in_first < block_size
                    most = own - low - apart
                    wanted = [min(max(count - 1, 1) - apart, most) for count in counts]
                    chosen = _heaviest(weight[:, apart:], wanted)
                    if apart:
                        first = slice(start, first_page + block_size)
                        keys.append(key[b, :, first].float())
                        values.append(value[b, :, first].float())
                        scores.append(final_scores_(rows @ keys[-1].transpose(1, 2), scale, softcap))
                    if chosen.shape[1]:
                        at = first_page + apart * block_size
                        keys.append(_pages_at(key[b], chosen, at, block_size))
                        values.append(_pages_at(value[b], chosen, at, block_size))
                        scores.append(final_scores_(rows @ keys[-1].transpose(1, 2), scale, softcap))
                        if min(wanted) < max(wanted):
                            _hide_beyond_(scores[-1], wanted, block_size)
                    kept_keys = [kept_keys[0] + apart * seen_in_first + n * block_size for n in wanted]
                attended[b, :, i] = (
                    kept_keys[0]
                    if min(kept_keys) == max(kept_keys)
                    else torch.tensor(kept_keys, device=query.device).repeat_interleave(group)
                )
                every_score = torch.cat(scores, -1)
                if want_stats:
                    dense = final_scores_(rows @ key[b, :, start:end].float().transpose(1, 2), scale, softcap)
                    kept, whole = (torch.logsumexp(t, -1).view(Hq, 1) for t in (every_score, dense))
                    empty = torch.zeros(1, dtype=torch.bool, device=query.device)
                    stats.record(RowBlock(b, i, i + 1, start, end), kept, whole, empty)
                weights = softmax_(every_score.view(Hq, 1, -1), None if logits is None else logits[:, None])
                output[b, :, i] = _weighted_parts(weights, values, Hkv).to(output.dtype)
    return AttentionResult(output, *stats.results(), attended)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets PyTorch's operations on the CPU use one thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def page_weights(
    query: torch.Tensor,
    pages: PageStatistics,
    own_scores: torch.Tensor,
    seen_in_first: int,
    block_size: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Weights float32 ``[Hkv, P]`` of the visible pages of one query before its own; infinite for the first.

    Args:
        query: float32 ``[Hkv, G, D]``.
        pages: codes ``[Hkv, P, 3, D]`` and scales ``[Hkv, P, 3]``.
        own_scores: final scores of the keys of the query's own page, ``[Hkv, G, N]``.
        seen_in_first: how many keys of the first page are visible; the others are seen whole.
    """
    count: torch.Tensor | int = block_size
    if seen_in_first < block_size:
        count = torch.full(pages.scales.shape[1:2], block_size, device=query.device)
        count[0] = seen_in_first
    estimates = page_logits(query, pages, count, scale, softcap)
    logits = torch.cat((estimates, torch.logsumexp(own_scores, -1, keepdim=True)), -1)
    weight = plain_softmax_(logits.clone())[..., :-1].sum(1)
    # A row that holds NaN or +inf has become NaN throughout.
    if math.isnan(float(weight[:, 0].sum())):
        overwhelming = logits.isnan() | (logits == torch.inf)
        weight = torch.softmax(logits.masked_fill(overwhelming, -torch.inf), -1).nan_to_num_(nan=0.0)
        weight = weight.masked_fill_(overwhelming, torch.inf)[..., :-1].sum(1)
    weight[:, 0] = torch.inf
    return weight


def _heaviest(weight: torch.Tensor, wanted: list[int]) -> torch.Tensor:
    """The ``max(wanted)`` heaviest pages of each head, int64 ``[Hkv, max(wanted)]``, heaviest first.

    Of equal weights the lower page comes first; ``weight`` is ``[Hkv, P]``.
    """
    most, pages = max(wanted), weight.shape[1]
    if most == pages and min(wanted) == most:
        return torch.arange(pages, device=weight.device).expand(len(weight), -1)
    if min(wanted) == most and most > 0:
        top, order = weight.topk(most + 1, dim=-1)
        # No tie at the cut: which pages are taken is certain, whatever the order among equals.
        if bool((top[:, -2] > top[:, -1]).all()):
            return order[:, :most]
    return torch.sort(weight, dim=-1, descending=True, stable=True).indices[:, :most]


def _hide_beyond_(scores: torch.Tensor, wanted: list[int], block_size: int) -> None:
    """Makes the scores ``[Hkv, G, P * block_size]`` of all but the first ``wanted[h]`` pages of head h -inf."""
    page = torch.arange(scores.shape[-1], device=scores.device) // block_size
    scores.masked_fill_((page >= torch.tensor(wanted, device=scores.device)[:, None])[:, None], -torch.inf)


def _pages_at(tensor: torch.Tensor, pages: torch.Tensor, first: int, block_size: int) -> torch.Tensor:
    """Rows of whole pages, ``pages [H, P]`` counted from the row ``first``, of ``tensor [H, L, D]``: ``[H, P *
    block_size, D]`` in float32."""
    H, L, D = tensor.shape
    shared = H > 1 and tensor.stride(0) == 0
    if tensor.stride(2) != 1 or tensor.stride(1) != D or tensor.stride(0) % D or shared:
        position = (pages[..., None] * block_size + torch.arange(block_size, device=pages.device)).flatten(1) + first
        return tensor.gather(1, position[..., None].expand(-1, -1, D)).float()
    # A view whose rows are runs of a page's length from every position on, whatever room there is between the heads.
    heads_apart = tensor.stride(0) // D if H > 1 else L
    runs = tensor.as_strided(((H - 1) * heads_apart + L - block_size + 1, block_size * D), (D, 1))
    begin = torch.arange(first, first + H * heads_apart, heads_apart, device=pages.device)[:, None]
    return runs.index_select(0, torch.add(begin, pages, alpha=block_size).view(-1)).view(H, -1, D).float()


def _weighted_parts(weights: torch.Tensor, values: list[torch.Tensor], kv_heads: int) -> torch.Tensor:
    """Weights ``[Hq, 1, N]`` times values ``[Hkv, N_i, Dv]``, of which N is made up: ``[Hq, Dv]``.

    Under a zero weight even NaN contributes nothing.
    """
    parts = weights.view(kv_heads, -1, weights.shape[-1]).split([value.shape[1] for value in values], -1)
    output = torch.bmm(parts[0], values[0])
    for part, value in zip(parts[1:], values[1:], strict=True):
        output = torch.baddbmm(output, part, value)
    if not math.isfinite(float(output.sum())):
        return weighted_values(weights, torch.cat(values, 1))[:, 0]
    return output.view(weights.shape[0], -1)

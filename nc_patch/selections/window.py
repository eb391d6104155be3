"""``Window``: the first keys and the most recent ones, whatever they score. A selection in one file."""

from dataclasses import dataclass

import torch

from nc_patch.common import check_integer
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rows import (
    MOST_ROWS,
    Buffers,
    Rows,
    RowStats,
    final_scores_,
    hide_unseen_,
    row_blocks,
    rows_per_block,
    scores_of,
    softmax_,
    split_scale,
    weighted_values,
)
from nc_patch.selections.base import Selection, register


@register("window")
@dataclass(frozen=True)
class Window(Selection):
    """The first ``sink_keys`` visible keys, and of the others the most recent; one key is always recent.

    Args:
        sink_keys: how many first keys are attended, within the budget.
    """

    sink_keys: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "sink_keys", check_integer("sink_keys", self.sink_keys, 0))

    def edges(self, visible: torch.Tensor, budget: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the first keys end and the recent ones begin, int32 ``[H or 1, R]``; arguments as in ``Rows``."""
        sinks = (budget - 1).clamp(0, self.sink_keys)
        return visible[:, 0] + sinks, visible[:, 1] - (budget - sinks)

    def keep(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The definition, bool ``[H or 1, R, N]``; see ``Selection.keep``."""
        position = rows.positions(scores.shape[-1])
        sink_stop, recent_begin = (edge[..., None] for edge in self.edges(rows.visible, rows.budget))
        return rows.seen(scores.shape[-1]) & ((position < sink_stop) | (position >= recent_begin))

    def prefill_torch(self, problem: Problem) -> AttentionResult:
        """Reads no other keys, but for the kept mass, which needs the scores of all visible ones."""
        query, key, value, budget = problem.query, problem.key, problem.value, problem.budget
        B, Hq, Lq, _ = query.shape
        Lk = key.shape[2]
        output = query.new_zeros(B, Hq, Lq, value.shape[-1])
        logits = None if problem.sinks is None else problem.sinks.float()
        stats = RowStats(query, logits, problem.stats)
        before, after = split_scale(problem.scale)
        most_keys = Lk
        if budget.numel() and not problem.stats:
            # A block of R rows reads up to R - 1 keys more than its budget.
            most_keys = min(Lk, int(budget.max()) + MOST_ROWS + self.sink_keys)
        rows = rows_per_block(Hq, most_keys)
        buffers = Buffers(Hq * min(rows, Lq) * most_keys, query.device)
        for block in row_blocks(problem.visible, rows):
            b = block.batch
            seen = problem.visible[b, block.rows]
            empty = seen[:, 1] <= seen[:, 0]
            sink_stop, recent_begin = self.edges(seen, budget[b, :, block.rows])
            left = min(int(sink_stop[:, ~empty].max()), block.high)
            right = max(int(recent_begin[:, ~empty].min()), left)
            span = slice(block.low, block.high)
            every = torch.arange(block.low, block.high, device=query.device, dtype=torch.int32)
            position = torch.cat((every[: left - block.low], every[right - block.low :]))
            keys, values = (
                torch.cat((t[b, :, block.low : left], t[b, :, right : block.high]), dim=1).float() for t in (key, value)
            )
            rows_query = query[b, :, block.rows].float() * before
            scores = final_scores_(scores_of(rows_query, keys, buffers), after, problem.softcap)
            unattended = (position < seen[:, :1]) | (position >= seen[:, 1:])
            unattended = unattended | ((position >= sink_stop[..., None]) & (position < recent_begin[..., None]))
            scores.masked_fill_(unattended, -torch.inf)
            if problem.stats:
                dense = scores_of(rows_query, key[b, :, span].float(), buffers, "dense")
                hide_unseen_(final_scores_(dense, after, problem.softcap), seen, every)
                stats.record(block, torch.logsumexp(scores, -1), torch.logsumexp(dense, -1), empty)
            attended = weighted_values(softmax_(scores, None if logits is None else logits[:, None]), values)
            output[b, :, block.rows] = attended.masked_fill_(empty[:, None], 0.0).to(output.dtype)
        return AttentionResult(output, *stats.results())

    def prefill_triton(self, problem: Problem) -> AttentionResult:
        """The attention kernel over two runs of keys: to the rows' last sink, and from their first recent key on."""
        from nc_patch.ops.triton.launch import launch_attention

        return launch_attention(self.with_means(problem, "triton"), self.sink_keys)

    def prefill_cpu(self, problem: Problem) -> AttentionResult:
        """In a compiled kernel, over the same two runs of keys."""
        from nc_patch.ops.cpu.recent import cpu_recent_attention

        return cpu_recent_attention(problem, self.sink_keys)

"""What a serving engine's step attends, with keys in blocks of memory: rows that decode, and chunks of requests.

A query attends what it attends in ``generate`` of its request alone.
"""

from typing import NamedTuple

import torch

from nc_patch.common import once
from nc_patch.config import NCConfig
from nc_patch.functional import attend
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention
from nc_patch.selections import Dense
from nc_patch.selections.base import Selection


class Chunk(NamedTuple):
    """Queries of a request that follow each other, and what they choose by.

    Attributes:
        rows: their place among the step's queries. length: the keys that the last one sees.
        blocks: int32 ``[M]``, those of the request.
        visible: int32 ``[1, Lq, 2]``, the keys that each sees. origin: int32 ``[1, Lq]``, zeros.
        dense: so many of the first queries, and of the last, attend every key: of those that choose together with them
            some are in another chunk.
    """

    rows: slice
    length: int
    blocks: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    dense: tuple[int, int]
    selection: Selection


def chunk(rows: slice, length: int, blocks: torch.Tensor, selection: Selection, ends: bool) -> Chunk:
    """A chunk for a selection; ``ends`` says that its last query is the last that chooses with those before it."""
    count, together = rows.stop - rows.start, queries_together(selection)
    visible = causal_intervals(1, count, length, blocks.device)
    first = min(-(length - count) % together, count)
    last = 0 if ends else min(length % together, count - first)
    return Chunk(rows, length, blocks, visible, torch.zeros_like(visible[..., 0]), (first, last), selection)


def queries_together(selection: Selection) -> int:
    """How many positions of a prompt choose their keys together."""
    return int(getattr(selection, "query_block_size", 1)) if selection.chooses_together else 1


class ServedLayer(NamedTuple):
    """How a layer attends. ``heads``: of the model's query heads, those that are here."""

    config: NCConfig
    layer: int
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    heads: slice = slice(None)

    def decode(self, query: torch.Tensor, paged: PagedKeys, rows: PagedRows) -> AttentionResult:
        """Attention of ``query [R, Hq, D]`` by page statistics: output ``[R, Hq, Dv]`` and attended ``[R, Hq]``.

        The budget of ``rows`` is of every key that they see, of which this layer attends what its law says.
        """
        if not self.config.is_dense(self.layer):
            budget = self._budget(rows.visible, rows.most)[..., 0]
            rows = rows._replace(budget=budget, most=self.config.largest_budget(rows.most, self.layer))
        return paged_block_attention(
            query, paged, rows, scale=self.scale, softcap=self.softcap, sinks=self.sinks, backend=self.config.backend
        )

    def prefill(self, query: torch.Tensor, paged: PagedKeys, chunk: Chunk) -> tuple[AttentionResult, str | None]:
        """Attention of a chunk ``[1, Hq, Lq, D]`` over all keys of its request, and why it was dense, if it was.

        The result holds how many keys were attended, int32 ``[1, Hq or 1, Lq]``.
        """
        config, length = self.config, chunk.length
        held = chunk.blocks[: -(-length // paged.key.shape[2])]
        key, value = (t[held].transpose(0, 1).flatten(1, 2)[None, :, :length] for t in paged[:2])
        seen = chunk.visible[:, None, :, 1]
        problem = Problem(*(query, key, value, chunk.visible, chunk.origin, seen), self.scale, self.softcap, self.sinks)
        reason = config.dense_reason(self.layer, chunk.selection, length)
        if reason is None:
            problem = problem._replace(budget=self._budget(chunk.visible, length, *chunk.dense))
        result = attend(problem, chunk.selection if reason is None else Dense(), config.backend)
        return result._replace(attended=problem.budget if result.attended is None else result.attended), reason

    def _budget(self, visible: torch.Tensor, most_keys: int, first: int = 0, last: int = 0) -> torch.Tensor:
        """Budgets int32 ``[B, heads or 1, Lq]`` of the queries that see ``visible [B, Lq, 2]``.

        So many of the first and of the last attend every key.
        """
        budget = self.config.row_budgets(visible, most_keys, self.layer)
        if budget.shape[1] > 1:
            budget = budget[:, self.heads].contiguous()
        if not first and not last:
            return budget

        def with_dense_ends() -> torch.Tensor:
            row, count = torch.arange(visible.shape[1], device=visible.device), visible.shape[1]
            return torch.where((row >= first) & (row < count - last), budget, visible[:, None, :, 1])

        found: torch.Tensor = once(budget, ("dense ends", first, last), with_dense_ends)
        return found

"""``block`` attention in PyTorch: some rows choose the key blocks that a whole query block attends."""

import torch

from nc_patch.ops.rows import (
    Buffers,
    RowBlock,
    final_scores_,
    hide_unseen_,
    row_blocks,
    rows_per_block,
    scores_of,
    split_scale,
)
from nc_patch.selections.block.audit import BlockAudit
from nc_patch.selections.block.blocks import BlockChoice, BlockSettings, Mark, QueryBlocks, no_mark, query_block_table
from nc_patch.selections.block.torch_attend import attend_blocks
from nc_patch.selections.block.torch_choose import choose_blocks

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def torch_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    softcap: float,
    block_size: int,
    query_block_size: int,
    sample_stride: int,
    min_mass: float,
    max_factor: float,
    want_stats: bool,
    estimator: str = "sampled",
    audit: BlockAudit | None = None,
    mark: Mark = no_mark,
) -> Five:
    """Attention over key blocks that a query block shares, as ``reference_attention`` defines ``"block"``.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``. budget: int32 ``[B, Hq or 1, Lq]``. sinks: ``[Hq]``.
        scale: factor of the scores. softcap: 0 for none.
        block_size to max_factor, estimator: see ``BlockSettings``.
        want_stats: whether lse and kept mass are wanted; the kept mass costs half of dense attention.
        audit: is made, where there is one.
        mark: for timing the steps, see ``blocks.Mark``; may be called several times for one.

    Returns:
        (output ``[B, Hq, Lq, Dv]``, lse and kept mass float32 ``[B, Hq, Lq]`` or empty, attended int32 ``[B, Hq,
        Lq]``, estimate float32 ``[Hq, 5]``, columns ``blocks.ESTIMATE_COLUMNS``).
    """
    settings = BlockSettings(block_size, query_block_size, sample_stride, min_mass, max_factor, estimator)
    table = query_block_table(visible, origin, query_block_size)
    expected = (
        None
        if audit is None
        else torch.empty(len(table.first), query.shape[1], dtype=torch.float32, device=query.device)
    )
    choice, estimate = choose_blocks(
        *(query, key, visible, origin, budget, table, settings),
        scale=scale,
        softcap=softcap,
        expected=expected,
        mark=mark,
    )
    if audit is not None and expected is not None:
        tensors = (query, key, visible, origin, table, choice, expected)
        audit.make(*tensors, block_size=block_size, scale=scale, softcap=softcap)
        mark("choose")
    output, of_keys, attended = attend_blocks(
        *(query, key, value, visible, sinks, table, choice),
        scale=scale,
        softcap=softcap,
        block_size=block_size,
        want_lse=want_stats,
    )
    mark("attend")
    if not want_stats:
        return output, of_keys, torch.empty_like(of_keys), attended, estimate
    empty = (visible[..., 1] <= visible[..., 0])[:, None]
    kept_mass = torch.exp(of_keys - _dense_lse(query, key, visible, scale, softcap)).masked_fill_(empty, 1.0)
    lse = of_keys if sinks is None else torch.logaddexp(of_keys, sinks.float()[:, None].expand_as(of_keys))
    return output, lse, kept_mass, attended, estimate


class ChosenBlocks:
    """A choice by rows, for what goes through query blocks one by one; see ``gradients.Keep``."""

    def __init__(self, table: QueryBlocks, choice: BlockChoice, block_size: int) -> None:
        self._table, self._choice, self._block_size = table, choice, block_size
        columns = (table.batch, table.first, table.last, table.low, table.high)
        self.blocks = [RowBlock(*row) for row in torch.stack(columns, -1).tolist()]
        self._number = {(block.batch, block.first): number for number, block in enumerate(self.blocks)}

    def keep_(self, raw: torch.Tensor, seen: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """Makes the scores ``[Hq, R, N]`` of keys outside the chosen blocks -inf; returns the others' shift, zero.

        Args:
            raw: the scores of ``block.low:block.high``; overwritten. seen: int32 ``[R, 2]``. block: one of ``blocks``.
        """
        number = self._number[block.batch, block.first]
        indices, counts = self._choice.block_indices[number], self._choice.block_counts[number]
        position = torch.arange(block.low, block.high, device=raw.device)
        of_key = torch.div(position - self._table.begin[number], self._block_size, rounding_mode="floor")
        exists = torch.arange(indices.shape[1], device=raw.device) < counts[:, None]
        attended = ((of_key[:, None] == indices[:, None]) & exists[:, None]).any(-1)
        hidden = ~attended[:, None, None]
        raw.view(indices.shape[0], -1, *raw.shape[1:]).masked_fill_(hidden, -torch.inf)
        hide_unseen_(raw, seen, position)
        return raw.new_zeros(1, raw.shape[1])


def _dense_lse(
    query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Log-sum-exp of every row over the keys it sees, float32 ``[B, Hq, Lq]``; -inf where it sees none."""
    B, Hq, Lq, _ = query.shape
    lse = torch.full((B, Hq, Lq), -torch.inf, dtype=torch.float32, device=query.device)
    before, after = split_scale(scale)
    buffers = Buffers(0, query.device)
    loaded, keys = -1, key
    for block in row_blocks(visible, rows_per_block(Hq, key.shape[2])):
        b, rows = block.batch, block.rows
        if b != loaded:
            keys, loaded = key[b].float(), b
        scores = scores_of(query[b, :, rows].float() * before, keys[:, block.low : block.high], buffers)
        position = torch.arange(block.low, block.high, device=query.device)
        lse[b, :, rows] = torch.logsumexp(
            hide_unseen_(final_scores_(scores, after, softcap), visible[b, rows], position), -1
        )
    return lse

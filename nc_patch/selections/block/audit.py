"""An audit of prefill by blocks: some rows, drawn at random, whose kept mass is computed from all of their scores.

The rows that chose the blocks keep more of their mass than the others, so that their mean is too high. Audited rows
have had no say (but by chance), each row of a sequence is as likely to be one as any other, and so what they keep tells
without bias by how much the mean of those that chose is off. In the words of survey sampling this is a difference
estimator under stratified sampling: from each of ``a`` equal runs of a sequence's rows one is drawn, and what it keeps
is compared with what the scored rows of its query block keep on average, which is known for all blocks.
"""

import torch

from nc_patch.ops.rows import Buffers, final_scores_, hide_unseen_, rows_per_block, scores_of, split_scale
from nc_patch.selections.block.blocks import BlockChoice, QueryBlocks, block_of_rows

# Columns of an audit, float32 [Hq + 1, 5]: how many rows there are, an estimate of the sum of their kept mass with its
# variance and degrees of freedom, and how many were audited. The last line is of the mean over heads.
AUDIT_COLUMNS = ("rows", "kept_mass", "variance", "freedom", "audited")

# One row of so many is audited, within limits: few rows say little, and more than enough cost for nothing.
_ROWS_PER_AUDITED = 256
_FEWEST, _MOST = 8, 16


def audited_rows(query_length: int) -> int:
    """How many rows of a sequence are audited; of a few rows some more than once."""
    return min(max(query_length // _ROWS_PER_AUDITED, _FEWEST), _MOST)


class BlockAudit:
    """An audit to be made once blocks are chosen.

    Args:
        seed: of the draw; the global random state is left alone.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.result: torch.Tensor | None = None

    def make(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        visible: torch.Tensor,
        origin: torch.Tensor,
        table: QueryBlocks,
        choice: BlockChoice,
        expected: torch.Tensor,
        *,
        block_size: int,
        scale: float,
        softcap: float,
    ) -> None:
        """Sets ``result``; does not read the device.

        Args:
            query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B,
                Lq]``. table, choice: of N query blocks.
            expected: float32 ``[N, Hq]``, the mean kept mass of each query block's scored rows.
            scale, softcap: of the scores; softcap 0 for none.
        """
        B, Hq, Lq, _ = query.shape
        count = audited_rows(Lq)
        result = torch.zeros(Hq + 1, len(AUDIT_COLUMNS), dtype=torch.float32, device=query.device)
        self.result = result
        if expected.shape[0] == 0:
            return
        owner = block_of_rows(table, B, Lq)
        occupied = owner >= 0
        rows = occupied.sum(-1)
        row = self._draw(occupied, rows, count)
        number = owner.gather(1, row).clamp(min=0)
        kept = torch.stack(
            [
                _kept_mass(
                    *(query[b], key[b], visible[b], origin[b], row[b]),
                    BlockChoice(choice.block_indices[number[b]], choice.block_counts[number[b]]),
                    *(block_size, scale, softcap),
                )
                for b in range(B)
            ]
        )
        of_block = expected.T[:, number].transpose(0, 1)  # [B, Hq, count]
        difference = kept - of_block
        size = rows.float()[:, None]
        spread = difference.var(-1)
        # Of a head that rarely drops much, few rows may show none of it: half of what other heads show counts too.
        spread = torch.maximum(spread, (spread + spread.mean(1, keepdim=True)) / 2)
        together = difference.mean(1, keepdim=True)
        for line, known, off, spread_of_line in (
            (slice(0, Hq), expected.T, difference, spread),
            (slice(Hq, Hq + 1), expected.mean(-1)[None], together, together.var(-1)),
        ):
            by_row = known[:, owner.clamp(min=0).flatten()] * occupied.flatten()
            result[line, 0] = rows.sum()
            result[line, 1] = by_row.sum(-1) + (size * off.mean(-1)).sum(0)
            result[line, 2] = (size.square() * spread_of_line / count).sum(0)
            result[line, 3] = ((rows > 0) * (count - 1)).sum()
            result[line, 4] = ((rows > 0) * count).sum()

    def _draw(self, occupied: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
        """One row from each of ``count`` equal runs of the ``rows [B]`` rows that see a key, int64 ``[B, count]``."""
        device = occupied.device
        # Pinned, so that the host does not wait for the copy; PyTorch keeps such memory until the copy is done.
        share = torch.rand(
            occupied.shape[0], count, dtype=torch.float32, generator=self._generator, pin_memory=device.type == "cuda"
        )
        share = share.to(device, non_blocking=True)
        wanted = (torch.arange(count, device=device) + share) / count * rows[:, None]
        wanted = torch.minimum(wanted.long(), (rows[:, None] - 1).clamp(min=0)) + 1
        found = torch.searchsorted(occupied.long().cumsum(-1), wanted)
        return found.clamp(max=occupied.shape[1] - 1)


def _kept_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    row: torch.Tensor,
    choice: BlockChoice,
    block_size: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """What the rows ``row [a]`` of a sequence keep, float32 ``[Hq, a]``; ``choice`` has their query blocks' blocks."""
    Hq, (Hkv, Lk, _) = query.shape[0], key.shape
    before, after = split_scale(scale)
    buffers = Buffers(0, query.device)
    keys = key.float()
    position = torch.arange(Lk, device=key.device, dtype=torch.int32)
    width = -(-Lk // block_size) + 1
    step = rows_per_block(Hq, Lk)
    parts = []
    for first in range(0, row.shape[0], step):
        here = row[first : first + step]
        seen = visible[here]
        scores = scores_of(query[:, here].float() * before, keys, buffers, "audited")
        hide_unseen_(final_scores_(scores, after, softcap), seen, position)
        torch.softmax(scores, -1, out=scores)
        # Blocks of the buffer's keys, counted from the one that holds its first.
        of_key = torch.div(position - origin[here, None], block_size, rounding_mode="floor")
        indices, counts = (t[first : first + step] for t in choice)
        exists = torch.arange(indices.shape[-1], device=key.device) < counts[..., None]
        place = torch.where(exists, indices - of_key[:, None, :1], width).clamp(0, width).long()
        chosen = torch.zeros(*counts.shape, width + 1, dtype=torch.float32, device=key.device).scatter_(-1, place, 1.0)
        attended = chosen[..., :-1].gather(-1, (of_key - of_key[:, :1]).long()[:, None].expand(-1, Hkv, -1))
        shares = scores.view(Hkv, -1, *scores.shape[1:]) * attended.transpose(0, 1)[:, None]
        # A row whose scores are not numbers counts as keeping nothing, as among those that choose.
        parts.append(shares.sum(-1).nan_to_num(nan=0.0).clamp(max=1.0).view(Hq, -1))
    return torch.cat(parts, -1)

"""The tail in PyTorch: the pages of a block of rows as further columns of their scores."""

import itertools
from collections.abc import Iterable, Iterator

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans
from nc_patch.ops.rows import Buffers, RowBlock, final_scores_, scores_of


def of_one_origin(blocks: Iterable[RowBlock], visible: torch.Tensor, origin: torch.Tensor) -> Iterator[RowBlock]:
    """The blocks, cut where the sequence changes; ``visible`` int32 ``[B, Lq, 2]``, ``origin`` int32 ``[B, Lq]``."""
    for block in blocks:
        begin, seen = origin[block.batch, block.rows], visible[block.batch, block.rows]
        cuts = (begin[1:] != begin[:-1]).nonzero()[:, 0] + 1
        if not len(cuts):
            yield block
            continue
        for first, last in itertools.pairwise([0, *cuts.tolist(), len(begin)]):
            rows = seen[first:last][seen[first:last, 1] > seen[first:last, 0]]
            if len(rows):
                low, high = int(rows[:, 0].min()), int(rows[:, 1].max())
                yield RowBlock(block.batch, block.first + first, block.first + last, low, high)


def join_tail(
    scores: torch.Tensor,
    shift: torch.Tensor,
    query: torch.Tensor,
    means: PageMeans,
    batch: int,
    begin: int,
    seen: torch.Tensor,
    block: RowBlock,
    factor: float,
    softcap: float,
    buffers: Buffers,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Scores of the attended keys and behind them those of the tail, and the tail's values.

    Args:
        scores: final scores float32 ``[H, R, N]`` less ``shift`` ``[H or 1, R]``, against the keys
            ``block.low:block.high``; -inf where a key is not attended.
        query: float32 ``[H, R, D]``. factor: of the scores. softcap: 0 for none.
        begin: where the rows' sequence begins. seen: int32 ``[R, 2]``, the rows' intervals.

    Returns:
        (float32 ``[H, R, N + P]``, values ``[Hkv, P, Dv]`` in a list); the scores and an empty list where no page
        counts.
    """
    H, R, N = scores.shape
    size = TAIL_PAGE_SIZE
    first_page, slots = pages_of(block, begin)
    count = slots.stop - slots.start
    if not count:
        return scores, []
    column = begin + first_page * size - block.low
    missing = size - _sums_of_pages(scores[..., column : column + count * size] > -torch.inf)
    keys, values = (t[batch, :, slots].float() for t in means)
    logits = final_scores_(scores_of(query, keys, buffers, "tail"), factor, softcap)
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

"""What PyTorch implementations share: blocks of query rows, their scores, and softmax times value.

One block of rows of one sequence at a time, so that the extra memory is O(rows * keys), whatever Lq. Scores and softmax
are float32.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from nc_patch.ops.problem import Problem

# Most rows of a block.
MOST_ROWS = 128
# Most score elements of a block: 16 MB in float32, near the size of a core's share of the last-level cache.
SCORES_PER_BLOCK = 1 << 22


class RowBlock(NamedTuple):
    """Rows ``first:last`` of the sequence ``batch``, and the keys ``low:high`` that any of them sees."""

    batch: int
    first: int
    last: int
    low: int
    high: int

    @property
    def rows(self) -> slice:
        """The rows of the block, within their sequence."""
        return slice(self.first, self.last)


class Rows(NamedTuple):
    """R rows of one sequence of a batch, and the keys that their scores are of.

    Attributes:
        visible: int32 ``[R, 2]``, the half-open interval of keys that each row sees.
        budget: int32 ``[H or 1, R]``, how many keys each head and row attends, at most as many as it sees.
        origin: int32 ``[R]``, the position at which each row's sequence begins. low: the position of the first key.
        group: how many heads share a key/value head, side by side.
    """

    visible: torch.Tensor
    budget: torch.Tensor
    origin: torch.Tensor
    low: int
    group: int

    @classmethod
    def of(cls, problem: Problem, block: RowBlock) -> "Rows":
        """The rows of a block, and the keys ``block.low:block.high``."""
        b, rows = block.batch, block.rows
        visible, origin = problem.visible[b, rows], problem.origin[b, rows]
        return cls(visible, problem.budget[b, :, rows], origin, block.low, problem.group)

    def positions(self, count: int) -> torch.Tensor:
        """The positions of ``count`` keys, int32 ``[count]``."""
        return torch.arange(self.low, self.low + count, dtype=torch.int32, device=self.visible.device)

    def seen(self, count: int) -> torch.Tensor:
        """Which of ``count`` keys each row sees, bool ``[R, count]``."""
        position = self.positions(count)
        return (position >= self.visible[:, :1]) & (position < self.visible[:, 1:])


def rows_per_block(num_heads: int, key_length: int) -> int:
    """How many rows, at most ``MOST_ROWS``, keep ``num_heads * rows * key_length`` scores within the block's memory."""
    return max(1, min(MOST_ROWS, SCORES_PER_BLOCK // max(1, num_heads * key_length)))


def row_blocks(visible: torch.Tensor, rows: int, origin: torch.Tensor | None = None) -> Iterator[RowBlock]:
    """Blocks of at most ``rows`` rows over ``visible`` int32 ``[B, Lq, 2]``, without those that see no key.

    With ``origin`` int32 ``[B, Lq]`` each block is of one sequence.
    """
    B, Lq, _ = visible.shape
    blocks = -(-Lq // rows)
    start, end = visible.unbind(-1)
    empty, far = end <= start, torch.iinfo(visible.dtype).max
    start, end = (
        torch.nn.functional.pad(edge.masked_fill(empty, fill), (0, blocks * rows - Lq), value=fill)
        for edge, fill in ((start, far), (end, 0))
    )
    lows, highs = start.view(B, blocks, rows).amin(-1).tolist(), end.view(B, blocks, rows).amax(-1).tolist()
    for b in range(B):
        for i in range(blocks):
            if highs[b][i] > 0:
                block = RowBlock(b, i * rows, min(Lq, (i + 1) * rows), lows[b][i], highs[b][i])
                yield from (block,) if origin is None else _by_sequence(block, visible[b], origin[b])


def _by_sequence(block: RowBlock, visible: torch.Tensor, origin: torch.Tensor) -> Iterator[RowBlock]:
    """A block, cut where the origin of its rows changes."""
    begin = origin[block.rows]
    cuts = (begin[1:] != begin[:-1]).nonzero()[:, 0] + 1 + block.first
    if not len(cuts):
        yield block
        return
    for first, last in itertools.pairwise([block.first, *cuts.tolist(), block.last]):
        seen = visible[first:last]
        seen = seen[seen[:, 1] > seen[:, 0]]
        if len(seen):
            yield RowBlock(block.batch, first, last, int(seen[:, 0].min()), int(seen[:, 1].max()))


class Choice:
    """Which keys the rows of a problem attend, by ``blocks`` of rows that together hold every row that sees a key."""

    def __init__(self, problem: Problem, keep: Callable[[torch.Tensor, Rows], torch.Tensor]) -> None:
        self._problem, self._keep = problem, keep
        rows = rows_per_block(problem.query.shape[1], problem.key.shape[2])
        origin = None if problem.means is None else problem.origin
        self.blocks: Iterable[RowBlock] = row_blocks(problem.visible, rows, origin)

    def keep(self, scores: torch.Tensor, block: RowBlock) -> torch.Tensor:
        """Which of the keys ``block.low:block.high`` a block's rows attend, bool ``[Hq or 1, R, N]``, by their scores
        q·k, float32 ``[Hq, R, N]``.
        """
        return self._keep(scores, Rows.of(self._problem, block))


def scores_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """q·k: ``[Hq, R, D]`` with ``[Hkv, N, D]`` gives ``[Hq, R, N]``, query heads in groups of G."""
    (Hq, R, D), (Hkv, N, _) = query.shape, key.shape
    return (query.reshape(Hkv, Hq // Hkv * R, D) @ key.transpose(1, 2)).view(Hq, R, N)


def final_scores_(raw: torch.Tensor, factor: float, softcap: float) -> torch.Tensor:
    """Scales and soft-caps raw scores in place."""
    if softcap:
        return raw.mul_(factor / softcap).tanh_().mul_(softcap)
    return raw if factor == 1.0 else raw.mul_(factor)


def hide_unseen_(scores: torch.Tensor, seen: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Makes the scores ``[H, R, N]`` of keys outside the intervals ``seen [R, 2]`` -inf, in place."""
    return scores.masked_fill_((position < seen[:, :1]) | (position >= seen[:, 1:]), -torch.inf)


def softmax_(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights ``[H, R, N]`` of scores masked with -inf, in place; ``sinks`` float32 ``[H, R]`` joins the denominator.

    A row with nothing but -inf becomes NaN, as in dense attention; the caller knows which rows see no key.
    """
    if sinks is None:
        return torch.softmax(scores, -1, out=scores)
    share_of_keys = torch.sigmoid(torch.logsumexp(scores, -1) - sinks)
    weights = torch.softmax(scores, -1, out=scores)
    return weights.mul_(share_of_keys[..., None]).masked_fill_(share_of_keys[..., None] == 0, 0.0)


def weighted_values(weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
    """``[Hq, R, N]`` times ``[Hkv, N, Dv]``, given in parts of N: ``[Hq, R, Dv]``.

    Under a zero weight even NaN contributes nothing.
    """
    Hq, R, N = weights.shape
    Hkv = values[0].shape[0]
    columns = weights.view(Hkv, (Hq // Hkv) * R, N).split([value.shape[1] for value in values], -1)
    output = torch.bmm(columns[0], values[0])
    for part, value in zip(columns[1:], values[1:], strict=True):
        output.baddbmm_(part, value)
    # 0 * NaN and 0 * inf show as NaN, so a finite output, the common case, needs no second look.
    if not bool(output.sum().isfinite()):
        grouped, value = torch.cat(columns, -1), torch.cat(values, 1)
        finite = value.isfinite()
        output = torch.bmm(grouped, torch.where(finite, value, 0.0))
        touched = torch.bmm((grouped != 0).float(), (~finite).float()) > 0
        output = torch.where(touched, torch.nan, output)
    return output.view(Hq, R, values[0].shape[-1])

"""What block-sparse prefill is made of, whatever computes it: its options, query blocks, sampled rows, chosen blocks.

Rows are queries. A query block is a run of rows of one sequence with the same ``position // query_block_size``, where a
row's position is ``end - 1 - origin``, its distance from the sequence's first token. Key block ``j`` holds ``size``
keys from ``origin + j * size`` on. So nothing depends on where a sequence lies in the buffer, nor on its neighbours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from nc_patch.common import check_choice, check_integer, check_number, once
from nc_patch.ops.derivatives import is_capturing
from nc_patch.ops.problem import Problem
from nc_patch.selections.base import Selection

BLOCK_SIZES = (16, 32, 64, 128)
QUERY_BLOCK_SIZES = (32, 64, 128)
SAMPLE_STRIDES = (1, 2, 4, 8, 16, 32, 64)


def _one_of(name: str, value: Any, allowed: tuple[int, ...]) -> int:
    return int(check_choice(name, check_integer(name, value, 1), allowed))


@dataclass(frozen=True)
class BlockOptions(Selection):
    """How keys and queries are cut into blocks, and how blocks are chosen; see ``Block``."""

    size: int = 16
    query_block_size: int = 64
    sample_stride: int | None = None
    local_keys: int = 64
    min_mass: float | None = None
    max_factor: float = 4.0

    shorthand: ClassVar = {"size": "block_size"}
    checks: ClassVar = {
        "size": partial(_one_of, allowed=BLOCK_SIZES),
        "query_block_size": partial(_one_of, allowed=QUERY_BLOCK_SIZES),
        "sample_stride": partial(_one_of, allowed=SAMPLE_STRIDES),
        "local_keys": partial(check_integer, least=0),
        "min_mass": partial(check_number, allowed="a number in (0, 1), or None", ok=lambda v: 0 < v < 1),
        "max_factor": partial(check_number, allowed="a number of at least 1", ok=lambda v: v >= 1),
    }


class BlockChoice(NamedTuple):
    """The key blocks that each query block attends: int32 ``[N, Hkv, M]``, ascending, -1 beyond the ``[N, Hkv]``."""

    block_indices: torch.Tensor
    block_counts: torch.Tensor


class PlannedBlock(NamedTuple):
    """A query block: its rows, and what it may attend and scores.

    Attributes:
        batch: the sequence of the batch. first, last: its rows, ``first:last`` of Lq; each of them sees a key.
        low, high: the keys ``low:high`` that any of its rows sees.
        begin: key position of the sequence's first token; negative where a cache has dropped it.
        lowest: the first key block that a row sees. width: how many there are from there on.
        first_sample, samples: where its scored rows begin among the plan's ``samples``, and how many they are.
    """

    batch: int
    first: int
    last: int
    low: int
    high: int
    begin: int
    lowest: int
    width: int
    first_sample: int
    samples: int


PLAN_COLUMNS = len(PlannedBlock._fields)


class BlockPlan(NamedTuple):
    """What is scored and attended, as far as it follows from intervals and budgets: the same for all layers of a model.

    Attributes:
        table: int32 ``[N, 10]``, a query block a row, in the columns of ``PlannedBlock``.
        owner: int64 ``[B, Lq]``, which query block each row belongs to; -1 for rows in none.
        recent: int32 ``[N, Hkv]``: attended always are ``lowest`` and the blocks from ``lowest + recent`` on, which
            hold the query block's own positions and, as far as the budget reaches, ``local_keys`` before them.
        law: int32 ``[N, Hkv]``, how many blocks are attended. limit: the most that ``min_mass`` may make it.
        samples: int32 ``[S]``, the rows of Lq that are scored, by query block, whose numbers are ``sample_owner``
            int32 ``[S]``. A query block that attends all its key blocks scores none.
        listed: ``table`` on the host. capacity: the most blocks that a query block may attend.
    """

    table: torch.Tensor
    owner: torch.Tensor
    recent: torch.Tensor
    law: torch.Tensor
    limit: torch.Tensor
    samples: torch.Tensor
    sample_owner: torch.Tensor
    listed: list[PlannedBlock]
    capacity: int


def plan_of(problem: Problem, options: BlockOptions) -> BlockPlan:
    """The plan of a problem, made once for all layers that share its intervals, budgets and number of heads."""
    heads = problem.key.shape[1]
    if problem.budget.shape[1] > 1:  # of one layer alone, and large
        return make_plan(problem, options)
    key = ("block plan", options, heads, problem.budget, problem.origin)
    plan: BlockPlan = once(problem.visible, key, lambda: make_plan(problem, options))
    return plan


def make_plan(problem: Problem, options: BlockOptions) -> BlockPlan:
    """The plan of a problem; reads the device three times.

    Raises:
        RuntimeError: a CUDA graph is being captured, which a read of the device would break.
    """
    visible, origin, heads, size = problem.visible, problem.origin, problem.key.shape[1], options.size
    if is_capturing(visible):
        raise RuntimeError(
            "block attention counts its query blocks on the host, which a CUDA graph cannot capture: capture decoding "
            'steps only, or prefill with selection "topk", "window" or "dense"'
        )
    Lq, device = origin.shape[1], visible.device
    (start, end), begin = visible.flatten(0, 1).unbind(-1), origin.flatten()
    owner, opens = _query_blocks(visible, origin, options.query_block_size)
    N = len(opens)
    if N == 0:
        none = torch.zeros(0, dtype=torch.int32, device=device)
        pairs = none.new_zeros(0, heads)
        return BlockPlan(none.new_zeros(0, PLAN_COLUMNS), owner, pairs, pairs, pairs, none, none, [], 1)
    block_of_row = owner.flatten()

    def reduce(of_rows: torch.Tensor, how: str) -> torch.Tensor:
        # Rows in no query block go to a spare one.
        index = torch.where(block_of_row < 0, N, block_of_row).view(-1, *[1] * (of_rows.ndim - 1)).expand_as(of_rows)
        spare = of_rows.new_zeros(N + 1, *of_rows.shape[1:])
        return spare.scatter_reduce_(0, index, of_rows, how, include_self=False)[:N]

    low, high, rows = reduce(start, "amin"), reduce(end, "amax"), reduce(torch.ones_like(start), "sum")
    first, begins, position = (opens % Lq).int(), begin[opens], (end - 1 - begin)[opens]
    lowest, highest = (_floored(x - begins, size) for x in (low, high - 1))
    width = highest - lowest + 1
    # The largest budget of the rows and of the group's heads; every block where all rows may attend all their keys.
    budget = problem.budget if len(problem.budget[0]) == 1 else problem.budget.unflatten(1, (heads, -1)).amax(2)
    by_row = budget.transpose(1, 2).flatten(0, 1)
    every = reduce((by_row >= (end - start)[:, None]).int(), "amin") > 0
    counts = torch.minimum((reduce(by_row, "amax") + size - 1) // size, width[:, None])
    counts = torch.where(every, width[:, None], counts).expand(N, heads)
    # The first block and the most recent ones are together no more than the budget has, but for the block's own.
    own, local = (_floored(x, size)[:, None] for x in (position, position - options.local_keys))
    recent = ((highest + 2)[:, None] - counts).clamp(local, own)
    recent = (recent - lowest[:, None]).clamp_(min=0).contiguous()
    always = (recent > 0).int() + width[:, None] - recent
    law = limit = counts.clamp(always, width[:, None]).contiguous()
    if options.min_mass is not None:
        most = (counts.double() * options.max_factor).ceil_().clamp_(max=2**31 - 1).int()
        limit = most.clamp(always, width[:, None]).contiguous()

    # Of each query block the last row of every stride is scored, and its last row.
    stride = strides_of(high - low, counts, options)[block_of_row]
    scored = ((end - 1 - begin) % stride == stride - 1) & (block_of_row >= 0)
    scored[opens + rows - 1] = True
    scored &= (law < width[:, None]).any(1)[block_of_row]
    samples = scored.nonzero()[:, 0]
    of_block = block_of_row[samples]
    bounds = torch.searchsorted(of_block, torch.arange(N + 1, device=device), out_int32=True)
    of_batch = (opens // Lq).int()
    columns = (of_batch, first, first + rows, low, high, begins, lowest, width, bounds[:-1], bounds.diff())
    table = torch.stack(columns, -1)
    *found, (capacity, *_) = torch.cat((table, limit.max().expand(1, PLAN_COLUMNS))).tolist()
    listed = [PlannedBlock(*row) for row in found]
    return BlockPlan(table, owner, recent, law, limit, (samples % Lq).int(), of_block.int(), listed, capacity)


def _query_blocks(visible: torch.Tensor, origin: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query block each row is in, int64 ``[B, Lq]``, -1 for rows that see no key; the rows where blocks begin.

    These, int64 ``[N]``, count on over the batch. Reads the device once, for N.
    """
    number = _floored(visible[..., 1] - 1 - origin, size)
    occupied = visible[..., 1] > visible[..., 0]
    opens = occupied.clone()
    same = (number[:, 1:] == number[:, :-1]) & (origin[:, 1:] == origin[:, :-1])
    opens[:, 1:] &= ~(same & occupied[:, :-1])
    owner = (opens.flatten().cumsum(0) - 1).view_as(origin).masked_fill(~occupied, -1)
    return owner, opens.flatten().nonzero()[:, 0]


def _floored(numbers: torch.Tensor, size: int) -> torch.Tensor:
    return numbers.div(size, rounding_mode="floor")


def strides_of(seen: torch.Tensor, counts: torch.Tensor, options: BlockOptions) -> torch.Tensor:
    """Every how many rows each query block scores one, int32 ``[N]``: ``sample_stride``, or by the law near ``n / 2k``.

    n is how many keys the block's rows see, int32 ``seen [N]``, k their budget, ``size`` times the mean of ``counts``
    int32 ``[N, Hkv]``. So scoring costs n / stride for each row, which grows with n as the budget does.
    """
    if options.sample_stride is not None:
        return torch.full_like(seen, options.sample_stride)
    keys = counts.sum(-1, dtype=torch.float64) * (2.0 * options.size / counts.shape[1])
    return stride_by_law(seen / keys)


def stride_by_law(ratio: torch.Tensor) -> torch.Tensor:
    """The power of two from 2 to 64 that is nearest to n / 2k, on a logarithmic scale; int32 for float64.

    By comparisons, which are exact.
    """
    return (2 << sum((ratio >= 2.0 ** (power + 0.5)).long() for power in range(1, 6))).int()

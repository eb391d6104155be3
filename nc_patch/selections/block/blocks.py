"""What block-sparse prefill is made of, whatever computes it: its options, query blocks, sampled rows, chosen blocks.

Rows are queries. A query block is a run of rows of one sequence with the same ``position // query_block_size``, where a
row's position is ``end - 1 - origin``, its distance from the sequence's first token. Key blocks are counted from there
too: block ``j`` of a sequence that begins at ``begin`` holds the keys ``begin + j * size`` and the ``size - 1`` after
it. So nothing depends on where a sequence lies in the buffer, nor on its neighbours.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from nc_patch.common import check_choice, check_integer, check_number, once
from nc_patch.ops.problem import Problem
from nc_patch.selections.base import Selection

BLOCK_SIZES = (16, 32, 64, 128)
QUERY_BLOCK_SIZES = (32, 64, 128)
SAMPLE_STRIDES = (1, 2, 4, 8, 16, 32, 64)


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

    @property
    def enlarges(self) -> bool:
        """Whether it has a mass to aim at."""
        return self.min_mass is not None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        sizes = (("size", BLOCK_SIZES), ("query_block_size", QUERY_BLOCK_SIZES), ("sample_stride", SAMPLE_STRIDES))
        for name, allowed in sizes:
            if name == "sample_stride" and self.sample_stride is None:
                continue
            spelled = self.shorthand.get(name, name)
            keep(name, check_integer(spelled, getattr(self, name), 1))
            check_choice(spelled, getattr(self, name), allowed)
        keep("local_keys", check_integer("local_keys", self.local_keys, 0))
        if self.min_mass is not None:
            mass = check_number("min_mass", self.min_mass, "a number in (0, 1), or None", lambda v: 0 < v < 1)
            keep("min_mass", mass)
        keep("max_factor", check_number("max_factor", self.max_factor, "a number of at least 1", lambda v: v >= 1))


class QueryBlocks(NamedTuple):
    """The query blocks of a call, N in all, in order of sequence and row; int32 ``[N]`` on the inputs' device.

    Attributes:
        batch: the sequence of the batch.
        first, last: its rows, ``first:last`` of Lq; each of them sees a key.
        low, high: the keys ``low:high`` that any of its rows sees.
        begin: key position of the sequence's first token; negative where a cache has dropped it.
    """

    batch: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    begin: torch.Tensor


class BlockChoice(NamedTuple):
    """The key blocks that each query block attends.

    Attributes:
        block_indices: int32 ``[N, Hkv, M]``, numbers of blocks counted from ``begin``, ascending; -1 beyond the count.
        block_counts: int32 ``[N, Hkv]``.
    """

    block_indices: torch.Tensor
    block_counts: torch.Tensor


class PlannedBlock(NamedTuple):
    """A query block in a plan: the fields of ``QueryBlocks``, and what it may attend and scores.

    Attributes:
        lowest: the first key block that a row sees. width: how many there are from there on.
        first_sample: where its scored rows begin among the plan's ``samples``. samples: how many they are.
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

    @property
    def blocks(self) -> QueryBlocks:
        """The query blocks."""
        return QueryBlocks(*self.table[:, :6].unbind(-1))


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
    if visible.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "block attention counts its query blocks on the host, which a CUDA graph cannot capture: capture decoding "
            'steps only, or prefill with selection "topk", "window" or "dense"'
        )
    (B, Lq), device = origin.shape, visible.device
    blocks = query_block_table(visible, origin, options.query_block_size)
    owner, N = block_of_rows(blocks, B, Lq), blocks.first.shape[0]
    if N == 0:
        none = torch.zeros(0, dtype=torch.int32, device=device)
        pairs = none.new_zeros(0, heads)
        return BlockPlan(none.new_zeros(0, PLAN_COLUMNS), owner, pairs, pairs, pairs, none, none, [], 1)
    floor = lambda x: torch.div(x - blocks.begin, size, rounding_mode="floor")  # noqa: E731
    lowest, highest = floor(blocks.low), floor(blocks.high - 1)
    width = highest - lowest + 1
    budget = torch.minimum(law_counts(problem, blocks, owner, size), width[:, None])
    position = visible[blocks.batch.long(), blocks.first.long(), 1] - 1
    own, local = (floor(x)[:, None] for x in (position, position - options.local_keys))
    # The first block and the most recent ones are together no more than the budget has, but for the block's own.
    recent = torch.minimum(torch.maximum(local, (highest + 2)[:, None] - budget), own)
    recent = torch.maximum(recent - lowest[:, None], torch.zeros_like(recent))
    always = (recent > 0).int() + width[:, None] - recent
    within = lambda count: torch.minimum(torch.maximum(count, always), width[:, None]).contiguous()  # noqa: E731
    law = limit = within(budget)
    if options.min_mass is not None:
        limit = within((budget.double() * options.max_factor).ceil_().clamp_(max=2**31 - 1).int())

    scored = sampled_rows(blocks, visible, origin, owner, strides_of(blocks, budget, options))
    scored &= (law < width[:, None]).any(1)[owner.clamp(min=0)]
    samples = scored.flatten().nonzero()[:, 0]
    of_block = owner.flatten()[samples]
    first_sample = torch.searchsorted(of_block, torch.arange(N + 1, device=device), out_int32=True)
    table = torch.stack((*blocks, lowest, width, first_sample[:-1], first_sample.diff()), -1)
    *found, (capacity, *_) = torch.cat((table, limit.max().expand(1, PLAN_COLUMNS))).tolist()
    listed = [PlannedBlock(*row) for row in found]
    rows = (samples % Lq).int()
    return BlockPlan(table, owner, recent.contiguous(), law, limit, rows, of_block.int(), listed, capacity)


def query_block_table(visible: torch.Tensor, origin: torch.Tensor, query_block_size: int) -> QueryBlocks:
    """The query blocks of rows with intervals ``visible`` int32 ``[B, Lq, 2]`` and ``origin`` int32 ``[B, Lq]``.

    Rows that see no key are in none. Reads the device once, for N.
    """
    Lq = visible.shape[1]
    start, end = visible[..., 0], visible[..., 1]
    number = torch.div(end - 1 - origin, query_block_size, rounding_mode="floor")
    occupied = end > start
    opens = occupied.clone()
    same = (number[:, 1:] == number[:, :-1]) & (origin[:, 1:] == origin[:, :-1])
    opens[:, 1:] &= ~(same & occupied[:, :-1])
    row = opens.flatten().nonzero()[:, 0]
    if row.shape[0] == 0:
        return QueryBlocks(*(torch.zeros(0, dtype=torch.int32, device=visible.device) for _ in range(6)))
    owner = (opens.flatten().cumsum(0) - 1).clamp_(min=0)
    flat = occupied.flatten()
    reduced = torch.zeros(3, row.shape[0], dtype=torch.int32, device=visible.device)
    reduced[0].scatter_add_(0, owner, flat.int())
    reduced[1].fill_(torch.iinfo(torch.int32).max)
    reduced[1].scatter_reduce_(0, owner, start.flatten().masked_fill(~flat, torch.iinfo(torch.int32).max), "amin")
    reduced[2].scatter_reduce_(0, owner, end.flatten().masked_fill(~flat, 0), "amax")
    first = (row % Lq).int()
    return QueryBlocks(
        (row // Lq).int(), first, first + reduced[0], reduced[1], reduced[2], origin.flatten()[row].int()
    )


def block_of_rows(table: QueryBlocks, batch_size: int, query_length: int) -> torch.Tensor:
    """Which query block each row belongs to, int64 ``[B, Lq]``; -1 for rows in none."""
    opens = torch.zeros(batch_size * query_length, dtype=torch.int64, device=table.first.device)
    opens[table.batch.long() * query_length + table.first] = 1
    owner = (opens.cumsum(0) - 1).view(batch_size, query_length)
    if table.first.shape[0] == 0:
        return owner
    row = torch.arange(query_length, device=owner.device)
    of = owner.clamp(min=0)
    batch = torch.arange(batch_size, device=owner.device)[:, None]
    inside = (owner >= 0) & (table.batch[of] == batch) & (row < table.last[of])
    return owner.masked_fill(~inside, -1)


def sampled_rows(
    table: QueryBlocks, visible: torch.Tensor, origin: torch.Tensor, owner: torch.Tensor, strides: torch.Tensor
) -> torch.Tensor:
    """Which rows are scored, bool ``[B, Lq]``: of each query block the last row of every stride, and its last row.

    ``owner`` is as from ``block_of_rows``; strides int32 ``[N]`` as from ``strides_of``.
    """
    if len(strides) == 0:
        return torch.zeros_like(origin, dtype=torch.bool)
    position = visible[..., 1] - 1 - origin
    stride = strides[owner.clamp(min=0)]
    sampled = (position % stride == stride - 1) & (owner >= 0)
    sampled[table.batch.long(), table.last.long() - 1] = True
    return sampled


def strides_of(table: QueryBlocks, counts: torch.Tensor, options: BlockOptions) -> torch.Tensor:
    """Every how many rows each query block scores one, int32 ``[N]``: ``sample_stride``, or by the law near ``n / 2k``.

    n is how many keys the block's rows see, k their budget, ``size`` times the mean of ``counts`` int32 ``[N, Hkv]``;
    the stride is the nearest power of two, on a logarithmic scale, from 2 to 64. So scoring costs n / stride for each
    row, which grows with n as the budget does.
    """
    if options.sample_stride is not None:
        return torch.full_like(table.first, options.sample_stride)
    keys = counts.sum(-1, dtype=torch.float64) * (2.0 * options.size / counts.shape[1])
    return stride_by_law((table.high - table.low) / keys)


# n / 2k from which on the next power of two is nearer, on a logarithmic scale.
_STRIDE_STEPS = tuple(2.0 ** (power + 0.5) for power in range(1, 6))


def stride_by_law(ratio: torch.Tensor) -> torch.Tensor:
    """The power of two from 2 to 64 that is nearest to n / 2k; int32 for float64, by comparisons, which are exact."""
    steps = torch.stack([ratio >= step for step in _STRIDE_STEPS]).sum(0)
    return (2 << steps).int()


def law_counts(problem: Problem, table: QueryBlocks, owner: torch.Tensor, block_size: int) -> torch.Tensor:
    """How many blocks the budget has, int32 ``[N, Hkv]``: that of the largest among the block's rows and group's heads.

    Every block that any row sees, where all rows may attend all their keys: intervals begin and end within blocks.
    ``owner`` is as from ``block_of_rows``.
    """
    visible, budget, num_kv_heads = problem.visible, problem.budget, problem.key.shape[1]
    B, heads, Lq = budget.shape
    of_group = budget if heads == 1 else budget.reshape(B, num_kv_heads, -1, Lq).amax(2)
    N = table.first.shape[0]
    by_row = of_group.movedim(1, 2).reshape(B * Lq, -1)
    left_out = owner.view(-1, 1) < 0
    short = (by_row < (visible[..., 1] - visible[..., 0]).view(-1, 1)).int().masked_fill(left_out, 0)
    largest, fall_short = (torch.zeros(N, by_row.shape[1], dtype=torch.int32, device=budget.device) for _ in range(2))
    if N:
        at = owner.view(-1, 1).clamp(min=0).expand_as(by_row)
        largest.scatter_reduce_(0, at, by_row.masked_fill(left_out, 0), "amax")
        fall_short.scatter_reduce_(0, at, short, "amax")
        largest = torch.where(fall_short == 0, (table.high - table.low + 2 * block_size)[:, None], largest)
    return ((largest + block_size - 1) // block_size).expand(N, num_kv_heads)

"""Block-sparse prefill in Triton against float64: on a GPU where there is one, and in Triton's interpreter.

Whether kernels are interpreted is settled when they are imported, so the interpreter needs a process of its own:
``test_every_case_in_the_interpreter`` runs this file again in one. There, small tiles make short inputs cross many.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from attention_cases import random_case

triton = pytest.importorskip("triton", reason="the kernels need triton")

import operations  # noqa: E402
from gpu_semantics import check_as_on_a_gpu  # noqa: E402
from operations import INTERPRETED, assert_close, on_kernel_device, reference_attention  # noqa: E402

from nc_patch.functional import sparse_attention  # noqa: E402
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals  # noqa: E402
from nc_patch.ops.triton.launch import Tiles  # noqa: E402
from nc_patch.selections.block import prefill as triton_block  # noqa: E402
from nc_patch.selections.block.blocks import (  # noqa: E402
    BlockChoice,
    BlockOptions,
    BlockPlan,
    PlannedBlock,
    make_plan,
    stride_by_law,
)
from nc_patch.selections.block.definition import query_blocks  # noqa: E402
from nc_patch.selections.block.prefill import (  # noqa: E402
    attend_blocks,
    block_tiles,
    choose_blocks,
    triton_block_attention,
)
from nc_patch.selections.block.torch import torch_block_attention  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles in the interpreter."""

    def small(architecture, dtype, head_dim, value_dim, block_size):
        chunk = 32 if dtype == torch.float32 else None
        score = Tiles(32, max(32, block_size), 4, 1, chunk)
        return triton_block.BlockTiles(score, Tiles(64, 32, 4, 1, chunk), 16)

    monkeypatch.setattr(triton_block, "block_tiles", small)
    monkeypatch.setattr(triton_block, "_BLOCKS_AT_ONCE", 8)
    monkeypatch.setattr(triton_block, "_RANKS_AT_ONCE", 16)
    monkeypatch.setattr(triton_block, "_SEGMENT", 64)


@dataclass(frozen=True)
class Case:
    """One input: its shape, what its queries may see, and its settings."""

    name: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    queries: int = 150
    keys: int = 150
    head_dim: int = 32
    value_dim: int | None = None
    intervals: str = "causal"
    budget: int = 40
    dense_below: int = 0
    softcap: float = 0.0
    sinks: bool = False
    block_size: int = 16
    query_block_size: int = 64
    sample_stride: int | None = 16
    local_keys: int = 0
    min_mass: float | None = None
    max_factor: float = 4.0
    spread: float = 3.0

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> BlockOptions:
        """How blocks are cut and chosen."""
        names = ("query_block_size", "sample_stride", "local_keys", "min_mass", "max_factor")
        return BlockOptions(self.block_size, **{name: getattr(self, name) for name in names})


CASES = [
    Case("plain"),
    Case("g1-bf16-d80", torch.bfloat16, group=1, head_dim=80),
    Case("g3-fp16-d96-b32", torch.float16, group=3, head_dim=96, queries=70, keys=101, block_size=32),
    Case("g4-bf16-d128-b64-q128", torch.bfloat16, 1, 1, 4, 50, 190, 128, block_size=64, query_block_size=128),
    Case("g5-d192-narrow-values", group=5, queries=20, keys=90, head_dim=192, value_dim=128),
    Case("d256-softcap-sinks", torch.bfloat16, queries=40, keys=140, head_dim=256, softcap=5.0, sinks=True),
    Case("left-padding", batch=2, intervals="left_padding", queries=90, keys=110, sinks=True),
    Case("packed", intervals="packed", budget=20),
    Case("sliding-window", intervals="sliding", queries=140, keys=170, group=1, budget=50),
    Case("sliding-cache", torch.bfloat16, intervals="sliding_cache", queries=40, keys=120, budget=50),
    Case("some-rows-empty", batch=2, intervals="ragged", queries=90, keys=100),
    Case("both-directions", intervals="all", queries=70, keys=90, group=1),
    Case("b128", torch.bfloat16, queries=100, keys=300, budget=130, block_size=128, softcap=3.0),
    Case("stride-4", queries=64, keys=130, sample_stride=4, group=3),
    Case("stride-1-q32", queries=70, keys=130, sample_stride=1, query_block_size=32),
    Case("stride-by-the-law", kv_heads=2, queries=200, keys=200, sample_stride=None, local_keys=16),
    Case("local-keys", queries=110, keys=230, budget=170, sample_stride=None, local_keys=64),
    Case("local-keys-beyond-the-budget", queries=60, keys=230, budget=70, local_keys=100),
    Case("dense-rows", queries=200, keys=200, budget=20, dense_below=100, sample_stride=None, local_keys=64),
    Case("packed-dense-rows", intervals="packed", budget=20, dense_below=40, sample_stride=None, local_keys=16),
    Case("one-key", queries=1, keys=1),
    Case("budget-of-all", queries=90, keys=130, budget=1000, sinks=True),
]


def inputs_of(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Random inputs of a case, on the CPU; keys of unequal size, so that blocks differ in mass."""
    generator = torch.Generator().manual_seed(seed)
    B, Lq, Lk, heads = case.batch, case.queries, case.keys, case.kv_heads * case.group
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    visible = causal_intervals(B, Lq, Lk, "cpu").clone()
    origin = torch.zeros(B, Lq, dtype=torch.int32)
    if case.intervals == "left_padding":
        origin[1] = 37
    elif case.intervals == "packed":
        for border in (19, 37, 111):
            origin[:, visible[0, :, 1] > border] = border
    elif case.intervals.startswith("sliding"):
        visible[..., 0] = (visible[..., 1] - 70).clamp(min=0)
        origin -= 1000 if case.intervals == "sliding_cache" else 0
    elif case.intervals == "all":
        visible[..., 0], visible[..., 1] = 5, Lk - 2
    elif case.intervals == "ragged":
        origin[1] = 30
        visible[:, 40:57, 1] = 0
        visible[:, 80, 1] = 0
    visible[..., 0] = torch.maximum(visible[..., 0], origin)
    visible[..., 1] = torch.maximum(visible[..., 1], visible[..., 0])
    n = (visible[..., 1] - visible[..., 0])[:, None]
    size = 1 + case.spread * torch.rand(B, case.kv_heads, Lk, 1, generator=generator) ** 4
    return {
        "query": normal(B, heads, Lq, case.head_dim).to(case.dtype),
        "key": (normal(B, case.kv_heads, Lk, case.head_dim) * size).to(case.dtype),
        "value": normal(B, case.kv_heads, Lk, case.value_dim or case.head_dim).to(case.dtype),
        "visible": visible,
        "origin": origin,
        "budget": torch.where(n <= case.dense_below, n, n.clamp(max=case.budget)),
        "sinks": normal(heads) if case.sinks else None,
    }


def scores_of(case: Case, inputs: dict[str, Any]) -> torch.Tensor:
    """Final scores ``[B, Hq, Lq, Lk]`` in float64; what is hidden is -inf."""
    scores = inputs["query"].double() @ inputs["key"].double().repeat_interleave(case.group, 1).transpose(-1, -2)
    scores *= case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    position, visible = torch.arange(case.keys), inputs["visible"][:, None]
    return scores.masked_fill((position < visible[..., :1]) | (position >= visible[..., 1:]), -torch.inf)


@dataclass
class Block:
    """What one query block and key/value head should choose.

    Attributes:
        law: how many blocks the budget has, or those that are attended always.
        masses: the share that each head's sampled rows give to each block, ``[G, S, K]``.
    """

    batch: int
    rows: torch.Tensor
    head: int
    lowest: int
    law: int
    masses: torch.Tensor
    chosen: list[int]

    @property
    def kept(self) -> torch.Tensor:
        """The shares of each head's sampled rows for the chosen blocks, ``[G, S]``."""
        return self.masses[..., [j - self.lowest for j in self.chosen]].sum(-1)


def expected_blocks(case: Case, inputs: dict[str, Any]) -> list[Block]:
    """The choice in float64, block by block, with plain sorting."""
    size, found = case.block_size, []
    scores = scores_of(case, inputs)
    for b in range(case.batch):
        visible, origin = inputs["visible"][b], inputs["origin"][b]
        for rows in query_blocks(visible, origin, case.query_block_size):
            begin, budget = int(origin[rows[0]]), inputs["budget"][b, 0, rows]
            position = visible[rows, 1] - 1 - begin
            first_seen, past_seen = int(visible[rows, 0].min()), int(visible[rows, 1].max())
            lowest, highest = (first_seen - begin) // size, (past_seen - 1 - begin) // size
            width, first = highest - lowest + 1, int(position[0])
            whole = bool((budget == visible[rows, 1] - visible[rows, 0]).all())
            law = width if whole else min(-(-int(budget.max()) // size), width)
            ratio = (past_seen - first_seen) / (2 * size * law)
            stride = case.sample_stride or min(max(2 ** round(math.log2(ratio)), 2), 64)
            sampled = rows[(position % stride == stride - 1) | (rows == rows[-1])]
            # The block's own positions, and local keys before them while the budget has more than the first block.
            always = {lowest, *range(max(first // size, lowest), highest + 1)}
            for j in range(first // size - 1, max((first - case.local_keys) // size, lowest) - 1, -1):
                if len(always) < law:
                    always.add(j)
            law = max(law, len(always))
            limit = min(max(math.ceil(min(-(-int(budget.max()) // size), width) * case.max_factor), law), width)
            for h in range(case.kv_heads):
                group = scores[b, h * case.group : (h + 1) * case.group, sampled]
                edges = [(max(begin + j * size, 0), begin + (j + 1) * size) for j in range(lowest, highest + 1)]
                logit = torch.amax if case.min_mass is None else torch.logsumexp
                masses = torch.softmax(torch.stack([logit(group[..., low:high], -1) for low, high in edges], -1), -1)
                by_block, largest = masses.sum((0, 1)), masses.amax((0, 1))
                others = [j for j in range(lowest, highest + 1) if j not in always]
                others.sort(key=lambda j, largest=largest, lowest=lowest: -largest[j - lowest])
                chosen, count = sorted(always) + others, law
                wanted = (case.min_mass or 0.0) * group.shape[0] * group.shape[1]
                while count < limit and by_block[[j - lowest for j in chosen[:count]]].sum() < wanted:
                    count += 1
                found.append(Block(b, rows, h, lowest, law, masses, sorted(chosen[:count])))
    return found


def problem_of(case: Case, inputs: dict[str, Any], device: str, stats: bool = True, **more: Any) -> Problem:
    """The inputs of a case on the device."""
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    return operations.problem_of(**moved, scale=case.head_dim**-0.5, softcap=case.softcap, stats=stats, **more)


def choose(case: Case, inputs: dict[str, Any], device: str) -> tuple[torch.Tensor, ...]:
    """(block_indices, block_counts, how many were added, what the scored rows keep) of the kernels."""
    problem = problem_of(case, inputs, device)
    plan = make_plan(problem, case.options)
    expected = torch.full((len(plan.listed), case.kv_heads * case.group), torch.nan, device=device)
    choice, added = choose_blocks(problem, plan, tiles_of(case, problem).score, case.options, expected)
    return *choice, added, expected


def tiles_of(case: Case, problem: Problem) -> triton_block.BlockTiles:
    """The tiles that the operation takes for a case."""
    sizes = (case.head_dim, case.value_dim or case.head_dim, case.block_size)
    return triton_block.block_tiles(triton_block.architecture_of(problem.query.device), case.dtype, *sizes)


def run(case: Case, inputs: dict[str, Any], device: str, want_stats: bool = True) -> tuple[torch.Tensor, ...]:
    """What the operation returns, on the CPU."""
    return on_cpu(triton_block_attention(problem_of(case, inputs, device, want_stats), case.options))


def on_cpu(result: AttentionResult) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exp, kept mass and attended; empty where there is none."""
    return tuple(result.output.new_empty(0) if x is None else x.cpu() for x in result[:4])


@on_kernel_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_the_reference(case, device):
    inputs = inputs_of(case)
    output, lse, kept_mass, attended = run(case, inputs, device)
    expected = reference_attention(
        **inputs, selection="block", scale=case.head_dim**-0.5, softcap=case.softcap, block_size=case.block_size,
        query_block_size=case.query_block_size, sample_stride=case.sample_stride, local_keys=case.local_keys,
    )  # fmt: skip
    assert output.dtype == case.dtype
    assert torch.equal(attended, expected.attended)
    assert_close(output, expected.output, TOLERANCE[case.dtype])
    assert_close(lse, expected.lse, 1e-5)
    assert_close(kept_mass, expected.kept_mass, 1e-5)


@on_kernel_device
@pytest.mark.parametrize("seed", [1, 2, 5, 9, 10, 31, 44, *range(400, 405)])  # 31 and 44 have a budget for each head
def test_random_problems_equal_the_reference(seed, device):
    case = random_case(seed, longest=100)
    output, lse, kept_mass, attended = on_cpu(operations.run_blocks(case, "triton", device))
    expected = case.reference("block")
    assert torch.equal(attended.cpu(), expected.attended)
    assert_close(output.cpu(), expected.output, 1e-5)
    assert_close(lse.cpu(), expected.lse, 1e-5)
    assert_close(kept_mass.cpu(), expected.kept_mass, 1e-5)


CHOICES = [
    Case("bf16-g4", torch.bfloat16, group=4, queries=100, keys=200, kv_heads=2),
    Case("per-mass", group=3, queries=100, keys=260, budget=33, min_mass=0.9, max_factor=8.0, spread=5.0),
    Case("per-mass-capped", torch.float16, group=2, queries=120, keys=300, budget=30, min_mass=0.99, max_factor=1.5),
    Case(
        "per-mass-window", group=2, queries=150, keys=300, intervals="sliding", budget=16, min_mass=0.97, max_factor=8.0
    ),
    Case("per-mass-packed", group=1, intervals="packed", budget=10, min_mass=0.95, max_factor=2.5, sample_stride=8),
    Case(
        "per-mass-local-dense", kv_heads=2, queries=250, keys=250, budget=100, min_mass=0.97, dense_below=70,
        sample_stride=None, local_keys=64, spread=5.0,
    ),
]  # fmt: skip
CHOOSING = (
    *("plain", "left-padding", "packed", "sliding-window", "sliding-cache", "stride-1-q32", "stride-by-the-law"),
    *("local-keys", "local-keys-beyond-the-budget", "dense-rows", "packed-dense-rows"),
)


@on_kernel_device
@pytest.mark.parametrize("case", [*CHOICES, *(case for case in CASES if case.name in CHOOSING)], ids=str)
def test_choice_and_what_it_keeps_equal_those_in_float64(case, device):
    inputs = inputs_of(case, seed=1)
    block_indices, block_counts, added, kept = (x.cpu() for x in choose(case, inputs, device))
    blocks = expected_blocks(case, inputs)
    assert len(blocks) == block_counts.numel()
    scored = 0
    for number, block in enumerate(blocks):
        # The expected ones come by sequence, query block and head, as the kernels number them.
        listed = block_indices.flatten(0, 1)[number]
        count = int(block_counts.flatten()[number])
        assert listed[:count].tolist() == block.chosen
        assert (listed[count:] == -1).all()
        assert int(added.flatten()[number]) == count - block.law
        query_block = number // case.kv_heads
        heads = slice(block.head * case.group, (block.head + 1) * case.group)
        of_all = all(
            each.law == each.masses.shape[-1] for each in blocks[query_block * case.kv_heads :][: case.kv_heads]
        )
        mean = torch.ones(case.group) if of_all else block.kept.mean(-1)
        assert_close(kept[query_block, heads], mean.double(), 1e-4)
        scored += not of_all
    assert scored > 0
    assert bool(added.any()) == (case.min_mass is not None)
    problem = problem_of(case, inputs, device)
    enlarged = triton_block_attention(problem, case.options).enlarged
    if case.min_mass is None:
        assert enlarged is None
    else:
        by_head = torch.stack((torch.full((case.kv_heads,), len(added)), (added > 0).sum(0)), -1)
        assert torch.equal(enlarged.cpu(), by_head.repeat_interleave(case.group, 0).float())


@on_kernel_device
def test_the_audit_equals_that_of_the_other_backend(device):
    for case in (CHOICES[0], *CHOICES[-2:], next(case for case in CASES if case.name == "dense-rows")):
        inputs, results = inputs_of(case, seed=2), []
        for backend, place in (("triton", device), ("torch", "cpu")):
            attend = {"triton": triton_block_attention, "torch": torch_block_attention}[backend]
            result = attend(problem_of(case, inputs, place, audit_seed=5), case.options)
            results.append(result.audit.cpu())
        assert float(results[1][0, 1]) > 0
        assert_close(results[0], results[1].double(), 1e-4)


@on_kernel_device
def test_ties_go_to_the_lower_position(device):
    case = Case("ties", group=1, queries=20, keys=260, budget=80)
    inputs = inputs_of(case)
    inputs["key"].zero_()
    block_indices, block_counts, *_ = choose(case, inputs, device)
    # Queries 240 to 259 lie in blocks 15 and 16 of two query blocks; all full blocks weigh the same.
    assert block_counts.flatten().tolist() == [5, 5]
    assert block_indices.flatten(0, 1).tolist() == [[0, 1, 2, 3, 15], [0, 1, 2, 3, 16]]


@on_kernel_device
@pytest.mark.parametrize("bytes_at_once", [1, 6000])
def test_chunks_of_query_blocks_change_nothing(bytes_at_once, device, monkeypatch):
    case = Case("chunks", batch=2, group=1, intervals="left_padding", queries=150, keys=150, min_mass=0.8)
    inputs = inputs_of(case)
    whole = choose(case, inputs, device)
    for name in ("SCORE_BYTES", "MOST_SCORE_BYTES"):
        monkeypatch.setattr(triton_block, name, bytes_at_once)
    *choice, kept = choose(case, inputs, device)
    for ours, theirs in zip(choice, whole[:3], strict=True):
        assert torch.equal(ours, theirs)
    # Tiles of other shapes may sum in another order.
    assert_close(kept, whole[3].double(), 1e-6)


@pytest.fixture
def contracting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter round ``a * b - c`` once where the product goes straight into the difference.

    That is what a compiler does, which a mask in between keeps from it. Products are known by their memory.
    """
    if not INTERPRETED:
        return
    builder = triton.runtime.interpreter.InterpreterBuilder
    multiply, subtract, products = builder.create_fmul, builder.create_fsub, {}

    def create_fmul(self, left, right):
        made = multiply(self, left, right)
        products[made.data.ctypes.data] = (made, left.data.astype(numpy.float64) * right.data)
        return made

    def create_fsub(self, left, right):
        made = subtract(self, left, right)
        if left.data.ctypes.data in products:
            exact = products[left.data.ctypes.data][1].reshape(left.data.shape)
            made.data = (exact - right.data).astype(made.data.dtype)
        return made

    monkeypatch.setattr(builder, "create_fmul", create_fmul)
    monkeypatch.setattr(builder, "create_fsub", create_fsub)


@on_kernel_device
@pytest.mark.parametrize("softcap", [0.0, 80.0])
def test_a_block_scores_the_same_whether_its_tile_is_masked_or_not(softcap, device, contracting, monkeypatch):
    # Row 0 sees all keys in one call, so that no tile is masked, and half of them in the other; rows 1 to 3 see all.
    case = Case("paths", group=1, queries=4, keys=256, softcap=softcap, sample_stride=1, budget=100)
    inputs, found = inputs_of(case), []
    # Large scores, in which a rounding shows.
    inputs["query"] *= 30
    score = triton_block.score_blocks_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda **kwargs: (score[grid](**kwargs), found.append(kwargs["scores"].view(-1, 4)[:, 1:]))

    monkeypatch.setattr(triton_block, "score_blocks_kernel", Recorded())
    for first in (0, 128):
        inputs["visible"][0, :, :] = torch.tensor([0, 256])
        inputs["visible"][0, 0, 0] = first
        choose(case, inputs, device)
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@on_kernel_device
@pytest.mark.parametrize("name", ["plain", "g3-fp16-d96-b32", "left-padding", "sliding-window", "d256-softcap-sinks"])
def test_attention_over_given_blocks_equals_float64(name, device):
    case = next(case for case in CASES if case.name == name)
    inputs = inputs_of(case, seed=2)
    problem = problem_of(case, inputs, device)
    plan = make_plan(problem, case.options)
    N, widths = plan.table.shape[0], plan.table[:, 7].tolist()
    generator = torch.Generator().manual_seed(3)
    # From one block to all, whichever they are: rows may attend nothing.
    block_counts = torch.tensor(
        [[1 + int(torch.rand((), generator=generator) * width) for _ in range(case.kv_heads)] for width in widths]
    )
    block_counts[-1] = widths[-1]
    block_indices = torch.full((N, case.kv_heads, max(widths)), -1)
    allowed = torch.zeros(case.batch, case.kv_heads * case.group, case.queries, case.keys, dtype=torch.bool)
    batch, first, last, _, _, begin, lowest = plan.table[:, :7].cpu().unbind(1)
    for n in range(N):
        for h in range(case.kv_heads):
            chosen = torch.randperm(widths[n], generator=generator)[: block_counts[n, h]].sort().values + lowest[n]
            block_indices[n, h, : len(chosen)] = chosen
            for j in chosen:
                low = max(int(begin[n] + j * case.block_size), 0)
                high = int(begin[n] + (j + 1) * case.block_size)
                heads = slice(h * case.group, (h + 1) * case.group)
                allowed[batch[n], heads, first[n] : last[n], low:high] = True
    scores = scores_of(case, inputs).masked_fill(~allowed, -torch.inf)
    lse_keys = torch.logsumexp(scores, -1)
    sink = None if inputs["sinks"] is None else inputs["sinks"].double()[:, None]
    expected_lse = lse_keys if sink is None else torch.logaddexp(lse_keys, sink.expand_as(lse_keys))
    weights = torch.exp(scores - expected_lse[..., None]).nan_to_num(nan=0.0)
    expected = weights @ inputs["value"].double().repeat_interleave(case.group, 1)

    choice = BlockChoice(block_indices.int().to(device), block_counts.int().to(device))
    found = attend_blocks(problem, plan, choice, tiles_of(case, problem), case.block_size)
    assert_close(found.output.cpu(), expected, TOLERANCE[case.dtype])
    assert_close(found.lse.cpu(), expected_lse, 1e-5)
    assert_close(found.lse_keys.cpu(), lse_keys, 1e-5)
    assert torch.equal(found.attended.cpu(), scores.isfinite().sum(-1).int())


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_broken_value_shows_in_the_rows_that_attend_it_and_reaches_none_of_another_query_block(dtype, device):
    case = Case("broken-values", dtype, group=2, head_dim=80, queries=100, keys=130, budget=1000)
    inputs = inputs_of(case)
    # Seen by all rows; within the diagonal block of a few; beyond what half of the rows see.
    inputs["value"][:, :, 3, 7] = torch.inf
    inputs["value"][:, :, 60, 3] = torch.nan
    inputs["value"][:, :, 101, 50] = -torch.inf
    output = run(case, inputs, device, want_stats=False)[0]
    expected = reference_attention(**inputs, selection="block", scale=case.head_dim**-0.5, block_size=16).output
    broken = expected.isnan()
    assert 0 < broken[..., 50].sum() < broken[..., 3].sum() < broken[..., 7].sum() == 200
    assert not output[broken].isfinite().any()
    # Rows 0 to 33 and 34 to 97 are of a query block each.
    assert output[:, :, :34, 50].isfinite().all()
    sound = output.isfinite()
    assert sound[..., [c for c in range(80) if c not in (3, 7, 50)]].all()
    assert_close(output[sound], expected[sound], TOLERANCE[dtype])


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_no_row_of_a_query_block_sees_is_not_read_from_the_blocks_at_its_edges(dtype, device):
    case = Case("edges", dtype, group=2, queries=70, keys=100, intervals="left_padding", batch=2, budget=1000)
    inputs = inputs_of(case)
    # Blocks begin at key 37 of sequence 1: with a later start, and an earlier end, the first and last are seen in part.
    inputs["visible"][..., 0] += 5
    inputs["visible"][..., 1] = inputs["visible"][..., 1].clamp(max=97)
    expected = run(case, inputs, device)
    for tensor in (inputs["key"], inputs["value"]):
        tensor[:, :, 97:] = tensor[0, :, :5] = tensor[1, :, :42] = torch.nan
    for ours, clean in zip(run(case, inputs, device), expected, strict=True):
        assert torch.equal(ours, clean)


@on_kernel_device
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_a_broken_key_reaches_only_the_rows_that_attend_it(spoil, device):
    case = Case("broken-keys", group=1, queries=70, keys=150, intervals="packed", budget=1000)
    inputs = inputs_of(case)
    inputs["query"] = inputs["query"].abs()
    inputs["key"][:, :, 120] = spoil
    output, *_ = run(case, inputs, device)
    expected = reference_attention(**inputs, selection="block", scale=case.head_dim**-0.5, block_size=16)
    assert 0 < int(expected.output.isnan().any(-1).sum()) < 70
    assert torch.equal(output.isnan(), expected.output.isnan())
    assert_close(output, expected.output, 1e-5)


@on_kernel_device
def test_what_no_row_sees_and_neighbours_change_nothing(device):
    case = Case("neighbours", batch=2, group=1, intervals="left_padding", queries=70, keys=120, min_mass=0.6)
    inputs = inputs_of(case)
    both = run(case, inputs, device)
    inputs["key"][1, :, :37] = torch.nan
    inputs["value"][1, :, :37] = torch.nan
    inputs["key"][0], inputs["value"][0] = 2.0, 3.0
    spoiled = run(case, inputs, device)
    alone = {name: x[1:] if torch.is_tensor(x) and x.dim() > 1 else x for name, x in inputs.items()}
    single = run(replace(case, batch=1), alone, device)
    for ours, theirs, own in zip(both[:4], spoiled[:4], single[:4], strict=True):
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[1], own[0])


@on_kernel_device
def test_a_budget_of_all_keys_equals_sdpa(device):
    case = Case("dense", torch.float32, group=2, queries=130, keys=130, budget=1000, block_size=32)
    inputs = inputs_of(case)
    output, _, kept_mass, _ = run(case, inputs, device)
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], is_causal=True, enable_gqa=True
    )
    assert_close(output, expected.double(), 1e-5)
    assert_close(kept_mass, torch.ones_like(kept_mass).double(), 1e-5)


@on_kernel_device
def test_tensors_laid_out_otherwise_give_the_same(device):
    case = Case("strides", torch.bfloat16, batch=2, kv_heads=2, group=1, queries=20, keys=40)
    inputs = inputs_of(case)
    plain = run(case, inputs, device)
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["visible"] = inputs["visible"].transpose(1, 2).contiguous().transpose(1, 2)
    for ours, theirs in zip(run(case, inputs, device), plain, strict=True):
        assert torch.equal(ours, theirs)


@on_kernel_device
@pytest.mark.parametrize("empty", [True, False], ids=["no-queries", "nothing-visible"])
def test_nothing_to_attend(empty, device):
    case = Case("nothing", queries=10, sinks=True)
    inputs = inputs_of(case)
    if empty:
        for name in ("query", "budget"):
            inputs[name] = inputs[name][:, :, :0]
        inputs["visible"], inputs["origin"] = inputs["visible"][:, :0], inputs["origin"][:, :0]
    else:
        inputs["visible"][..., 1] = inputs["visible"][..., 0]
    output, lse, kept_mass, attended = run(case, inputs, device)
    assert output.shape == (1, 2, 0 if empty else 10, 32)
    assert not output.any()
    assert not attended.any()
    assert torch.equal(lse, inputs["sinks"][None, :, None].expand_as(lse))
    assert (kept_mass == 1).all()


@on_kernel_device
def test_statistics_are_empty_unless_wanted(device):
    case = Case("no-stats", queries=20, keys=40)
    _, lse, kept_mass, attended = run(case, inputs_of(case), device, want_stats=False)
    assert lse.numel() == kept_mass.numel() == 0
    assert attended.shape == (1, 2, 20)


@on_kernel_device
def test_sparse_attention_runs_it_where_triton_is_the_backend(device):
    case = Case("public", queries=40, keys=90, block_size=16)
    query, key, value = (inputs_of(case)[name].to(device) for name in ("query", "key", "value"))
    settings = {"alpha": 2.0, "C": 0.5, "selection": "block", "dense_below": 30, "return_stats": True, "min_mass": 0.83}
    ours = sparse_attention(query, key, value, **settings, backend="triton")
    theirs = sparse_attention(query, key, value, **settings, backend="torch")
    assert torch.equal(ours.attended, theirs.attended)
    assert_close(ours.output.cpu(), theirs.output.double().cpu(), 1e-5)
    assert torch.equal(ours.enlarged, theirs.enlarged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 150, 32).double()}, "query must be one of bfloat16"),
        ({"origin": torch.zeros(1, 150)}, "origin must be int32"),
        ({"budget": torch.zeros(1, 5, 150, dtype=torch.int32)}, "budget must be int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    case = Case("plain")
    problem = problem_of(case, inputs_of(case), "cpu")._replace(**change)
    with pytest.raises(ValueError, match=message):
        triton_block_attention(problem, case.options)


def plan_with(widths: list[int], samples: list[int]) -> BlockPlan:
    """A plan of query blocks with so many key blocks and scored rows, as far as chunks are cut by it."""
    first, listed = 0, []
    for width, count in zip(widths, samples, strict=True):
        listed.append(PlannedBlock(0, 0, 0, 0, 0, 0, lowest=0, width=width, first_sample=first, samples=count))
        first += count
    nothing = torch.zeros(0)
    return BlockPlan(*(nothing,) * 7, listed, 1)


def check_chunks(chunks: list[triton_block.Chunk], widths: list[int], samples: list[int]) -> None:
    """Every query block is in one chunk, which has what it says."""
    assert [n for chunk in chunks for n in range(chunk.first, chunk.last)] == list(range(len(widths)))
    for chunk in chunks:
        assert chunk.width == max(widths[chunk.first : chunk.last])
        assert chunk.first_sample == sum(samples[: chunk.first])
        assert chunk.samples == sum(samples[chunk.first : chunk.last])


def test_chunks_hold_every_query_block_and_no_more_than_fits(monkeypatch):
    widths, samples = [1, 5, 5, 9, 200, 3, 3], [0, 4, 4, 2, 4, 1, 64]
    plan = plan_with(widths, samples)
    monkeypatch.setattr(triton_block, "MOST_SCORE_BYTES", 2400)
    for at_once in (300, 2400):
        monkeypatch.setattr(triton_block, "SCORE_BYTES", at_once)
        chunks = triton_block.score_chunks(plan, 2, 3, 1)
        check_chunks(chunks, widths, samples)
        for chunk in chunks:
            # Two query blocks, of two key/value heads, are enough for a multiprocessor: more of them take less.
            most = 2400 if chunk.last - chunk.first <= 2 else at_once
            assert chunk.width * chunk.samples * 4 * 2 * 3 <= most or chunk.last - chunk.first == 1
    assert len(chunks) == 4
    assert triton_block.score_chunks(plan_with([], []), 2, 3, 1) == []


@pytest.mark.parametrize("keys", [32_768, 131_072, 524_288, 2_097_152])
def test_chunks_give_every_multiprocessor_work_within_the_memory_allowed(keys):
    # Llama-3-8B: 8 key/value heads of 4 query heads, blocks of 16 keys, and rows scored by the law.
    widths = [(row + 64) // 16 for row in range(0, keys, 64)]
    ratio = torch.tensor([row + 64 for row in range(0, keys, 64)], dtype=torch.float64).sqrt() / 24
    strides = stride_by_law(ratio).tolist()
    samples = [0 if row < 1024 else 64 // stride for row, stride in zip(range(0, keys, 64), strides, strict=True)]
    chunks = triton_block.score_chunks(plan_with(widths, samples), 8, 4, 132)
    check_chunks(chunks, widths, samples)
    for chunk in chunks:
        size = chunk.width * chunk.samples * 8 * 4 * 4
        assert size <= triton_block.MOST_SCORE_BYTES
        enough = (chunk.last - chunk.first) * 8 >= 4 * 132 or size > triton_block.MOST_SCORE_BYTES // 2
        assert enough or chunk.last == len(widths)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_scored_tiles_hold_whole_blocks(architecture, dtype):
    for block_size in (16, 32, 64, 128):
        for head_dim in (16, 64, 80, 128, 192, 256):
            tiles = block_tiles(architecture, dtype, head_dim, head_dim, block_size)
            assert tiles.score.keys % block_size == 0


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)

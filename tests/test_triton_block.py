"""What is special in Triton's block-sparse prefill: the choice of blocks, chunks, tiles, and broken numbers."""

import pytest
import torch
from attention_cases import DESCRIBED, Case, Shape

triton = pytest.importorskip("triton", reason="the kernels need triton")

from operations import assert_close, problem_of_case  # noqa: E402

from nc_patch.ops.problem import Problem  # noqa: E402
from nc_patch.selections.block import prefill as triton_block  # noqa: E402
from nc_patch.selections.block.blocks import BlockPlan, PlannedBlock, make_plan, stride_by_law  # noqa: E402
from nc_patch.selections.block.definition import block_choice  # noqa: E402
from nc_patch.selections.block.prefill import block_tiles, choose_blocks  # noqa: E402
from nc_patch.selections.block.torch import choose_blocks as torch_choose_blocks  # noqa: E402


def shape_of(name: str, **more: object) -> Shape:
    """Two query blocks and a few key blocks of one head."""
    return Shape(name, (), **{"queries": 150, "keys": 150, "head_dim": 32, "budget": 40} | more)


def choose(case: Case, problem: Problem) -> tuple[torch.Tensor, ...]:
    """(block_indices, block_counts, what the scored rows keep) of the kernels, on the CPU."""
    options, problem = case.selection("block"), problem._replace(audit_seed=0)
    plan = make_plan(problem, options)
    architecture = triton_block.launch.architecture_of(problem.query.device)
    tiles = triton_block.block_tiles(architecture, problem.query.dtype, *problem.head_dims, options.size)
    choice, kept = choose_blocks(problem, plan, tiles.score, options)
    return tuple(x.cpu() for x in (*choice, kept))


@pytest.mark.parametrize(
    "name", ["stride-by-the-law", "local-keys", "packed-dense-rows", "min-mass", "min-mass-sliding"]
)
def test_choice_and_what_it_keeps_are_those_of_the_definition_and_of_pytorch(name, device):
    case = DESCRIBED[f"{name}-block"][0].case(1)
    problem, options = problem_of_case(case, audit_seed=0), case.selection("block")
    expected = block_choice(problem, case.scores(), options)
    indices, counts, kept = choose(case, problem_of_case(case, device))
    most = expected.block_indices.shape[-1]
    assert torch.equal(counts, expected.block_counts)
    assert torch.equal(indices[..., :most], expected.block_indices)
    assert (indices[..., most:] == -1).all()
    plan = make_plan(problem, options)
    assert len(plan.samples) > 0
    assert bool((counts > plan.law).any()) == ("min_mass" in case.options)
    assert_close(kept, torch_choose_blocks(problem, plan, options)[1].double(), 1e-4)


@pytest.mark.parametrize("name", ["min-mass", "dense-rows", "full-budget"])
def test_the_audit_and_how_many_attend_more_equal_those_of_the_other_backend(name, device):
    case = DESCRIBED[f"{name}-block"][0].case(2)
    ours, theirs = (
        case.selection("block").run(problem_of_case(case, place, audit_seed=5), backend)
        for backend, place in (("triton", device), ("torch", "cpu"))
    )
    assert float(theirs.audit[0, 1]) > 0
    assert_close(ours.audit.cpu(), theirs.audit.double(), 1e-4)
    assert (ours.enlarged is None) == ("min_mass" not in case.options)
    assert ours.enlarged is None or torch.equal(ours.enlarged.cpu(), theirs.enlarged)


@pytest.mark.parametrize("bytes_at_once", [1, 6000])
def test_chunks_of_query_blocks_change_nothing(bytes_at_once, device, monkeypatch):
    case = shape_of("chunks", batch=2, group=1, intervals="padding", blocks={"min_mass": 0.8}).case()
    problem = problem_of_case(case, device)
    whole = choose(case, problem)
    for name in ("SCORE_BYTES", "MOST_SCORE_BYTES"):
        monkeypatch.setattr(triton_block, name, bytes_at_once)
    *choice, kept = choose(case, problem)
    assert all(map(torch.equal, choice, whole[:2]))
    # Tiles of other shapes may sum in another order.
    assert_close(kept, whole[2].double(), 1e-6)


@pytest.mark.parametrize("softcap", [0.0, 80.0])
def test_a_block_scores_the_same_whether_its_tile_is_masked_or_not(softcap, device, monkeypatch):
    # A compiler, and ``gpu_semantics``, round a product once where it goes straight into a difference: no mask between.
    # Row 0 sees all keys in one call, so that no tile is masked, and half of them in the other; rows 1 to 3 see all.
    options = {"sample_stride": 1, "min_mass": 0.9}
    case = shape_of("paths", group=1, queries=4, keys=256, softcap=softcap, budget=100, blocks=options).case()
    case.query *= 30  # large scores, in which a rounding shows
    found, score = [], triton_block.score_blocks_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda **kwargs: (score[grid](**kwargs), found.append(kwargs["scores"].view(-1, 4)[:, 1:]))

    monkeypatch.setattr(triton_block, "score_blocks_kernel", Recorded())
    for first in (0, 128):
        case.visible[0] = torch.tensor([0, 256])
        case.visible[0, 0, 0] = first
        choose(case, problem_of_case(case, device))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def plan_with(widths: list[int], samples: list[int]) -> BlockPlan:
    """A plan of query blocks with so many key blocks and scored rows, as far as chunks are cut by it."""
    first, listed = 0, []
    for width, count in zip(widths, samples, strict=True):
        listed.append(PlannedBlock(0, 0, 0, 0, 0, 0, lowest=0, width=width, first_sample=first, samples=count))
        first += count
    return BlockPlan(*(torch.zeros(0),) * 7, listed, 1)


@pytest.mark.parametrize("keys", [32_768, 524_288, 2_097_152])
def test_chunks_give_every_multiprocessor_work_within_the_memory_allowed(keys):
    # Llama-3-8B: 8 key/value heads of 4 query heads, blocks of 16 keys, and rows scored by the law.
    rows = range(0, keys, 64)
    strides = stride_by_law(torch.tensor([row + 64 for row in rows], dtype=torch.float64).sqrt() / 24).tolist()
    samples = [0 if row < 1024 else 64 // stride for row, stride in zip(rows, strides, strict=True)]
    widths = [(row + 64) // 16 for row in rows]
    chunks = triton_block.score_chunks(plan_with(widths, samples), 8, 4, 132)
    assert [n for chunk in chunks for n in range(chunk.first, chunk.last)] == list(range(len(widths)))
    for chunk in chunks:
        assert chunk.width == max(widths[chunk.first : chunk.last])
        assert chunk.first_sample == sum(samples[: chunk.first])
        assert chunk.samples == sum(samples[chunk.first : chunk.last])
        size = chunk.width * chunk.samples * 8 * 4 * 4
        assert size <= triton_block.MOST_SCORE_BYTES
        enough = (chunk.last - chunk.first) * 8 >= 4 * 132 or size > triton_block.MOST_SCORE_BYTES // 2
        assert enough or chunk.last == len(widths)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_scored_tiles_hold_whole_blocks(architecture):
    for dtype in (torch.bfloat16, torch.float32):
        for block_size in (16, 32, 64, 128):
            for head_dim in (16, 64, 80, 128, 192, 256):
                tiles = block_tiles(architecture, dtype, head_dim, head_dim, block_size)
                assert tiles.score.keys % block_size == 0

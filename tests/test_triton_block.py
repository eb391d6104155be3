"""What is special in Triton's block-sparse prefill: scores with and without a mask, chunks and tiles."""

import pytest
import torch
from attention_cases import Shape

triton = pytest.importorskip("triton", reason="the kernels need triton")

from nc_patch.selections.block import prefill as triton_block  # noqa: E402
from nc_patch.selections.block.blocks import BlockPlan, PlannedBlock, stride_by_law  # noqa: E402
from nc_patch.selections.block.prefill import block_tiles  # noqa: E402


@pytest.mark.parametrize("softcap", [0.0, 80.0])
def test_a_block_scores_the_same_whether_its_tile_is_masked_or_not(softcap, device, monkeypatch):
    # A compiler, and ``gpu_semantics``, round a product once where it goes straight into a difference: no mask between.
    # Row 0 sees all keys in one call, so that no tile is masked, and half of them in the other; rows 1 to 3 see all.
    sizes = {"group": 1, "queries": 4, "keys": 256, "head_dim": 32, "budget": 100, "softcap": softcap}
    case = Shape("paths", (), blocks={"sample_stride": 1, "min_mass": 0.9}, **sizes).case()
    case.query *= 30  # large scores, in which a rounding shows
    found, score = [], triton_block.score_blocks_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda **kwargs: (score[grid](**kwargs), found.append(kwargs["scores"].view(-1, 4)[:, 1:]))

    monkeypatch.setattr(triton_block, "score_blocks_kernel", Recorded())
    for first in (0, 128):
        case.visible[0] = torch.tensor([0, 256])
        case.visible[0, 0, 0] = first
        case.run("block", "triton")
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

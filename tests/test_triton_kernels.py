"""What is special in Triton's prefill and its decoding by pages; what they compute, ``test_attention.py`` holds."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from attention_cases import SPOILED, Shape, check
from operations import INTERPRETED

from nc_patch.ops.triton import launch as triton_launch
from nc_patch.ops.triton.launch import Tiles
from nc_patch.selections.block import prefill as triton_block
from nc_patch.selections.block.blocks import stride_by_law
from nc_patch.selections.topk import threshold as triton_threshold


@pytest.mark.skipif(not INTERPRETED, reason="passes are counted in the interpreter")
@pytest.mark.parametrize(
    ("kind", "budget", "most"),
    [(None, "full", 0), (None, "law", 9), ("all equal", "law", 4), ("denormals", "law", 25), ("far apart", "any", 25)],
)
def test_counting_passes_are_few_and_bounded(kind, budget, most, device, monkeypatch):
    passes, count_range = [], triton_threshold.count_range
    monkeypatch.setattr(triton_threshold, "count_range", lambda *args: passes.append(1) or count_range(*args))
    monkeypatch.setattr(triton_launch, "tiles_for", lambda *_: Tiles(32, 16, 4, 1, 32))  # one program
    case = Shape("", (), group=1, queries=30, keys=90, budget=budget, sink_keys=0, recent_keys=0).case()
    if kind is not None:
        case.key = SPOILED[kind](case.key)
    check("drop", case, "triton", stats=False)
    assert (len(passes) > 0) == (budget != "full")
    assert len(passes) <= most


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_value_of_no_attended_page_may_be_anything_and_another_is_seen(broken, device):
    case = Shape("pages", (), queries=1, keys=200, budget=70).case()
    # An all-zero query weighs every page alike: pages 0 to 3 and the own one are attended.
    case.query.zero_()
    case.key.fill_(0.25)
    case.value[:, :, 150] = broken
    assert check("pages", case, "triton").output.isfinite().all()
    case.value[:, :, 3, 5] = broken
    assert not check("pages", case, "triton").output.isfinite().all()


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


@pytest.mark.parametrize("keys", [32_768, 524_288, 2_097_152])
def test_chunks_give_every_multiprocessor_work_within_the_memory_allowed(keys):
    # Llama-3-8B: 8 key/value heads of 4 query heads, blocks of 16 keys, and rows scored by the law.
    seen = torch.arange(64, keys + 64, 64)
    strides = stride_by_law(seen.double().sqrt() / 24)
    samples, widths = torch.where(seen <= 1024, 0, 64 // strides).tolist(), (seen // 16).tolist()
    blocks = zip(widths, itertools.accumulate(samples, initial=0), samples, strict=False)
    listed = [SimpleNamespace(width=width, first_sample=first, samples=count) for width, first, count in blocks]
    chunks = triton_block.score_chunks(SimpleNamespace(listed=listed), 8, 4, 132)
    assert [n for chunk in chunks for n in range(chunk.first, chunk.last)] == list(range(len(listed)))
    for chunk in chunks:
        part = slice(chunk.first, chunk.last)
        expected = max(widths[part]), sum(samples[: chunk.first]), sum(samples[part])
        assert (chunk.width, chunk.first_sample, chunk.samples) == expected
        size = chunk.width * chunk.samples * 8 * 4 * 4
        assert size <= triton_block.MOST_SCORE_BYTES
        enough = (chunk.last - chunk.first) * 8 >= 4 * 132 or size > triton_block.MOST_SCORE_BYTES // 2
        assert enough or chunk.last == len(widths)

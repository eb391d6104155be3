"""Tiles, and plans of decoding by codes, that are small enough for Triton's interpreter."""

from typing import Any

import pytest
import torch

from nc_patch.ops.triton import launch
from nc_patch.ops.triton.launch import Tiles
from nc_patch.selections.block import decode as block_decode
from nc_patch.selections.block import prefill
from nc_patch.selections.topk import decode, plan


def plan_with(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    """Makes plans of several tiles, splits and blocks for few keys; ``splits``, ``samples`` or ``segment`` as given."""

    def small(sizes: plan.Sizes, *settings: Any) -> plan.Plan:
        made = plan.plan_for(sizes, *settings)
        splits, tile = min(made.splits, changes.get("splits", 2)), 32
        variant = made.variant._replace(keys=tile, samples=changes.get("samples", 64), samplers=1, held=128)
        segment = changes.get("segment", -(-(-(-sizes.keys // tile) + 1) // splits) * tile)
        made = made._replace(variant=variant, splits=splits, parts=splits + made.parts - made.splits)
        return plan.with_scratch(made._replace(segment=segment, stride=max(splits * segment, sizes.keys)))

    monkeypatch.setattr(decode, "plan_for", small)
    monkeypatch.setattr(decode, "_STEPS", {})


def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes short inputs cross many tiles."""

    def tiles(_: str, dtype: torch.dtype, *sizes: int) -> Tiles:
        return Tiles(16, 32, 4, 1, 32 if dtype == torch.float32 else None)

    def block_tiles(_: str, dtype: torch.dtype, head_dim: int, value_dim: int, block_size: int) -> prefill.BlockTiles:
        chunk = 32 if dtype == torch.float32 else None
        score = Tiles(32, max(32, block_size), 4, 1, chunk)
        return prefill.BlockTiles(score, Tiles(64, 32, 4, 1, chunk), 16)

    monkeypatch.setattr(launch, "tiles_for", tiles)
    monkeypatch.setattr(prefill, "block_tiles", block_tiles)
    for name, size in (("_BLOCKS_AT_ONCE", 8), ("_RANKS_AT_ONCE", 16), ("_SEGMENT", 64)):
        monkeypatch.setattr(prefill, name, size)
    monkeypatch.setattr(block_decode, "_CHOOSE_AT_ONCE", 4)
    plan_with(monkeypatch)

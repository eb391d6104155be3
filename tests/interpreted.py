"""Sizes for Triton's interpreter."""

import pytest
import torch


def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles."""
    from small_plans import plan_with

    from nc_patch.ops.triton import launch
    from nc_patch.selections.block import decode, prefill

    def tiles(_, dtype, *sizes):
        return launch.Tiles(16, 32, 4, 1, 32 if dtype == torch.float32 else None)

    def block_tiles(architecture, dtype, head_dim, value_dim, block_size):
        chunk = 32 if dtype == torch.float32 else None
        score = launch.Tiles(32, max(32, block_size), 4, 1, chunk)
        return prefill.BlockTiles(score, launch.Tiles(64, 32, 4, 1, chunk), 16)

    monkeypatch.setattr(launch, "tiles_for", tiles)
    monkeypatch.setattr(prefill, "block_tiles", block_tiles)
    for name, size in (("_BLOCKS_AT_ONCE", 8), ("_RANKS_AT_ONCE", 16), ("_SEGMENT", 64)):
        monkeypatch.setattr(prefill, name, size)
    monkeypatch.setattr(decode, "_CHOOSE_AT_ONCE", 4)
    plan_with(monkeypatch)

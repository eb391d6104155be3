"""Sizes for Triton's interpreter, by which short inputs cross many tiles."""

import pytest
import torch

from nc_patch.ops.problem import Problem
from nc_patch.ops.triton import decoding, launch
from nc_patch.selections.block import decode as block_decode
from nc_patch.selections.block import prefill
from nc_patch.selections.topk import decode, plan


def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and plans everywhere."""

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
    monkeypatch.setattr(block_decode, "_CHOOSE_AT_ONCE", 4)
    plan_with(monkeypatch)


def plan_with(monkeypatch: pytest.MonkeyPatch, splits: int = 2) -> None:
    """Makes plans of decoding by codes of several tiles, splits and blocks for few keys."""

    def small(problem: Problem, keys: int, architecture: str) -> plan.Plan:
        made = plan.plan_for(problem, keys, architecture)
        count = min(made.splits, splits)
        parts = count + made.parts - made.splits
        return made._replace(tile=32, samples=64, samplers=1, held=128, splits=count, parts=parts)

    monkeypatch.setattr(decode, "plan_for", small)
    monkeypatch.setattr(decoding, "_DECODERS", {})

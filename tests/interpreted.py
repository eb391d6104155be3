"""Tests of kernels in Triton's interpreter: small sizes, and a file of them run once more as on a GPU.

Whether kernels are interpreted is settled when they are imported, so that the latter takes a process of its own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from operations import INTERPRETED


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


def run_in_the_interpreter(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """pytest in a process of its own."""
    tests = os.path.dirname(__file__)
    # One thread: the interpreter's tiles are too small to share.
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=os.path.dirname(tests),
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def check_as_on_a_gpu(file: str, **environment: str) -> None:
    """Fails unless every test of a file passes under ``gpu_semantics``, but the one below, which is skipped there."""
    done = run_in_the_interpreter("-p", "gpu_semantics", file, **environment)
    said = done.stdout[-8000:] + done.stderr[-2000:]
    assert done.returncode == 0, said
    assert re.search(r"^gpu_semantics: [1-9]\d* launches", done.stdout, re.M), said
    assert re.search(r"^[1-9]\d* passed, 1 skipped\b", done.stdout, re.M), said


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """Runs the file that imports this test."""
    pytest.importorskip("triton", reason="the interpreter is Triton's")
    check_as_on_a_gpu(str(request.path))

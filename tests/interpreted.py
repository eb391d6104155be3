"""Tests of kernels once more in Triton's interpreter, with the semantics of a GPU.

Whether kernels are interpreted is settled when they are imported, so that takes a process of its own.
"""

import os
import re
import subprocess
import sys

import pytest
from operations import INTERPRETED


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

"""The tests of the Triton kernels in Triton's interpreter, as on a GPU, and the plugin that makes it so.

Whether kernels are interpreted is settled when they are imported, so that this takes a process of its own. One file:
``TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p gpu_semantics tests/test_attention.py``.
"""

import os
import re
from pathlib import Path

import pytest
import triton
from processes import python

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="starts processes that interpret")
TESTS = Path(__file__).parent
FILES = ("gpu_semantics", "attention", "paged", "triton_decode_topk", "triton_kernels")


def run_in_the_interpreter(*arguments: object, **settings: str) -> str:
    """What pytest says in a process of its own."""
    # One thread: the interpreter's tiles are too small to share.
    settings |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=TESTS.parent, **settings)


@pytest.mark.parametrize("seed", ["0", *(pytest.param(seed, marks=pytest.mark.wide) for seed in "12")])
def test_every_case_passes_as_on_a_gpu(seed):
    files = [TESTS / f"test_{name}.py" for name in FILES]
    said = run_in_the_interpreter("-p", "gpu_semantics", *files, GPU_SEMANTICS_SEED=seed)
    assert re.search(r"^gpu_semantics: [1-9]\d* launches", said, re.M)
    assert re.search(r"^[1-9]\d* passed, 1 xfailed\b(?!.*skipped)", said, re.M)


@pytest.mark.wide
def test_many_more_random_calls_equal_the_reference():
    run_in_the_interpreter("-m", "wide", "-k", "many_more_random_calls", TESTS / "test_fuzz.py")

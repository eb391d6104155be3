"""A GPU that is not there: Triton compiles for it what a launch needs, holds that to its limits, and runs nothing.

``python tests/pretended_gpu.py bench ARGUMENTS`` calls what ``nc-patch bench ARGUMENTS`` would time, at its shapes;
``python tests/pretended_gpu.py small`` what ``scripts/small_attention.py`` calls. Both end with what was launched, or
with the error of the first launch that the GPU would refuse. What is computed means nothing.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from recorded_launches import TARGETS, pretended
from triton.compiler import compiler

from eval_tasks.bench.command import parser, settings_of
from eval_tasks.bench.inputs import GEOMETRIES, Inputs
from eval_tasks.bench.operator import sparse_step

# An H100 or H200: shared memory and threads of a program, and the largest grid along each axis.
_TARGET, _THREADS = "sm_90", 1024
LARGEST_GRID = (2**31 - 1, 65535, 65535)
# Indexes of more keys than that are not built: their memory is real.
_MOST_KEYS = 1 << 20


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Within it, Triton and ``nc_patch`` take the CPU for a GPU; yields the names of what is launched, as it comes.

    Raises:
        ValueError: from the launch, for a grid beyond the GPU's. Triton raises what it raises on a GPU for the rest.
    """
    launches: list[str] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self._name = metadata.name

        def __call__(self, x: int, y: int, z: int, *arguments: Any) -> None:
            if any(size > limit for size, limit in zip((x, y, z), LARGEST_GRID, strict=True)):
                raise ValueError(f"{self._name}: a grid is at most {LARGEST_GRID}, got {(x, y, z)}")
            launches.append(self._name)

    utils = SimpleNamespace(load_binary=lambda *_: (object(), 1, 0, 0, _THREADS), unload_module=lambda *_: None)
    with (
        pretended(_TARGET, utils=utils, launcher_cls=Launcher),
        mock.patch.object(compiler, "max_shared_mem", return_value=TARGETS[_TARGET].shared_limit),
    ):
        yield launches


def call_benchmark(arguments: Sequence[str]) -> None:
    """Calls each sparse step that ``nc-patch bench`` with these arguments times, at each of its shapes, once."""
    parsed = parser().parse_args([*arguments, "--out", "unused", "--device", "cpu"])
    settings, phase = settings_of(parsed), parsed.benchmark
    for case in settings.cases():
        if phase == "decode" and case.batch * case.length > _MOST_KEYS:
            print(f"not called: {case}: its indexes are too large to be made here")
            continue
        geometry, n = GEOMETRIES[case.geometry], case.length

        def empty(heads: int, length: int, batch: int = case.batch, width: int = geometry.head_dim) -> torch.Tensor:
            return torch.empty(batch, heads, length, width, dtype=settings.dtype)  # memory that is never touched

        queries = empty(geometry.heads, n if phase == "prefill" else 1)
        inputs = Inputs(queries, empty(geometry.kv_heads, n), empty(geometry.kv_heads, n))
        for selection in settings.selections:
            sparse_step([inputs], settings.config(selection), phase)(0)


def main(arguments: Sequence[str]) -> None:
    """Calls what the arguments name and prints how often each kernel was launched."""
    with torch.inference_mode(), pretended_gpu() as launches:
        if arguments[0] == "bench":
            call_benchmark(arguments[1:])
        else:
            sys.path.append(str(Path(__file__).parent.parent / "scripts"))
            from small_attention import small_calls

            list(small_calls(torch.device("cpu")))
    print(f"pretended {_TARGET}, triton {triton.__version__}: {len(launches)} launches")
    print("\n".join(f"{count:7} {kernel}" for kernel, count in sorted(Counter(launches).items())))
    if not launches:
        sys.exit("nothing was launched")


if __name__ == "__main__":
    main(sys.argv[1:])

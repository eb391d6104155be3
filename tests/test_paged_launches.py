"""What a GPU is asked for by a step over keys in blocks of memory; none is needed."""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

from pretended_gpu import pretended_gpu  # noqa: E402
from test_paged import Engine  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from nc_patch.paged import paged_block_attention, summarize_slots_  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set")


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's numbers, or a shape that follows from them, are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **kwargs or {})


def test_a_step_on_a_gpu_is_four_launches_and_reads_nothing_on_the_host():
    engine = Engine((50, 200), dims=(64, 64), dtype=torch.bfloat16)
    with torch.inference_mode(), pretended_gpu() as launches, NoHostReads():
        for _ in range(2):
            summarize_slots_(engine.paged, engine.sequences[0][2][-4:], "triton")
            paged_block_attention(engine.query, engine.paged, engine.rows_of_step, scale=1.0, backend="triton")
    step = ["summarize_slots_kernel", "score_pages_kernel", "choose_pages_kernel", "attend_pages_kernel"]
    assert [launch.kernel for launch in launches] == 2 * step

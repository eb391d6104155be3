"""Attention of a whole prompt at one layer, as a model calls it: intervals, budgets, choice of keys and attention.

The projections are the same for all methods and left out.
"""

from collections.abc import Sequence

import torch

from eval_tasks.bench.inputs import GEOMETRIES, Inputs, make_inputs
from eval_tasks.bench.measure import Benchmark, Row, Settings, check_memory, heads_bytes
from eval_tasks.bench.timing import Step
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention


def make_sets(settings: Settings, case: Row) -> list[Inputs]:
    """One prompt. Raises MemoryError where queries, keys, values and an output leave too little memory."""
    geometry = GEOMETRIES[case["geometry"]]
    check_memory(settings, case, 2 * (geometry.heads + geometry.kv_heads) * heads_bytes(settings, case))
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    return [make_inputs(geometry, case["batch"], case["length"], case["length"], settings.dtype, generator)]


def sparse_step(sets: Sequence[Inputs], config: NCConfig) -> Step:
    """A step of ``config.prefill``: attention of the whole prompt."""

    def step(i: int) -> torch.Tensor:
        output = sparse_attention(
            *(sets[i].query, sets[i].key, sets[i].value),
            alpha=config.alpha,  # type: ignore[arg-type]
            C=config.C,  # type: ignore[arg-type]
            selection=config.prefill,
            dense_below=config.dense_below,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return step


PREFILL = Benchmark(
    phase="prefill",
    what=(
        "Causal attention of a whole prompt at one layer: intervals, budgets, choice of keys, attention; medians of "
        "interleaved repeats. Dense: the fastest of all implementations that ran."
    ),
    unit="milliseconds a layer",
    per_second=1e3,
    selections=("block", "window", "topk"),
    defaults={
        "cpu": {
            "lengths": (1024, 2048, 4096, 8192),
            "geometry": ("smollm2",),
            "dtype": "float32",
            "repeats": 5,
            "forward": (2048,),
        },
        "cuda": {
            "lengths": (8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576),
            "geometry": ("llama3-8b",),
            "dtype": "bfloat16",
            "repeats": 20,
            "forward": (32768, 131072),
        },
    },
    make_sets=make_sets,
    sparse_step=sparse_step,
    growth=2.0,
    graphs=False,
    whole="forward",
)

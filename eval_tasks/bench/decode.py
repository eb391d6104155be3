"""One decoding step of one layer: upkeep of the index and the tail's means (one key taken in), choice, attention.

The projections and the write to the cache are the same for all methods and left out.
"""

from collections.abc import Sequence

import torch

from eval_tasks.bench.inputs import GEOMETRIES, Inputs, make_inputs
from eval_tasks.bench.measure import Benchmark, Row, Settings, check_memory, heads_bytes
from eval_tasks.bench.timing import Step
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.selections.index import KeyIndex

# Inputs rotate until together they are this many times the cache; fewer and more sets do not pay.
_TIMES_CACHE, _FEWEST_SETS, _MOST_SETS = 3, 4, 16
_CPU_CACHE_BYTES = 32 << 20
# Memory of a set per byte of keys and values: indexes, the copy in pages, and what dense attention expands.
_MEMORY_FACTOR = 2.5


def make_sets(settings: Settings, case: Row) -> list[Inputs]:
    """As many sets of inputs as keep the cache cold and the memory holds.

    Raises:
        MemoryError: not even one fits.
    """
    geometry, device = GEOMETRIES[case["geometry"]], settings.device
    size = 2 * geometry.kv_heads * heads_bytes(settings, case)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
    wanted = min(_MOST_SETS, max(_FEWEST_SETS, -(-_TIMES_CACHE * cache // size)))
    count = min(wanted, check_memory(settings, case, _MEMORY_FACTOR * size))
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(settings.seed, settings.seed + count)]
    return [make_inputs(geometry, case["batch"], case["length"], 1, settings.dtype, one) for one in generators]


def sparse_step(sets: Sequence[Inputs], config: NCConfig) -> Step:
    """A step of ``config.decode``: the last key is taken into the index, and into the page means; the query attends."""
    selection = config.decode
    indexes = [KeyIndex.build(one.key, kind) if (kind := selection.index_kind) else None for one in sets]
    means_of = [KeyIndex.build(one.key, "means", value=one.value) if selection.uses_means else None for one in sets]
    batch, _, length, _ = sets[0].key.shape
    end = torch.full((batch,), length, dtype=torch.int32, device=sets[0].key.device)

    def step(i: int) -> torch.Tensor:
        one, index, means = sets[i], indexes[i], means_of[i]
        if index is not None:
            index.extend(one.key, 1, end)
        if means is not None:
            means.extend(one.key, 1, end, one.value)
        output = sparse_attention(
            *(one.query, one.key, one.value),
            alpha=config.alpha,  # type: ignore[arg-type]
            C=config.C,  # type: ignore[arg-type]
            selection=selection,
            index=index,
            means=means,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return step


DECODE = Benchmark(
    phase="decode",
    what=(
        "One decoding step of one layer: upkeep of the indexes (one key), choice of keys, attention. CUDA graphs on a "
        "GPU; medians of interleaved repeats over rotating inputs. Dense: the fastest of all implementations that ran."
    ),
    unit="microseconds a step and layer",
    per_second=1e6,
    selections=("topk", "block", "window"),
    defaults={
        "cpu": {
            "lengths": (512, 2048, 8192),
            "geometry": ("smollm2",),
            "dtype": "float32",
            "repeats": 5,
            "generate": (1024,),
        },
        "cuda": {
            "lengths": (4096, 8192, 16384, 32768, 65536, 131072, 262144),
            "geometry": ("llama3-8b",),
            "dtype": "bfloat16",
            "repeats": 30,
            "generate": (32768,),
        },
    },
    make_sets=make_sets,
    sparse_step=sparse_step,
    growth=1.0,
    graphs=True,
    whole="generate",
)

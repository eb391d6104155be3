"""One decoding step of one layer, sparse against dense: every case of lengths, batches and geometries, timed.

A step is what a layer does once its new key and value are in the cache: upkeep of the index and the tail's means (one
key taken in), choice of keys, attention. The projections and the write to the cache are the same for all methods and
left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nc_patch.bench import generate
from nc_patch.bench.benchmark import Benchmark, Whole, Wording
from nc_patch.bench.cases import Case, Row, Settings, fail, judge, new_row, time_rows
from nc_patch.bench.checks import Expected, compare, expected_output
from nc_patch.bench.dense_rivals import Step, rivals
from nc_patch.bench.inputs import GEOMETRIES, DecodeInputs, concentration, make_inputs
from nc_patch.bench.machine import cache_bytes, free_bytes
from nc_patch.bench.timing import Prepared, prepare
from nc_patch.bench.traffic import copy_bandwidth, dense_bytes, sparse_bytes
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.selections.index import KeyIndex

# Inputs rotate until together they are this many times the cache; fewer and more sets do not pay.
_TIMES_CACHE, _FEWEST_SETS, _MOST_SETS = 3, 4, 16
# Memory that a set may take, per byte of keys and values: indexes, the copy in pages, and what dense attention expands.
_MEMORY_FACTOR, _MEMORY_SHARE = 2.5, 0.6


def measure_case(case: Case, settings: Settings, bandwidth: float, before: Sequence[Row], deadline: float) -> list[Row]:
    """One row for each dense implementation and each selection, in one case."""
    device, geometry = settings.device, GEOMETRIES[case.geometry]
    itemsize = settings.dtype.itemsize
    dense = dense_bytes(geometry, case.batch, case.length, itemsize)
    count = _set_count(dense, device)
    sets = [
        make_inputs(geometry, case.batch, case.length, settings.dtype, device, list(settings.selections), seed)
        for seed in range(settings.seed, settings.seed + count)
    ]
    configs = {name: settings.config(name) for name in ("dense", *settings.selections)}
    budget = configs["dense"].largest_budget(case.length)
    shared: dict[str, Any] = {"budget": budget, "input_sets": count, "scores": concentration(sets[0], budget)}
    rows: dict[str, Row] = {}
    ready: dict[str, Prepared] = {}
    right = {name: expected_output(sets[0], config) for name, config in configs.items()}
    for selection in settings.selections:
        config = configs[selection]
        moved = sparse_bytes(config.decode, geometry, case.batch, case.length, budget, itemsize)
        rows[selection] = new_row(case, selection, "sparse", bytes=moved, **shared)
        rows[selection] |= {"attended": right[selection].attended, "kept_mass": right[selection].kept_mass}
        _try(rows[selection], ready, partial(sparse_step, sets, config), sets, selection, right[selection], device)
    for name, make in rivals(device, settings.dense).items():
        rows[name] = new_row(case, name, "dense", bytes=dense, **shared)
        _try(rows[name], ready, partial(make, sets), sets, "dense", right["dense"], device)
    time_rows(rows, ready, "bytes", settings, bandwidth, deadline)
    return list(rows.values())


def sparse_step(sets: Sequence[DecodeInputs], config: NCConfig) -> Step:
    """A step of ``config.decode``: the last key is taken into the index, and into the page means; the query attends."""
    selection = config.decode
    means_of = [KeyIndex.build(one.key, "means", value=one.value) if selection.uses_means else None for one in sets]

    def step(i: int) -> torch.Tensor:
        one, means = sets[i], means_of[i]
        index = one.indexes.get(selection.name)
        if index is not None:
            index.extend(one.key, 1, one.end)
        if means is not None:
            means.extend(one.key, 1, one.end, one.value)
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


def _try(
    row: Row,
    ready: dict[str, Prepared],
    make: Callable[[], Step],
    sets: Sequence[DecodeInputs],
    selection: str,
    right: Expected,
    device: torch.device,
) -> None:
    """Makes, checks and prepares one method; whatever goes wrong is written into its row."""
    try:
        step = make()
        if not judge(row, compare(step(0), right, selection)):
            return
        prepared = prepare(step, len(sets), device)
        if prepared.replayed is not None and not judge(row, compare(prepared.replayed, right, selection)):
            row["message"] += ", in a CUDA graph"
            return
    except Exception as error:
        fail(row, error)
    else:
        ready[row["method"]] = prepared
        row |= {"captured": prepared.captured, "message": prepared.reason}


def _set_count(kv_bytes: int, device: torch.device) -> int:
    wanted = min(_MOST_SETS, max(_FEWEST_SETS, -(-_TIMES_CACHE * cache_bytes(device) // kv_bytes)))
    room = int(free_bytes(device) * _MEMORY_SHARE / (kv_bytes * _MEMORY_FACTOR))
    if room < 1:
        raise MemoryError(f"{kv_bytes / 1e9:.1f} GB of keys and values leave too little of the memory")
    return min(wanted, room)


def _bandwidth(device: torch.device, _: torch.dtype, megabytes: int) -> float:
    return copy_bandwidth(device, megabytes)


DECODE = Benchmark(
    name="decode",
    summary="one step of the operator, per layer, and generate()",
    what=(
        "One decoding step of one layer: upkeep of the indexes (one key), choice of keys, attention. CUDA graphs on a "
        "GPU; medians of interleaved repeats over rotating inputs. Dense: the fastest of all implementations that ran."
    ),
    lengths_are="keys",
    selections=("topk", "block", "window"),
    defaults={
        "cpu": {
            "lengths": (512, 2048, 8192),
            "geometry": ("smollm2",),
            "dtype": "float32",
            "repeats": 5,
            "generate": (1024,),
            "ceiling_size": 256,
        },
        "cuda": {
            "lengths": (4096, 8192, 16384, 32768, 65536, 131072, 262144),
            "geometry": ("llama3-8b",),
            "dtype": "bfloat16",
            "repeats": 30,
            "generate": (32768,),
            "ceiling_size": 2048,
        },
    },
    wording=Wording(
        unit="microseconds a step and layer",
        per_second=1e6,
        ceiling="the bandwidth of a copy at which the counted bytes were moved",
        counts="bytes at the bandwidth of a copy",
    ),
    ceiling_name="copy_bytes_per_second",
    ceiling=_bandwidth,
    ceiling_in_words=lambda bandwidth: f"copies {bandwidth / 1e9:,.0f} GB/s",
    measure=measure_case,
    growth=0.0,
    whole=Whole(
        "generate", "time generate() too, after prompts of N tokens", generate.measure_generate, generate.table
    ),
    add_options=lambda parser: None,
    options=lambda parsed: {},
)

"""Attention of a whole prompt at one layer, sparse against dense: every case of lengths, batches and geometries, timed.

Timed is the operator from queries, keys and values to the output, as a model calls it: intervals, budgets, choice of
keys and attention. The projections are the same for all methods and left out.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nc_patch.bench import forward
from nc_patch.bench.benchmark import Benchmark, Whole, Wording
from nc_patch.bench.cases import Case, Row, Settings, fail, is_wanted, judge, new_row, time_rows
from nc_patch.bench.checks import Expected, compare
from nc_patch.bench.dense_rivals import Step
from nc_patch.bench.flops import attend_flops, dense_flops, matrix_rate, score_flops, topk_flops
from nc_patch.bench.inputs import GEOMETRIES
from nc_patch.bench.machine import PeakMemory, free_bytes
from nc_patch.bench.prefill_checks import checked_rows, expected_rows
from nc_patch.bench.prefill_report import findings
from nc_patch.bench.prefill_rivals import rivals
from nc_patch.bench.prefill_steps import step_seconds
from nc_patch.bench.prompts import PromptInputs, make_prompt, prompt_concentration
from nc_patch.bench.timing import Prepared
from nc_patch.config import DEFAULT_DENSE_BELOW, NCConfig
from nc_patch.functional import attend, sparse_attention
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block, TopK
from nc_patch.selections.block.blocks import BLOCK_SIZES, QUERY_BLOCK_SIZES, SAMPLE_STRIDES, plan_of

# Repeats of a case go on for this long, and three in any case.
_CASE_SECONDS = 20.0
# Exponent of the length with which the time of dense attention grows.
_GROWTH = 2.0
# Of the free memory, the part that queries, keys, values and one output may take.
_MEMORY_SHARE = 0.6


def measure_case(case: Case, settings: Settings, rate: float, before: Sequence[Row], deadline: float) -> list[Row]:
    """One row for each dense implementation and each selection, in one case."""
    device, geometry, dense_config = settings.device, GEOMETRIES[case.geometry], settings.config("dense")
    _check_memory(case, settings)
    inputs = make_prompt(geometry, case.batch, case.length, settings.dtype, device, settings.seed)
    visible = causal_intervals(1, case.length, case.length, device)
    budgets = dense_config.row_budgets(visible, case.length, 0)[0, 0].cpu()
    shared: dict[str, Any] = {
        "budget": dense_config.largest_budget(case.length),
        "scores": prompt_concentration(inputs, budgets),
    }
    rows_of = checked_rows(case.length, settings.options.get("query_block_size", Block.query_block_size))
    rows: dict[str, Row] = {}
    ready: dict[str, Prepared] = {}
    for selection in settings.selections:
        row = rows[selection] = new_row(case, selection, "sparse", **shared)
        if is_wanted(row, before, deadline, growth=_GROWTH, always=selection == "block"):
            config = settings.config(selection)
            counted = partial(_count, row, inputs, config, case, device)
            right = partial(expected_rows, inputs, config, rows_of)
            _try(row, ready, partial(sparse_step, inputs, config), right, rows_of, device, counted)
    dense = _Once(partial(expected_rows, inputs, dense_config, rows_of))
    for name, make in rivals(device, settings.dense).items():
        row = new_row(case, name, "dense", flops=dense_flops(geometry, case.batch, case.length), **shared)
        rows[name] = row
        if is_wanted(row, before, deadline, growth=_GROWTH):
            _try(row, ready, partial(make, inputs), dense, rows_of, device)
    case_deadline = min(deadline, time.monotonic() + _CASE_SECONDS)
    time_rows(rows, ready, "flops", settings, rate, case_deadline)
    if "median_seconds" in rows.get("block", {}):
        try:
            rows["block"]["step_seconds"] = step_seconds(inputs, settings, deadline)
        except Exception as error:
            fail(rows["block"], error)
    return list(rows.values())


class _Once:
    """Calls a function when it is first called, and returns the same from then on."""

    def __init__(self, make: Callable[[], Expected]) -> None:
        self._make = make
        self._made: Expected | None = None

    def __call__(self) -> Expected:
        if self._made is None:
            self._made = self._make()
        return self._made


def sparse_step(inputs: PromptInputs, config: NCConfig) -> Step:
    """A step of ``config.prefill``: attention of the whole prompt; its argument is not looked at."""

    def step(_: int) -> torch.Tensor:
        output = sparse_attention(
            *(inputs.query, inputs.key, inputs.value),
            alpha=config.alpha,  # type: ignore[arg-type]
            C=config.C,  # type: ignore[arg-type]
            selection=config.prefill,
            dense_below=config.dense_below,
            backend=config.backend,
        )
        assert isinstance(output, torch.Tensor)
        return output

    return step


def _count(row: Row, inputs: PromptInputs, config: NCConfig, case: Case, device: torch.device, right: Expected) -> None:
    """Writes what a selection attends and computes into its row; block attention tells it after the fact."""
    geometry, selection, length = GEOMETRIES[case.geometry], config.prefill, case.length
    problem = inputs.problem(config)
    backend, reason = choose_backend(
        config.backend, device, head_dims=problem.head_dims, implemented=selection.backends("prefill")
    )
    row |= {"backend": backend, "backend_reason": reason, "kept_mass": right.kept_mass}
    pairs = case.batch * geometry.heads * int(problem.budget[0, 0].sum(dtype=torch.int64))
    if isinstance(selection, Block):
        result = attend(problem, selection, config.backend)
        assert result.attended is not None
        pairs = int(result.attended.sum(dtype=torch.int64))
        query_blocks, enlarged = (1, 0) if result.enlarged is None else result.enlarged.double().sum(0).tolist()
        row["enlarged"] = enlarged / query_blocks
        score = score_flops(geometry, case.batch, plan_of(problem, selection).samples)
        row["step_flops"] = {"score": score, "attend": attend_flops(geometry, pairs)}
        row["flops"] = sum(row["step_flops"].values())
    elif isinstance(selection, TopK):
        row["flops"] = topk_flops(geometry, case.batch, length, pairs)
    else:
        row["flops"] = attend_flops(geometry, pairs)
    row["attended"] = pairs / (case.batch * geometry.heads * length)


def _try(
    row: Row,
    ready: dict[str, Prepared],
    make: Callable[[], Step],
    right: Callable[[], Expected],
    rows: torch.Tensor,
    device: torch.device,
    count: Callable[[Expected], None] | None = None,
) -> None:
    """Makes, checks and prepares one method; whatever goes wrong is written into its row."""
    try:
        expected, step = right(), make()
        peak = PeakMemory(device)
        output = step(0)
        row["peak_bytes"] = peak.bytes()
        if not judge(row, _compare(output, expected, row["method"], rows)):
            return
        del output
        if count is not None:
            count(expected)
    except Exception as error:
        fail(row, error)
    else:
        ready[row["method"]] = Prepared(lambda: step(0), 1)


def _compare(output: torch.Tensor, right: Expected, method: str, rows: torch.Tensor) -> dict[str, Any]:
    found = compare(output[:1].index_select(2, rows.to(output.device)), right, method)
    finite = bool(output.isfinite().all())
    return {**found, "right": found["right"] and finite, "compared_rows": len(rows)}


def _check_memory(case: Case, settings: Settings) -> None:
    geometry = GEOMETRIES[case.geometry]
    heads = 2 * geometry.heads + 2 * geometry.kv_heads
    wanted = case.batch * case.length * heads * geometry.head_dim * settings.dtype.itemsize
    if wanted > _MEMORY_SHARE * free_bytes(settings.device):
        raise MemoryError(f"{wanted / 1e9:.1f} GB of queries, keys, values and outputs leave too little of the memory")


def _add_options(parser: argparse.ArgumentParser) -> None:
    block = parser.add_argument_group("block")
    for name, default, choices, what in (
        ("block_size", Block.size, BLOCK_SIZES, "keys of a block"),
        ("query_block_size", Block.query_block_size, QUERY_BLOCK_SIZES, "queries that choose together"),
    ):
        option = f"--{name.replace('_', '-')}"
        block.add_argument(option, type=int, choices=choices, default=default, help=f"{what}; by default {default}")
    stride = "every how many queries one is scored; by default it follows the budget"
    block.add_argument("--sample-stride", type=int, choices=SAMPLE_STRIDES, help=stride)
    block.add_argument("--local-keys", type=int, default=Block.local_keys, help="keys before a query block, always")
    block.add_argument("--min-mass", type=float, help="kept mass to enlarge the budget for; by default none")
    most = f"by how much it may be enlarged; by default {Block.max_factor:g}"
    block.add_argument("--max-factor", type=float, default=Block.max_factor, help=most)
    below = f"queries that see no more keys attend them all; by default {DEFAULT_DENSE_BELOW}"
    parser.add_argument("--dense-below", type=int, default=DEFAULT_DENSE_BELOW, help=below)


def _options(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("block_size", "query_block_size", "sample_stride", "local_keys", "min_mass", "max_factor", "dense_below")
    # What is counted and compared is the keys that are attended.
    return {name: getattr(parsed, name) for name in names} | {"tail": "drop"}


PREFILL = Benchmark(
    name="prefill",
    summary="attention of a whole prompt at one layer, and forward passes",
    what=(
        "Causal attention of a whole prompt at one layer: intervals, budgets, choice of keys, attention; medians of "
        "interleaved repeats. Dense: the fastest of all implementations that ran."
    ),
    lengths_are="tokens of the prompt",
    selections=("block", "window", "topk"),
    defaults={
        "cpu": {
            "lengths": (1024, 2048, 4096, 8192),
            "geometry": ("smollm2",),
            "dtype": "float32",
            "repeats": 5,
            "forward": (2048,),
            "ceiling_size": 1024,
        },
        "cuda": {
            "lengths": (8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576),
            "geometry": ("llama3-8b",),
            "dtype": "bfloat16",
            "repeats": 20,
            "forward": (32768, 131072),
            "ceiling_size": 8192,
        },
    },
    wording=Wording(
        unit="milliseconds a layer",
        per_second=1e3,
        ceiling="the matrix products' rate of this run at which the counted operations were done",
        counts="counted operations at the rate of a matrix product",
        notes="(kept masses are those of the rows that are compared)",
    ),
    ceiling_name="matrix_flops_per_second",
    ceiling=matrix_rate,
    ceiling_in_words=lambda rate: f"matrix products {rate / 1e12:,.3g} TFLOP/s",
    measure=measure_case,
    growth=_GROWTH,
    whole=Whole(
        "forward",
        "time whole forward passes too, of prompts of N tokens",
        forward.measure_forward,
        forward.table,
    ),
    add_options=_add_options,
    options=_options,
    findings=findings,
)

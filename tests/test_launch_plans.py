"""Grids of all kernel launches at the largest sizes, and what no launch may do on the way: read a tensor on the host.

The kernels are replaced by what records their grids, and the tensors have shapes but no memory, so that reading one
fails. Nothing of this needs a GPU.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from nc_patch import KeyIndex, ops, selections  # noqa: E402
from nc_patch.budget import budget_of  # noqa: E402
from nc_patch.ops import backends, custom_ops, decode_ops  # noqa: E402
from nc_patch.ops.by_backend import READS_HOST, BackendOp  # noqa: E402
from nc_patch.ops.means import PageMeans, slot_count  # noqa: E402
from nc_patch.ops.triton import launch as triton_launch  # noqa: E402
from nc_patch.selections.block import prefill as triton_block  # noqa: E402
from nc_patch.selections.block.pages import VECTORS, page_count  # noqa: E402
from nc_patch.selections.block.plan import BlockPlan  # noqa: E402
from nc_patch.selections.topk import decode as triton_decode_topk  # noqa: E402
from nc_patch.selections.topk.codes import KeyCodes  # noqa: E402

needs_tag = pytest.mark.skipif(not READS_HOST, reason="this version of PyTorch cannot mark such operations")
# What CUDA allows along a grid's axes.
LIMITS = (2**31 - 1, 65_535, 65_535)
KEYS = 1 << 21
BATCH, HEADS = 64, 64
MODULES = [
    importlib.import_module(module.name)
    for package in (ops, selections)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
KERNELS = {
    name
    for module in MODULES
    for name, value in vars(module).items()
    if name.endswith("_kernel") and hasattr(value, "arg_names")
}


class Launches:
    """Stands in for a kernel: takes a launch and keeps its grid."""

    def __init__(self, name: str, kernel: Any, grids: dict[str, tuple[int, ...]]) -> None:
        self.name, self.grids, self.arg_names = name, grids, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids[self.name] = grid
        return lambda *args, **options: None


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """Every kernel replaced; the grids of the launches, by the kernel's name."""
    found: dict[str, tuple[int, ...]] = {}
    for module in MODULES:
        for name in KERNELS & vars(module).keys():
            monkeypatch.setattr(module, name, Launches(name, getattr(module, name), found))
    return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def floats(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def row_arguments(queries: int, head_dim: int, tail: bool = False) -> tuple[Any, ...]:
    """Tensors and settings of the operations over rows: as many query heads as of keys, all of the keys."""
    query, key = meta(BATCH, HEADS, queries, head_dim), meta(BATCH, HEADS, KEYS, head_dim)
    return (
        *(query, key, key, integers(BATCH, queries, 2), integers(BATCH, 1, queries), None, 1.0, 0.0, 4, 4, True),
        "triton",
        *(tail_arguments(queries, head_dim) if tail else ()),
    )


def run(op: BackendOp | torch.library.CustomOpDef, *args: Any) -> Any:
    """What an operation runs on tensors with memory; without any the dispatcher would choose its fake."""
    return (op.function if isinstance(op, BackendOp) else op._init_fn)(*args)


def tail_arguments(queries: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    means = meta(BATCH, HEADS, slot_count(KEYS), head_dim)
    return means, means, integers(BATCH, queries)


def code_tensors(head_dim: int) -> tuple[torch.Tensor, ...]:
    half = meta(BATCH, HEADS, KEYS, head_dim // 2, dtype=torch.int8)
    number, channel = (BATCH, HEADS, KEYS), floats(BATCH, HEADS, head_dim)
    return half, half, floats(*number), meta(*number), meta(*number), channel, channel


def decode_by_codes(head_dim: int, tail: bool, bounds: bool) -> None:
    query, key = meta(BATCH, HEADS, 1, head_dim), meta(BATCH, HEADS, KEYS, head_dim)
    run(
        decode_ops.topk_decode,
        *(query, key, key, integers(BATCH, 1, 2), integers(BATCH, 1, 1), None, *code_tensors(head_dim)),
        *(1.0, 0.0, 4, 4, True, 20_000, bounds, "triton"),
        *(tail_arguments(1, head_dim) if tail else ()),
    )


def decode_by_pages(head_dim: int, block_size: int) -> None:
    query, key = meta(BATCH, HEADS, 1, head_dim), meta(BATCH, HEADS, KEYS, head_dim)
    pages = page_count(KEYS, block_size)
    run(
        decode_ops.block_decode,
        *(query, key, key, integers(BATCH, 1, 2), integers(BATCH, 1), integers(BATCH, 1, 1), None),
        *(meta(BATCH, HEADS, pages, VECTORS, head_dim, dtype=torch.int8), floats(BATCH, HEADS, pages, VECTORS)),
        *(1.0, 0.0, block_size, 20_000, True, "triton"),
    )


def attend_blocks(head_dim: int, block_size: int) -> None:
    """Scoring, choosing and attending a prompt's blocks; their plan, which is read on the host, is made up."""
    query, visible = meta(BATCH, HEADS, KEYS, head_dim), integers(BATCH, KEYS, 2)
    blocks, slots, capacity = BATCH * KEYS // 64, 4, 1024
    widths = [KEYS // block_size] * 64  # of a few of them; chunks of them are taken one by one
    count = integers(blocks, HEADS)
    plan = BlockPlan(integers(blocks, 8), integers(blocks, slots), count, count, widths, 64, capacity)
    tiles = triton_block.block_tiles("sm_80", query.dtype, head_dim, head_dim, block_size)
    settings = {"scale": 1.0, "softcap": 0.0, "block_size": block_size}
    indices, counts, _ = triton_block.choose_blocks(query, query, visible, plan, tiles.score, min_mass=0.5, **settings)
    lse, attended = floats(BATCH, HEADS, KEYS), integers(BATCH, HEADS, KEYS)
    triton_block.attend_blocks(
        *(query, query, query, visible, None, plan, indices, counts, tiles, query, lse, lse, attended), **settings
    )


def summarize(head_dim: int, block_size: int) -> None:
    pages, position = page_count(KEYS, block_size), integers(BATCH)
    run(
        decode_ops.summarize_pages_,
        *(meta(BATCH, HEADS, KEYS, head_dim), position, position, KEYS, position),
        *(meta(BATCH, HEADS, pages, VECTORS, head_dim, dtype=torch.int8), floats(BATCH, HEADS, pages, VECTORS)),
        *(block_size, "triton"),
    )


def encode(head_dim: int) -> None:
    key = meta(BATCH, HEADS, KEYS, head_dim)
    run(decode_ops.encode_keys_, key, integers(BATCH), KEYS, *code_tensors(head_dim), "triton")


def average(head_dim: int) -> None:
    key = meta(BATCH, HEADS, KEYS, head_dim)
    run(decode_ops.page_means, key, key, integers(BATCH, 1, 2), integers(BATCH, 1), "triton")
    means, _, position = tail_arguments(1, head_dim)
    run(decode_ops.page_means_, key, key, position[:, 0], position[:, 0], KEYS, means, means, "triton")


BLOCK_KERNELS = {"score_blocks", "choose_blocks", "attend_blocks", "blank_rows"}
CODE_KERNELS = {"sample", "guess", "scan", "score", "choose", "gather", "score_flagged", "choose_flagged", "combine"}
PAGE_KERNELS = {"score_pages", "choose_pages", "attend_pages", "combine", "attend"}
# What runs, and the kernels that it launches.
CALLS: dict[str, tuple[Callable[[int], None], set[str]]] = {
    "topk": (lambda D: run(custom_ops.topk_attention, *row_arguments(KEYS, D)), {"threshold", "attend"}),
    "topk-tail": (
        lambda D: run(custom_ops.topk_attention, *row_arguments(KEYS, D, True)),
        {"threshold", "attend_tail"},
    ),
    "window": (lambda D: run(custom_ops.window_attention, *row_arguments(KEYS, D)), {"attend"}),
    "block-16": (lambda D: attend_blocks(D, 16), BLOCK_KERNELS),
    "block-128": (lambda D: attend_blocks(D, 128), BLOCK_KERNELS),
    "codes": (
        lambda D: decode_by_codes(D, False, True),
        {*CODE_KERNELS, "bounds"},
    ),
    "codes-tail": (
        lambda D: decode_by_codes(D, True, False),
        {*CODE_KERNELS, "tail"},
    ),
    "pages-16": (
        lambda D: decode_by_pages(D, 16),
        {"score_pages", "choose_pages", "attend_pages", "combine", "attend"},
    ),
    "pages-128": (
        lambda D: decode_by_pages(D, 128),
        {"score_pages", "choose_pages", "attend_pages", "combine", "attend"},
    ),
    "summarize": (lambda D: summarize(D, 16), {"summarize"}),
    "encode": (encode, {"encode"}),
    "means": (average, {"means"}),
}


@pytest.mark.parametrize("bounds", [False, True], ids=["plain", "bounds"])
@pytest.mark.parametrize(("sequences", "queries", "tail"), [(8, 32, True), (8, 1, True), (1, 32, False), (1, 2, False)])
def test_decoding_holds_no_more_memory_than_allowed_and_as_much_as_it_counts(
    sequences, queries, tail, bounds, grids, monkeypatch
):
    # Llama-3-8B at 131,072 tokens, where several queries of several sequences would take gigabytes.
    D, keys = 128, 131_072
    held: list[int] = []
    counted: list[int] = []
    empty, decode = torch.empty, triton_decode_topk._decode_at_once
    count = triton_decode_topk.Plan.scratch_bytes

    def counting_empty(*shape, **options):
        made = empty(*shape, **options)
        held[-1:] = [sum(held[-1:]) + made.nbytes]
        return made

    def decoding(*args, **options):
        held.append(0)
        results = decode(*args, **options)
        held[-1] -= sum(result.nbytes for result in results[1:])  # the output is no ``torch.empty``
        held.append(0)
        return results

    monkeypatch.setattr(torch, "empty", counting_empty)
    monkeypatch.setattr(triton_decode_topk, "_decode_at_once", decoding)
    monkeypatch.setattr(
        triton_decode_topk.Plan, "scratch_bytes", lambda *args: counted.append(count(*args)) or counted[-1]
    )
    query, key = (empty(sequences, H, L, D, dtype=torch.bfloat16, device="meta") for H, L in ((32, queries), (8, keys)))
    integer = {"dtype": torch.int32, "device": "meta"}
    visible, budget = empty(sequences, queries, 2, **integer), empty(sequences, 1, queries, **integer)
    half = empty(sequences, 8, keys, D // 2, dtype=torch.int8, device="meta")
    number = empty(sequences, 8, keys, dtype=torch.bfloat16, device="meta")
    channel = empty(sequences, 8, D, device="meta")
    codes = KeyCodes(half, half, number.float(), number, number, channel, channel)
    means = PageMeans(*(empty(sequences, 8, slot_count(keys), D, dtype=torch.bfloat16, device="meta"),) * 2)
    triton_decode_topk.triton_topk_decode(
        *(query, key, key, visible, budget, None, codes), scale=0.1, softcap=0.0, sink_keys=4, recent_keys=4,
        refine=True, max_budget=4_705, want_bounds=bounds, tail=means if tail else None,
        origin=visible[..., 0] if tail else None,
    )  # fmt: skip
    largest = max(held)
    assert largest <= triton_decode_topk.SCRATCH_BYTES
    # What is counted is what is allocated.
    assert largest == pytest.approx(counted[-1], rel=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("call", CALLS)
def test_no_grid_is_larger_than_cuda_allows(call, head_dim, grids):
    launch, launched = CALLS[call]
    launch(head_dim)
    assert grids.keys() == {f"{name}_kernel" for name in launched}
    for name, grid in grids.items():
        assert all(1 <= size <= limit for size, limit in zip(grid, LIMITS, strict=False)), (name, grid)


def meta_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operation that a decoding step or a prompt may run on the PyTorch backend, with tensors without memory."""
    B, Hkv, Lq, Lk, D, block_size = 2, 2, 3, 90, 32, 16
    query, key = meta(B, 2 * Hkv, Lq, D), meta(B, Hkv, Lk, D)
    visible, budget, position = integers(B, Lq, 2), integers(B, 1, Lq), integers(B)
    rows = (query, key, key, visible, budget, None)
    half, number, channel = meta(B, Hkv, Lk, D // 2, dtype=torch.int8), (B, Hkv, Lk), floats(B, Hkv, D)
    codes = (half, half, floats(*number), meta(*number), meta(*number), channel, channel)
    pages = page_count(Lk, block_size)
    statistics = meta(B, Hkv, pages, VECTORS, D, dtype=torch.int8), floats(B, Hkv, pages, VECTORS)
    means = (meta(B, Hkv, slot_count(Lk), D),) * 2
    blocks = (*rows[:4], visible[..., 0], budget, None, 1.0, 0.0, block_size, 64, 16, 0.0, 4.0, "sampled")
    return {
        "row_budgets": (custom_ops.row_budgets, (visible, Lk, [2.0], [0.5], 1, "power")),
        "topk_attention": (custom_ops.topk_attention, (*rows, 1.0, 0.0, 4, 4, True, "torch")),
        "window_attention": (custom_ops.window_attention, (*rows, 1.0, 0.0, 4, 4, True, "torch")),
        "block_attention": (custom_ops.block_attention, (*blocks, True, "torch")),
        "attention_backward": (custom_ops.attention_backward, (query, *rows, 1.0, 0.0, 4, 4, "topk")),
        "block_attention_backward": (custom_ops.block_attention_backward, (query, *blocks)),
        "encode_keys_": (decode_ops.encode_keys_, (key, position, 5, *codes, "torch")),
        "summarize_pages_": (
            decode_ops.summarize_pages_,
            (key, position, position, 20, position, *statistics, block_size, "torch"),
        ),
        "page_means": (decode_ops.page_means, (key, key, visible, visible[..., 0], "torch")),
        "page_means_": (decode_ops.page_means_, (key, key, position, position, 5, *means, "torch")),
        "topk_decode": (
            decode_ops.topk_decode,
            (*rows, *codes, 1.0, 0.0, 4, 4, True, 20, False, "torch"),
        ),
        "block_decode": (
            decode_ops.block_decode,
            (*rows[:4], visible[..., 0], budget, None, *statistics, 1.0, 0.0, block_size, 20, False, "torch"),
        ),
    }


@needs_tag
@pytest.mark.parametrize("name", meta_calls())
def test_an_operation_of_pytorch_that_reads_a_tensor_on_the_host_is_left_out_of_cuda_graphs(name):
    op, args = meta_calls()[name]
    registered = op.of("torch") if isinstance(op, BackendOp) else op
    tagged = READS_HOST[0] in registered._opoverload.tags
    # PyTorch raises where there is nothing to read.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta") if tagged else contextlib.nullcontext():
        run(op, *args)


@needs_tag
def test_an_operation_of_triton_that_reads_nothing_on_the_host_may_be_in_a_cuda_graph():
    for op, _ in meta_calls().values():
        if isinstance(op, BackendOp):  # the calls above run them without memory
            assert READS_HOST[0] not in op.of("triton")._opoverload.tags


def test_the_calls_are_of_every_operation():
    registered = {
        name
        for module in (custom_ops, decode_ops)
        for name, value in vars(module).items()
        if isinstance(value, BackendOp | torch._library.custom_ops.CustomOpDef)
    }
    assert registered == meta_calls().keys()


def test_the_calls_launch_every_kernel():
    assert {f"{name}_kernel" for _, launched in CALLS.values() for name in launched} == KERNELS


class PretendedDriver:
    """As much of a driver of an H200 as Triton asks for before it compiles a kernel."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """What each launch would have compiled, which nothing does: kernels and what they are specialised for."""
    found: set[tuple[str, str]] = set()
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedDriver())
    monkeypatch.setattr(triton_launch, "architecture_of", lambda device: "sm_90")

    def skip(*, key: str, fn: Any, **_: Any) -> bool:
        found.add((fn.name, key))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", skip)
    return found


def heads(queries: int, keys: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as a projection leaves them, and keys as a cache keeps them, of 8 and 2 heads."""
    return torch.zeros(1, queries, 8, D).transpose(1, 2).bfloat16(), torch.zeros(1, 2, keys, D).bfloat16()


def packed(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(visible, origin) of a causal call, views of one tensor as the mask function makes it."""
    end = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    whole = torch.stack((torch.zeros_like(end), end, torch.zeros_like(end)), -1)[None]
    return whole[..., :2], whole[..., 2]


def prefill(n: int, D: int) -> None:
    query, key = heads(n, n, D)
    visible, origin = packed(n, n)
    budget = torch.full((1, 1, n), 64, dtype=torch.int32)
    rows = (query, key, key, visible, budget, None, 0.1, 0.0)
    run(custom_ops.topk_attention, *rows, 4, 4, False, "triton")
    run(custom_ops.window_attention, *rows, 4, 4, False, "triton")
    blocks = (*rows[:4], origin, budget, None, 0.1, 0.0, 32, 64, 16, 0.0, 4.0, "sampled")
    run(custom_ops.block_attention, *blocks, False, "triton")
    means = run(decode_ops.page_means, key, key, visible, origin, "triton")
    run(custom_ops.topk_attention, *rows, 4, 4, False, "triton", *means, origin)


def step(n: int, D: int, indexes: dict[str, KeyIndex], alpha: float = 4.0) -> None:
    """One step of a generation with n keys, by every index."""
    query, key = heads(1, n, D)
    visible, origin = packed(1, n)
    k = budget_of(n, alpha, 0.6)
    budget = torch.full((1, 1, 1), k, dtype=torch.int32)
    end = torch.tensor([n], dtype=torch.int32)
    for index in indexes.values():
        index.extend(key, 1, end, key)
    rows = (query, key, key, visible)
    means = indexes["means"].means()
    for tail in ((), (*means, origin)):
        run(
            decode_ops.topk_decode,
            *(*rows, budget, None, *indexes["codes"].codes(), 0.1, 0.0, 4, 4, True, k, True, "triton", *tail),
        )
    pages = indexes["pages"].pages()
    run(decode_ops.block_decode, *rows, origin, budget, None, *pages, 0.1, 0.0, 32, k, False, "triton")


def indexes_of(n: int, D: int) -> dict[str, KeyIndex]:
    _, key = heads(1, n, D)
    return {
        kind: KeyIndex.build(key, kind, value=key if kind == "means" else None, backend="triton")
        for kind in ("codes", "pages", "means")
    }


@pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter compiles nothing")
def test_prompts_of_other_lengths_and_further_steps_compile_nothing_new(variants, monkeypatch):
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)
    for head_dim in (80, 128):
        prefill(1000, head_dim)
        indexes = indexes_of(1000, head_dim)
        step(1001, head_dim, indexes)
        step(1130, head_dim, indexes)
        first = set(variants)
        for n in (1001, 1007, 1008, 1024, 1025, 1040, 1100):
            prefill(n, head_dim)
            step(n + 1, head_dim, indexes_of(n, head_dim))
        indexes = indexes_of(1000, head_dim)
        for n in range(1001, 1200):
            step(n, head_dim, indexes)
        assert variants == first
    assert {name for name, _ in variants} == KERNELS

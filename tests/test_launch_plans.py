"""Grids of all kernel launches at the largest sizes, and what no launch may do on the way: read a tensor on the host.

The kernels are replaced by what checks their grids, and the tensors have shapes but no memory, so that reading one
fails. Nothing of this needs a GPU.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need triton")

from operations import problem_of  # noqa: E402
from pretended_gpu import pretended_gpu  # noqa: E402
from recorded_launches import hooked, library_kernels  # noqa: E402
from test_paged import Engine  # noqa: E402

from nc_patch import KeyIndex, library, sparse_attention  # noqa: E402
from nc_patch import budget as budget_module  # noqa: E402
from nc_patch.budget import budget_of, row_budgets  # noqa: E402
from nc_patch.ops import backends  # noqa: E402
from nc_patch.ops.backends import READS_HOST  # noqa: E402
from nc_patch.ops.means import PageMeans, slot_count  # noqa: E402
from nc_patch.ops.problem import Problem  # noqa: E402
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention, summarize_slots_  # noqa: E402
from nc_patch.selections import Block, Dense, Selection, TopK, Window, index  # noqa: E402
from nc_patch.selections.block import prefill as triton_block  # noqa: E402
from nc_patch.selections.block.blocks import PLAN_COLUMNS, BlockPlan, PlannedBlock  # noqa: E402
from nc_patch.selections.block.pages import VECTORS, PageStatistics  # noqa: E402
from nc_patch.selections.block.summarize import triton_summarize_slots_  # noqa: E402
from nc_patch.selections.index import LAYOUTS  # noqa: E402
from nc_patch.selections.topk import decode as triton_decode_topk  # noqa: E402

needs_tag = pytest.mark.skipif(not READS_HOST, reason="this version of PyTorch cannot mark such operations")
pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter compiles nothing")
# What CUDA allows along a grid's axes.
LIMITS = (2**31 - 1, 65_535, 65_535)
KEYS = 1 << 21
BATCH, HEADS = 64, 64
KERNELS = {kernel.fn.__name__ for kernel in library_kernels()}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that are launched, which run nothing and take only grids that CUDA allows."""
    found: set[str] = set()

    def check(kernel: Any, *_: Any, grid: tuple[int, ...], **options: Any) -> None:
        name = kernel.fn.__name__
        assert all(1 <= size <= limit for size, limit in zip(grid, LIMITS, strict=False)), (name, grid)
        found.add(name)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", check)
    return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def floats(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def of_rows(queries: int, head_dim: int, **more: Any) -> Problem:
    """A problem of as many query heads as of keys, all of the keys."""
    query, key = meta(BATCH, HEADS, queries, head_dim), meta(BATCH, HEADS, KEYS, head_dim)
    return problem_of(query, key, key, integers(BATCH, queries, 2), integers(BATCH, 1, queries), **more)


def mean_tensors(head_dim: int) -> PageMeans:
    return PageMeans(*(meta(BATCH, HEADS, slot_count(KEYS), head_dim),) * 2)


def code_tensors(head_dim: int) -> tuple[torch.Tensor, ...]:
    number, channel = floats(BATCH, HEADS, KEYS), floats(BATCH, HEADS, head_dim)
    return meta(BATCH, HEADS, KEYS, head_dim, dtype=torch.int8), number, number, channel, channel


def page_tensors(head_dim: int, block_size: int) -> tuple[torch.Tensor, ...]:
    pages = LAYOUTS["pages"].rows(KEYS, block_size)
    codes = meta(BATCH, HEADS, pages, VECTORS, head_dim, dtype=torch.int8)
    return codes, floats(BATCH, HEADS, pages, VECTORS)


def run(selection: Selection, queries: int, head_dim: int, **more: Any) -> None:
    selection.run(of_rows(queries, head_dim, **more), "triton")


def by_pages(block_size: int, head_dim: int, queries: int = 1, **more: Any) -> None:
    pages = page_tensors(head_dim, block_size)
    run(Block(block_size), queries, head_dim, key_index=pages, page_size=block_size, most=20_000, **more)


class Shown(list[list[int]]):
    """The beginning of a list of another length."""

    length: int

    def __len__(self) -> int:
        return self.length


def attend_blocks(head_dim: int, block_size: int) -> None:
    """Scoring, choosing and attending a prompt's blocks; their plan, which is read on the host, is made up."""
    query, visible = meta(BATCH, HEADS, KEYS, head_dim), integers(BATCH, KEYS, 2)
    blocks, scored = BATCH * KEYS // 64, 4
    width = KEYS // block_size
    # As many as there are, of which a few are listed; chunks of them are taken one by one.
    listed = Shown([PlannedBlock(0, 0, 64, 0, KEYS, 0, 0, width, scored * number, scored) for number in range(64)])
    listed.length = blocks
    count, samples = integers(blocks, HEADS), integers(blocks * scored)
    rows = (integers(blocks, PLAN_COLUMNS), meta(BATCH, KEYS, dtype=torch.int64))
    plan = BlockPlan(*rows, count, count, count, samples, samples, listed, 1024)
    tiles = triton_block.block_tiles("sm_80", query.dtype, head_dim, head_dim, block_size)
    problem = problem_of(query, query, query, visible, integers(BATCH, 1, KEYS), stats=True)
    choice, _ = triton_block.choose_blocks(problem, plan, tiles.score, Block(block_size, min_mass=0.5))
    triton_block.attend_blocks(problem, plan, choice, tiles, block_size)


def write(kind: str, index: tuple[torch.Tensor, ...], head_dim: int, block_size: int = 16) -> None:
    """Takes all keys into an index."""
    key, position = meta(BATCH, HEADS, KEYS, head_dim), integers(BATCH)
    values = (key,) if LAYOUTS[kind].takes_values else ()
    LAYOUTS[kind].write(list(index), [key, position, position, position, *values], KEYS, block_size, "triton")


def summarize_slots(head_dim: int) -> None:
    """New keys of blocks of memory, as many as grids allow keys of one sequence."""
    keys, codes = meta(2**18, HEADS, 16, head_dim), meta(2**18, HEADS, 1, VECTORS, head_dim, dtype=torch.int8)
    statistics = PageStatistics(codes, floats(2**18, HEADS, 1, VECTORS))
    triton_summarize_slots_(keys, statistics, meta(KEYS, dtype=torch.int64), 16)


def launch_everything(D: int) -> None:
    """Every kernel, at the largest sizes."""
    by_codes: dict[str, Any] = {"key_index": code_tensors(D), "most": 20_000}
    for selection in (TopK(4, 4, "drop"), Window(4)):
        run(selection, KEYS, D, stats=True)
    run(TopK(4, 4), KEYS, D, means=mean_tensors(D), stats=True)
    run(TopK(4, 4, "drop"), 1, D, bounds=True, **by_codes)
    run(TopK(4, 4), 1, D, means=mean_tensors(D), **by_codes)
    for block_size in (16, 128):
        attend_blocks(D, block_size)
        by_pages(block_size, D)
    by_pages(16, D, stats=True)
    by_pages(16, D, new=1)
    by_pages(16, D, 2, new=2)
    TopK().with_means(of_rows(1, D), "triton")
    for kind, tensors in (("pages", page_tensors(D, 16)), ("codes", code_tensors(D)), ("means", mean_tensors(D))):
        write(kind, tensors, D)
    summarize_slots(D)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_grid_is_larger_than_cuda_allows(head_dim, launched):
    launch_everything(head_dim)
    assert launched == KERNELS


@pytest.mark.parametrize(
    ("sequences", "queries", "tail", "bounds"), [(8, 32, True, True), (8, 1, True, False), (1, 32, False, True)]
)
def test_decoding_holds_no_more_memory_than_allowed(sequences, queries, tail, bounds, launched, monkeypatch):
    # Llama-3-8B at 131,072 tokens, where several queries of several sequences would take gigabytes.
    held, decode = [], triton_decode_topk._decode_at_once
    decoding = lambda plan, *rest: held.append(4 * plan.offsets[-1]) or decode(plan, *rest)  # noqa: E731
    for name, size in (("KEYS", 131_072), ("BATCH", sequences), ("HEADS", 8)):
        monkeypatch.setitem(globals(), name, size)
    problem = of_rows(queries, 128, key_index=code_tensors(128), most=4_705, bounds=bounds)
    problem = problem._replace(query=meta(sequences, 32, queries, 128), means=mean_tensors(128) if tail else None)
    monkeypatch.setattr(triton_decode_topk, "_decode_at_once", decoding)
    triton_decode_topk.bound_topk_decode(problem, 4, 4)(problem)
    assert 0 < max(held) <= triton_decode_topk.SCRATCH_BYTES


def meta_calls() -> list[tuple[Any, Callable[[], Any]]]:
    """Each operation that PyTorch runs, with calls of what it runs on tensors without memory."""
    problem, at, pages = of_rows(3, 32, stats=True), integers(BATCH), page_tensors(32, 16)
    by_codes = problem._replace(key_index=code_tensors(32), most=20, stats=False)
    by_pages = problem._replace(key_index=pages, page_size=16, most=20)
    topk, window, block = TopK(4, 4, "drop"), Window(4), Block(16)
    attended = [(selection, problem) for selection in (topk, window, block)]
    attended += [(topk, by_codes), (topk, by_codes._replace(new=1)), (block, by_pages)]
    calls = [(library.operation(chosen, of, "torch"), partial(chosen.run, of, "torch")) for chosen, of in attended]
    for selection in (topk, block):
        given = (problem.query, problem.tensors(), *library.arguments(selection, problem, "torch")[:3])
        calls.append((library._attend_backward, partial(library._attend_backward._init_fn, *given)))
    written = (list(pages), [problem.key, at, at, at], 20, 16, "torch")
    calls.append((index._EXTEND[True], partial(LAYOUTS["pages"].write, *written)))
    return [*calls, (row_budgets, partial(row_budgets._init_fn, problem.visible, KEYS, [2.0], [0.5], 1, 30))]


@needs_tag
@pytest.mark.parametrize(("op", "call"), meta_calls())
def test_an_operation_of_pytorch_that_reads_a_tensor_on_the_host_is_left_out_of_cuda_graphs(op, call):
    tagged = READS_HOST[0] in op._opoverload.tags
    # PyTorch raises where there is nothing to read.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta") if tagged else contextlib.nullcontext():
        call()


@needs_tag
def test_an_operation_of_triton_that_reads_nothing_on_the_host_may_be_in_a_cuda_graph():
    # The calls above run them without memory.
    problem = problem_of(*(meta(1, 1, 1, 16),) * 3, integers(1, 1, 2), integers(1, 1, 1))
    for selection in (TopK(), Window(), Block(), Dense()):
        for given in (problem, problem._replace(key_index=(meta(1),))):
            reads = READS_HOST[0] in library.operation(selection, given, "triton")._opoverload.tags
            assert reads == (isinstance(selection, Block) and not given.key_index)
            step = library.operation(selection, given._replace(new=1), "triton")
            assert reads == (READS_HOST[0] in step._opoverload.tags)
    assert READS_HOST[0] not in index._EXTEND[False]._opoverload.tags


def test_the_calls_are_of_every_operation():
    registered = {
        value
        for module in (library, index, budget_module)
        for value in (*vars(module).values(), *index._EXTEND.values(), *library._OPERATIONS.values())
        if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    of_triton = {library._OPERATIONS["attend", False], library._OPERATIONS["decode", False], index._EXTEND[False]}
    assert registered == {op for op, _ in meta_calls()} | of_triton


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
    for options in ({"tail": "drop"}, {"tail": "mean"}, {"selection": "window"}, {"selection": "block"}):
        sparse_attention(
            query, key, key, **{"selection": "topk", "alpha": 1.0, "C": 0.6, "backend": "triton"} | options
        )


def step(n: int, D: int, indexes: dict[str, KeyIndex], alpha: float = 4.0) -> None:
    """One step of a generation with n keys, by every index."""
    query, key = heads(1, n, D)
    visible, origin = packed(1, n)
    k = budget_of(n, alpha, 0.6)
    budget = torch.full((1, 1, 1), k, dtype=torch.int32)
    end = torch.tensor([n], dtype=torch.int32)
    for each in indexes.values():
        each.extend(key, 1, end, key)
    problem = problem_of(query, key, key, visible, budget, scale=0.1, origin=origin, most=k)
    by_codes = problem._replace(
        key_index=indexes["codes"].tensors(), means=PageMeans(*indexes["means"].tensors()), bounds=True
    )
    for tail in ("drop", "mean"):
        TopK(4, 4, tail).run(by_codes._replace(new=1), "triton")
    # By its own upkeep too, which takes in once more what is there.
    for new in (0, 1):
        by_pages = problem._replace(key_index=indexes["pages"].tensors(), page_size=32, new=new)
        Block().run(by_pages, "triton")


def indexes_of(n: int, D: int) -> dict[str, KeyIndex]:
    _, key = heads(1, n, D)
    return {
        kind: KeyIndex.build(key, kind, value=key if kind == "means" else None, backend="triton")
        for kind in ("codes", "pages", "means")
    }


NAMES = {
    TopK: ("prepare", "guess", "scan", "scan", "choose", "gather"),
    Block: ("score_pages", "choose_pages", "attend_pages"),
}


@pytest.mark.parametrize("selection", [TopK(tail="drop"), Block()])
def test_a_step_is_a_few_launches_at_none_of_which_triton_looks_again(selection, monkeypatch):
    compiled: list[str] = []
    launched: list[tuple[str, int]] = []

    class Compiled:
        """What Triton returns for a launch."""

        def __init__(self, kernel: Any) -> None:
            self.name, self.arguments = kernel.fn.__name__, len(kernel.arg_names)
            compiled.append(self.name)

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, stream=0: launched.append((self.name, len(arguments) - self.arguments))

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda kernel, *args, **options: Compiled(kernel))
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)
    monkeypatch.setattr(triton_decode_topk, "_STEPS", {})
    query, _ = heads(1, 3200, 64)
    visible, origin = packed(1, 1100)
    index, room = indexes_of(3200, 64)[str(selection.index_kind)].tensors(), 64
    compiled.clear()
    names = [f"{name}_kernel" for name in NAMES[type(selection)]]
    for n in (1100, 1101, 1102):
        visible[..., 1] = n
        keys = torch.zeros(1, 2, 3200, 64, dtype=torch.bfloat16)[:, :, :n]
        problem = problem_of(query, keys, keys, visible, torch.full((1, 1, 1), room, dtype=torch.int32), scale=0.1)
        problem = problem._replace(origin=origin, key_index=index, page_size=32, most=room, new=1)
        selection.run(problem, "triton")
        assert compiled == names
    assert launched == [(name, 0) for name in names] * 2
    # Memory that begins elsewhere is looked at.
    assert origin.data_ptr() % 16
    selection.run(problem._replace(origin=origin.clone()), "triton")
    assert compiled == names * 2


def test_a_step_over_blocks_of_memory_is_four_launches_and_reads_nothing_on_the_host():
    engine = Engine((50, 200), dims=(64, 64), dtype=torch.bfloat16)
    paged = PagedKeys(*(t.to("meta") for t in engine.paged[:4]), 16)
    slots, query = engine.sequences[0][2][-4:].to("meta"), engine.query.to("meta")
    rows = PagedRows(*(t.to("meta") for t in (engine.table, engine.visible, engine.given_budget)), 70)
    with torch.inference_mode(), pretended_gpu() as launches:
        for _ in range(2):
            summarize_slots_(paged, slots, "triton")
            paged_block_attention(query, paged, rows, scale=1.0, backend="triton")
    step = ["summarize_slots_kernel", "score_pages_kernel", "choose_pages_kernel", "attend_pages_kernel"]
    assert [launch.kernel for launch in launches] == 2 * step


def test_prompts_of_other_lengths_and_further_steps_compile_nothing_new():
    variants: set[tuple[str, str]] = set()
    with hooked("sm_90", lambda *, key, fn, **_: variants.add((fn.name, key)) or True):
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
            for n in (*range(1001, 1034), *range(1040, 1200, 13)):
                step(n, head_dim, indexes)
            assert variants == first
    assert {name for name, _ in variants} == KERNELS - {"summarize_slots_kernel"}  # of serving engines

"""Grids of all kernel launches at the largest sizes, and what no launch may do on the way: read a tensor on the host.

The kernels are replaced by what checks their grids, and the tensors have shapes but no memory, so that reading one
fails. Nothing of this needs a GPU.
"""

from collections import defaultdict
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from transformers import DynamicCache

triton = pytest.importorskip("triton", reason="the kernels need triton")

from attention_cases import Shape  # noqa: E402
from operations import problem_of, problem_of_case  # noqa: E402
from pretended_gpu import LARGEST_GRID  # noqa: E402
from recorded_launches import hooked, library_kernels, pretended  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

from nc_patch import KeyIndex, library, patch_model  # noqa: E402
from nc_patch.budget import row_budgets  # noqa: E402
from nc_patch.functional import by_index  # noqa: E402
from nc_patch.ops import backends  # noqa: E402
from nc_patch.ops.means import PageMeans  # noqa: E402
from nc_patch.ops.problem import Problem  # noqa: E402
from nc_patch.ops.triton import decoding  # noqa: E402
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention  # noqa: E402
from nc_patch.selections import Block, Dense, Selection, TopK, Window, index  # noqa: E402
from nc_patch.selections.block.pages import VECTORS, PageStatistics  # noqa: E402
from nc_patch.selections.block.summarize import triton_summarize_slots_  # noqa: E402
from nc_patch.selections.index import LAYOUTS  # noqa: E402
from nc_patch.selections.topk import decode as triton_decode_topk  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter compiles nothing")
KEYS = 1 << 21
BATCH, HEADS = 64, 64
KERNELS = {kernel.fn.__name__ for kernel in library_kernels()}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that are launched, which run nothing and take only grids that CUDA allows."""
    found: set[str] = set()

    def check(kernel: Any, *_: Any, grid: tuple[int, ...], **options: Any) -> None:
        name = kernel.fn.__name__
        assert all(1 <= size <= limit for size, limit in zip(grid, LARGEST_GRID, strict=False)), (name, grid)
        found.add(name)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", check)
    monkeypatch.setattr(backends, "triton_problem", lambda device: None)
    return found


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


integers = partial(meta, dtype=torch.int32)


def of_rows(queries: int, D: int, batch: int = BATCH, heads: int = HEADS, keys: int = KEYS, **more: Any) -> Problem:
    """A problem of as many query heads as of keys, all of the keys."""
    query, key = meta(batch, heads, queries, D), meta(batch, heads, keys, D)
    return problem_of(query, key, key, integers(batch, queries, 2), integers(batch, 1, queries), **more)


def tensors_of(kind: str, key: torch.Tensor, block_size: int = 16) -> list[torch.Tensor]:
    """An index of the keys."""
    layout, at = LAYOUTS[kind], integers(len(key))
    return layout.allocate(key, key, (at, at), layout.rows(key.shape[2], block_size))


def run(selection: Selection, problem: Problem, *kinds: str, **more: Any) -> None:
    """Attention with indexes of these kinds."""
    found = {kind: tuple(tensors_of(kind, problem.key, selection.page_size)) for kind in kinds}
    means = PageMeans(*found.pop("means")) if "means" in found else None
    given = {"key_index": next(iter(found.values()), ()), "page_size": selection.page_size, "most": 20_000, **more}
    selection.run(problem._replace(means=means, **given), "triton")


# Of a prompt, whose query blocks are counted on the host.
PREFILL_BY_BLOCKS = {f"{name}_kernel" for name in ("score_blocks", "choose_blocks", "attend_blocks")}


def launch_everything(D: int) -> None:
    """Every kernel but those of a prompt's blocks, at the largest sizes."""
    prompt, step, two = of_rows(KEYS, D), of_rows(1, D), of_rows(2, D)
    for selection in (TopK(4, 4, "drop"), Window(4)):
        run(selection, prompt, stats=True)
    run(TopK(4, 4), prompt, "means", stats=True)
    run(TopK(4, 4, "drop"), step, "codes", bounds=True)
    run(TopK(4, 4), step, "codes", "means")
    run(Block(128), step, "pages")
    run(Block(16), step, "pages", stats=True)
    run(Block(16), step, "pages", new=1)
    run(Block(16), two, "pages", new=2)
    TopK().with_means(step, "triton")
    for kind, layout in LAYOUTS.items():  # that take in all keys
        values = (step.key,) if layout.takes_values else ()
        layout.write(tensors_of(kind, step.key), [step.key, *(integers(BATCH),) * 3, *values], KEYS, 16, "triton")
    # New keys of blocks of memory, as many as grids allow keys of one sequence.
    keys, codes = meta(2**18, HEADS, 16, D), meta(2**18, HEADS, 1, VECTORS, D, dtype=torch.int8)
    statistics = PageStatistics(codes, meta(2**18, HEADS, 1, VECTORS, dtype=torch.float32))
    triton_summarize_slots_(keys, statistics, meta(KEYS, dtype=torch.int64), 16)
    paged = PagedKeys(keys, keys, *statistics, 16)
    rows = PagedRows(integers(1, 2**16), integers(1), integers(1, 1), 20_000)
    paged_block_attention(meta(1, HEADS, D), paged, rows, scale=1.0, backend="triton")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_grid_is_larger_than_cuda_allows(head_dim, launched):
    launch_everything(head_dim)
    assert launched == KERNELS - PREFILL_BY_BLOCKS


@pytest.mark.parametrize(
    ("sequences", "queries", "tail", "bounds"), [(8, 32, True, True), (8, 1, True, False), (1, 32, False, True)]
)
def test_decoding_holds_no_more_memory_than_allowed(sequences, queries, tail, bounds, launched, monkeypatch):
    # Llama-3-8B at 131,072 tokens, where several queries of several sequences would take gigabytes.
    held, decode = [], triton_decode_topk._decode_at_once
    watched = lambda launches, *rest: held.append(4 * launches.scratch_size) or decode(launches, *rest)  # noqa: E731
    problem = of_rows(queries, 128, sequences, 8, 131_072)._replace(query=meta(sequences, 32, queries, 128))
    monkeypatch.setattr(triton_decode_topk, "_decode_at_once", watched)
    kinds = ("codes", "means") if tail else ("codes",)
    run(TopK(4, 4, "mean" if tail else "drop"), problem, *kinds, most=4_705, bounds=bounds)
    assert 0 < max(held) <= triton_decode_topk.SCRATCH_BYTES


def test_operations_that_read_a_tensor_on_the_host_are_left_out_of_cuda_graphs():
    tagged = lambda op: backends.READS_HOST[0] in op._opoverload.tags  # noqa: E731
    problem = problem_of(*(meta(1, 1, 1, 16),) * 3, integers(1, 1, 2), integers(1, 1, 1))
    ways = product((TopK(), Window(), Block(), Dense()), ((), (meta(1),)), (0, 1), ("torch", "triton"))
    for selection, key_index, new, backend in ways:
        op = library.operation(selection, problem._replace(key_index=key_index, new=new), backend)
        # The others of Triton have run above without memory, as this one does: where there is nothing to read.
        assert tagged(op) == (backend == "torch" or (isinstance(selection, Block) and not key_index))
    assert list(map(tagged, (library._attend_backward, index._EXTEND[True], index._EXTEND[False]))) == [1, 1, 0]
    assert not tagged(row_budgets)
    row_budgets._init_fn(problem.visible, KEYS, [2.0], [0.5], 1, 30)


@pytest.mark.parametrize(
    ("way", "kernels"),
    [
        ("codes", ("prepare", "guess", "scan", "scan", "choose", "gather")),
        ("pages", ("score_pages", "choose_pages", "attend_pages")),
    ],
)
def test_a_step_is_a_few_launches_at_none_of_which_triton_looks_again(way, kernels, monkeypatch):
    compiled: list[str] = []
    launched: list[tuple[str, int]] = []

    def compile(kernel: Any, *_: Any, **options: Any) -> dict[Any, Any]:
        """What Triton returns for a launch, by grid."""
        compiled.append(name := kernel.fn.__name__)
        again = lambda *given, stream=0: launched.append((name, len(given) - len(kernel.arg_names)))  # noqa: E731
        return defaultdict(lambda: again)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile)
    monkeypatch.setattr(decoding, "_DECODERS", {})
    case = Shape("step", (), torch.bfloat16, kv_heads=2, queries=1, keys=3200, budget=64).case()
    interval = torch.tensor([[[0, 1100, 0]]], dtype=torch.int32)  # as the mask function makes visible and origin
    names = [f"{name}_kernel" for name in kernels]
    with pretended("sm_90"):
        selection, index = case.selection(way), KeyIndex.build(case.key, way, backend="triton")
        compiled.clear()
        problem = by_index(problem_of_case(case), index, 64)
        problem = problem._replace(visible=interval[..., :2], origin=interval[..., 2], new=1)
        for n in (1100, 1101, 1102):
            interval[..., 1] = n
            selection.run(problem._replace(key=case.key[:, :, :n], value=case.value[:, :, :n]), "triton")
            assert compiled == names
        assert launched == [(name, 0) for name in names] * 2
        # Memory that begins elsewhere is looked at.
        assert problem.origin.data_ptr() % 16
        selection.run(problem._replace(origin=problem.origin.clone()), "triton")
    assert compiled == names * 2


SETTINGS = (
    *({"selection": "topk", "tail": tail} for tail in ("mean", "drop")),
    *({"selection": name} for name in ("block", "window")),
)


@pytest.mark.parametrize("head_dim", [80, 128])
def test_prompts_of_other_lengths_and_further_steps_compile_nothing_new(head_dim):
    variants: set[tuple[str, str]] = set()
    token = torch.zeros(1, 1, dtype=torch.int64)
    model = tiny_model("llama", head_dim=head_dim, num_hidden_layers=1).bfloat16()

    def generate(length: int, steps: int) -> None:
        cache = DynamicCache(config=model.config)
        for count in (length, *(1,) * steps):
            model(token.expand(1, count), past_key_values=cache)

    with hooked("sm_90", lambda *, key, fn, **_: variants.add((fn.name, key)) or True), torch.inference_mode():
        for options in SETTINGS:
            patch_model(model, 1.0, 0.6, backend="triton", key_index="always", **options)
            generate(1000, 2)
            first = set(variants)
            for n, steps in ((1000, 40), (1007, 2), (1008, 2), (1024, 2), (1025, 2), (1100, 30)):
                generate(n, steps)
                assert variants == first
    assert {name for name, _ in variants} == KERNELS - {"summarize_slots_kernel"}  # of serving engines

"""Decoding over pages against the float64 reference: on a GPU where there is one, and in Triton's interpreter.

``test_every_case_in_the_interpreter`` runs this file again in a process in which kernels are interpreted.
"""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton
import triton.language as tl
from gpu_semantics import check_as_on_a_gpu
from operations import (
    INTERPRETED,
    assert_close,
    on_kernel_device,
    problem_of,
    reference_attention,
    summarize_pages,
)

from nc_patch.ops.problem import Problem
from nc_patch.ops.triton.launch import Tiles, shape_of
from nc_patch.ops.triton.split import arrives_last, join_parts, write_joined
from nc_patch.ops.triton.structs import Rows, Softmax
from nc_patch.selections import Block
from nc_patch.selections.block import decode as triton_decode_block
from nc_patch.selections.block.decode import triton_block_decode
from nc_patch.selections.block.pages import PageStatistics, page_count
from nc_patch.selections.block.summarize import triton_summarize_pages_

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles in the interpreter."""
    # Few pages at a time make short inputs cross many chunks.
    monkeypatch.setattr(triton_decode_block, "_CHOOSE_AT_ONCE", 4)


@dataclass(frozen=True)
class Case:
    """One input. ``origins`` are those of the sequences; ``window`` slides over the keys; ``spare`` keys follow."""

    name: str
    dtype: torch.dtype = torch.float32
    kv_heads: int = 1
    group: int = 2
    queries: int = 1
    keys: int = 200
    head_dim: int = 64
    value_dim: int | None = None
    origins: tuple[int, ...] = (0,)
    window: int = 0
    spare: int = 0
    block_size: int = 16
    budget: int = 70
    per_head: bool = False
    softcap: float = 0.0
    sinks: bool = False
    stats: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain"),
    Case("bf16-g4-d128-p32", torch.bfloat16, group=4, head_dim=128, keys=331, block_size=32, budget=90),
    Case("fp16-g3-d80-left-padding", torch.float16, group=3, head_dim=80, origins=(0, 37), queries=2),
    Case("g7-per-head-budgets", group=7, kv_heads=2, per_head=True, sinks=True),
    Case("g1-sliding-window-softcap", group=1, queries=5, window=111, softcap=2.0, origins=(3, 50), budget=50),
    Case("bf16-sinks-softcap", torch.bfloat16, kv_heads=2, softcap=5.0, sinks=True),
    Case("sixteen-queries", group=1, queries=16, keys=150, budget=40, stats=False),
    Case("negative-origin", origins=(-21, -5), queries=2),
    Case("static-cache", origins=(0, 29), queries=2, spare=83),
    Case("transposed", kv_heads=2, transposed=True, origins=(0, 8)),
    Case("narrow-values-p64", head_dim=96, value_dim=40, block_size=64, keys=350, budget=130),
    Case("everything", budget=1000, queries=2, sinks=True),
    Case("budget-of-one", budget=1),
    Case("one-key", keys=1, group=3),
    Case("wide-group", group=19, budget=40),
]


def inputs_of(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Random inputs on the CPU; keys and values after the sequences' end hold NaN."""
    g = torch.Generator().manual_seed(seed)
    B, heads, Lq = len(case.origins), case.kv_heads * case.group, case.queries

    def normal(count: int, length: int, width: int) -> torch.Tensor:
        shape = (B, length, count, width) if case.transposed else (B, count, length, width)
        made = torch.randn(shape, generator=g).to(case.dtype)
        return made.transpose(1, 2) if case.transposed else made

    key = normal(case.kv_heads, case.keys + case.spare, case.head_dim)
    value = normal(case.kv_heads, case.keys + case.spare, case.value_dim or case.head_dim)
    key[:, :, case.keys :] = value[:, :, case.keys :] = torch.nan
    origin = torch.tensor(case.origins, dtype=torch.int32)[:, None].repeat(1, Lq)
    end = torch.arange(case.keys - Lq + 1, case.keys + 1, dtype=torch.int32).repeat(B, 1)
    start = origin.clamp(min=0)
    if case.window:
        start = torch.maximum(start, end - case.window)
    n = (end - start)[:, None]
    share = torch.rand(B, heads, Lq, generator=g) if case.per_head else torch.ones(B, 1, Lq)
    return {
        "query": normal(heads, Lq, case.head_dim),
        "key": key,
        "value": value,
        "visible": torch.stack((start, end), -1),
        "origin": origin,
        "budget": (share * case.budget).ceil().int().minimum(n).contiguous(),
        "sinks": torch.randn(heads, generator=g) if case.sinks else None,
    }


def statistics_of(case: Case, inputs: dict[str, torch.Tensor | None]) -> PageStatistics:
    """The page statistics; pages after the last that is seen hold NaN, and so does the last, which is read from K."""
    key, origin = inputs["key"], inputs["origin"][:, 0]
    pages = page_count(key.shape[2] - min(0, *case.origins), case.block_size) + 3
    end = torch.full_like(origin, case.keys)
    found = summarize_pages(key, origin, end, torch.zeros_like(origin), pages, case.block_size)
    for b, begin in enumerate(case.origins):
        # A query's own page is read from K, so that no later page's statistics matter.
        unseen = (case.keys - 1 - begin) // case.block_size
        found.codes[b, :, unseen:], found.scales[b, :, unseen:] = 99, torch.nan
    return found


def run(case: Case, device: str, inputs, statistics=None):
    statistics = statistics_of(case, inputs) if statistics is None else statistics
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    index = tuple(x.to(device) for x in statistics)
    result = triton_block_decode(problem_of_run(case, moved, index))
    return [result.output.new_empty(0) if x is None else x.cpu() for x in result[:4]]


def problem_of_run(case: Case, inputs: dict[str, torch.Tensor | None], index: tuple[torch.Tensor, ...]) -> Problem:
    return problem_of(
        **inputs,
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        key_index=index,
        page_size=case.block_size,
        most=case.budget,
        stats=case.stats,
    )


def reference(case: Case, inputs):
    # Zero has the same effect as what is unwritten, which the reference multiplies by zero.
    clean = {**inputs, "key": inputs["key"].clone()}
    clean["key"][:, :, case.keys :] = 0
    return reference_attention(
        **clean,
        selection="pages",
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        block_size=case.block_size,
    )


def exact_statistics(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A page ``[Hkv, n, D]`` in float64: levels ``[Hkv, 3, D]`` that codes round, how far float32 may be off, scales.

    In any order a sum of n numbers is off by less than n roundings of the sum of their sizes; a division by two ulps.
    So a code is what its level rounds to, or a neighbour where the level lies that close to the middle of the two.
    """
    keys, n, rounding = keys.double(), keys.shape[1], 2.0**-24
    far = (keys - keys.mean(1, keepdim=True)).square().sum(-1).argmax(-1)
    others = torch.stack([torch.cat((page[:f], page[f + 1 :])) for page, f in zip(keys, far.tolist(), strict=True)])
    mean = others.mean(1)
    off = others - mean[:, None]
    vectors = torch.stack((keys[torch.arange(len(keys)), far], mean, off.square().mean(1)), 1)
    of_mean = (n + 4) * rounding * others.abs().mean(1)
    of_variance = (n + 8) * rounding * vectors[:, 2] + 2 * of_mean * off.abs().mean(1)
    largest = vectors.abs().amax(-1, keepdim=True)
    # A level is off by its vector's error and by that of the largest, which makes the step.
    error = torch.stack((torch.zeros_like(of_mean), of_mean, of_variance), 1).amax(-1, keepdim=True) / largest
    step = largest[..., 0] / 127
    scales = torch.cat((step[:, :2], step[:, 2:].sqrt()), -1)
    return 127 * vectors / largest, 127 * (2 * error + 8 * rounding), scales


def check(case: Case, device: str, inputs) -> None:
    output, lse, kept_mass, attended = run(case, device, inputs)
    expected = reference(case, inputs)
    assert output.dtype == case.dtype
    assert torch.equal(attended, expected.attended)
    assert_close(output, expected.output, TOLERANCE[case.dtype])
    if case.stats:
        assert_close(lse, expected.lse, 1e-5)
        assert_close(kept_mass, expected.kept_mass, 1e-5)
    else:
        assert lse.numel() == kept_mass.numel() == 0


@on_kernel_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case, device):
    check(case, device, inputs_of(case))


@on_kernel_device
def test_ties_go_to_the_lower_page(device):
    case = Case("ties", group=1, queries=2, keys=256, budget=112)
    inputs = inputs_of(case)
    # Pages of equal keys of a few kinds: their statistics and logits are exact, and most pages tie.
    kinds = torch.arange(16) % 3
    inputs["query"].zero_()[..., 0] = 8.0
    inputs["key"].zero_()[..., 0] = kinds.repeat_interleave(16).float() * 0.25
    output, _, _, attended = run(case, device, inputs)
    expected = reference(case, inputs)
    assert torch.equal(attended, expected.attended)
    assert_close(output, expected.output, 1e-5)


@on_kernel_device
def test_equal_pages_are_all_tied(device):
    case = Case("equal", group=3, keys=192, budget=80)
    inputs = inputs_of(case)
    # Whole numbers: their sums have the same bits in any order.
    inputs["query"] = inputs["query"].round()
    inputs["key"].fill_(0.5)
    check(case, device, inputs)


@on_kernel_device
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_unattended_value_may_be_anything_and_an_attended_one_is_seen(broken, device):
    case = Case("values", group=2, stats=False)
    inputs = inputs_of(case)
    plain = reference(case, inputs).output
    # An all-zero query weighs every page alike: pages 0 to 3 and the own one are attended.
    inputs["query"].zero_()
    inputs["key"].fill_(0.25)
    inputs["value"][:, :, 150] = broken
    output = run(case, device, inputs)[0]
    assert plain.isfinite().all()
    assert output.isfinite().all()
    inputs["value"][:, :, 3, 5] = broken
    assert_close(run(case, device, inputs)[0], reference(case, inputs).output, 1e-5)


@on_kernel_device
def test_a_page_with_a_nan_key_is_chosen_first(device):
    case = Case("nan-key", group=2, kv_heads=2, budget=48)
    inputs = inputs_of(case)
    inputs["key"][:, 0, 100] = torch.nan
    output, lse, kept_mass, attended = run(case, device, inputs)
    expected = reference(case, inputs)
    assert_close(output, expected.output, 1e-5)
    assert torch.equal(attended, expected.attended)
    assert output[:, :2].isnan().all()
    assert output[:, 2:].isfinite().all()
    assert lse[:, 2:].isfinite().all()
    assert kept_mass[:, 2:].isfinite().all()


@on_kernel_device
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_without_keys_is_zero(sinks, device):
    case = Case("empty", queries=3, keys=60, origins=(0, 20), sinks=sinks)
    inputs = inputs_of(case)
    inputs["visible"][1, 0] = 25
    inputs["visible"][0, 1] = 0
    inputs["budget"] = inputs["budget"].minimum((inputs["visible"][..., 1] - inputs["visible"][..., 0])[:, None])
    check(case, device, inputs)


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("first", "count"), [((40, 55), 1), ((33, 47), 16), ((0, 0), 90)])
def test_summaries_follow_new_keys(first, count, dtype, device):
    g = torch.Generator().manual_seed(0)
    block_size, pages, D = 16, 9, 80
    key = torch.randn(2, 3, 100, D, generator=g).to(dtype)
    origin, first = torch.tensor([0, 13]), torch.tensor(first)
    end = first + count
    for b in range(2):
        key[b, :, int(end[b]) :] = torch.nan
    codes = torch.full((2, 3, pages, 3, D), 77, dtype=torch.int8, device=device)
    scales = torch.full((2, 3, pages, 3), 7.0, device=device)
    # As the buffers of a cache may be: views of something larger.
    found = PageStatistics(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (codes, scales)))
    triton_summarize_pages_(
        *(x.to(device) for x in (key, origin.int(), first)), count, end.to(device), found, block_size
    )
    for b in range(2):
        begins = [int(origin[b]) + j * block_size for j in range(pages)]
        written = [
            j for j, begin in enumerate(begins) if int(first[b]) < begin + block_size <= int(end[b])
        ]  # fmt: skip
        for j in written:
            levels, slack, scales = exact_statistics(key[b, :, begins[j] : begins[j] + block_size])
            assert_close(found.scales[b, :, j].cpu(), scales, 1e-5)
            assert ((found.codes[b, :, j].cpu() - levels).abs() <= 0.5 + slack).all()
        rest = [j for j in range(pages) if j not in written]
        assert (found.codes[b, :, rest] == 77).all()
        assert (found.scales[b, :, rest] == 7).all()


def index_of(case: Case, inputs: dict[str, torch.Tensor | None], missing: int) -> PageStatistics:
    """An index of all keys but the last ``missing`` of each sequence; NaN, and codes of 99, of what is not whole."""
    key, origin = inputs["key"], inputs["origin"][:, -1].contiguous()
    pages = page_count(key.shape[2], case.block_size) + 2
    codes = torch.full((*key.shape[:2], pages, 3, key.shape[3]), 99, dtype=torch.int8, device=key.device)
    index = PageStatistics(codes, torch.full(codes.shape[:4], torch.nan, device=key.device))
    end = torch.full_like(origin, case.keys - missing)
    triton_summarize_pages_(key, origin, torch.zeros_like(end), case.keys, end, index, case.block_size)
    return index


# Keys that end with a page of the first sequence, that begin one and that lie within one.
@on_kernel_device
@pytest.mark.parametrize(("queries", "keys"), [(1, 160), (1, 161), (1, 170), (3, 161)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_that_takes_in_its_keys_leaves_and_attends_by_the_index_that_is_built_afresh(
    dtype, queries, keys, device
):
    case = Case("new", dtype, 2, 3, queries, keys, 80, origins=(0, 7, -22), spare=9, budget=50, stats=False)
    inputs = {name: x if x is None else x.to(device) for name, x in inputs_of(case).items()}
    before, index, afresh = (index_of(case, inputs, missing) for missing in (queries, queries, 0))
    block = Block(case.block_size)
    problem = problem_of_run(case, inputs, index)._replace(new=queries)
    assert block.takes_in(problem, "triton") == (queries == 1)
    found = block.run(problem, "triton")
    expected = block.run(problem_of_run(case, inputs, afresh), "triton")
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.attended, expected.attended)
    completed = [(keys - b) // 16 > (keys - queries - b) // 16 for b in case.origins]
    for kept, built, old in zip(index, afresh, before, strict=True):
        torch.testing.assert_close(kept, built, rtol=0, atol=0, equal_nan=True)
        assert [not torch.equal(*pair) for pair in zip(kept.nan_to_num(), old.nan_to_num(), strict=True)] == completed


@on_kernel_device
def test_a_key_goes_into_an_index_that_is_a_view_of_something_larger(device):
    case = Case("view", kv_heads=2, keys=160, stats=False)
    inputs = {name: x if x is None else x.to(device) for name, x in inputs_of(case).items()}
    afresh, kept = index_of(case, inputs, 0), index_of(case, inputs, 1)
    kept = PageStatistics(*(torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in kept))
    Block(case.block_size).run(problem_of_run(case, inputs, kept)._replace(new=1), "triton")
    torch.testing.assert_close(tuple(kept), tuple(afresh), rtol=0, atol=0, equal_nan=True)


@triton.jit
def join_kernel(parts, sinks, attended, arrivals, last, output, lse, lse_keys, rows, num_heads, Lq, count, shape):
    """The last of ``count`` programs joins the parts of a block of rows; every program says whether it is the last."""
    row = tl.program_id(0) * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
    valid = row < rows
    arrived = arrives_last(arrivals + tl.program_id(0), count)
    tl.store(last + tl.program_id(0) * count + tl.program_id(1), arrived.to(tl.int32))
    if arrived:
        written = Rows(None, None, None, (row // Lq) % num_heads, row, valid, None, None, None)
        joined = join_parts(parts, written, row * count, 1, count, shape)
        write_joined(joined, written, sinks, tl.load(attended + row, mask=valid), output, lse, lse_keys, shape)


@on_kernel_device
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_join_to_the_whole(sinks, device):
    g = torch.Generator().manual_seed(0)
    rows, splits, width = 12, 5, 40
    logits, values = torch.randn(rows, splits, 7, generator=g).double() * 3, torch.randn(rows, splits, 7, width)
    logits[3] = -torch.inf
    sink = torch.randn(3, generator=g) if sinks else None
    base2 = logits * 1.4426950408889634
    peak = base2.amax(-1)
    weights = torch.exp2(base2 - torch.where(peak.isinf(), 0.0, peak)[..., None])
    acc, total = (weights[..., None] * values).sum(-2).float(), weights.sum(-1).float()
    peak = peak.float()
    for idle in ((1, 2), (5,)):
        peak[idle], total[idle], acc[idle], logits[idle] = -torch.inf, 0.0, torch.nan, -torch.inf
    attended = torch.full((2, 3, 2), 9, dtype=torch.int32)
    attended.view(-1)[5] = 0
    output, lse, lse_keys = torch.empty(2, 3, 2, width), torch.empty(2, 3, 2), torch.empty(2, 3, 2)
    arrivals, last = torch.zeros(2, dtype=torch.int32), torch.full((2, splits), 7, dtype=torch.int32)
    tensors = (acc, peak, total, sink, attended, output, lse, lse_keys, arrivals, last)
    moved = [x if x is None else x.to(device) for x in tensors]
    acc, peak, total, sink_logits, attended, output, lse, lse_keys, arrivals, last = moved
    join_kernel[(2, splits)](
        parts=Softmax(acc, peak, total),
        sinks=sink_logits,
        attended=attended,
        arrivals=arrivals,
        last=last,
        output=output,
        lse=lse,
        lse_keys=lse_keys,
        rows=rows,
        num_heads=3,
        Lq=2,
        count=splits,
        shape=shape_of(width, width, Tiles(8, 16, 4, 1)),
    )
    assert arrivals.tolist() == [splits, splits]
    assert last.sum(1).tolist() == [1, 1]
    expected_keys = torch.logsumexp(logits.flatten(1), -1)
    expected = expected_keys
    if sink is not None:
        expected = torch.logaddexp(expected, sink.double()[None, :, None].expand(2, 3, 2).reshape(-1))
    result = torch.einsum("rsn,rsnd->rd", torch.exp(logits - expected[:, None, None]), values.double())
    result[5] = 0
    assert_close(output.cpu().view(rows, width), result, 1e-5)
    assert_close(lse.cpu().view(rows), expected, 1e-5)
    assert_close(lse_keys.cpu().view(rows), expected_keys, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": torch.zeros(1, 2, dtype=torch.int32)}, "origin must be int32"),
        ({"codes": torch.zeros(1, 1, 13, 3, 32, dtype=torch.int8)}, "page_codes must be"),
        ({"scales": torch.zeros(1, 1, 13, 3).double()}, "page_scales must be"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    case = Case("plain")
    inputs = inputs_of(case)
    parts = {**statistics_of(case, inputs)._asdict(), **change}
    problem = problem_of_run(case, inputs, (parts.pop("codes"), parts.pop("scales")))._replace(**parts)
    with pytest.raises(ValueError, match=message):
        triton_block_decode(problem)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)

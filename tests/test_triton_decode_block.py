"""What is special in Triton's decoding over pages: ties, broken numbers, upkeep of the index, and the join of parts.

As in ``test_triton_kernels.py`` the interpreter needs a process of its own, which the last test starts.
"""

import pytest
import torch
from attention_cases import Case, Shape, check
from test_key_index import assert_summarises

triton = pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl  # noqa: E402
from gpu_semantics import check_as_on_a_gpu  # noqa: E402
from operations import INTERPRETED, assert_close, on_kernel_device, problem_of_case  # noqa: E402
from test_triton_kernels import FP32_BF16, small_sizes  # noqa: E402

from nc_patch import KeyIndex  # noqa: E402
from nc_patch.functional import by_index  # noqa: E402
from nc_patch.ops.problem import Problem  # noqa: E402
from nc_patch.ops.triton.launch import Tiles, shape_of  # noqa: E402
from nc_patch.ops.triton.split import arrives_last, join_parts, write_joined  # noqa: E402
from nc_patch.ops.triton.structs import Rows, Softmax  # noqa: E402
from nc_patch.selections import Block  # noqa: E402
from nc_patch.selections.block.decode import triton_block_decode  # noqa: E402
from nc_patch.selections.block.pages import PageStatistics  # noqa: E402
from nc_patch.selections.block.summarize import triton_summarize_pages_  # noqa: E402

small_tiles = pytest.fixture(small_sizes)


def decode_shape(**more: object) -> Shape:
    """A query of two heads over a dozen pages."""
    return Shape("pages", ("pages",), **{"queries": 1, "keys": 200, "budget": 70} | more)


@on_kernel_device
@pytest.mark.parametrize("kinds", [1, 3])
def test_ties_go_to_the_lower_page(kinds, device):
    case = decode_shape(group=3, queries=2, keys=256, budget=112).case()
    # Pages of equal keys of a few kinds: their statistics and logits are exact, and most pages tie.
    case.query.zero_()[..., 0] = 8.0
    case.key.zero_()[..., 0] = (torch.arange(16) % kinds).repeat_interleave(16).float() * 0.25
    check("pages", case, "triton", device)


@on_kernel_device
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_unattended_value_may_be_anything_and_an_attended_one_is_seen(broken, device):
    case = decode_shape().case()
    # An all-zero query weighs every page alike: pages 0 to 3 and the own one are attended.
    case.query.zero_()
    case.key.fill_(0.25)
    case.value[:, :, 150] = broken
    assert check("pages", case, "triton", device).output.isfinite().all()
    case.value[:, :, 3, 5] = broken
    assert not check("pages", case, "triton", device).output.isfinite().all()


@on_kernel_device
def test_a_page_with_a_nan_key_is_chosen_first(device):
    case = decode_shape(kv_heads=2, budget=48).case()
    case.key[:, 0, 100] = torch.nan
    expected = case.reference("pages")
    problem = case.problem("pages", "triton", device, stats=True)
    result = Block(16).run(problem, "triton")
    assert_close(result.output.cpu(), expected.output, 1e-5)
    assert torch.equal(result.attended.cpu(), expected.attended)
    assert result.output[:, :2].isnan().all()
    for of_other_heads in (result.output, result.lse, result.kept_mass):
        assert of_other_heads[:, 2:].isfinite().all()


@on_kernel_device
def test_a_row_without_keys_beside_others_is_zero(device):
    case = decode_shape(batch=2, queries=3, keys=60, intervals="padding", sinks=True).case()
    case.visible[1, 0], case.visible[0, 1] = 25, 0
    case.budget = case.budget.minimum(case.rows)
    assert not check("pages", case, "triton", device).output[0, :, 1].any()


@on_kernel_device
@FP32_BF16
@pytest.mark.parametrize(("first", "count"), [((40, 55), 1), ((33, 47), 16), ((0, 0), 90)])
def test_summaries_follow_new_keys(first, count, dtype, device):
    key = torch.randn(2, 3, 100, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    origin, first = torch.tensor([0, 13]), torch.tensor(first)
    end = first + count
    for b in range(2):
        key[b, :, int(end[b]) :] = torch.nan
    codes = torch.full((2, 3, 9, 3, 80), 77, dtype=torch.int8, device=device)
    scales = torch.full((2, 3, 9, 3), 7.0, device=device)
    # As the buffers of a cache may be: views of something larger.
    found = PageStatistics(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (codes, scales)))
    triton_summarize_pages_(*(x.to(device) for x in (key, origin.int(), first)), count, end.to(device), found, 16)
    written = 0
    for b, j in ((b, j) for b in range(2) for j in range(9)):
        begin = int(origin[b]) + 16 * j
        codes, scales = found.codes[b, :, j].cpu(), found.scales[b, :, j].cpu()
        if int(first[b]) < begin + 16 <= int(end[b]):
            written += 1
            for h in range(3):
                assert_summarises(codes[h], scales[h], key[b, h, begin : begin + 16])
        else:
            assert (codes == 77).all()
            assert (scales == 7).all()
    assert written == {1: 0, 16: 2, 90: 9}[count]


def problem_by(index: KeyIndex, case: Case, device: str) -> Problem:
    return by_index(problem_of_case(case, device), index, int(case.budget.max()))


# Keys that end with a page of the first sequence, that begin one and that lie within one.
@on_kernel_device
@pytest.mark.parametrize(("queries", "keys"), [(1, 160), (1, 161), (1, 170), (3, 161)])
@FP32_BF16
def test_a_step_that_takes_in_its_keys_leaves_and_attends_by_the_index_that_is_built_afresh(
    dtype, queries, keys, device
):
    case = decode_shape(dtype=dtype, batch=3, kv_heads=3, queries=queries, keys=keys, head_dim=80, budget=50).case()
    case.origin[:] = torch.tensor([0, 7, -22], dtype=torch.int32)[:, None]
    case.visible[..., 0] = case.origin.clamp(min=0)
    case.budget = case.budget.minimum(case.rows)
    end, options = torch.full((3,), keys, device=device), {"start": case.origin[:, 0].to(device), "backend": "triton"}
    before, index, afresh = (
        KeyIndex.build(case.key.to(device), "pages", end=end - missing, capacity=keys + 64, **options)
        for missing in (queries, queries, 0)
    )
    problem = problem_by(index, case, device)._replace(new=queries)
    assert Block(16).takes_in(problem, "triton") == (queries == 1)
    found, expected = Block(16).run(problem, "triton"), Block(16).run(problem_by(afresh, case, device), "triton")
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.attended, expected.attended)
    completed = [(keys - b) // 16 > (keys - queries - b) // 16 for b in (0, 7, -22)]
    for kept, built, old in zip(index.tensors(), afresh.tensors(), before.tensors(), strict=True):
        torch.testing.assert_close(kept, built, rtol=0, atol=0, equal_nan=True)
        assert [not torch.equal(*pair) for pair in zip(kept, old, strict=True)] == completed


@on_kernel_device
def test_a_key_goes_into_an_index_that_is_a_view_of_something_larger(device):
    case = decode_shape(kv_heads=2, keys=160).case()
    kept, afresh = (case.problem("pages", "triton", device, new=new) for new in (1, 0))
    kept = kept._replace(key_index=tuple(torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in kept.key_index))
    Block(16).run(kept, "triton")
    torch.testing.assert_close(kept.key_index, afresh.key_index, rtol=0, atol=0, equal_nan=True)


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
    acc, peak, total, sink_logits, attended, output, lse, lse_keys, arrivals, last = (
        x if x is None else x.to(device) for x in tensors
    )
    join_kernel[(2, splits)](
        parts=Softmax(acc, peak, total), sinks=sink_logits, attended=attended, arrivals=arrivals, last=last,
        output=output, lse=lse, lse_keys=lse_keys, rows=rows, num_heads=3, Lq=2, count=splits,
        shape=shape_of(width, width, Tiles(8, 16, 4, 1)),
    )  # fmt: skip
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
    problem = decode_shape().case().problem("pages")
    codes, scales = problem.key_index
    index = (change.pop("codes", codes), change.pop("scales", scales))
    with pytest.raises(ValueError, match=message):
        triton_block_decode(problem._replace(key_index=index, **change))


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)

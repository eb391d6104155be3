"""What is special in Triton's decoding over pages: ties, broken numbers, upkeep of the index, and the join of parts."""

import pytest
import torch
from attention_cases import Shape, check

triton = pytest.importorskip("triton", reason="the kernels need triton")

from operations import assert_close, assert_summarises, problem_of_case  # noqa: E402
from test_triton_kernels import FP32_BF16  # noqa: E402

from nc_patch import KeyIndex  # noqa: E402
from nc_patch.functional import by_index  # noqa: E402
from nc_patch.selections import Block  # noqa: E402
from nc_patch.selections.block.pages import PageStatistics  # noqa: E402
from nc_patch.selections.block.summarize import triton_summarize_pages_  # noqa: E402


def decode_shape(**more: object) -> Shape:
    """A query of two heads over a dozen pages."""
    return Shape("pages", ("pages",), **{"queries": 1, "keys": 200, "budget": 70} | more)


@pytest.mark.parametrize("kinds", [1, 3])
def test_ties_go_to_the_lower_page(kinds, device):
    case = decode_shape(group=3, queries=2, keys=256, budget=112).case()
    # Pages of equal keys of a few kinds: their statistics and logits are exact, and most pages tie.
    case.query.zero_()[..., 0] = 8.0
    case.key.zero_()[..., 0] = (torch.arange(16) % kinds).repeat_interleave(16).float() * 0.25
    check("pages", case, "triton", device)


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


def test_a_row_without_keys_beside_others_is_zero(device):
    case = decode_shape(batch=2, queries=3, keys=60, intervals="padding", sinks=True).case()
    case.visible[1, 0], case.visible[0, 1] = 25, 0
    case.budget = case.budget.minimum(case.rows)
    assert not check("pages", case, "triton", device).output[0, :, 1].any()


@FP32_BF16
@pytest.mark.parametrize(("first", "count"), [((40, 55), 1), ((33, 47), 16), ((0, 0), 90)])
def test_summaries_follow_new_keys(first, count, dtype, device):
    key = torch.randn(2, 3, 100, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    origin, first = torch.tensor([0, 13]), torch.tensor(first)
    end = first + count
    for b in range(2):
        key[b, :, int(end[b]) :] = torch.nan
    # As the buffers of a cache may be: views of something larger.
    filled = torch.full((2, 9, 3, 3, 80), 77, dtype=torch.int8), torch.full((2, 9, 3, 3), 7.0)
    found = PageStatistics(*(x.to(device).transpose(1, 2) for x in filled))
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


# Keys that end with a page of the first sequence, that begin one and that lie within one.
@pytest.mark.parametrize(
    ("dtype", "queries", "keys"),
    [(torch.float32, 1, 160), (torch.float32, 1, 161), (torch.bfloat16, 1, 170), (torch.float32, 3, 161)],
)
def test_a_step_that_takes_in_its_keys_has_the_index_that_is_built_afresh(dtype, queries, keys, device):
    case = decode_shape(dtype=dtype, batch=3, queries=queries, keys=keys, head_dim=80, budget=50).case()
    case.origin[:] = torch.tensor([0, 7, -22], dtype=torch.int32)[:, None]
    case.visible[..., 0] = case.origin.clamp(min=0)
    case.budget = case.budget.minimum(case.rows)
    end, options = torch.full((3,), keys, device=device), {"start": case.origin[:, 0].to(device), "backend": "triton"}
    before, index, afresh = (
        KeyIndex.build(case.key.to(device), "pages", end=end - missing, capacity=keys + 64, **options)
        for missing in (queries, queries, 0)
    )
    problem, anew = (by_index(problem_of_case(case, device), of, int(case.budget.max())) for of in (index, afresh))
    problem = problem._replace(new=queries)
    assert Block(16).takes_in(problem, "triton") == (queries == 1)
    found, expected = Block(16).run(problem, "triton"), Block(16).run(anew, "triton")
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.attended, expected.attended)
    completed = [(keys - b) // 16 > (keys - queries - b) // 16 for b in (0, 7, -22)]
    for kept, built, old in zip(index.tensors(), afresh.tensors(), before.tensors(), strict=True):
        torch.testing.assert_close(kept, built, rtol=0, atol=0, equal_nan=True)
        assert [not torch.equal(*pair) for pair in zip(kept, old, strict=True)] == completed


def test_a_key_goes_into_an_index_that_is_a_view_of_something_larger(device):
    case = decode_shape(kv_heads=2, keys=160).case()
    kept, afresh = (case.problem("pages", "triton", device, new=new) for new in (1, 0))
    kept = kept._replace(key_index=tuple(torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in kept.key_index))
    Block(16).run(kept, "triton")
    torch.testing.assert_close(kept.key_index, afresh.key_index, rtol=0, atol=0, equal_nan=True)


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
        Block(16).run(problem._replace(key_index=index, **change), "triton")

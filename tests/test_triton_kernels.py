"""Every way of attending in Triton against the float64 definitions: on a GPU where there is one, and interpreted.

``test_interpreter.py`` runs this file in the interpreter. There, small tiles make short inputs cross many.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import DESCRIBED, SHAPES, TOLERANCE, WAYS, Case, Shape, check, relative_error
from tiny_models import random_ids, tiny_model

triton = pytest.importorskip("triton", reason="the kernels need triton")

from operations import INTERPRETED, assert_close, problem_of_case, topk_mask  # noqa: E402
from small_plans import plan_with  # noqa: E402

from nc_patch import patch_model  # noqa: E402
from nc_patch.ops.means import PageMeans, page_means, page_starts  # noqa: E402
from nc_patch.ops.triton import launch as triton_launch  # noqa: E402
from nc_patch.ops.triton.launch import Tiles  # noqa: E402
from nc_patch.ops.triton.means import triton_page_means  # noqa: E402
from nc_patch.selections import Block, TopK, Window  # noqa: E402
from nc_patch.selections.topk import threshold as triton_threshold  # noqa: E402

ROWS = pytest.mark.parametrize("way", ["drop", "window"])
FP32_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.parametrize("name", DESCRIBED)
def test_described_cases_equal_the_reference(name, device):
    shape, way = DESCRIBED[name]
    bounds = WAYS[way].index == "codes" and not shape.transposed
    # The kept mass of blocks takes a pass over all keys.
    stats = WAYS[way].selection != "block" or shape.sinks or shape.softcap > 0 or shape.intervals != "causal"
    check(way, shape.case(), "triton", device, stats=stats, bounds=bounds)
    if shape.name in ("plain", "decode"):
        check(way, shape.case(), "triton", device, stats=not stats)


@FP32_BF16
def test_topk_attends_exactly_the_reference_set_where_scores_tie(dtype, device):
    case = tied_case(Shape("grid", (), dtype, 1, 2, 1, 30, 64, budget="any", sink_keys=2, recent_keys=2))
    output = check("drop", case, "triton", device).output
    assert torch.equal(output > 0, topk_mask(case.scores(), case.visible, case.budget, 2, 2))


def tied_case(shape: Shape) -> Case:
    """Scores on a small integer grid are exact in every dtype, and most tie; identity values show what is attended."""
    case, g = shape.case(), torch.Generator().manual_seed(1)
    for tensor in (case.query, case.key):
        tensor.zero_()[..., :3] = torch.randint(-1, 2, (*tensor.shape[:3], 3), generator=g).to(shape.dtype)
    case.value = torch.eye(shape.keys, dtype=shape.dtype).expand(1, shape.kv_heads, -1, -1).contiguous()
    return case


SPOILED = {
    "all equal": lambda key: key.fill_(0.5),
    "all zero": lambda key: key.zero_()[:, :, ::2].mul_(-1),
    "huge": lambda key: key.mul_(1e18),
    "tiny": lambda key: key.mul_(1e-38),
    "outlier": lambda key: key[:, :, ::16].fill_(1e6),
    "far apart": lambda key: key.mul_(torch.logspace(-30, 16, key.shape[2])[:, None]),
    "infinite": lambda key: key.index_fill_(2, torch.tensor([11, 30]), torch.inf)[:, :, 12].fill_(-torch.inf),
    "nan": lambda key: key.index_fill_(2, torch.tensor([11, 40]), torch.nan),
}


def spoiled_case(kind: str, queries: int, keys: int) -> Case:
    """Positive queries along one axis: then no order of summation changes which score is larger."""
    case = Shape("spoiled", (), group=1, queries=queries, keys=keys, unequal=0.0).case(3)
    case.query.zero_()[..., 0] = 1.5
    case.key[..., 1:] = 0.0
    SPOILED[kind](case.key)
    if kind not in ("infinite", "nan"):
        case.key[..., 1:] = 0.0
    return case


@pytest.mark.parametrize("kind", SPOILED)
def test_topk_ends_and_is_exact_for_keys_that_are(kind, device, monkeypatch):
    check("drop", spoiled_case(kind, 20, 53), "triton", device, stats=False)
    # Decoding with room for all keys in the list, and without, so that blocks take all keys.
    plan_with(monkeypatch, segment=(160, 20)[list(SPOILED).index(kind) % 2])
    check("codes", spoiled_case(kind, 3, 130), "triton", device, bounds=True)


def test_nan_and_infinity_rank_together_and_softcap_makes_infinity_finite(device):
    case = spoiled_case("all equal", 20, 53)
    case.softcap, case.sink_keys, case.recent_keys = 3.0, 0, 0
    for position, score in ((3, torch.inf), (9, torch.nan), (20, torch.inf), (33, -torch.inf)):
        case.key[:, :, position, 0] = score
    check("drop", case, "triton", device, stats=False)


@pytest.mark.skipif(not INTERPRETED, reason="passes are counted in the interpreter")
@pytest.mark.parametrize(
    ("kind", "budget", "most"),
    [(None, "full", 0), (None, "law", 9), ("all equal", "law", 4), ("tiny", "law", 25), ("far apart", "any", 25)],
)
def test_counting_passes_are_few_and_bounded(kind, budget, most, device, monkeypatch):
    passes, count_range = [], triton_threshold.count_range
    monkeypatch.setattr(triton_threshold, "count_range", lambda *args: passes.append(1) or count_range(*args))
    monkeypatch.setattr(triton_launch, "tiles_for", lambda *_: Tiles(32, 16, 4, 1, 32))  # one program
    case = Shape("", (), group=1, queries=30, keys=90, budget=budget, sink_keys=0, recent_keys=0).case()
    if kind is not None:
        SPOILED[kind](case.key)
    check("drop", case, "triton", device, stats=False)
    assert (len(passes) > 0) == (budget != "full")
    assert len(passes) <= most


@pytest.mark.parametrize("way", ["drop", "window", "block", "codes"])
@FP32_BF16
def test_a_broken_value_reaches_the_rows_that_attend_it_and_none_of_another_program(way, dtype, device):
    rows = triton_launch.tiles_for(triton_launch.architecture_of(torch.device(device)), dtype, 80, 80, 40).rows
    queries, keys, of_way = {"block": (100, 130, {"budget": "full"}), "codes": (5, 130, {})}.get(way, (40, 53, {}))
    case = Shape("broken", (), dtype, 1, 1, 3 if way == "codes" else 1, queries, keys, 80, **of_way).case()
    broken = [(keys - 5, 3, torch.nan), (keys - 2, 50, torch.inf)]
    if way == "block":  # in a tile that all rows see whole, and in two that some do not
        broken = [(3, 7, torch.inf), (60, 3, torch.nan), (101, 50, -torch.inf)]
    for key, column, what in broken:
        case.value[:, :, key, column] = what
    output = case.selection(way).run(case.problem(way, "triton", device), "triton").output.cpu()
    expected = case.reference(way).output
    sound = output.isfinite()
    assert not sound[expected.isnan()].any()
    assert_close(output[sound], expected[sound], TOLERANCE[dtype])
    touched = [column for _, column, _ in broken]
    assert sound[..., [column for column in range(80) if column not in touched]].all()
    for key, column, _ in broken:
        assert expected[..., column].isnan().any()
        # The first row of the first program with a row that sees it; blocks of queries begin at multiples of 64.
        first = {"block": key // 64 * 64 - (keys - queries), "codes": 0}.get(way, (key - 53 + 40) // rows * rows)
        assert sound[:, :, : max(first, 0), column].all()


@ROWS
def test_keys_between_what_the_rows_of_a_program_see_change_nothing(way, device):
    case = Shape("apart", (), group=1).case()
    for first, seen in ((0, (2, 9)), (7, (40, 40)), (9, (12, 26)), (14, (26, 33))):
        case.visible[:, first:] = torch.tensor(seen, dtype=torch.int32)
    case.budget = case.budget.minimum(case.rows)
    assert int(case.unread(way).sum()) == 2 + 3 + 20
    assert check(way, case, "triton", device).output.isfinite().all()


@pytest.mark.parametrize("way", ["topk", "block", "codes", "pages"])
def test_neighbours_in_a_batch_change_nothing(way, device):
    few = {"queries": 1, "group": 3} if WAYS[way].index else {"queries": 40}
    case = Shape("neighbours", (), batch=2, keys=80, intervals="padding", **few).case()
    case.min_mass = 0.6
    alone = replace(case, **{n: getattr(case, n)[1:] for n in ("query", "key", "value", "visible", "origin", "budget")})
    case.key[0], case.value[0] = 2.0, 3.0
    both, one = (of.selection(way).run(of.problem(way, "triton", device), "triton").output for of in (case, alone))
    assert torch.equal(both[1], one[0])


@pytest.mark.parametrize("way", ["drop", "block"])
def test_no_query_is_an_empty_output(way, device):
    case = Shape("nothing", (), queries=0, sinks=True).case()
    assert case.selection(way).run(problem_of_case(case, device), "triton").output.shape == (1, 2, 0, 64)


def means_of(case: Case) -> PageMeans:
    return page_means(case.key, case.value, page_starts(case.visible, case.origin, case.key.shape[2]))


@pytest.mark.parametrize("way", ["topk", "codes with means"])
@pytest.mark.parametrize("whole", [False, True], ids=["some", "all"])
def test_a_page_that_is_attended_whole_hides_what_its_mean_holds(way, whole, device):
    """A page without a key left over for any row of a program has no part in the tail, though its mean is infinite."""
    case = Shape("whole", (), queries=2, keys=64, sink_keys=16, recent_keys=0).case()
    case.budget = torch.tensor([[[16, 16 if whole else 8]]], dtype=torch.int32)
    means = means_of(case)
    means.value[:, :, 0] = torch.inf
    problem = case.problem(way, "triton", device)._replace(means=PageMeans(*(t.to(device) for t in means)))
    output = case.selection(way).run(problem, "triton").output.cpu()
    if whole:
        assert relative_error(output, case.reference(way).output) < 1e-5
    else:  # it may reach the other row too, which shares a program
        assert not output[:, :, 1].isfinite().any()


@FP32_BF16
def test_means_are_those_of_pytorch(dtype, device):
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 1, 93, width, generator=g).to(dtype) for width in (16, 70))

    origin = torch.tensor([[0] * 20 + [20] * 33 + [53] * 40, [3] * 93], dtype=torch.int32)
    visible = torch.stack((origin.clamp(min=0), torch.arange(1, 94, dtype=torch.int32).expand(2, -1)), -1)
    of_prompts = page_starts(visible, origin, 93)
    for starts in (of_prompts, of_prompts[:, 1:2]):
        ours = triton_page_means(*(t.to(device) for t in (key, value, starts)))
        for mine, other in zip(ours, page_means(key, value, starts), strict=True):
            # The interpreter cuts what does not fit 16 bits.
            torch.testing.assert_close(mine.cpu(), other, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_patched_model_generates_as_with_pytorch(device):
    ids = random_ids(1, 35).to(device)
    tokens, logits = {}, {}
    for backend in ("torch", "triton"):
        model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2).to(device)
        patch_model(model, 1.0, 0.5, tail="mean", backend=backend, key_index="always")
        made = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens[backend], logits[backend] = made.sequences.tolist(), torch.cat(made.logits)
    assert tokens["triton"] == tokens["torch"]
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 53, 64)}, r"key must be \[batch, heads, length, head_dim\]"),
        ({"visible": torch.zeros(1, 20, 2)}, "visible must be int32"),
        ({"origin": torch.zeros(1, 20)}, "origin must be int32"),
        ({"budget": torch.zeros(1, 5, 20, dtype=torch.int32)}, "budget must be int32"),
        ({"value": torch.zeros(1, 1, 53, 320)}, "at most 256, got 64 and 320"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    problem = problem_of_case(SHAPES[0].case())._replace(**change)
    for chosen in (TopK(tail="drop"), Window()) if "value" in change else (TopK(tail="drop"), Window(), Block(16)):
        with pytest.raises(ValueError, match=message):
            chosen.prefill_triton(problem)


def test_means_that_do_not_fit_are_refused():
    case = Shape("means", (), queries=2, keys=40, head_dim=16, value_dim=24).case()
    means, problem = means_of(case), problem_of_case(case)
    of_keys = r"means of keys must be float32 \[1, 1, 3, 16\] on cpu, got float32 \[1, 1, 2, 16\] on cpu"
    for tail, message in (
        (PageMeans(means.key[:, :, :2], means.value), of_keys),
        (PageMeans(means.key, means.value[..., :8]), r"means of values must be float32 \[1, 1, 4, 24\]"),
        (PageMeans(*(t.half() for t in means)), "means of keys must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            TopK().prefill_triton(problem._replace(means=tail))

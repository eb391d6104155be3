"""The float64 reference against definitions written out key by key, and against SDPA."""

import pytest
import torch
from attention_cases import Shape, random_case
from operations import assert_close, problem_of_case

from nc_patch import sparse_attention
from nc_patch.ops.problem import visible_mask
from nc_patch.ops.reference import raw_scores


def topk_by_hand(scores, start, end, budget, sink_keys, recent_keys):
    recents = min(recent_keys, budget)
    sinks = min(sink_keys, budget - recents)
    kept = set(range(end - recents, end)) | set(range(start, start + sinks))
    rivals = sorted((j for j in range(start, end) if j not in kept), key=lambda j: (-scores[j], j))
    return kept | set(rivals[: budget - len(kept)])


@pytest.mark.parametrize("way", ["drop", "window"])
@pytest.mark.parametrize("odd", [False, True], ids=["numbers", "nan and infinity"])
@pytest.mark.parametrize("seed", range(20))
def test_masks_are_the_definitions_read_aloud(seed, odd, way):
    case = random_case(seed, longest=30)
    problem, scores = problem_of_case(case), raw_scores(problem_of_case(case))
    if odd:  # NaN ranks with infinity, and of equal scores the first come first
        scores = torch.tensor([-torch.inf, -1.0, 0.0, 1.0, torch.inf, torch.nan])[torch.randint(6, scores.shape)]
    mask = case.selection(way).mask(problem, scores)
    ranked, budget = scores.nan_to_num(nan=torch.inf, posinf=torch.inf), case.budget.expand(scores.shape[:3])
    sizes = case.options["sink_keys"], case.options["recent_keys"]
    if way == "window":  # the first keys, and the most recent ones, of which there is always one
        ranked, sizes = torch.arange(scores.shape[-1]).expand_as(scores), (case.options["sink_keys"], 1)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        start, end = case.visible[b, i].tolist()
        by_hand = topk_by_hand(ranked[b, h, i].tolist(), start, end, int(budget[b, h, i]), *sizes)
        assert set(mask[b, h, i].nonzero()[:, 0].tolist()) == by_hand


@pytest.mark.parametrize("intervals", ["causal", "sliding"])
@pytest.mark.parametrize(
    ("way", "blocks"),
    [
        *((way, {}) for way in ("drop", "window", "dense")),
        *((way, {"size": size}) for way in ("block", "pages") for size in (16, 32)),
        ("block", {"min_mass": 0.9}),
    ],
    ids=str,
)
def test_a_full_budget_is_dense_attention(way, blocks, intervals):
    sizes = {"batch": 2, "kv_heads": 2, "group": 3, "queries": 33, "keys": 70, "head_dim": 16, "value_dim": 8}
    case = Shape("full", (), intervals=intervals, budget="full", blocks=blocks, **sizes).case()
    tensors, seen = [t.double() for t in (case.query, case.key, case.value)], visible_mask(case.visible, 70)
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, seen, scale=case.scale, enable_gqa=True)
    result = case.reference(way)
    assert_close(result.output, dense, 1e-13)
    assert torch.allclose(result.kept_mass, torch.ones(2, 6, 33, dtype=torch.float64))
    assert torch.equal(result.attended, case.budget.expand(2, 6, 33))


def test_a_page_whose_keys_are_equal_is_not_missed():
    """Keys and values that are constant over pages are approximated without an error, however few are attended."""
    key, value = (torch.randn(1, 2, 9, 8).repeat_interleave(16, 2) for _ in range(2))
    # Each query sees whole pages, and attends the last.
    query, ends = torch.randn(1, 4, 9, 8), torch.arange(16, 145, 16)
    visible = torch.stack((torch.zeros(9), ends), -1).int()[None]
    options = {"alpha": 16.0, "sink_keys": 0, "recent_keys": 16, "visible": visible, "origin": visible[..., 0]}
    dense = sparse_attention(query, key, value, alpha=1.0, C=1.0, visible=visible).double()
    assert_close(sparse_attention(query, key, value, tail="mean", **options), dense, 1e-6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(sparse_attention(query, key, value, tail="drop", **options), dense, 0.1)

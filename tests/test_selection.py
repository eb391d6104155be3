"""Selections: the float64 reference against definitions written out key by key and against SDPA; one of a user's own.

A selection is one file: the example of docs/selection.md works everywhere, and nothing else has to be written.
"""

import copy
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from attention_cases import Shape, random_case
from operations import assert_close, problem_of_case
from tiny_models import random_ids, tiny_model

from nc_patch import nc_stats, patch_model, sparse_attention
from nc_patch.ops.problem import visible_mask
from nc_patch.ops.reference import raw_scores
from nc_patch.selections import base


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


PAGE = Path(__file__).parent.parent / "docs" / "selection.md"


@pytest.fixture(scope="module")
def Stride():
    """The class of the page, which is not registered any more afterwards."""
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]
    assert len(example.splitlines()) <= 40
    module = types.ModuleType("stride_example")
    sys.modules[module.__name__] = module
    exec(compile(example, str(PAGE), "exec"), vars(module))
    yield module.Stride
    del sys.modules[module.__name__], base._SELECTIONS["stride"]


def test_it_attends_exactly_what_it_says(Stride):
    sizes = {"batch": 2, "kv_heads": 2, "queries": 37, "keys": 90, "head_dim": 16, "value_dim": 8}
    case = Shape("stride", intervals="padding", sinks=True, softcap=20.0, **sizes).case()
    given, chosen = problem_of_case(case, stats=True), Stride(every=5)
    mask = chosen.mask(given, torch.zeros(2, 4, 37, 90))
    assert torch.equal(mask.sum(-1, dtype=torch.int32), given.budget.expand(-1, 4, -1))
    last = mask[0, 0, -1].nonzero()[:, 0].tolist()
    assert set(range(89, 89 - 5 * 18, -5)) <= set(last)
    expected, result = chosen.reference(given), chosen.run(given, "torch")
    for found, wanted in zip(result[:3], expected[:3], strict=True):
        assert_close(found, wanted, 1e-6)


def test_models_generate_compile_and_train_with_it(Stride):
    model = patch_model(tiny_model("llama", num_hidden_layers=1), 3.0, 0.5, selection="stride", every=4)
    ids = random_ids(2, 40)
    generated = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    # Token by token it attends what it attends in one go.
    alone = model(generated[:, :-1]).logits
    assert torch.equal(alone[:, 39:].argmax(-1), generated[:, 40:])
    assert 0 < nc_stats(model)["attended_fraction"] < 1
    twin = torch.compile(pickle.loads(pickle.dumps(copy.deepcopy(model))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(twin(generated[:, :-1], use_cache=False).logits, alone, atol=2e-5, rtol=0)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)

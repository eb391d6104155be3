"""Certificates of the kept mass hold the truth, and ``on_drop`` acts on them as it says."""

import copy
import logging
import pickle
import re
from dataclasses import replace

import pytest
import torch
from attention_cases import HARD, WAYS, Case, Shape, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import INSTALLED, problem_of_case
from tiny_models import random_ids, tiny_model
from ways import TOPK, left_padded, rows_of, small

from nc_patch import DroppedMassError, NCConfig, nc_stats, patch_model, reset_stats
from nc_patch.certificates import certified_bounds
from nc_patch.functional import attend
from nc_patch.layers import Observed
from nc_patch.ops.problem import AttentionResult
from nc_patch.ops.reference import reference_attention
from nc_patch.ops.rounding import rounding_bounds
from nc_patch.selections import Dense

WITHOUT_MEANS = {"topk": "drop", "codes with means": "codes"}


def run(case: Case, way: str, value: torch.Tensor, backend: str = "torch") -> AttentionResult:
    by_codes = WAYS[way].index == "codes"
    problem = case.problem(way, stats=not by_codes, bounds=by_codes)._replace(value=value)
    return attend(problem, case.selection(way), backend)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([way for way in WAYS if way not in ("dense", "block")]),
    st.sampled_from([None, *HARD.values()]),
    st.sampled_from(INSTALLED),
)
def test_bounds_hold_the_truth_and_are_narrow_in_prefill(seed, way, kind, backend):
    decode = WAYS[way].index is not None or kind is not None
    case = random_case(seed, decode=decode)
    case.key = case.key if kind is None else kind(case.key.clone())
    length = case.key.shape[2]
    # Under values of one key each, the output shows what is attended, whichever operation ran.
    ones = torch.eye(length).expand(*case.key.shape[:2], length, length)
    # Means of pages would show what they stand for too, and sinks leave nothing to show; without them the same keys are
    # attended.
    attended = run(replace(case, sinks=None), WITHOUT_MEANS.get(way, way), ones).output
    true = reference_attention(problem_of_case(case), attended > 0).kept_mass
    result, problem = run(case, way, ones, backend), problem_of_case(case)
    lower, upper = certified_bounds(result, problem).double().unbind(-1)
    assert bool((lower <= true + 1e-12).all()), float((lower - true).max())
    assert bool((true <= upper + 1e-12).all()), float((true - upper).max())
    assert bool(((lower >= 0) & (upper <= 1)).all())
    # A query that sees no key drops nothing.
    assert bool((lower.transpose(1, 2)[case.visible[..., 1] <= case.visible[..., 0]] == 1).all())
    assert decode or float((upper - lower).max()) < 1e-3
    if (kept := result.kept_mass) is not None:  # whose bounds rest on the norms of keys that kernels have left
        by_norms, by_keys = (rounding_bounds(each, case.problem(way)) for each in (kept, kept.clone()))
        torch.testing.assert_close(by_norms, by_keys)


def test_what_is_attended_whole_is_certain_to_be_whole_and_a_nan_never_to_be_kept():
    case = Shape("whole", intervals="ragged", budget="full").case()
    for way in ("drop", "window"):
        assert bool((certified_bounds(run(case, way, case.value), problem_of_case(case)) == 1).all())
    case = Shape("broken", queries=3, keys=60, budget=6).case()
    case.key[:, :, 50] = torch.nan
    for way in ("drop", "codes", "window"):
        lower, upper = certified_bounds(run(case, way, case.value), problem_of_case(case))[0].unbind(-1)
        assert bool((lower == 0).all() and (upper == 1).all()), way


def watched(model: torch.nn.Module, config: NCConfig, most_dropped: float) -> list[bool]:
    """Holds every call of a patched model to what float64 says of it; fills a list with which of them ran dense."""
    ran_dense: list[bool] = []

    def check(call: Observed) -> None:
        n = (call.problem.visible[..., 1] - call.problem.visible[..., 0])[:, None]
        problem = call.problem._replace(budget=config.budget(n), key_index=(), means=None, new=0)
        decodes = call.output.shape[2] == 1
        chosen = config.decode if decodes else config.prefill
        if chosen.uses_means:
            chosen = replace(chosen, tail="drop")
        least = float(chosen.reference(problem, decodes and chosen.name == "block").kept_mass.min())
        ran_dense.append(torch.allclose(call.output.double(), Dense().reference(problem).output, atol=1e-5))
        assert ran_dense[-1] or least >= 1 - most_dropped

    for layer in model.model.layers:
        layer.self_attn._nc_patch = replace(layer.self_attn._nc_patch, observe=check)
    return ran_dense


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", TOPK | {"key_index": "always", "tail": "mean"}),
        ("llama", TOPK | {"tail": "drop", "key_index": "never"}),
        ("gemma2", {"selection": "window"}),
        ("gpt_oss", TOPK | {"key_index": "always", "tail": "drop"}),
        ("llama", {"prefill": "topk", "decode": "block", "block_size": 16}),
    ],
    ids=str,
)
def test_dense_never_returns_a_row_that_keeps_too_little(family, options, cache):
    model, ids, padding = tiny_model(family), random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    padding[0, :9] = 0
    redone, kept = 0, 0
    for most_dropped in (0.35, 0.6):
        patch_model(model, 1.5, 0.6, on_drop="dense", max_dropped_mass=most_dropped, **options)
        ran_dense = watched(model, NCConfig(1.5, 0.6, **options), most_dropped)
        run = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        model.generate(ids, attention_mask=padding, **run)
        model.generate(random_ids(1, 6), **run)
        layers = nc_stats(model)["layers"]
        assert sum(layer["calls"] for layer in layers) == len(ran_dense)
        kept += ran_dense.count(False)
        for layer in layers:
            found = sum(count for reason, count in layer["dense_calls"].items() if 'on_drop="dense"' in reason)
            assert found == layer["exceeded_calls"] == sum(layer["dense_calls"].values())
            redone += found
            for mass in layer["kept_mass"].values():
                assert mass["least"] >= 1 - most_dropped
                assert mass["calls"].get("dense", 0) <= found
    assert redone > 0
    assert kept > 0 or family == "gemma2", "some calls keep enough"


def test_a_call_redone_has_the_numbers_of_the_dense_model_and_its_gradients_and_counts_every_key():
    ids = random_ids(2, 150)

    def numbers(model: torch.nn.Module) -> list[torch.Tensor]:
        out = model.train()(ids, labels=ids)
        out.loss.backward()
        return [out.logits, *(p.grad for p in model.parameters())]

    dense = numbers(tiny_model("llama"))
    for selection in ("topk", "window", "block"):
        model = small(selection=selection, block_size=16, on_drop="dense", max_dropped_mass=0.0)
        torch.testing.assert_close(numbers(model), dense, atol=1e-5, rtol=1e-5)
        stats = nc_stats(model)
        assert stats["attended_fraction"] == stats["kept_mass"]["prefill"]["least"] == 1.0
        assert [layer["exceeded_calls"] for layer in stats["layers"]] == [1, 1, 1]


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_raise_names_the_place_and_the_remedy(selection):
    model, rows = small(selection=selection, block_size=16, on_drop="raise", max_dropped_mass=0.25), rows_of(2, 200)
    with pytest.raises(DroppedMassError, match=r"layer 0, head \d.*1 - max_dropped_mass = 0.75. Raise") as info:
        model(**left_padded(rows))
    error, certified = info.value, selection == "topk"
    assert 0 < error.kept_mass < 0.75
    assert (error.layer, error.certified, error.position is not None) == (0, certified, certified)
    assert ("certain" if certified else "by estimate") in str(error)
    layer = nc_stats(model)["layers"][0]
    by_head = layer["kept_mass"]["prefill"]["least_by_head" if certified else "mean_by_head"]
    assert error.kept_mass == pytest.approx(by_head[error.head]) == pytest.approx(min(by_head))
    assert layer["exceeded_calls"] == 1
    if certified:  # it is the last row of its sequence up to there
        row = rows[int(re.findall(r"position \d+ of sequence (\d): in prefill only", str(error))[0])]
        with pytest.raises(DroppedMassError) as info:
            model(row[None, : error.position + 1])
        assert (info.value.head, info.value.position) == (error.head, error.position)
        assert info.value.kept_mass == pytest.approx(error.kept_mass)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)


def test_warn_says_so_once_for_each_layer_and_counts_and_copies_keep_that(caplog):
    model, ids = small(on_drop="warn", max_dropped_mass=0.2), random_ids(2, 60)
    with caplog.at_level(logging.WARNING, logger="nc_patch"), torch.inference_mode():
        model(ids), model(ids)
        reset_stats(model)
        model(ids)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert nc_stats(twin) == nc_stats(model)
        twin(ids)
    said = [record.getMessage() for record in caplog.records if "max_dropped_mass" in record.getMessage()]
    assert [message[: message.index(", head")] for message in said] == [f"layer {layer}" for layer in range(3)]
    for each, calls in ((model, 1), (twin, 2)):
        for layer in nc_stats(each)["layers"]:
            assert (layer["exceeded_calls"], layer["dense_calls"]) == (calls, {})
            assert layer["kept_mass"]["prefill"]["below"] > 0

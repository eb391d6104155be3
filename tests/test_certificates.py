"""Certificates of the kept mass hold the truth, and ``on_drop`` acts on them as it says."""

import copy
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from attention_cases import KINDS, WAYS, Case, decode_case, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import problem_of, problem_of_case
from tiny_models import random_ids, tiny_model
from transformers import AttentionInterface
from ways import CHOICES, TOPK, UNASKED

from nc_patch import DroppedMassError, NCConfig, nc_stats, patch_model, reset_stats, sparse_attention
from nc_patch.attention import nc_attention_forward
from nc_patch.certificates import certified_bounds, find_drop
from nc_patch.functional import attend
from nc_patch.hooks import IMPLEMENTATION
from nc_patch.ops.problem import AttentionResult, Problem, visible_mask
from nc_patch.selections import Dense
from nc_patch.visibility import Visibility

WITHOUT_MEANS = {"topk": "drop", "codes with means": "codes"}


def run(case: Case, way: str, value: torch.Tensor) -> AttentionResult:
    by_codes = WAYS[way].index == "codes"
    problem = case.problem(way, stats=not by_codes, bounds=by_codes)._replace(value=value)
    return attend(problem, case.selection(way), "torch")


def true_mass(case: Case, attended: torch.Tensor) -> torch.Tensor:
    """The kept mass in float64 of the keys that are ``attended``, bool ``[B, Hq, Lq, Lk]``."""
    seen = visible_mask(case.visible, case.key.shape[2])
    kept, whole = (
        torch.logsumexp(case.scores().masked_fill(~mask, -torch.inf), -1) for mask in (attended & seen, seen)
    )
    return torch.where(seen.any(-1), torch.exp(kept - whole), 1.0)


def check_bounds(case: Case, way: str) -> torch.Tensor:
    """Asserts that the bounds hold the truth; returns their width ``[B, Hq, Lq]``."""
    length = case.key.shape[2]
    # Under values of one key each, the output shows what is attended, whichever operation ran.
    ones = torch.eye(length).expand(*case.key.shape[:2], length, length)
    result = run(case, way, ones)
    # Means of pages would show what they stand for too: the same keys are attended where they are left out.
    attended = run(case, WITHOUT_MEANS.get(way, way), ones).output
    true = true_mass(case, attended > 0)
    lower, upper = certified_bounds(result, problem_of_case(case)).double().unbind(-1)
    assert bool((lower <= true + 1e-12).all()), float((lower - true).max())
    assert bool((true <= upper + 1e-12).all()), float((true - upper).max())
    assert bool(((lower >= 0) & (upper <= 1)).all())
    # A query that sees no key drops nothing.
    assert bool((lower.transpose(1, 2)[case.visible[..., 1] <= case.visible[..., 0]] == 1).all())
    return upper - lower


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from([way for way in WAYS if way not in ("dense", "block")]),
    st.integers(0, len(KINDS) - 1),
)
def test_bounds_hold_the_truth_while_decoding(seed, way, kind):
    case = decode_case(seed)
    case.key = KINDS[kind](case.key.clone())
    check_bounds(case, way)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["topk", "drop", "window"]))
def test_bounds_hold_the_truth_in_prefill_and_are_narrow(seed, way):
    width = check_bounds(random_case(seed), way)
    assert float(width.max()) < 1e-3


def test_what_is_attended_whole_is_certain_to_be_whole():
    case = random_case(4)
    case.budget = (case.visible[..., 1] - case.visible[..., 0]).clamp(min=0)[:, None]
    for way in ("drop", "window"):
        bounds = certified_bounds(run(case, way, case.value), problem_of_case(case))
        assert bool((bounds == 1).all())


def test_a_nan_is_never_certain_to_be_kept():
    case = decode_case(12)
    n = case.visible[..., 1] - case.visible[..., 0]
    assert int(n.min()) > 8
    case.budget = torch.full_like(n[:, None], 6)
    case.key[:, :, int(case.visible[0, 0, 1]) - 4] = torch.nan
    for way in ("drop", "codes", "window"):
        lower, upper = certified_bounds(run(case, way, case.value), problem_of_case(case))[0].unbind(-1)
        assert bool((lower == 0).all()), way
        assert bool((upper == 1).all()), way


def least_kept(kept: torch.Tensor, visible: torch.Tensor, origin: torch.Tensor) -> DroppedMassError | None:
    none = torch.empty(0)
    return find_drop(kept, Problem(none, none, none, visible, origin, none, 1.0), 0.9, layer=3, phase="decode")


def test_the_least_certain_row_is_found_with_its_place():
    kept = torch.full((2, 3, 4), 0.95)
    visible = torch.tensor([[[0, 5], [0, 6], [0, 7], [0, 8]], [[3, 3], [3, 6], [3, 7], [3, 8]]], dtype=torch.int32)
    assert least_kept(kept, visible, visible[..., 0]) is None
    assert least_kept(kept[:0], visible[:0], visible[:0, :, 0]) is None
    kept[1, 2, 3], kept[0, 1, 1] = 0.25, 0.5
    found = least_kept(kept, visible, visible[..., 0])
    assert (found.layer, found.head, found.position, found.kept_mass, found.certified) == (3, 2, 4, 0.25, True)
    said = "layer 3, head 2, position 4 of sequence 1: in decode only 0.2500 of the dense softmax"
    assert str(found).startswith(said)
    # The position of a row is its own where its interval ends behind it.
    visible = torch.tensor([[[0, 1], [0, 2], *[[0, 8]] * 6]], dtype=torch.int32)
    kept = torch.ones(1, 1, 8)
    kept[0, 0, 3] = 0.1
    assert least_kept(kept, visible, torch.zeros(1, 8, dtype=torch.int32)).position == 3


class Spied:
    """Every call of attention: what went in and what came out, and what the float64 definition says of it."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, module, query, key, value, mask, **options):
        output, weights = nc_attention_forward(module, query, key, value, mask, **options)
        # A static cache is written to again.
        self.calls.append((module.layer_idx, query, key.clone(), value.clone(), mask, options, output))
        return output, weights


@contextmanager
def spied() -> Iterator[Spied]:
    spy = Spied()
    AttentionInterface.register(IMPLEMENTATION, spy)
    try:
        yield spy
    finally:
        AttentionInterface.register(IMPLEMENTATION, nc_attention_forward)


def masses_and_outputs(call, selection: str, config: NCConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kept mass of the sparse rows, dense output, output that the call returned), in float64."""
    _, query, key, value, mask, options, output = call
    visible, origin, _ = Visibility.unpack(mask, query.shape[2], key.shape[2]).expand(len(query))
    n = (visible[..., 1] - visible[..., 0])[:, None]
    problem = problem_of(
        *(query, key, value, visible, config.budget(n), options.get("s_aux")),
        scale=options["scaling"],
        softcap=options.get("softcap"),
        origin=origin,
    )
    chosen = config.decode if selection == "pages" else config.prefill
    if chosen.uses_means:
        chosen = replace(chosen, tail="drop")
    dense = Dense().reference(problem)
    return chosen.reference(problem, selection == "pages").kept_mass, dense.output, output.transpose(1, 2).double()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "options", "selections"),
    [
        ("llama", TOPK | {"key_index": "always", "tail": "mean"}, ("topk", "topk")),
        ("llama", TOPK | {"tail": "drop", "key_index": "never"}, ("topk", "topk")),
        ("gemma2", {"selection": "window"}, ("window", "window")),
        ("gpt_oss", TOPK | {"key_index": "always", "tail": "drop"}, ("topk", "topk")),
        ("llama", {"prefill": "topk", "decode": "block", "block_size": 16}, ("topk", "pages")),
    ],
    ids=str,
)
def test_dense_never_returns_a_row_that_keeps_too_little(family, options, selections, cache):
    model, ids, padding = tiny_model(family), random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    padding[0, :9] = 0
    short = random_ids(1, 6)
    redone, kept = 0, 0
    for max_dropped_mass in (0.35, 0.6):
        patch_model(model, 1.5, 0.6, on_drop="dense", max_dropped_mass=max_dropped_mass, **options)
        config = NCConfig(1.5, 0.6, **options)
        with spied() as spy:
            run = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
            model.generate(ids, attention_mask=padding, **run)
            model.generate(short, **run)
        for call in spy.calls:
            selection = selections[call[1].shape[2] == 1]
            mass, dense, output = masses_and_outputs(call, selection, config)
            is_dense = torch.allclose(output, dense, atol=1e-5)
            assert is_dense or float(mass.min()) >= 1 - max_dropped_mass
            kept += not is_dense
        layers = nc_stats(model)["layers"]
        assert sum(layer["calls"] for layer in layers) == len(spy.calls)
        for layer in layers:
            found = sum(count for reason, count in layer["dense_calls"].items() if 'on_drop="dense"' in reason)
            assert found == layer["exceeded_calls"] == sum(layer["dense_calls"].values())
            redone += found
            for phase in ("prefill", "decode"):
                assert layer["kept_mass"][phase]["least"] >= 1 - max_dropped_mass
                assert layer["kept_mass"][phase]["calls"].get("dense", 0) <= found
    assert redone > 0
    assert kept > 0 or family == "gemma2", "some calls keep enough"


@pytest.mark.parametrize("length", [16, 32])
def test_blocks_that_attend_every_key_of_a_short_prompt_keep_all_of_it(length):
    model, ids = tiny_model("llama"), random_ids(2, length)
    patch_model(model, 2.0, 0.5, **UNASKED, on_drop="raise", max_dropped_mass=0.0)
    with torch.inference_mode():
        model(ids)
    assert nc_stats(model)["kept_mass"]["prefill"]["mean"] == 1.0


def test_a_call_redone_equals_the_dense_model_and_counts_every_key():
    model, ids = tiny_model("llama"), random_ids(2, 150)
    with torch.inference_mode():
        dense = model(ids).logits
        for selection in ("topk", "window", "block"):
            patch_model(model, 2.0, 0.5, selection=selection, block_size=16, on_drop="dense", max_dropped_mass=0.0)
            assert torch.allclose(model(ids).logits, dense, atol=1e-5)
            stats = nc_stats(model)
            assert stats["attended_fraction"] == 1.0
            assert stats["kept_mass"]["prefill"]["least"] == 1.0
            assert [layer["exceeded_calls"] for layer in stats["layers"]] == [1, 1, 1]


def test_where_enough_is_kept_nothing_changes():
    model, ids = tiny_model("llama"), random_ids(2, 60)
    for options in (*CHOICES, {"selection": "window"}):
        texts = []
        for on_drop in ("ignore", "warn", "raise", "dense"):
            patch_model(model, 2.0, 0.5, on_drop=on_drop, max_dropped_mass=0.999, **options)
            texts.append(model.generate(ids, max_new_tokens=6, do_sample=False))
            stats = nc_stats(model)
            assert [layer["exceeded_calls"] for layer in stats["layers"]] == [0, 0, 0]
            assert (stats["kept_mass"]["decode"] is None) == (on_drop == "ignore")
        assert all(torch.equal(text, texts[0]) for text in texts[1:]), options


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_raise_names_the_place_and_the_remedy(selection):
    model, ids = tiny_model("llama"), random_ids(2, 200)
    patch_model(model, 2.0, 0.5, selection=selection, block_size=16, on_drop="raise", max_dropped_mass=0.25)
    with pytest.raises(
        DroppedMassError, match=r"layer 0, head \d.*less than 1 - max_dropped_mass = 0.75. Raise"
    ) as info:
        model(ids)
    error = info.value
    assert error.layer == 0
    assert 0 < error.kept_mass < 0.75
    assert error.certified == (selection == "topk")
    assert (error.position is not None) == error.certified
    assert ("certain" in str(error)) == error.certified
    assert ("by estimate" in str(error)) != error.certified
    assert nc_stats(model)["layers"][0]["exceeded_calls"] == 1
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)
    patch_model(model, 2.0, 0.5, selection=selection)
    with torch.inference_mode():
        assert bool(model(ids).logits.isfinite().all())


def test_after_an_error_the_cache_serves_on_once_it_is_cropped():
    model, ids = tiny_model("llama"), random_ids(1, 60)
    options = TOPK | {"key_index": "always", "tail": "drop"}
    with torch.inference_mode():
        cache = patch_model(model, 2.0, 0.5, **options)(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        patch_model(model, 2.0, 0.5, on_drop="raise", max_dropped_mass=0.01, **options)
        with pytest.raises(DroppedMassError, match="layer 0"):
            model(ids[:, :1], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [61, 60, 60]
        cache.layers[0].crop(-1)
        patch_model(model, 2.0, 0.5, **options)
        assert torch.allclose(model(ids[:, :1], past_key_values=cache).logits, expected, atol=1e-5)


def test_warn_says_so_once_for_each_layer_and_counts(caplog):
    model, ids = tiny_model("llama"), random_ids(2, 60)
    patch_model(model, 2.0, 0.5, on_drop="warn", max_dropped_mass=0.2, selection="topk")
    with caplog.at_level(logging.WARNING, logger="nc_patch"), torch.inference_mode():
        for _ in range(3):
            model(ids)
        reset_stats(model)
        model(ids)
    said = [record.getMessage() for record in caplog.records if "max_dropped_mass" in record.getMessage()]
    assert len(said) == 3
    assert all(f"layer {layer}, head" in message for layer, message in enumerate(said))
    layers = nc_stats(model)["layers"]
    assert [layer["exceeded_calls"] for layer in layers] == [1, 1, 1]
    assert all(layer["kept_mass"]["prefill"]["below"] > 0 for layer in layers)
    assert all(layer["dense_calls"] == {} for layer in layers)


def test_copies_keep_counts_and_what_was_said():
    model, ids = tiny_model("llama"), random_ids(2, 150)
    patch_model(model, 2.0, 0.5, on_drop="warn", max_dropped_mass=0.2, selection="block", block_size=16)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert nc_stats(other) == nc_stats(model)
        assert other.model.layers[0].self_attn._nc_patch.counters.warned
        with torch.inference_mode():
            other(ids)
        assert nc_stats(other)["layers"][0]["exceeded_calls"] == nc_stats(model)["layers"][0]["exceeded_calls"] + 1


def test_training_goes_through_calls_that_are_redone():
    ids, gradients = random_ids(1, 60), []
    for options in (TOPK | {"on_drop": "dense", "max_dropped_mass": 0.0}, {"selection": "dense"}):
        model = patch_model(tiny_model("llama"), 2.0, 0.5, **options).train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_compiled_graph_refuses_by_name():
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 40)
    patch_model(model, 2.0, 0.5, backend="torch", on_drop="dense", selection="topk")
    torch._dynamo.reset()
    with (
        torch.inference_mode(),
        pytest.raises(Exception, match=r'on_drop="dense" reads in layer 0 how much was dropped'),
    ):
        torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False)


@pytest.mark.wide
def test_compiled_in_several_graphs_it_acts():
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 40)
    with torch.inference_mode():
        dense = model(ids, use_cache=False).logits
        patch_model(model, 2.0, 0.5, backend="torch", on_drop="dense", selection="topk")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    assert nc_stats(model)["layers"][0]["exceeded_calls"] == 1
    assert torch.allclose(compiled, dense, atol=1e-5)


def test_a_cuda_graph_refuses_by_name(monkeypatch):
    model, ids = patch_model(tiny_model("llama"), 2.0, 0.5, on_drop="warn", selection="topk"), random_ids(1, 20)
    monkeypatch.setattr("nc_patch.attention._capturing", lambda tensor: True)
    with pytest.raises(RuntimeError, match=r'on_drop="warn".*nor a CUDA graph can'), torch.inference_mode():
        model(ids)
    patch_model(model, 2.0, 0.5, track=True, selection="topk")
    with torch.inference_mode():
        model(ids)
    assert nc_stats(model)["kept_mass"] == {"prefill": None, "decode": None}


def test_the_functional_form_leaves_acting_to_the_caller():
    query = torch.randn(1, 2, 8, 4)
    with pytest.raises(TypeError, match=r"on_drop acts in patched models.*ask for return_stats"):
        sparse_attention(query, query, query, alpha=1.0, on_drop="raise")

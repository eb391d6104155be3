"""Integers, numbers and truth values are taken from Python, numpy and PyTorch alike, wherever a setting is read."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from profiles import made_up_profile
from tiny_models import random_ids, tiny_model

from nc_patch import KeyIndex, NCConfig, ProfileError, calibrate, nc_stats, patch_model, reset_stats, sparse_attention
from nc_patch.common import as_bool, as_integer, as_number

THREES = (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8))
HALVES = (0.5, np.float16(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"))
NO_INTEGERS = (True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", None, 1j, [3])
NO_NUMBERS = (True, np.False_, torch.tensor(True), "0.5", None, 1j, np.complex64(1), [0.5], object())


@pytest.mark.parametrize("value", THREES, ids=repr)
def test_integers_are_integers_of_python(value):
    assert as_integer(value) == as_number(value) == 3
    assert type(as_integer(value)) is int


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_numbers_are_floats_of_python(value):
    assert as_number(value) == 0.5
    assert type(as_number(value)) is float


def test_what_is_neither_is_none():
    assert [as_integer(value) for value in NO_INTEGERS] == [None] * len(NO_INTEGERS)
    assert [as_number(value) for value in NO_NUMBERS] == [None] * len(NO_NUMBERS)
    assert as_bool(np.True_) is as_bool(torch.tensor(True)) is True
    assert [as_bool(value) for value in (0, 1, "yes", None, np.int8(1))] == [None] * 5


@pytest.mark.parametrize("three", THREES, ids=repr)
@pytest.mark.parametrize("half", HALVES, ids=repr)
def test_a_config_of_any_numbers_is_the_config_of_pythons(three, half):
    options = {"sink_keys": three, "recent_keys": three, "min_keys": three, "dense_layers": [three, three]}
    config = NCConfig(half, half, **options, min_mass=half, max_dropped_mass=half, max_factor=three, track=np.True_)
    plain = {"sink_keys": 3, "recent_keys": 3, "min_keys": 3, "dense_layers": (3,)}
    expected = NCConfig(0.5, 0.5, **plain, min_mass=0.5, max_dropped_mass=0.5, max_factor=3.0, track=True)
    assert config == expected
    assert json.loads(config.to_json()) == json.loads(expected.to_json())
    assert config.budget(three) == expected.budget(3)


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple, iter], ids=lambda make: make.__name__)
def test_layers_are_taken_from_arrays_tensors_and_any_iterable(make):
    assert NCConfig(2.0, 0.5, dense_layers=make([1, 0, 1])).dense_layers == (0, 1)
    model = patch_model(tiny_model("llama"), 2.0, 0.5, dense_layers=make([0, 2]), selection="topk")
    model(random_ids(1, 30))
    assert [bool(layer["dense_calls"]) for layer in nc_stats(model)["layers"]] == [True, False, True]


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=lambda make: make.__name__)
def test_budgets_by_layer_and_head_are_taken_from_arrays_and_tensors(make):
    assert NCConfig(make([[1.0, 2.0], [3.0, 4.0]]), make([0.5, 0.25])).alpha == ((1.0, 2.0), (3.0, 4.0))
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4)
    by_head = [sparse_attention(query, key, key, alpha=alpha, tail="drop") for alpha in (make([2.0, 4.0]), [2.0, 4.0])]
    assert torch.equal(*by_head)


@pytest.mark.parametrize("wrong", [np.array(2), np.array([0.5]), np.array(["0"]), torch.tensor([True]), "01", 3])
def test_what_are_no_layers_is_refused(wrong):
    with pytest.raises(TypeError, match="dense_layers must be"):
        NCConfig(2.0, 0.5, dense_layers=wrong)


@pytest.mark.parametrize("name", ["alpha", "C", "max_factor", "max_dropped_mass"])
@pytest.mark.parametrize("wrong", [np.float32("nan"), torch.tensor(float("nan")), Decimal("nan")], ids=repr)
def test_nan_is_out_of_every_range(name, wrong):
    with pytest.raises(ValueError, match=f"{name} must be"):
        NCConfig(**{"alpha": 2.0, "C": 0.5, name: wrong})


def test_zero_and_one_are_no_truth_values():
    with pytest.raises(TypeError, match="track must be True or False, got 1"):
        NCConfig(2.0, 0.5, track=1)


@pytest.mark.parametrize("wrong", [2.5, True, np.float32(2), "3"])
def test_a_budget_is_of_a_whole_number_of_keys(wrong):
    with pytest.raises(TypeError, match="n must be an int or an int tensor"):
        NCConfig(2.0, 0.5).budget(wrong)


@pytest.mark.parametrize("three", THREES, ids=repr)
def test_arguments_of_functions_are_taken_as_settings_are(three):
    key = torch.randn(1, 1, 40, 8)
    index = KeyIndex.build(key[:, :, :37], "pages", block_size=torch.tensor(16), capacity=np.int64(40))
    index.extend(key, three, torch.tensor([40]))
    whole = KeyIndex.build(key, "pages", block_size=16)
    assert all(torch.equal(one, other) for one, other in zip(index.tensors(), whole.tensors(), strict=True))
    model = patch_model(tiny_model("llama"), 2.0, 0.5, selection="topk")
    reset_stats(model, tail=three)
    model(random_ids(1, 30))
    assert nc_stats(model)["tail_mean_keys"] is not None
    profile = made_up_profile()
    layers = np.array([0])
    one, other = (
        profile.at_budget(0.5, n=np.int64(64), dense_layers=layers),
        profile.at_budget(0.5, n=64, dense_layers=(0,)),
    )
    assert np.array_equal(one.alpha, other.alpha)
    json.dumps(one.to_dict())


def test_scale_and_softcap_are_numbers_of_any_kind():
    query = torch.randn(1, 2, 9, 4)
    given = [sparse_attention(query, query, query, alpha=2.0, scale=s, softcap=s) for s in HALVES]
    assert all(torch.equal(output, given[0]) for output in given)
    with pytest.raises(ValueError, match="scale must be a positive number, got True"):
        sparse_attention(query, query, query, alpha=2.0, scale=True)


def test_calibration_takes_numbers_of_any_kind():
    model, ids = tiny_model("llama"), random_ids(1, 200).tolist()
    settings = {"pieces": 1, "rows": 4, "eps": (0.1,)}
    plain = calibrate(model, None, ids, (32, 64), 0.9, seed=3, **settings)
    other = calibrate(
        *(model, None, ids, np.array([32, 64]), np.float64(0.9)),
        **settings | {"pieces": np.int32(1), "rows": torch.tensor(4)},
        seed=np.int64(3),
    )
    assert plain.to_dict() == other.to_dict()
    with pytest.raises(ProfileError, match="lengths must be a list of at least two different numbers of tokens"):
        calibrate(model, None, ids, np.array([32.0, 64.0]))


def test_settings_of_tasks_take_numbers_of_any_kind():
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from eval_tasks.errors import EvalError
    from eval_tasks.lm_eval.settings import checked_lengths, positive

    for lengths in (np.array([64, 32]), torch.tensor([64, 32]), [np.int64(64), 32], np.int64(64), 64):
        assert checked_lengths(lengths, 100)[-1] == 64
    positive(samples=np.int64(3))
    for wrong in (np.True_, 2.0, "3", 0):
        with pytest.raises(EvalError, match="samples must be a positive integer"):
            positive(samples=wrong)

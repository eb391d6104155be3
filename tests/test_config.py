"""NCConfig: validation, JSON, and the budget law."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_patch import NCConfig
from nc_patch.budget import _device_steps, budget_of, budgets, budgets_for, law_values, row_budgets
from nc_patch.selections import Block, TopK, Window  # noqa: F401  Block for eval


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.0, "C": 0.5, "on_drop": "stop"}, "on_drop must be one of 'ignore', 'warn', 'raise', 'dense', got"),
        ({"alpha": 1.0, "C": 0.5, "on_drop": None}, "on_drop must be one of .* got None"),
        ({"alpha": 1.0, "C": 0.5, "max_dropped_mass": 1.0}, r"max_dropped_mass must be a number in \[0, 1\), got 1.0"),
        ({"alpha": 1.0, "C": 0.5, "max_dropped_mass": -0.1}, "max_dropped_mass must be a number in"),
        ({"alpha": 1.0, "C": 0.5, "max_dropped_mass": float("nan")}, "max_dropped_mass must be a number in .* got nan"),
        ({"alpha": 0.0, "C": 0.5}, "alpha must be a positive number, got 0.0"),
        ({"alpha": -1.0, "C": 0.5}, "alpha must be a positive number, got -1.0"),
        ({"alpha": math.nan, "C": 0.5}, "alpha must be a positive number, got nan"),
        ({"alpha": math.inf, "C": 0.5}, "alpha must be a positive number, got inf"),
        ({"alpha": 1.0, "C": -0.1}, r"C must be a number in \[0, 1\], got -0.1"),
        ({"alpha": 1.0, "C": 1.1}, r"C must be a number in \[0, 1\], got 1.1"),
        ({"alpha": 1.0, "C": math.nan}, r"C must be a number in \[0, 1\], got nan"),
        ({"alpha": [1.0, -2.0], "C": 0.5}, "alpha must be a positive number, got -2.0"),
        ({"alpha": [1.0, 2.0], "C": [0.5]}, "alpha has 2 layers and C has 1"),
        ({"alpha": [[1.0, 2.0]], "C": [[0.5]]}, "layer 0: alpha has 2 heads and C has 1"),
        ({"alpha": [[[1.0]]], "C": 0.5}, "alpha must be a number, a list per layer"),
        ({"alpha": [], "C": 0.5}, "alpha must be a number, a list per layer"),
        (
            {"alpha": 1.0, "C": 0.5, "prefill": "best"},
            "prefill must be one of 'block', 'dense', 'topk', 'window', got 'best'",
        ),
        ({"alpha": 1.0, "C": 0.5, "decode": None}, "decode must be one of"),
        (
            {"alpha": 1.0, "C": 0.5, "backend": "cuda"},
            "backend must be one of 'auto', 'triton', 'cpu', 'torch', got 'cuda'",
        ),
        ({"alpha": 1.0, "C": 0.5, "sink_keys": -1}, "sink_keys must be at least 0, got -1"),
        ({"alpha": 1.0, "C": 0.5, "min_keys": 0}, "min_keys must be at least 1, got 0"),
        ({"alpha": 1.0, "C": 0.5, "dense_below": -1}, "dense_below must be at least 0, got -1"),
        ({"alpha": 1.0, "C": 0.5, "block_size": 48}, "block_size must be one of 16, 32, 64, 128, got 48"),
        ({"alpha": 1.0, "C": 0.5, "query_block_size": 16}, "query_block_size must be one of 32, 64, 128, got 16"),
        ({"alpha": 1.0, "C": 0.5, "sample_stride": 5}, "sample_stride must be one of 1, 2, 4, 8, 16, 32, 64, got 5"),
        ({"alpha": 1.0, "C": 0.5, "min_mass": 1.0}, r"min_mass must be a number in \(0, 1\), or None, got 1.0"),
        ({"alpha": 1.0, "C": 0.5, "max_factor": 0.5}, "max_factor must be a number of at least 1, got 0.5"),
        ({"alpha": 1.0, "C": 0.5, "dense_layers": [-1]}, "dense_layers must be at least 0, got -1"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        NCConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": "2", "C": 0.5}, "alpha must be a positive number, or a list of them, got '2'"),
        ({"alpha": True, "C": 0.5}, "alpha must be a positive number"),
        ({"alpha": 1.0, "C": 0.5, "sink_keys": 2.5}, "sink_keys must be an integer, got 2.5"),
        ({"alpha": 1.0, "C": 0.5, "dense_below": 1.5}, "dense_below must be an integer, got 1.5"),
        ({"alpha": 1.0, "C": 0.5, "dense_below": "x"}, "dense_below must be an integer, got 'x'"),
        ({"alpha": 1.0, "C": 0.5, "dense_below": True}, "dense_below must be an integer, got True"),
        ({"alpha": 1.0, "C": 0.5, "min_mass": "0.9"}, "min_mass must be a number in"),
        ({"alpha": 1.0, "C": 0.5, "max_factor": None}, "max_factor must be a number of at least 1, got None"),
        ({"alpha": 1.0, "C": 0.5, "track": 1}, "track must be True or False, got 1"),
        ({"alpha": 1.0, "C": 0.5, "max_dropped_mass": "0.1"}, "max_dropped_mass must be a number in .* got '0.1'"),
        ({"alpha": 1.0, "C": 0.5, "dense_layers": "0"}, "dense_layers must be a sequence"),
    ],
)
def test_values_of_a_wrong_type_are_refused_by_name(arguments, message):
    with pytest.raises(TypeError, match=message):
        NCConfig(**arguments)


def test_a_misspelled_option_is_told_the_one_that_was_meant():
    for wrong, meant in (("blocksize", "block_size"), ("c", "C"), ("sinkkeys", "sink_keys"), ("select", "selection")):
        with pytest.raises(TypeError, match=f"unknown option {wrong}; .* Did you mean {meant}\\?"):
            NCConfig(1.0, **{wrong: 0.5})
    with pytest.raises(TypeError, match=r"and selection$"):
        NCConfig(1.0, xyzzy=1)


def test_the_repr_says_what_differs_from_the_defaults_and_stays_short():
    assert repr(NCConfig(2.0, 0.5)) == "NCConfig(alpha=2.0, C=0.5)"
    config = NCConfig([1.0, 2.0], 0.5, selection="block", min_mass=0.9, dense_layers=[0])
    assert eval(repr(config)) == config
    profiled = NCConfig([[1.0, 2.0, 3.0]] * 30, [0.5] * 30, dense_below=7)
    assert repr(profiled) == "NCConfig(alpha=<30 layers of 3 heads, 1 to 3>, C=<30 layers, 0.5 to 0.5>, dense_below=7)"
    assert repr(NCConfig(2.0, 0.5, selection="topk")) == "NCConfig(alpha=2.0, C=0.5, selection='topk')"
    for options in ({"tail": "drop"}, {"local_keys": 0}, {"prefill": "topk", "sink_keys": 2}, {"decode": "block"}):
        config = NCConfig(2.0, 0.5, **options)
        assert eval(repr(config)) == config


def test_unknown_options_are_refused_and_the_allowed_ones_listed():
    with pytest.raises(TypeError, match=r"unknown option blocksize; allowed are alpha, C, .*block_size.*selection"):
        NCConfig(1.0, 0.5, blocksize=3)
    with pytest.raises(TypeError, match="unknown option magic"):
        NCConfig.from_dict({"alpha": 1.0, "magic": 1})
    with pytest.raises(TypeError, match="alpha is missing"):
        NCConfig.from_dict({"C": 1.0})
    with pytest.raises(TypeError, match="leave out prefill"):
        NCConfig(1.0, 0.5, selection="topk", prefill="block")


@pytest.mark.parametrize(
    ("name", "default", "others", "instead"),
    [
        ("estimator", "sampled", ("pooled", None, ["sampled"]), "sampled queries; leave it out"),
        ("refine", True, (False, 1, None), "decoding by an index is always exact"),
        ("law", "power", ("log", None, 1), r"the budget is alpha \* n\*\*C"),
    ],
)
def test_files_of_earlier_versions_load_where_a_removed_option_has_its_default(name, default, others, instead):
    config = NCConfig(2.0, 0.5, prefill="block")
    assert NCConfig.from_dict(config.to_dict() | {name: default}) == config
    assert NCConfig.from_json(json.dumps(config.to_dict() | {name: default})) == config
    for removed in others:
        with pytest.raises(TypeError, match=f"{name} was removed: .*{instead}"):
            NCConfig.from_dict(config.to_dict() | {name: removed})
    with pytest.raises(TypeError, match=f"{name} was removed"):
        NCConfig(2.0, 0.5, **{name: default})


def test_a_file_without_dense_below_loads_and_gets_its_default(dense_with_few_keys):
    config = NCConfig(2.0, 0.5, prefill="block", track=True)
    values = config.to_dict()
    assert values.pop("dense_below") == 1024
    assert NCConfig.from_dict(values) == NCConfig.from_json(json.dumps(values)) == config
    config = dataclasses.replace(config, dense_below=0)
    assert NCConfig.from_json(config.to_json()) == config
    assert config != NCConfig.from_dict(values)


def test_it_is_frozen_and_hashable():
    config = NCConfig(2.0, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 3.0
    assert hash(config) == hash(NCConfig(2, 0.5))


def test_selection_sets_both_phases():
    config = NCConfig(2.0, 0.5, selection="window")
    assert (config.prefill, config.decode) == (Window(), Window())


@pytest.mark.parametrize("alpha", [2.0, [1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]])
def test_json_round_trip(alpha):
    config = NCConfig(alpha, 0.5, prefill="block", dense_layers=[1, 0, 1], sink_keys=2, backend="torch")
    assert NCConfig.from_json(config.to_json()) == config
    config = dataclasses.replace(config, track=True, on_drop="dense", max_dropped_mass=0.05)
    assert NCConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["dense_layers"] == [0, 1]


numbers = st.floats(1e-3, 1e3), st.floats(0, 1), st.integers(1, 100), st.integers(0, 1 << 20)


@given(*numbers)
@settings(max_examples=200, deadline=None)
def test_budget_is_the_law_in_float64(alpha, C, min_keys, n):
    expected = min(n, max(min_keys, math.ceil(alpha * float(n) ** C))) if n else 0
    assert NCConfig(alpha, C, min_keys=min_keys).budget(n) == expected


@pytest.mark.parametrize("dense_below", [0, 1, 63, 100, 10**9])
def test_a_query_that_sees_no_more_than_dense_below_keys_attends_them_all(dense_below):
    law, config = (NCConfig([[2.0, 4.0]], 0.5, dense_below=below) for below in (0, dense_below))
    n = torch.arange(200)
    visible = torch.stack((torch.full_like(n, 3), n + 3), -1)[None].int()
    found = config.row_budgets(visible, 200, 0)
    for head in range(2):
        expected = [int(i) if i <= dense_below else law.budget(int(i), 0, head) for i in n]
        assert found[0, head].tolist() == config.budget(n, 0, head).tolist() == expected
        assert [config.budget(int(i), 0, head) for i in n] == expected
    for most in (1, 50, 63, 64, 199):
        assert config.largest_budget(most, 0) == int(found[..., : most + 1].max())
    rounded = budgets_for(n.numpy(), 4.0, 0.5, dense_below=dense_below)
    assert rounded.tolist() == found[0, 1].tolist()


@given(st.floats(1e-2, 1e2), st.sampled_from([0.0, 1 / 3, 0.5, 0.6, 0.7, 2 / 3, 1.0]) | st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_tensors_get_the_same_budgets_as_ints(alpha, C):
    config = NCConfig(alpha, C)
    n = torch.randint(0, 5000, (7, 100))
    n[0, :70] = torch.arange(70) ** 2  # where n**0.5 is an integer, a rounding error would show
    assert config.budget(n).tolist() == [[config.budget(int(i)) for i in row] for row in n]


def test_budgets_per_layer_and_head():
    config = NCConfig([[1.0, 2.0], [3.0, 4.0]], [0.5, 0.0])
    assert config.budget(100, layer=0, head=1) == 20
    assert config.budget(100, layer=1, head=0) == 3
    with pytest.raises(ValueError, match="alpha is given per layer: say which layer"):
        config.budget(100)
    with pytest.raises(ValueError, match="alpha is given per head: say which head"):
        config.budget(100, layer=0)
    with pytest.raises(ValueError, match="alpha is given for 2 layers, got layer 2"):
        config.budget(100, layer=2)
    visible = torch.tensor([[[0, 100], [4, 20]]], dtype=torch.int32)
    assert config.row_budgets(visible, 100, 0).tolist() == [[[10, 4], [20, 8]]]


@pytest.mark.parametrize("min_keys", [1, 50])
def test_budgets_of_heads_and_arrays_equal_the_scalar_law(min_keys):
    draw = random.Random(0)
    laws = [(2.0, 0.5), (1.0, 0.5), (4.0, 0.6), (0.5, 1.0), (1.0, 1.0), (1e-3, 0.3), (100.0, 0.0), (7.5, 0.0)]
    laws += [(3.0, 1 / 3), (1e6, 0.7), (0.9, 1.0), (2.0, 1e-4), (2.0, 1e-7), (1.3, 0.98), (2.0, 1.0)]
    laws = [*laws, *((draw.uniform(0.1, 20), draw.random()) for _ in range(20))]
    n = torch.cat((torch.arange(1200), torch.arange(1100, 1400) ** 2, torch.tensor([2**20 - 1, 2**20, 2**20 + 1])))
    visible = torch.stack((torch.full_like(n, 3), n + 3), -1)[None].int()
    found = row_budgets(visible, int(n.max()), *map(list, zip(*laws, strict=True)), min_keys)
    for head, (alpha, C) in enumerate(laws):
        expected = [budget_of(int(i), alpha, C, min_keys) for i in n]
        assert found[0, head].tolist() == budgets(n.numpy(), alpha, C, min_keys).tolist() == expected, (alpha, C)
        alone = row_budgets(visible, int(n.max()), [alpha], [C], min_keys)
        assert torch.equal(alone, found[:, head : head + 1]), (alpha, C)


def test_arrays_get_the_same_budgets_as_ints_to_within_rounding():
    n, alpha, C = np.arange(1, 3000, 7), np.array([[0.3], [2.0], [1.0], [7.5]]), np.array([[0.9], [0.61], [1.0], [0.0]])
    raw, found = law_values(n, alpha, C), budgets_for(n, alpha, C, min_keys=4)
    expected = [[budget_of(int(i), a, c, 4) for i in n] for a, c in zip(alpha[:, 0], C[:, 0], strict=True)]
    sure = np.abs(raw - np.rint(raw)) > 1e-9 * raw
    assert sure.mean() > 0.4
    assert (found == expected)[sure].all()
    assert np.abs(found - expected).max() <= 1


def test_budgets_of_many_heads_take_little_memory():
    laws = tuple((2.0 + head / 100, 0.5) for head in range(64))
    empty = torch.empty(0, 4, 2, dtype=torch.int32)
    alphas, exponents = map(list, zip(*laws, strict=True))
    assert row_budgets(empty, 8, alphas, exponents, 1).shape == (0, 64, 4)
    assert row_budgets(empty.view(2, 0, 2), 8, alphas, exponents, 1).shape == (2, 64, 0)
    steps, _ = _device_steps(2**20, laws, 1, torch.device("cpu"))
    assert steps.numel() < 64 * 2800  # the largest budget, where a table would have a million entries a head


def test_bad_n_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        NCConfig(1.0, 0.5).budget(-1)
    with pytest.raises(ValueError, match="at least 0 everywhere, got -3"):
        NCConfig(1.0, 0.5).budget(torch.tensor([2, -3]))
    with pytest.raises(TypeError, match="int tensor"):
        NCConfig(1.0, 0.5).budget(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="at most 2147483647 everywhere, got 2147483648"):
        NCConfig(1.0, 0.5).budget(torch.tensor([2**31]))


def test_budgets_of_a_few_huge_n_take_little_memory():
    n = torch.tensor([[2**31 - 1, 7], [10**9, 7]])
    assert NCConfig(2.0, 0.5).budget(n).tolist() == [[NCConfig(2.0, 0.5).budget(int(x)) for x in row] for row in n]


def test_numbers_of_numpy_are_numbers():
    config = NCConfig(np.float32(2.0), np.float64(0.5), min_mass=np.float32(0.75))
    assert config == NCConfig(2.0, 0.5, min_mass=0.75)
    assert NCConfig.from_json(config.to_json()) == config
    with pytest.raises(TypeError, match="alpha must be a positive number"):
        NCConfig(np.bool_(True))


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_steps_made_in_inference_mode_serve_training(name):
    # On the device "meta" as on a GPU: they are copied by a thread that no mode of this one applies to.
    device = torch.device(name)
    with torch.inference_mode():
        steps, least = _device_steps(4096, ((1.375, 0.75), (2.0, 0.5)), 1, device)
    assert [each.device for each in (steps, least)] == [device] * 2
    assert not any(each.is_inference() for each in (steps, least))
    assert _device_steps(4096, ((1.375, 0.75), (2.0, 0.5)), 1, device)[0] is steps


def test_dense_laws_are_recognised():
    assert NCConfig(1.0, 1.0).is_dense()
    assert not NCConfig(0.5, 1.0).is_dense()
    assert not NCConfig(5.0, 0.9).is_dense()
    assert NCConfig(0.5, 0.5, dense_layers=[3]).is_dense(3)
    assert NCConfig([1.0, 0.5], 1.0).is_dense(0)


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="alpha has 2 layers, the model has 3"):
        NCConfig([1.0, 2.0], 0.5).check_model(3, 4)
    with pytest.raises(ValueError, match=r"C\[1\] has 3 heads, the model has 4"):
        NCConfig(1.0, [0.5, [0.1, 0.2, 0.3]]).check_model(2, 4)
    with pytest.raises(ValueError, match=r"dense_layers names layers \[7\], the model has layers 0 to 2"):
        NCConfig(1.0, 0.5, dense_layers=[0, 7]).check_model(3, 4)

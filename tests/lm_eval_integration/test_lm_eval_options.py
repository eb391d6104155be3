"""Model arguments of ``nc_hf``: from what lm-eval parses to settings, and what is refused."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from profiles import made_up_profile

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import located, read_config, split_arguments
from nc_patch import NCConfig
from nc_patch.selections import Block, TopK


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {}),
        ({"selection": "window"}, {"prefill": "window", "decode": "window"}),
        (
            {"prefill": "block", "block_size": 16, "min_mass": 0.9, "tail": "drop"},
            {"prefill": Block(16, min_mass=0.9), "decode": TopK(tail="drop")},
        ),
        ({"dense_layers": "0+1+29"}, {"dense_layers": (0, 1, 29)}),
        ({"dense_layers": 3}, {"dense_layers": (3,)}),
        ({"dense_layers": [0, 1]}, {"dense_layers": (0, 1)}),
    ],
)
def test_model_arguments_become_settings(given, meant):
    assert read_config({"alpha": 2, "C": 0.5, **given}) == NCConfig(**{"alpha": 2.0, "C": 0.5, **meant})


def test_settings_come_from_a_file_or_a_profile(tmp_path):
    config = NCConfig((1.0, 2.0), (0.5, 0.7), prefill="window", dense_layers=(1,))
    file, profile, path = tmp_path / "settings.json", made_up_profile().at_mass(0.9), tmp_path / "profile.json"
    file.write_text(config.to_json())
    assert read_config({}, str(file)) == read_config({}, config.to_dict()) == read_config({}, config) == config
    profile.save(path)
    options = {"tail": "drop", "selection": "topk", "dense_layers": (0, 1)}
    assert read_config(options, profile=str(path)) == read_config(options, profile=profile) == profile.config(**options)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"C": 0.5}, {}, "alpha missing: .* or profile=FILE"),
        ({"alpha": 2}, {}, "C missing"),
        ({"alpha": 2, "C": 1.5}, {}, r"C must be a number in \[0, 1\], got 1.5"),
        ({"alpha": 2, "C": 0.5, "dense_layers": "a+b"}, {}, "dense_layers must be an integer"),
        ({"alpha": 2, "C": 0.5, "backend": "cuda"}, {}, "backend must be one of .*'triton'"),
        ({"alpha": 1}, {"nc_config": "absent.json"}, "leave out alpha"),
        ({}, {"nc_config": "absent.json"}, "No such file"),
        ({}, {"nc_config": "broken.json"}, "no JSON"),
        ({}, {"nc_config": "x.json", "profile": "x.json"}, "leave out profile"),
        ({}, {"profile": "newer.json"}, "written by a newer nc_patch"),
        ({"alpha": 2}, {"profile": made_up_profile()}, "a profile brings alpha of its own"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "newer.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(EvalError, match=message):
        read_config(options, **given)


def test_backend_means_the_kernels_or_lm_evals_kind_of_model():
    assert split_arguments({"backend": "torch", "dtype": "auto"}) == ({"backend": "torch"}, {"dtype": "auto"})
    assert split_arguments({"backend": "causal", "alpha": 1}) == ({"alpha": 1}, {"backend": "causal"})


@pytest.mark.parametrize("trusted", [True, False])
def test_a_located_model_keeps_what_was_said_of_its_code(trusted):
    given = {"pretrained": "someone/model", "trust_remote_code": trusted, "revision": "v2"}
    assert located(given) == given

"""Model arguments of ``nc_hf``: from what lm-eval parses to settings, and what is refused."""

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import located, misspelt, read_config, split_arguments
from nc_patch import NCConfig
from nc_patch.selections import Block, TopK


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"alpha": "2", "C": "5e-1"}, {}),
        ({"alpha": [1, 2.5]}, {"alpha": (1.0, 2.5)}),
        ({"selection": "window"}, {"prefill": "window", "decode": "window"}),
        (
            {"prefill": "block", "block_size": "16", "min_mass": 0.9, "tail": "drop"},
            {"prefill": Block(16, min_mass=0.9), "decode": TopK(tail="drop")},
        ),
        ({"dense_layers": "0+1+29"}, {"dense_layers": (0, 1, 29)}),
        ({"dense_layers": 3}, {"dense_layers": (3,)}),
        ({"dense_layers": [0, 1]}, {"dense_layers": (0, 1)}),
        ({"sink_keys": "8", "min_keys": 16.0}, {"sink_keys": 8, "min_keys": 16}),
        ({"on_drop": "dense", "max_dropped_mass": "0.05"}, {"on_drop": "dense", "max_dropped_mass": 0.05}),
        ({"track": True}, {"track": True}),
    ],
)
def test_model_arguments_become_typed_settings(given, meant):
    assert read_config({"alpha": 2, "C": 0.5, **given}) == NCConfig(**{"alpha": 2.0, "C": 0.5, **meant})


def test_settings_come_from_a_file(tmp_path):
    config = NCConfig((1.0, 2.0), (0.5, 0.7), prefill="window", dense_layers=(1,))
    file = tmp_path / "settings.json"
    file.write_text(config.to_json())
    assert read_config({}, str(file)) == read_config({}, config.to_dict()) == config
    with pytest.raises(EvalError, match="leave out alpha"):
        read_config({"alpha": 1}, str(file))
    with pytest.raises(EvalError, match="No such file"):
        read_config({}, str(tmp_path / "absent.json"))
    file.write_text("{")
    with pytest.raises(EvalError, match=r"settings\.json: .*no JSON"):
        read_config({}, str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "two"}, "alpha must be a positive number"),
        ({"C": 1.5}, r"C must be a number in \[0, 1\], got 1.5"),
        ({"selection": "best"}, "selection must be one of .*'window', got 'best'"),
        ({"selection": "topk", "decode": "dense"}, "leave out decode"),
        ({"sink_keys": -1.0}, "sink_keys must be at least 0, got -1"),
        ({"dense_layers": "a+b"}, "dense_layers must be an integer"),
    ],
)
def test_a_bad_argument_is_refused_by_name(options, message):
    with pytest.raises(EvalError, match=message):
        read_config({"alpha": 2, "C": 0.5, **options})


def test_backend_means_the_kernels_or_lm_evals_kind_of_model():
    assert split_arguments({"backend": "torch", "dtype": "auto"}) == ({"backend": "torch"}, {"dtype": "auto"})
    assert split_arguments({"backend": "causal", "alpha": 1}) == ({"alpha": 1}, {"backend": "causal"})
    with pytest.raises(EvalError, match=r"auto, triton, cpu, torch .* default, causal, seq2seq"):
        split_arguments({"backend": "cuda"})


def test_misspelt_options_are_recognised_and_other_arguments_are_not():
    found = misspelt(["c", "alhpa", "sink_key", "dense_layer", "device_map", "attn_implementation", "use_safetensors"])
    assert found == {"c": "C", "alhpa": "alpha", "sink_key": "sink_keys", "dense_layer": "dense_layers"}


@pytest.mark.parametrize("trusted", [True, False])
def test_a_located_model_keeps_what_was_said_of_its_code(trusted):
    given = {"pretrained": "someone/model", "trust_remote_code": trusted, "revision": "v2"}
    assert located(given) == given
